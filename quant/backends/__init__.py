"""Other people's quantizers, run where they live: a child process of an environment of their own.

AutoGPTQ and AutoAWQ are archived upstream and pin an old transformers, so they never share an environment
with this package. A job with ``--backend`` hands them the checkpoint and the calibration rows, reads back
what they wrote, and goes on as any other job: converted, verified, measured, published with the same layout
and report.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant import defaults

if TYPE_CHECKING:
    from quant.recipe import Recipe

#: Keys of a recipe that no other backend has anything for.
_OURS_ALONE = (
    "rules", "outlier_suppression", "alpha", "kv_cache_scheme", "layers", "ignore", "clip_search", "options",
    "activations",
    "symmetric_activations",
)  # fmt: skip


@dataclass(frozen=True)
class Backend:
    """A library that quantizes in a process of its own.

    Attributes:
        name: as ``--backend`` has it, which is the distribution's name and the extra's.
        module: what is imported.
        version: the last release, which this was written against.
        archived: when its repository was.
        method: the only rounding method it has; ``format`` the layout that it writes.
        needs_cuda: it refuses to quantize without.
        worker: the program that runs in its environment.
        settings: the library's own words for a recipe's numbers.
        keys: keys of a recipe that it takes, of those that only some methods have.
        refuse: why it cannot make what a recipe asks for, or None.
    """

    name: str
    module: str
    version: str
    archived: str
    method: str
    format: str
    needs_cuda: bool
    worker: Path
    settings: Callable[[Recipe], dict[str, Any]]
    keys: frozenset[str]
    refuse: Callable[[Recipe], str | None]

    def problems(self, recipe: Recipe) -> list[str]:
        """What a recipe asks of it that it does not have."""
        problems = []
        if recipe.method != self.method:
            problems.append(f"--method is {recipe.method!r}: --backend {self.name} has only {self.method}")
        elif reason := self.refuse(recipe):
            problems.append(f"--backend {self.name}: {reason}")
        if recipe.device is not None:
            problems.append(
                f"--device is not an option of --backend {self.name}, which takes the first GPU that it "
                "sees: set CUDA_VISIBLE_DEVICES instead"
            )
        given = [
            k
            for k in (*_OURS_ALONE, "act_order", "damping")
            if k not in self.keys and getattr(recipe, k) not in (None, [], {})
        ]
        problems += [
            f"--{k.replace('_', '-')} is not an option of --backend {self.name}: leave it out, or use "
            "--backend native"
            for k in given
        ]
        return problems


def _gptq_settings(recipe: Recipe) -> dict[str, Any]:
    scheme = recipe.resolved_scheme(recipe.method).weights
    order = (recipe.act_order or defaults.ACT_ORDER) == "static"
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "damp_percent": recipe.damping or defaults.DAMPING,
        "desc_act": order,
        "static_groups": order,  # groups stay in natural order, the only one vLLM has a fast path for
    }


def _refuse_gptq(recipe: Recipe) -> str | None:
    scheme = recipe.resolved_scheme(recipe.method)
    if scheme.weights.type != "int" or scheme.activations is not None:
        return f"scheme {scheme} is not one of integer weights with 16-bit activations, all that it makes"
    return None


def _awq_settings(recipe: Recipe) -> dict[str, Any]:
    return {
        "w_bit": 4,
        "q_group_size": recipe.resolved_scheme(recipe.method).weights.group_size,
        "zero_point": True,
        "version": "GEMM",
    }


def _refuse_awq(recipe: Recipe) -> str | None:
    scheme = recipe.resolved_scheme(recipe.method)
    weights = scheme.weights
    if (
        (weights.type, weights.bits, weights.symmetric) != ("int", 4, False)
        or weights.group_size < 1
        or scheme.activations is not None
    ):
        return f"scheme {scheme} is not w4a16-asym in groups, all that its GEMM layout holds"
    return None


_HERE = Path(__file__).parent

BACKENDS = {
    b.name: b
    for b in (
        Backend(
            "auto-gptq", "auto_gptq", "0.7.1", "2025-04", *defaults.LEGACY_ENGINES["auto-gptq"], True,
            _HERE / "worker_auto_gptq.py",
            _gptq_settings,
            frozenset({"act_order", "damping"}), _refuse_gptq,
        ),
        Backend(
            "autoawq", "awq", "0.2.9", "2025-05", *defaults.LEGACY_ENGINES["autoawq"], False,
            _HERE / "worker_autoawq.py",
            _awq_settings, frozenset(), _refuse_awq
        ),
    )
}  # fmt: skip
