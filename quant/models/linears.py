"""The matrices that a job quantizes, as a file holds them: one tensor each, or a slice of a tensor that holds
all experts of a layer. No torch at import.

Mixtures of experts store their experts one by one (``experts.3.gate_proj.weight`` [N, K]) or fused, as one
tensor of three dimensions for a whole layer: ``experts.gate_up_proj`` [E, 2·I, H] with the gates' rows first
or interleaved with the ups', or transposed, [E, H, 2·I]. Quantized checkpoints name every expert, because
that is what vLLM's FusedMoE loads (`fused_moe/layer.py::make_expert_params_mapping`); so a fused tensor
becomes the linears of all its experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quant.checkpoint.header import WIDE_FLOATS, TensorInfo
from quant.models.place import decoder_list
from quant.models.roles import block_list, block_of, not_quantizable
from quant.schemes import UNQUANTIZED
from quant.vllm.config import block_count, parts, text_config
from quant.vllm.layers import EXPERTS_TRANSPOSED, Linear, stored_transposed
from quant.vllm.names import NUMBERED_AS, NUMBERED_PROJECTIONS

if TYPE_CHECKING:
    import torch

    from quant.checkpoint.reader import Checkpoint


@dataclass(frozen=True)
class Slice:
    """Part of a file tensor: of expert ``expert`` in the first dimension (None: the tensor has no such
    dimension) the outputs ``first``, ``first + step``, … (``count`` of them; 0: all). ``transposed``: outputs
    are the last dimension but in the tensor they are stored as [K, N]."""

    tensor: str
    expert: int | None = None
    first: int = 0
    step: int = 1
    count: int = 0
    transposed: bool = False

    @property
    def whole(self) -> bool:
        """Whether it is the tensor as it is stored."""
        return self.expert is None and not self.count and not self.transposed

    def read(self, checkpoint: Checkpoint) -> torch.Tensor:
        """Its values in the stored dtype, outputs first: [N, K] of a weight, [N] of a bias."""
        if self.whole:
            return checkpoint.read(self.tensor)
        stored = (
            checkpoint.read(self.tensor)
            if self.expert is None
            else checkpoint.read_index(self.tensor, self.expert)
        )
        if self.transposed:
            stored = stored.t()
        return self._outputs(stored).contiguous()

    def view(self, value: torch.Tensor) -> torch.Tensor:
        """The same part of a tensor in memory that is laid out as the file's, as a view, outputs first."""
        part = value if self.expert is None else value[self.expert]
        if self.transposed:
            part = part.t()
        return self._outputs(part)

    def _outputs(self, value: torch.Tensor) -> torch.Tensor:
        return value[self.first : self.first + self.step * self.count : self.step] if self.count else value


@dataclass(frozen=True)
class LinearRef:
    """One matrix [N, K].

    Attributes:
        name: what its quantized form is called, without ``.weight``.
        n, k: outputs and inputs.
        weight: where its weight is stored.
        bias: where its bias is stored, for those whose bias is part of a fused tensor, too; None where there
            is
            none, or one that is copied with the rest of the file.
    """

    name: str
    n: int
    k: int
    weight: Slice
    bias: Slice | None = None

    @property
    def tensor(self) -> str:
        """The file tensor that holds the weight."""
        return self.weight.tensor

    @property
    def turned(self) -> bool:
        """Whether it is a tensor of its own that is stored [K, N]."""
        return self.weight.transposed and not self.fused

    @property
    def fused(self) -> bool:
        """Whether the tensor holds other linears as well."""
        return self.weight.expert is not None

    def read(self, checkpoint: Checkpoint) -> torch.Tensor:
        """The weight [N, K] in the stored dtype, in memory of its own."""
        return self.weight.read(checkpoint)

    def pieces(self, checkpoint: Checkpoint, rows: int) -> Iterator[torch.Tensor]:
        """The weight in pieces of at most ``rows`` outputs. Pieces of a tensor of its own share one buffer:
        each is overwritten when the next one is asked for."""
        if self.weight.whole:
            yield from checkpoint.read_rows(self.tensor, rows)
        else:
            yield from self.read(checkpoint).split(rows)


