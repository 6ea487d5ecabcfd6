"""What a served checkpoint computes with besides its weights: quantized activations, and an FP8 KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from quant.checkpoint.reader import Checkpoint
from quant.errors import CheckpointError
from quant.formats import QuantizedLayers
from quant.formats.base import find_format
from quant.formats.reading import read_linear
from quant.models.attention import observed_attention
from quant.models.binding import BlockLinear
from quant.models.experts import Routed, Stage, experts_through
from quant.quantizers.activations import fake_quantize
from quant.quantizers.floats import nearest_float
from quant.tensors import InputParameters
from quant.vllm.layers import Linear


@dataclass(frozen=True)
class Kernels:
    """How an engine's kernels depart from the checkpoint's scheme on its hardware.

    Attributes:
        activations: whether inputs are rounded; False of kernels that take 8- and 4-bit weights alone.
        nearest_cache: whether K and V become the nearest FP8 numbers. vLLM's CPU kernel
            (`cpu_attn_reshape_and_cache`) takes the next one towards zero instead.
    """

    activations: bool = True
    nearest_cache: bool = True


class Simulation:
    """The inputs of a checkpoint's linears, and K and V, as vLLM rounds them; nothing where the checkpoint
    leaves them alone.

    Raises:
        CheckpointError: quantized in a way that is not read here.
    """

    def __init__(self, checkpoint: Checkpoint, kernels: Kernels | None = None):
        self._checkpoint, self._kernels = checkpoint, kernels or Kernels()
        self._found: QuantizedLayers | None = find_format(checkpoint.config, checkpoint.tensors)
        linears = self._found.linears if self._found else {}
        self._linears: dict[str, Linear] = {
            n: x for n, x in linears.items() if x.activations is not None and self._kernels.activations
        }
        self._caches = [n.removesuffix("k_scale") for n in checkpoint.tensors if n.endswith(".k_scale")]

    @property
    def description(self) -> str | None:
        """What is simulated, in words; None where nothing is."""
        kinds = [str(a) for a in dict.fromkeys(x.activations for x in self._linears.values())]
        kinds += ["FP8 KV cache"] if self._caches else []
        return f"simulated {', '.join(kinds)}" if kinds else None

    @contextmanager
    def inside(
        self, block: nn.Module, prefix: str, linears: Mapping[str, BlockLinear] | None = None
    ) -> Iterator[None]:
        """While it lasts, the block runs with rounded inputs.

        Args:
            prefix: starts the names of its tensors in the file.
            linears: where in the block each linear is, by its name behind the prefix
                (:meth:`quant.models.skeleton.Skeleton.linears`); None: under that name.
        """
        routed: dict[tuple[str, Stage], dict[int, Linear]] = {}
        with ExitStack() as stack:
            for name, linear in self._linears.items():
                if not name.startswith(prefix):
                    continue
                local = name.removeprefix(prefix)
                place = None if linears is None else linears.get(local)
                if place is not None and place.place is not None:
                    stage: Stage = "down" if place.parameter.endswith("down_proj") else "up"
                    expert = place.place.expert or 0
                    routed.setdefault((place.module, stage), {}).setdefault(expert, linear)
                else:
                    module = block.get_submodule(local if place is None else place.module)
                    stack.callback(module.register_forward_pre_hook(self._hook(linear)).remove)
            if routed:
                rounding = {key: self._rounded_experts(experts) for key, experts in routed.items()}
                stack.enter_context(
                    experts_through(
                        block, lambda path, stage, rows: rounding.get((path, stage), lambda x: x)(rows)
                    )
                )
            for cache in self._caches:
                if cache.startswith(prefix):
                    stack.enter_context(observed_attention(block, self._cached(cache)))
            yield

    def _hook(self, linear: Linear) -> Any:
        scheme, numbers = linear.activations, self._numbers(linear)
        assert scheme is not None
        return lambda module, inputs: (fake_quantize(inputs[0], scheme, numbers), *inputs[1:])

    def _rounded_experts(self, experts: Mapping[int, Linear]) -> Callable[[Routed], Routed]:
        """What one product of a layer's experts reads, rounded with each expert's own numbers."""
        scheme = next(iter(experts.values())).activations
        assert scheme is not None
        if not scheme.calibrated:
            return lambda routed: replace(routed, rows=fake_quantize(routed.rows, scheme))
        numbers = {expert: self._numbers(linear) for expert, linear in experts.items()}

        def rounded(routed: Routed) -> Routed:
            rows = routed.rows[routed.index]
            parts = rows.split(routed.counts.tolist())
            done = [
                fake_quantize(part, scheme, numbers[e]) if len(part) and e in numbers else part
                for e, part in enumerate(parts)
            ]
            return replace(routed, rows=torch.cat(done), index=torch.arange(len(rows), device=rows.device))

        return rounded

    def _numbers(self, linear: Linear) -> InputParameters | None:
        """The calibrated numbers of a linear's input; None where it has none.

        Raises:
            CheckpointError: the file does not hold them.
        """
        scheme = linear.activations
        assert scheme is not None and self._found is not None
        if not scheme.calibrated:
            return None
        numbers = read_linear(self._found.form, self._found, self._checkpoint, linear.name).inputs
        wanted = (
            ("global_scale",)
            if scheme.strategy == "tensor_group"
            else ("scale",)
            if scheme.symmetric
            else ("scale", "zero")
        )
        if numbers is None or any(getattr(numbers, x) is None for x in wanted):
            raise CheckpointError(
                f"{linear.name}: its activations are {scheme}, whose numbers no file holds: the "
                "checkpoint is incomplete"
            )
        return numbers

    def _cached(self, attention: str) -> Any:
        scales = [self._checkpoint.read(f"{attention}{x}_scale").float() for x in "kv"]

        def rounded(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            pairs = [(v, s.to(v.device)) for v, s in zip(values, scales, strict=True)]
            rounding = (lambda x: nearest_float(x, 8)) if self._kernels.nearest_cache else cut
            return tuple((rounding(v.float() / s) * s).to(v.dtype) for v, s in pairs)

        return rounded


def cut(values: torch.Tensor) -> torch.Tensor:
    """The next E4M3 numbers towards zero, fp32; beyond 448, 448."""
    codes = values.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    # the magnitude is the code without its sign: one less is the next number down
    above = codes.float().abs() > values.abs()
    return (codes.view(torch.uint8) - above.to(torch.uint8)).view(torch.float8_e4m3fn).float()
