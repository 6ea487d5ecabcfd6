"""The routed experts of a mixture, as transformers holds them in memory: all of a layer in 3-D parameters.

transformers 5 keeps ``gate_up_proj`` [E, 2·I, H] and ``down_proj`` [E, H, I] in one module a layer
(transposed, with interleaved rows or without a gate for some families, which the module's own attributes say:
`integrations/moe.py::use_experts_implementation`), whatever the file's layout is, and lets a registered
function compute them. :func:`experts_through` puts ours in its place, which passes each expert the tokens
that its router sends and can be suspended before each of the two matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from quant.models.linears import Slice
from quant.models.products import linear
from quant.threads import side_by_side

#: The two products of an expert: into the intermediate size (gate and up together), and out of it.
Stage = Literal["up", "down"]
STAGES: tuple[Stage, ...] = ("up", "down")


#: Rows of a product are a multiple of so many, where there are as many: for each number of rows torch's CPU
#: library compiles a kernel, and keeps a thousand of half a MiB.
_ROWS = 16
#: Pairs of a token and an expert from which on a thread for each expert pays.
_SHARED = 512


@dataclass(frozen=True)
class Routed:
    """The inputs of all experts of a layer in one batch.

    Attributes:
        rows: [R, K], what the experts read.
        index: int64 [S], the row of each pair of a token and an expert, sorted by expert.
        counts: int64 [E], pairs of each expert.
        gates: fp32 [S], what the router multiplies the pair's output by.
    """

    rows: torch.Tensor
    index: torch.Tensor
    counts: torch.Tensor
    gates: torch.Tensor


@dataclass(frozen=True)
class Experts:
    """An experts module of a block.

    Attributes:
        path: of the module inside the block.
        count: experts.
        projections: those of the first product, in the order of their rows.
        transposed, interleaved: as the module stores them.
    """

    path: str
    count: int
    projections: tuple[str, ...]
    transposed: bool
    interleaved: bool

    def parameter(self, projection: str) -> str:
        """The parameter that holds a projection, by its name inside the block."""
        if projection == "down_proj":
            return f"{self.path}.down_proj"
        return f"{self.path}.{'gate_up_proj' if len(self.projections) > 1 else 'up_proj'}"

    def place(self, projection: str, expert: int, shape: torch.Size) -> Slice:
        """Where in that parameter, of this shape, an expert's projection lies."""
        parts = ("down_proj",) if projection == "down_proj" else self.projections
        count = shape[2 if self.transposed else 1] // len(parts)
        position = parts.index(projection)
        first, step = (position, len(parts)) if self.interleaved and len(parts) > 1 else (position * count, 1)
        return Slice(self.parameter(projection), expert, first, step, count, self.transposed)


@dataclass(frozen=True)
class _Undeclared:
    """What a module does not say of itself.

    Attributes:
        transposed: how it stores its experts.
        sorted: it is given the tokens of all experts, zero where the router sends none, instead of the
            router's choice.
        identities: choices beyond its last expert stand for experts that return what they are given.
    """

    transposed: bool = False
    sorted: bool = False
    identities: bool = False


#: Modules that do not say of themselves how they store their experts, by class.
_UNDECLARED = {
    "Llama4TextExperts": _Undeclared(transposed=True, sorted=True),
    "LongcatFlashExperts": _Undeclared(identities=True),
}


def find_experts(block: nn.Module) -> list[Experts]:
    """The experts modules of a block."""
    modules = []
    for path, module in block.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        first = parameters.get("gate_up_proj", parameters.get("up_proj"))
        down = parameters.get("down_proj")
        if first is None or down is None or first.ndim != 3 or down.ndim != 3 or not path:
            continue
        declared, row = hasattr(module, "is_transposed"), _UNDECLARED.get(type(module).__name__)
        if not declared and row is None:
            continue
        transposed = row.transposed if row else module.is_transposed
        gated = "gate_up_proj" in parameters
        projections = ("gate_proj", "up_proj") if gated else ("up_proj",)
        interleaved = declared and not module.is_concatenated
        # the first product may have rows for experts that there are not (LongCat's identities)
        modules.append(Experts(path, len(down), projections, bool(transposed), bool(interleaved)))
    return modules


#: Called before a product with the module's path, which product it is, and the inputs; may give others in
#: their place.
Stop = Callable[[str, Stage, Routed], "Routed | None"]


@contextmanager
def experts_through(block: nn.Module, stop: Stop) -> Iterator[None]:
    """While it lasts, experts of the block are computed expert by expert, and ``stop`` is called before each
    product."""
    restore: list[Callable[[], None]] = []
    try:
        for experts in find_experts(block):
            module = block.get_submodule(experts.path)
            row = _UNDECLARED.get(type(module).__name__)
            forward = _sorted_forward if row and row.sorted else _routed_forward
            restore.append(partial(_put_back, module, module.__dict__.get("forward")))
            module.forward = partial(forward, module, experts, stop)
        yield
    finally:
        for back in restore:
            back()


