"""What the experts of a mixture read during calibration: each sees the tokens that its router sends, and few
of them where it is chosen seldom.

How a mixture is calibrated (``--moe-calibration``):

``routed``  each expert sees the tokens that its router sends, and no others.
``all``     each sees all tokens of its layer, as llm-compressor's `moe_calibrate_all_experts` does.
``blend``   the mean of x xᵀ over routed tokens, each weighted with the square of its gate, which is what its
            error is multiplied by in the layer's output, and over tokens of the whole layer, which count
            as :data:`PRIOR` tokens for each feature of the input; before the second product, where each of
            them has to go through the expert's first, fewer if the expert has many of its own.

What an expert's own tokens say is unbiased, and noisy where they are few beside the features; what all tokens
say is neither. Of a mixture with 8 experts (``benchmarks/make_mixture.py``) the blend's error on text that
was not used, weighted with the gates, is 2 % (first product) and 7 % (second) below that of routed tokens
with 16 and 5 of them to a feature, and 6 % and 23 % below with a quarter as many, where all tokens are 2 %
and 20 % below; one to eight tokens a feature as the prior differ by less than 2 %.

All inputs of a layer are kept until every expert is solved, a few at a time, so that few Hessians are in
memory at once (:func:`at_a_time`); beyond :data:`RESIDENT` bytes they lie in a scratch file.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from quant.accelerator import of_kind, on_accelerator
from quant.calibration.statistics import Accumulator, Statistics
from quant.models.experts import Experts, Routed, expert_inner
from quant.pipeline.scratch import ScratchFiles
from quant.quantizers.two_sided import OUTPUTS
from quant.tensors import QuantizedTensor

T = TypeVar("T")
Calibration = Literal["routed", "all", "blend"]
#: Bytes of an expert layer's inputs, and of what its weights become, that stay in memory.
RESIDENT = 64 << 20
#: Where tensors begin in memory that holds several, in bytes.
_ALIGNED = 64
#: Bytes that experts which are solved together may take; and on a CPU, whose caches hold few columns, their
#: outputs.
TOGETHER = {"cpu": 512 << 20, "accelerator": 4 << 30}
MOST_OUTPUTS = 1 << 13
#: Bytes that all threads of a CPU may take which solve experts side by side, where one expert does not take
#: more: sixteen of Mixtral 8x22B's at once would be 40 GiB.
SIDE_BY_SIDE = 2 << 30
#: Tokens of the whole layer, for each feature of the input, that an expert's own are blended with, at the
#: most; and how many are kept to be taken through an expert's first product, to see what its second reads.
PRIOR, MOST_PRIOR = 2, 1 << 13


@dataclass
class Aside:
    """Tensors that are kept for later: :data:`RESIDENT` bytes of a CPU's in memory, the rest in files without
    a name, whose pages are read when they are asked for.

    Those in memory have a region of their own: in the heap they would lie between the buffers that come and
    go, which then fit nowhere, and the heap grows by a few MiB with each.

    """

    files: ScratchFiles = field(default_factory=ScratchFiles)
    _region: torch.Tensor | None = None
    _held: int = 0
    _maps: list[mmap.mmap] = field(default_factory=list)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same tensor in memory of its own, or on a file.

        Raises:
            DiskFull: there is no room for what memory is not meant for.
        """
        if on_accelerator(tensor) or not tensor.numel():
            return tensor.clone()
        size = RESIDENT if self._region is None else len(self._region)
        if self._held + tensor.nbytes > size:
            kept, pages = self.files.hold(tensor.contiguous())
            self._maps.append(pages)
            return kept
        if self._region is None:  # pages are claimed as they are first written
            self._region = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
        place = self._region[self._held : self._held + tensor.nbytes]
        self._held += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def keep_weight(self, tensor: QuantizedTensor) -> QuantizedTensor:
        """The same weight, whose numbers are kept."""
        zeros = None if tensor.zeros is None else self.keep(tensor.zeros)
        return replace(tensor, codes=self.keep(tensor.codes), scales=self.keep(tensor.scales), zeros=zeros)

    def give_back(self) -> None:
        """Pages of the files that were read count as memory in use until they are given back."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)


@dataclass
class ExpertInputs:
    """The inputs of all experts of a layer before one product, over all batches.

    ``scratch`` holds what is too much for memory.
    """

    scratch: ScratchFiles = field(default_factory=ScratchFiles)
    _rows: list[torch.Tensor] = field(default_factory=list)
    _routes: list[Routed] = field(default_factory=list)
    _aside: Aside | None = None

    def add(self, routed: Routed) -> None:
        """Keeps a copy of a batch's inputs."""
        self._aside = self._aside or Aside(self.scratch)
        self._rows.append(self._aside.keep(routed.rows))
        self._routes.append(Routed(torch.empty(0), routed.index, routed.counts, routed.gates))

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self._rows)

    def batch(self, number: int) -> Routed:
        """A batch as it was added."""
        route = self._routes[number]
        return Routed(self._rows[number], route.index, route.counts, route.gates)

    def reorder(self, order: Sequence[int]) -> None:
        """Takes the batches in another order."""
        self._rows = [self._rows[i] for i in order]
        self._routes = [self._routes[i] for i in order]

    @property
    def features(self) -> int:
        return self._rows[0].shape[1]

    @property
    def device(self) -> torch.device:
        return self._rows[0].device

    @property
    def counts(self) -> torch.Tensor:
        """int64 [E], tokens of each expert."""
        return torch.stack([r.counts for r in self._routes]).sum(0)

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What an expert reads, [n, K], and the gates, fp32 [n], in the order of the batches."""
        spans = [(r.counts[:expert].sum(), r.counts[: expert + 1].sum()) for r in self._routes]
        pairs = [slice(*map(int, span)) for span in spans]
        rows = self._rows[0].new_empty(sum(p.stop - p.start for p in pairs), self.features)
        parts = rows.split([p.stop - p.start for p in pairs])
        for kept, route, taken, part in zip(self._rows, self._routes, pairs, parts, strict=True):
            torch.index_select(kept, 0, route.index[taken], out=part)
        self._give_back()
        return rows, torch.cat([r.gates[p] for r, p in zip(self._routes, pairs, strict=True)])

    def batches(self) -> Iterator[torch.Tensor]:
        """What the layer reads, [R, K], batch by batch, whoever it is sent to."""
        for rows, route in zip(self._rows, self._routes, strict=True):
            # where every expert has a row of its own for each token, most are zero
            yield rows[route.index] if len(route.index) < len(rows) else rows
            self._give_back()

    def reduced(self, most: int) -> ExpertInputs:
        """At most ``most`` rows at even distances over all batches, as one batch of no expert."""
        total = sum(min(len(r), len(route.index)) for r, route in zip(self._rows, self._routes, strict=True))
        stride = max(1, -(-total // max(most, 1)))
        parts, skip = [], 0
        for rows in self.batches():
            parts.append(rows[skip::stride].clone())
            skip = (skip - len(rows)) % stride
        kept = torch.cat(parts)
        everyone = Routed(torch.empty(0), torch.arange(len(kept)), self._routes[0].counts * 0, torch.empty(0))
        return ExpertInputs(_rows=[kept], _routes=[everyone])

    def _give_back(self) -> None:
        if self._aside is not None:
            self._aside.give_back()

    def close(self) -> None:
        self._rows.clear()
        self._aside = None  # files go when the last tensor on them is gone


def weighted(rows: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Rows [n, K] times their gates, which are scaled to a mean square of 1: their Gram matrix is then that
    of the error in the layer's output."""
    if not len(rows):
        return rows
    scale = gates.square().mean().sqrt()
    return rows if not float(scale) > 0 else rows * (gates / scale).unsqueeze(-1).to(rows.dtype)


