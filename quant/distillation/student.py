"""The student as a whole model in memory, and what of it is trained.

A checkpoint in 16 bits trains its weights, in fp32; a quantized one its norms and the scales of its linears,
under codes that stay as they are: what comes out is the same file with other numbers in it. Numbers are
trained as shares of what they were, so that one learning rate is right for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as run_again

from quant.checkpoint.dtypes import TORCH
from quant.checkpoint.reader import Checkpoint
from quant.errors import QuantError
from quant.formats import QuantizedLayers, find_format
from quant.formats.reading import dequantized, read_linear
from quant.models.skeleton import Skeleton
from quant.tensors import QuantizedTensor

#: What may be trained: all weights; or norms, biases and scales alone.
Trained = Literal["weights", "numbers"]


def kind(checkpoint: Checkpoint, asked: Trained | None = None) -> Trained:
    """What of a checkpoint is trained.

    Raises:
        QuantError: weights are asked for, and they are codes; or it is a GGUF file.
    """
    form = find_format(checkpoint.config, checkpoint.tensors)
    quantized = form is not None
    if form is not None and form.form.name == "gguf":
        raise QuantError(
            f"{checkpoint.metadata['file']}: is a GGUF file, whose codes are not taught: make a checkpoint "
            "of it by quant export-vllm, teach that, and make a file of it by quant export-gguf"
        )
    if asked == "weights" and quantized:
        raise QuantError(
            f"{checkpoint.path}: is quantized: its codes stay, and norms and scales are trained: leave "
            "--train weights out"
        )
    return asked or ("numbers" if quantized else "weights")


class _Rounded(torch.autograd.Function):
    """Values as a dtype stores them; gradients pass as if nothing had been rounded."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return values.to(dtype).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


@dataclass(frozen=True)
class _Scaled:
    """A quantized linear: its ``tensor`` as the file has it, and codes less zeros fp32 [N, G, g] in the order
    of groups."""

    name: str
    parameter: str
    tensor: QuantizedTensor
    codes: torch.Tensor