@contextmanager
def experts_passed_over(block: nn.Module, seen: Callable[[str], None]) -> Iterator[None]:
    """While it lasts, experts of the block need no weights: ``seen`` is called with the module's path, and
    what it returns are zeros of the shape that it is given."""
    restore: list[Callable[[], None]] = []

    def forward(path: str, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        seen(path)
        return torch.zeros_like(hidden)

    try:
        for experts in find_experts(block):
            module = block.get_submodule(experts.path)
            restore.append(partial(_put_back, module, module.__dict__.get("forward")))
            module.forward = partial(forward, experts.path)
        yield
    finally:
        for back in restore:
            back()


def _put_back(module: nn.Module, forward: Any) -> None:
    if forward is None:
        del module.forward
    else:
        module.forward = forward


def _routed_forward(
    module: Any,
    experts: Experts,
    stop: Stop,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """What an experts module computes: hidden [T, H], the experts that the router chose [T, top] (from ``E``
    on: none, or the token itself) and their weights [T, top]; returns [T, H]."""
    tokens, top = index.shape
    row = _UNDECLARED.get(type(module).__name__)
    chosen, order = index.reshape(-1).sort(stable=True)
    counts = torch.bincount(chosen, minlength=experts.count + 1)[: experts.count]
    order = order[: int(counts.sum())]  # pairs without an expert come last
    gates = weights.reshape(-1)[order]
    routed = Routed(hidden, order // top, counts, gates.float())
    if _recorded(hidden):
        output = _two_products(module, experts, stop, routed) * gates.unsqueeze(-1).to(hidden.dtype)
        pairs = hidden.new_zeros(tokens * top, output.shape[1])
        pairs[order] = output
        total = pairs.view(tokens, top, -1).sum(1, dtype=torch.float32)
    else:
        inner = _inner(module, experts, stop, routed)
        # expert by expert: all outputs at once are as large as a block's other activations together
        total = torch.zeros(tokens, _sizes(module, experts)[1], device=hidden.device)
        for taken, made in expert_outputs(module, experts, inner):
            made = made * gates[taken].unsqueeze(-1).to(made.dtype)
            total.index_add_(0, routed.index[taken], made.float())  # no token twice
    if row is not None and row.identities:
        total = total + hidden.float() * torch.where(index < experts.count, 0, weights).float().sum(
            1, keepdim=True
        )
    return total.to(hidden.dtype)


def _recorded(rows: torch.Tensor) -> bool:
    """Whether autograd follows what is computed of these rows."""
    return torch.is_grad_enabled() and rows.requires_grad


def _sorted_forward(module: Any, experts: Experts, stop: Stop, hidden: torch.Tensor) -> torch.Tensor:
    """The same where hidden [E·T, H] holds the rows of every expert one after another, already multiplied by
    the router's weight and zero where it sends none."""
    used = hidden.any(-1)
    index = used.nonzero().squeeze(1)
    counts = used.view(experts.count, -1).sum(1)
    gates = torch.ones(len(index), device=hidden.device)
    output, routed = torch.zeros_like(hidden), Routed(hidden, index, counts, gates)
    if _recorded(hidden):
        output[index] = _two_products(module, experts, stop, routed)
    else:
        for pairs, made in expert_outputs(module, experts, _inner(module, experts, stop, routed)):
            output[index[pairs]] = made
    return output


def _two_products(module: Any, experts: Experts, stop: Stop, routed: Routed) -> torch.Tensor:
    """[S, H]: the output of each pair's expert, for autograd."""
    routed = stop(experts.path, "up", routed) or routed
    inner = gated(module, product(module, _first(experts), experts, routed))
    whole = torch.arange(len(inner), device=inner.device)
    between = Routed(inner, whole, routed.counts, routed.gates)
    between = stop(experts.path, "down", between) or between
    return normed(module, product(module, "down_proj", experts, between))


def _first(experts: Experts) -> str:
    """The parameter of the first product."""
    return experts.parameter(experts.projections[-1]).rpartition(".")[2]


def _inner(module: Any, experts: Experts, stop: Stop, routed: Routed) -> Routed:
    """What the second product reads, of what the first does."""
    routed = stop(experts.path, "up", routed) or routed
    inner = routed.rows.new_empty(len(routed.index), _sizes(module, experts)[0])
    # gated while a cache still holds them
    for pairs, made in _products(module, _first(experts), experts, routed, partial(gated, module)):
        inner[pairs] = made
    whole = torch.arange(len(inner), device=inner.device)
    between = Routed(inner, whole, routed.counts, routed.gates)
    return stop(experts.path, "down", between) or between


def expert_outputs(module: Any, experts: Experts, inner: Routed) -> Iterator[tuple[slice, torch.Tensor]]:
    """For each expert that is sent tokens: its pairs, and its outputs [n, H]."""
    yield from _products(module, "down_proj", experts, inner, partial(normed, module))


def normed(module: Any, output: torch.Tensor) -> torch.Tensor:
    """[S, H]: what becomes of the second product."""
    return module.post_expert_norm(output) if getattr(module, "has_post_expert_norm", False) else output


def _sizes(module: Any, experts: Experts) -> tuple[int, int]:
    """Inputs and outputs of the second product."""
    _, rows, columns = module.down_proj.shape
    return (rows, columns) if experts.transposed else (columns, rows)


def gated(module: Any, inner: torch.Tensor) -> torch.Tensor:
    """The activation between the two products, [S, I] of [S, 2·I] (or of [S, I] without a gate)."""
    if not getattr(module, "has_gate", True):
        return module.act_fn(inner)
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(inner)
    gate, up = inner.chunk(2, dim=-1)
    return up * module.act_fn(gate)


def product(module: Any, name: str, experts: Experts, routed: Routed) -> torch.Tensor:
    """[S, N]: each pair's row times its expert's matrix of parameter ``name``, with its bias where there is
    one."""
    outputs = getattr(module, name).shape[2 if experts.transposed else 1]
    if _recorded(routed.rows):
        return _recorded_product(module, name, experts, routed, outputs)
    result = routed.rows.new_empty(len(routed.index), outputs)
    for pairs, made in _products(module, name, experts, routed, lambda made: made):
        result[pairs] = made
    return result


def _products(
    module: Any,
    name: str,
    experts: Experts,
    routed: Routed,
    then: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[tuple[slice, torch.Tensor]]:
    """For each expert that is sent tokens, in their order: its pairs, and what ``then`` makes of their rows'
    part of :func:`product` [n, N]."""
    counts, ends = routed.counts.tolist(), routed.counts.cumsum(0).tolist()
    sent = [(e, slice(end - n, end)) for e, (n, end) in enumerate(zip(counts, ends, strict=True)) if n]
    recording = torch.is_grad_enabled()

    def made(expert: int, pairs: slice) -> tuple[slice, torch.Tensor]:
        count = pairs.stop - pairs.start
        # with some of the next expert's
        taken = routed.index[pairs.start : pairs.start + -(-count // _ROWS) * _ROWS]
        with torch.set_grad_enabled(recording):  # which each thread has for itself
            rows = routed.rows.index_select(0, taken)  # by rows, where plain indexing goes by numbers
            return pairs, then(_times(module, name, experts, expert, rows)[:count])

    with side_by_side(_workers(routed)) as several:
        yield from several(lambda one: made(*one), sent)


def _workers(routed: Routed) -> int:
    """How many threads compute experts side by side: on a CPU as many as torch has, because an expert's rows
    of a batch are too few to share; or one after another by all of them, where one expert has so many that
    half of the threads would wait for it, and where operations are watched, which other threads' are not."""
    threads, pairs = torch.get_num_threads(), len(routed.index)
    if routed.rows.device.type != "cpu" or pairs < _SHARED or _get_current_dispatch_mode() is not None:
        return 1
    busy = min(threads, pairs // int(routed.counts.max()))
    return busy if 2 * busy >= threads else 1


def _recorded_product(module: Any, name: str, experts: Experts, routed: Routed, outputs: int) -> torch.Tensor:
    """:func:`product` for autograd: rows are gathered and taken apart at once, because the gradient of each
    part taken alone is as large as all of them."""
    rows = torch.index_select(routed.rows, 0, routed.index)
    parts = []
    for expert, part in enumerate(rows.split(routed.counts.tolist())):
        if count := len(part):
            padded = nn.functional.pad(part, (0, 0, 0, -count % _ROWS))
            parts.append(_times(module, name, experts, expert, padded)[:count])
    return torch.cat(parts) if parts else rows.new_empty(0, outputs)


def _times(module: Any, name: str, experts: Experts, expert: int, rows: torch.Tensor) -> torch.Tensor:
    """[P, N]: rows [P, K] times an expert's matrix of parameter ``name``, with its bias where there is
    one."""
    weight, bias = getattr(module, name)[expert], getattr(module, f"{name}_bias", None)
    matrix = weight.t() if experts.transposed else weight
    return linear(rows, matrix, None if bias is None else bias[expert])


def expert_inner(module: nn.Module, experts: Experts, expert: int, rows: torch.Tensor) -> torch.Tensor:
    """What an expert's second product reads, [P, I], of rows [P, H]."""
    return gated(module, _times(module, _first(experts), experts, expert, rows))