@dataclass(frozen=True)
class ExpertLayout:
    """How a family's files fuse the experts of a layer, and what vLLM calls the parts.

    Attributes:
        model_types: of the text decoder.
        tensors: last part of a fused tensor's name → the projections that it holds, in order.
        container: module that the fused tensors belong to, and the module under which vLLM numbers the
            experts.
        names: projection → vLLM's name of it.
        interleaved: rows of the gate and the up projection alternate.
        fused_only: transformers reads these checkpoints fused alone, so plain exports are written so.
        ending: what follows the names of fused weights.
        renamed: how they are fused under transformers' own names, where those are others and vLLM knows them.
    """

    model_types: tuple[str, ...] = ()
    tensors: Mapping[str, tuple[str, ...]] = ()  # type: ignore[assignment]
    container: tuple[str, str] = ("experts", "experts")
    names: Mapping[str, str] = ()  # type: ignore[assignment]
    interleaved: bool = False
    fused_only: bool = True
    ending: str = ""
    renamed: ExpertLayout | None = None

    @property
    def transposed(self) -> bool:
        """Stored as [E, K, N], where shapes alone do not tell."""
        return not EXPERTS_TRANSPOSED.isdisjoint(self.model_types)


_GATED = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
_SAME = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}

#: What holds where no row does: families whose files name every expert, saved by transformers 5 as it holds
#: them.
_DEFAULT = ExpertLayout((), _GATED, names=_SAME, fused_only=False)
#: Families whose own files are fused. Where each layout was read: transformers 5
#: ``models/<family>/modeling_*.py`` and its ``conversion_mapping.py``; vLLM's names:
#: ``model_executor/models/<family>.py::get_expert_mapping``.
LAYOUTS = (
    ExpertLayout(("llama4_text", "llama4"), _GATED, names=_SAME),
    ExpertLayout(("gpt_oss",), _GATED, names=_SAME, interleaved=True),
    ExpertLayout(("qwen3_vl_moe_text", "qwen3_vl_moe"), _GATED, names=_SAME),
    ExpertLayout(("qwen3_5_moe_text", "qwen3_5_moe"), _GATED, names=_SAME, fused_only=False),
    ExpertLayout(("gemma4_text", "gemma4"), _GATED, names=_SAME),
    ExpertLayout(
        ("aria_text", "aria"),
        {"fc1": ("gate_proj", "up_proj"), "fc2": ("down_proj",)},
        names=_SAME,
        ending=".weight",
    ),
    ExpertLayout(
        tuple(NUMBERED_PROJECTIONS),
        _GATED,
        names=NUMBERED_AS,
        fused_only=False,
    ),
    ExpertLayout(
        ("granitemoe", "granitemoeshared", "granitemoehybrid"),
        {"input_linear": ("gate_proj", "up_proj"), "output_linear": ("down_proj",)},
        container=("block_sparse_moe", "block_sparse_moe.experts"),
        names=_SAME,
        ending=".weight",
        renamed=_DEFAULT,
    ),
)


def expert_layout(config: Mapping[str, Any]) -> ExpertLayout:
    """The row of a config's family."""
    kinds = [part.get("model_type") for part in parts(config)]
    return next((row for kind in kinds for row in LAYOUTS if kind in row.model_types), _DEFAULT)


def _layout_of(name: str, shape: tuple[int, ...], layout: ExpertLayout) -> ExpertLayout:
    """A family's layout, or that of the other names that its files may have, where a tensor has one."""
    other = layout.renamed
    return other if other is not None and fused_experts(name, shape, other) is not None else layout


def fused_experts(name: str, shape: tuple[int, ...], layout: ExpertLayout) -> tuple[str, str] | None:
    """The module that a fused tensor of experts belongs to, and the last part of its name; None of other
    tensors.

    >>> fused_experts("model.layers.0.mlp.experts.gate_up_proj", (8, 64, 32), expert_layout({}))
    ('model.layers.0.mlp.experts', 'gate_up_proj')
    """
    stem = name.removesuffix(".weight").removesuffix("_bias").removesuffix(".bias")
    module, _, last = stem.rpartition(".")
    if last not in layout.tensors or not module.endswith(f".{layout.container[0]}"):
        return None
    dimensions = 2 if name.endswith("bias") else 3
    return (module, last) if len(shape) == dimensions else None