class Student:
    """
    Args:
        checkpoint: as it is stored.

    Raises:
        CheckpointError, QuantError: it cannot be run, or nothing of it can be trained.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, trained: Trained | None = None):
        self.checkpoint, self.device = checkpoint, device
        self.states: dict[int, torch.Tensor] = {}
        self.layers, self.trained = (
            find_format(checkpoint.config, checkpoint.tensors),
            kind(checkpoint, trained),
        )
        self.skeleton = Skeleton(dequantized(checkpoint), device, torch.float32)
        self._fill()
        self._scaled = [] if self.layers is None else list(self._find_scaled(self.layers))
        inside = {s.parameter for s in self._scaled}
        self._plain = {
            name: parameter.detach()
            for name, parameter in self._parameters()
            if name not in inside and (self.trained == "weights" or parameter.dim() == 1)
        }
        self.values: dict[str, nn.Parameter] = {
            name: nn.Parameter(value.clone() if self.trained == "weights" else torch.zeros_like(value))
            for name, value in self._plain.items()
        }
        for one in self._scaled:
            shape = one.tensor.scales.shape
            self.values[f"{one.parameter} scales"] = nn.Parameter(torch.zeros(shape, device=device))
        if not self.values:
            raise QuantError(f"{checkpoint.path}: has neither norms nor scales to train")

    def _fill(self) -> None:
        """Reads the whole model."""
        stack = self.skeleton.outside()
        self._outside = stack  # held as long as the student is
        stack.__enter__()
        for index in range(self.skeleton.block_count):
            self.skeleton.load_block(index)
        self.skeleton.model.requires_grad_(False)
        names: dict[int, list[str]] = {}
        for name, parameter in self.skeleton.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)  # a tied head is the embedding
        self._aliases = {several[0]: several for several in names.values()}

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those that are tensors of the file by themselves, and no parts of a tower that text does not go
        through."""
        for name, parameter in self.skeleton.model.named_parameters():
            stored = self.skeleton.binding.tensors.get(name)
            if stored is not None and not parameter.is_meta:
                yield name, parameter

    def _find_scaled(self, layers: QuantizedLayers) -> Iterator[_Scaled]:
        for index in range(self.skeleton.block_count):
            prefix = f"{self.skeleton.blocks_path}.{index}."
            for name, linear in self.skeleton.linears(index).items():
                full = self.skeleton.block_prefix(index) + name
                if linear.place is not None or full not in layers.linears:
                    continue  # experts, and parts of fused matrices, stay as they are
                tensor = read_linear(layers.form, layers, self.checkpoint, full)
                if tensor.scheme.type != "int" or tensor.scales.dtype == torch.uint8:
                    continue
                codes = tensor.codes.float()
                if tensor.zeros is not None:
                    zeros = tensor.zeros.float()
                    index_ = _groups(tensor)
                    codes = codes - zeros[:, index_]
                yield _Scaled(full, prefix + linear.parameter, tensor, codes.to(self.device))

    def overrides(self, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """The parameters that the model computes with, as the file would store them, in ``dtype``."""
        made: dict[str, torch.Tensor] = {}
        for name, was in self._plain.items():
            value = self.values[name]
            made[name] = value if self.trained == "weights" else was * (1 + value)
            made[name] = _Rounded.apply(made[name], self._stored(name))
        for one in self._scaled:
            scales = one.tensor.scales.to(self.device).float() * (1 + self.values[f"{one.parameter} scales"])
            scales = _Rounded.apply(scales, one.tensor.scales.dtype)
            made[one.parameter] = one.codes * scales[:, _groups(one.tensor).to(self.device)]
        return made if dtype is None else {n: v.to(dtype) for n, v in made.items()}

    def _stored(self, name: str) -> torch.dtype:
        return TORCH[self.checkpoint.info(self.skeleton.binding.tensors[name]).dtype]

    @contextmanager
    def computing(self, overrides: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """While it lasts, the model computes with these parameters, on the way back too: blocks that are run
        again there must find what they were run with."""
        model, kept = self.skeleton.model, []
        try:
            for name, value in overrides.items():
                for alias in self._aliases[name]:
                    path, _, last = alias.rpartition(".")
                    held: Any = model.get_submodule(path)._parameters
                    kept.append((held, last, held[last]))
                    held[last] = value
            yield
        finally:
            for held, last, value in kept:
                held[last] = value

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """fp32 [B, T, V] of tokens int64 [B, T]."""
        found: Any = self.skeleton.model(input_ids=tokens.to(self.device), use_cache=False)
        logits: torch.Tensor = found.logits
        return logits.float()

    def watch(self, blocks: Sequence[int]) -> None:
        """From now on :attr:`states` has, by block among ``blocks``, the hidden states behind it in the last
        pass."""

        def seen(index: int, module: nn.Module, inputs: Any, output: Any) -> None:
            self.states[index] = output[0] if isinstance(output, tuple) else output

        for index in blocks:
            self.skeleton.blocks[index].register_forward_hook(partial(seen, index))

    def run_again(self) -> None:
        """From now on blocks keep their inputs alone and are run once more on the way back, which takes a
        third more time and the memory of one block."""
        for block in self.skeleton.blocks:
            block.forward = partial(run_again, block.forward, use_reentrant=False)

    def changed(self) -> dict[str, torch.Tensor]:
        """By name, the tensors of the file that are others now, in their dtype and shape."""
        made: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            now = self.overrides()
            for name in self._plain:
                stored = self.skeleton.binding.tensors[name]
                made[stored] = now[name].to(self._stored(name)).cpu()
            for one in self._scaled:
                assert self.layers is not None
                share = 1 + self.values[f"{one.parameter} scales"].cpu()
                scales = (one.tensor.scales.float() * share).to(one.tensor.scales.dtype)
                linear = self.layers.linears[one.name]
                packed = self.layers.form.pack(
                    linear, replace(one.tensor, scales=scales), _dtype(self.checkpoint)
                )
                for part, value in packed.items():
                    made[self.layers.tensor(part)] = value
        return {n: v for n, v in made.items() if not torch.equal(v, self.checkpoint.read(n))}


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    from quant.vllm.config import stated_dtype

    return TORCH[stated_dtype(checkpoint.config) or checkpoint.dtype]


def _groups(tensor: QuantizedTensor) -> torch.Tensor:
    """int64 [K], the group of each input."""
    if tensor.group_index is not None:
        return tensor.group_index.long()
    k = tensor.codes.shape[1]
    return torch.arange(k) * tensor.scales.shape[1] // k
