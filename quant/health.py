"""How a GPU is: its temperature, its power, and what holds its clocks down, as NVML tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

#: Degrees Celsius below the driver's own slowdown threshold from which a GPU counts as hot.
MARGIN = 5
#: Degrees Celsius from which it does where the driver tells no threshold: most parts slow down at 87 to 95.
HOT = 85

#: Bit of NVML's clock event reasons (nvml.h, ``nvmlClocksEventReason…``) → what it means. Left out are those
#: that are no trouble: idle, clocks that a user or another GPU of the group set.
_REASONS = {
    0x4: "the power limit",
    0x8: "the hardware (heat, power or a brake signal)",
    0x20: "heat (the driver)",
    0x40: "heat (the hardware)",
    0x80: "a power brake signal (the power supply)",
}


@dataclass(frozen=True)
class Health:
    """One look at a GPU. None of what the part or its driver does not tell.

    Attributes:
        temperature: of the chip, degrees Celsius.
        slowdown_temperature: from which the hardware lowers its clocks, degrees Celsius.
        power_watts, power_limit_watts: drawn now, and at most.
        throttled_by: what lowers its clocks now, in words; empty where nothing does.
    """

    temperature: int | None = None
    slowdown_temperature: int | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    throttled_by: tuple[str, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def hot_from(self, asked: int | None = None) -> int:
        """Degrees Celsius from which it counts as hot: those asked for, or :data:`MARGIN` below the driver's
        threshold, or :data:`HOT`."""
        if asked is not None:
            return asked
        return HOT if self.slowdown_temperature is None else self.slowdown_temperature - MARGIN

    def warnings(self, hot: int | None = None) -> list[str]:
        """What a user should know before a long job, with what to do; ``hot``: see :meth:`hot_from`."""
        warnings = []
        if self.temperature is not None and self.temperature >= self.hot_from(hot):
            slows = (
                "" if self.slowdown_temperature is None else f", it slows down at {self.slowdown_temperature}"
            )
            warnings.append(
                f"{self.temperature} °C is hot (from {self.hot_from(hot)}{slows}): check fans and airflow, "
                "or lower the limit with nvidia-smi --power-limit"
            )
        if self.throttled_by:
            warnings.append(
                f"its clocks are held down by {' and '.join(self.throttled_by)}: speeds are below those "
                "planned for while that lasts"
            )
        return warnings


def read_health(ask: Callable[..., Any], handle: Any) -> Health | None:
    """A GPU's health, or None where nothing is told.

    Args:
        ask: puts one NVML question, ``ask(function, *arguments, default=…)``; the default is the answer of
            parts and drivers that have none.
        handle: NVML's of the GPU.
    """
    gpu_sensor, slowdown = 0, 1  # NVML_TEMPERATURE_GPU, NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
    power = ask("nvmlDeviceGetPowerUsage", handle)
    limit = ask("nvmlDeviceGetEnforcedPowerLimit", handle)
    reasons = ask("nvmlDeviceGetCurrentClocksEventReasons", handle)
    if reasons is None:  # its name in drivers before 535
        reasons = ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
    health = Health(
        temperature=ask("nvmlDeviceGetTemperature", handle, gpu_sensor),
        # newer parts tell a distance instead of a threshold, and 0 here
        slowdown_temperature=ask("nvmlDeviceGetTemperatureThreshold", handle, slowdown) or None,
        power_watts=None if power is None else power / 1000,  # NVML's are milliwatts
        power_limit_watts=None if limit is None else limit / 1000,
        throttled_by=None
        if reasons is None
        else tuple(words for bit, words in _REASONS.items() if int(reasons) & bit),
    )
    return None if health == Health() else health