def layer_statistics(inputs: ExpertInputs, needs: frozenset[str]) -> Statistics:
    """The statistics of what a whole layer reads before the first product of its experts."""
    sums = Accumulator(inputs.features, inputs.device, needs)
    for rows in inputs.batches():
        sums.add(rows)
    return sums.finish()


def expert_statistics(
    module: nn.Module,
    experts: Experts,
    expert: int,
    routed: ExpertInputs,
    prior: Statistics | ExpertInputs | None,
    how: Calibration,
    needs: frozenset[str],
) -> tuple[Statistics, tuple[str, ...]]:
    """The statistics of one expert's input before a product, and what to say of them; see the head of this
    module.

    Args:
        module: the experts; before the second product already quantized for the first.
        routed: what each expert reads before this product.
        prior: what is known of the whole layer: the statistics of all tokens before the first product
            (:func:`layer_statistics`); before the second the tokens themselves, as the first reads them, or
            some of them. None with ``routed``.
    """
    floor = routed.features
    if isinstance(prior, ExpertInputs):
        most = None if how == "all" else _inner_tokens(int(routed.counts[expert]), floor)
        prior = _inner_statistics(module, experts, expert, prior, floor, most, needs)
    if how == "all" and prior is not None:
        return prior, ()
    rows, gates = routed.of(expert)
    own = Accumulator.of(rows, needs - {"hessian"})
    if "hessian" in needs:
        # gates weigh errors; they are no part of what the expert reads
        seen = weighted(rows, gates) if how == "blend" else rows
        own = replace(own, hessian=Accumulator.of(seen, {"hessian"}).hessian)
    few = (f"its router sends it {len(rows)} calibration tokens, its input has {floor} features",)
    if how == "blend" and prior is not None:
        return blended(own, prior), few if len(rows) < floor else ()
    return own, few if len(rows) < floor else ()