def fused_refs(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, LinearRef]:
    """The linears inside fused tensors of decoder blocks, by the names that they get, in file order."""
    family, hidden = expert_layout(config), text_config(config).get("hidden_size")
    blocks, decoder = block_count(config), decoder_list(tensors.values(), config)
    refs: dict[str, LinearRef] = {}
    for info in tensors.values():
        layout = _layout_of(info.name, info.shape, family)
        place = fused_experts(info.name, info.shape, layout)
        index = block_of(info.name)
        if place is None or len(info.shape) != 3 or info.dtype not in WIDE_FLOATS or index is None:
            continue
        if block_list(info.name) != decoder:
            continue
        if (blocks is not None and index >= blocks) or not all(info.shape):
            continue
        module, last = place
        projections = layout.tensors[last]
        experts, rows, columns = info.shape
        transposed = _transposed(layout, projections, rows, columns, hidden)
        outputs, inputs = (columns, rows) if transposed else (rows, columns)
        if outputs % len(projections):
            continue
        bias = next(
            (f"{module}.{last}{end}" for end in ("_bias", ".bias") if f"{module}.{last}{end}" in tensors),
            None,
        )
        numbered = module.removesuffix(layout.container[0]) + layout.container[1]
        for expert in range(experts):
            for place_of, projection in enumerate(projections):
                count = outputs // len(projections)
                first, step = (place_of, len(projections)) if layout.interleaved else (place_of * count, 1)
                name = f"{numbered}.{expert}.{layout.names[projection]}"
                weight = Slice(info.name, expert, first, step, count, transposed)
                held = None if bias is None else Slice(bias, expert, first, step, count)
                refs[name] = LinearRef(name, count, inputs, weight, held)
    return refs


def fused_matrix(
    name: str, shape: tuple[int, ...], layout: ExpertLayout, hidden: object
) -> tuple[int, int] | None:
    """Outputs and inputs of one expert in a fused tensor of experts, several projections one after another;
    None of other tensors."""
    layout = _layout_of(name, shape, layout)
    place = fused_experts(name, shape, layout)
    if place is None or len(shape) != 3:
        return None
    rows, columns = shape[1:]
    return (
        (columns, rows)
        if _transposed(layout, layout.tensors[place[1]], rows, columns, hidden)
        else (rows, columns)
    )


def fused_tensors(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, list[LinearRef]]:
    """Fused tensors of experts, of weights and of biases, and the linears in each."""
    return holders(fused_refs(tensors, config).values())


def holders(refs: Iterable[LinearRef]) -> dict[str, list[LinearRef]]:
    """The linears of each fused tensor, of weights and of biases, among ``refs``."""
    held: dict[str, list[LinearRef]] = {}
    for ref in refs:
        if ref.fused:
            held.setdefault(ref.tensor, []).append(ref)
            if ref.bias is not None:
                held.setdefault(ref.bias.tensor, []).append(ref)
    return held


def _transposed(
    layout: ExpertLayout, projections: tuple[str, ...], rows: int, columns: int, hidden: object
) -> bool:
    """Whether a fused tensor [E, rows, columns] is stored as [E, K, N]: told by which side is the hidden
    size, else by the family."""
    if isinstance(hidden, int) and (rows == hidden) != (columns == hidden):
        reads_hidden = projections != ("down_proj",)
        return (rows == hidden) == reads_hidden
    return layout.transposed


def decoder_refs(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, LinearRef]:
    """All linears of the text decoder's blocks by name, sorted by block and name; experts of fused tensors
    included."""
    blocks, decoder = block_count(config), decoder_list(tensors.values(), config)
    refs = fused_refs(tensors, config)
    for info in tensors.values():
        if not_quantizable(info, blocks, decoder) is None:
            module = info.name.removesuffix(".weight")
            turned = stored_transposed(config, module)
            n, k = info.shape[::-1] if turned else info.shape
            refs[module] = LinearRef(module, n, k, Slice(info.name, transposed=turned))
    return dict(sorted(refs.items(), key=lambda item: (block_of(item[0] + "."), item[0])))


def built_linears(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], quantized: Mapping[str, Linear]
) -> list[Linear]:
    """Every linear of the text decoder's blocks that vLLM builds: those that are quantized, then those that
    stay in 16 bits."""
    rest = [ref for name, ref in decoder_refs(tensors, config).items() if name not in quantized]
    return [*quantized.values(), *(Linear(ref.name, ref.n, ref.k, UNQUANTIZED.weights) for ref in rest)]
