"""``quant detect``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from quant.commands import options
from quant.commands.terminal import Output, common_options
from quant.health import HOT, MARGIN

if TYPE_CHECKING:
    from quant.hardware import Gpu


@click.command()
@options.gpu
@click.option(
    "--max-temperature",
    type=click.IntRange(1, 150),
    show_default=f"{MARGIN} below the driver's slowdown threshold, or {HOT}",
    help="Degrees Celsius from which to warn.",
)
@common_options
def detect(gpu: str | None, max_temperature: int | None, out: Output) -> None:
    """The GPUs here: memory, who uses it, what each computes natively, temperature, power and what slows it
    down. Of a named GPU the same facts, with no hardware needed; `list` shows all names.

    \b
    quant detect
    quant detect --gpu L40S-48GB --json
    """
    from quant.commands.render import planning
    from quant.hardware import detect as look
    from quant.hardware import gpu_names, named_gpus
    from quant.vllm.kernels import gpu_dict

    if gpu == "list":
        names = gpu_names()
        out.result({"names": names}, lambda console: console.print("\n".join(names)))
        return
    if gpu is not None:
        gpus: tuple[Gpu, ...] = tuple(named_gpus(gpu))
        if gpus[0].note:
            out.note(gpus[0].note)
        out.result({"gpus": [gpu_dict(g) for g in gpus]}, lambda console: planning.show_gpus(gpus, console))
    else:
        detection = look()
        gpus = detection.gpus
        out.result(
            detection.to_dict() | {"gpus": [gpu_dict(g) for g in gpus]},
            lambda console: planning.show_detection(detection, console),
        )
        for one in gpus:
            for warning in one.health.warnings(max_temperature) if one.health is not None else ():
                out.warn(f"GPU {one.index} ({one.name}): {warning}")
    out.details(planning.gpu_sources(gpus))