def _inner_tokens(own: int, features: int) -> int:
    """Tokens of the whole layer that are taken through an expert's first product, for the prior of its second
    of so many ``features``: what the expert's ``own`` tokens lack of one more than :data:`PRIOR` for each
    feature, but at least one for each.

    >>> _inner_tokens(0, 768), _inner_tokens(1000, 768), _inner_tokens(2048, 768)
    (1536, 1304, 768)
    """
    return min(PRIOR * features, max((1 + PRIOR) * features - own, features))


def _inner_statistics(
    module: nn.Module,
    experts: Experts,
    expert: int,
    tokens: ExpertInputs,
    features: int,
    most: int | None,
    needs: frozenset[str],
) -> Statistics:
    """The statistics of what an expert's second product reads, of ``features``, of tokens of its whole layer,
    as the first reads them: of ``most`` of them, or of all."""
    if most is not None:
        parts = [r[:: max(1, len(r) // most)][:most] for r in tokens.batches()]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        return Accumulator.of(expert_inner(module, experts, expert, rows), needs)
    sums = Accumulator(features, tokens.device, needs)
    for rows in tokens.batches():
        sums.add(expert_inner(module, experts, expert, rows))
    return sums.finish()


def blended(own: Statistics, prior: Statistics) -> Statistics:
    """An expert's own statistics with those of its whole layer's tokens, of which :data:`PRIOR` for each
    feature count, or as many as there are. Its range and its sample are the expert's own, unless it has fewer
    tokens than features."""
    features = next(len(x) for x in (own.hessian, own.minimum, own.sample) if x is not None)
    count = min(PRIOR * features, prior.tokens)
    made = own
    if own.hessian is not None and prior.hessian is not None and count + own.tokens:
        weight = count / (count + own.tokens)
        # in the memory of its own, which nothing else has
        made = replace(made, hessian=own.hessian.lerp_(prior.hessian, weight))
    if own.tokens >= features:
        return made
    return replace(
        made,
        minimum=_either(torch.minimum, own.minimum, prior.minimum),
        maximum=_either(torch.maximum, own.maximum, prior.maximum),
        sample=_either(lambda x, y: torch.cat([x, y]), own.sample, prior.sample),
    )


def _either(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor | None,
    y: torch.Tensor | None,
) -> torch.Tensor | None:
    return x if y is None else y if x is None else function(x, y)


def at_a_time(outputs: int, inputs: int, device: torch.device, workers: int = 1, twice: bool = False) -> int:
    """How many weights [outputs, inputs] of experts each of ``workers`` should solve together: more make the
    steps of a solver larger, and take more memory. ``twice``: by a method of two Hessians."""
    several = of_kind(TOGETHER, device) // _solving_bytes(outputs, inputs, twice) // workers
    if device.type == "cpu":
        several = min(several, MOST_OUTPUTS // outputs)
    return max(1, several)


def workers_for(outputs: int, inputs: int, device: torch.device, twice: bool = False) -> int:
    """How many threads solve weights [outputs, inputs] of experts side by side: on a CPU as many as torch
    has, or fewer where they would take more than :data:`SIDE_BY_SIDE` together; on a GPU one."""
    if device.type != "cpu":
        return 1
    return max(1, min(torch.get_num_threads(), SIDE_BY_SIDE // _solving_bytes(outputs, inputs, twice)))


def _solving_bytes(outputs: int, inputs: int, twice: bool = False) -> int:
    """What the solve of one takes: its Hessian, and the weight, its errors and its codes; ``twice``: its
    Hessian and the factor, blocks of another, and a dozen of the weight's size."""
    if twice:
        return 4 * (3 * inputs * inputs + 3 * outputs * OUTPUTS + 12 * outputs * inputs)
    return 4 * (inputs * inputs + 3 * outputs * inputs)


def in_chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of ``size``, the last one shorter."""
    left = iter(items)
    while chunk := list(islice(left, size)):
        yield chunk


def coverage(counts: torch.Tensor, floor: int) -> dict[str, Any]:
    """How the tokens of a layer are spread over its experts; ``floor``: as many as the features of the
    input."""
    tokens = counts.tolist()
    return {
        "experts": len(tokens),
        "tokens": tokens,
        "minimum": min(tokens),
        "median": sorted(tokens)[len(tokens) // 2],
        "floor": floor,
        "below_floor": sum(t < floor for t in tokens),
    }
