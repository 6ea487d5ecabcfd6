"""What a calibrated job takes where even a trial of one block would take minutes: work is counted, and the
job's own code is timed on one small matrix.

Products of a forward pass take two operations a weight and token; sums of statistics grow with tokens × K²,
solves of weights [N, K] with N·K, and of a method with a Hessian with N·K² as well: two small matrices of as
many rows tell both apart. On them a step's fixed costs weigh more than on a large one, so a count errs on the
long side.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from quant.accelerator import synchronize
from quant.calibration.statistics import Accumulator, GradientAccumulator, Statistics
from quant.checkpoint.dtypes import TORCH
from quant.models.adapter import InputGroup
from quant.models.experts import find_experts
from quant.models.products import linear
from quant.models.skeleton import Skeleton
from quant.outlier_suppression.base import Place
from quant.pipeline.footprint import block_bytes, stated_active
from quant.pipeline.manager import QuantizationManager
from quant.quantizers import quantize_many
from quant.quantizers.two_sided import OUTPUTS, blocks_of
from quant.recipe import Assignment

#: Outputs of the matrices that a method is timed on, and inputs of each, as many tokens as inputs.
_OUTPUTS, _INPUTS = 512, (256, 1024)
#: Sides of the product that is timed.
_SIDE = 2048
#: Outputs and inputs of the matrix that such a method is timed on; and the products of the weight with a
#: Hessian that one takes which does not say.
_STEPPED, _PRODUCTS = (1024, 512), 10
#: Products of a weight and token with gradients: forward, and again; back once more for each draw.
_PASSES = 2


@dataclass(frozen=True)
class Rates:
    """Seconds that an assignment takes on a device: of its statistics by token · K², of its solves by N · K
    (``element``) and by N · K² (``product``), suppression included."""

    statistics: float
    element: float
    product: float = 0.0

    def solve(self, n: int, k: int) -> float:
        return n * k * (self.element + self.product * k)


@dataclass(frozen=True)
class BothRates:
    """Seconds that a method of two Hessians takes: of its statistics by token · (K² + 2·N·b), where b is the
    size of a block of H_O; of its solves by input · b, one by one, and by N · K² in products of matrices."""

    statistics: float
    step: float
    product: float


@dataclass(frozen=True)
class BlockWork:
    """What one block takes: seconds, and bytes of memory beside the activations that wait."""

    seconds: float
    memory: int


class Counter:
    """Counts the work of a job's blocks; each rate is measured once.

    Args:
        manager: of the job, whose quantizers and suppressors are timed.
    """

    def __init__(self, manager: QuantizationManager, skeleton: Skeleton):
        self._manager, self._skeleton = manager, skeleton
        self._rates: dict[Assignment, Rates] = {}
        self._both: dict[Assignment, BothRates] = {}
        self._product: float | None = None

    def block(self, index: int, tokens: int) -> BlockWork:
        """The work of a block that ``tokens`` go through.

        Raises:
            CheckpointError: a block that cannot be run to see which linears share an input.
        """
        skeleton, plan = self._skeleton, self._manager.plan
        block, prefix = skeleton.blocks[index], skeleton.block_prefix(index)
        experts = {e.path: e.count for e in find_experts(block)}
        active = self._active(sum(experts.values()) // max(len(experts), 1)) if experts else 1.0
        routed = sum(
            p.numel() for n, p in block.named_parameters() if n.rpartition(".")[0] in experts and p.ndim == 3
        )
        whole = sum(p.numel() for p in block.parameters())
        seconds = tokens * (whole - routed + routed * active) * self._product_seconds()
        if plan.gradients:
            return BlockWork(
                self._with_gradients(index, tokens, seconds, experts, active), self._bytes(index)
            )
        for group in skeleton.groups(index):
            chosen = [n for n in group.linears if prefix + n in plan.linears]
            if not chosen:
                continue
            k = plan.linears[prefix + chosen[0]].k
            outputs = [plan.linears[prefix + n].n for n in chosen]
            rates = self._of(plan.assignments[prefix + chosen[0]])
            seen = tokens * self._passes(group, experts, active)
            seconds += rates.statistics * seen * k * k + rates.solve(sum(outputs), k)
        return BlockWork(seconds, self._bytes(index))

    def _bytes(self, index: int) -> int:
        return block_bytes(self._manager, self._skeleton, index, self._manager.workspace.batch_tokens)

    def _with_gradients(
        self, index: int, tokens: int, seconds: float, experts: Mapping[str, int], active: float
    ) -> float:
        """Seconds of a block that a forward pass of so many goes through, whose linears are all summed on the
        way back; experts go through it once more."""
        plan, prefix = self._manager.plan, self._skeleton.block_prefix(index)
        draws = self._manager.draws
        seconds *= _PASSES + draws + bool(experts)
        for group in self._skeleton.groups(index):
            routed = bool(group.experts)
            seen = tokens * (active if routed else 1.0)
            for name in group.linears:
                if (linear := plan.linears.get(prefix + name)) is None:
                    continue
                n, k, assignment = linear.n, linear.k, plan.assignments[prefix + name]
                most = OUTPUTS if routed else self._manager.blocks.solver.outputs(assignment)
                count, size = blocks_of(n, most)
                if "gradients" in self._manager.blocks.solver.needs(assignment):
                    both = self._of_both(assignment)
                    drawn = seen if routed else seen * draws
                    seconds += both.statistics * drawn * (k * k + 2 * n * size)
                    seconds += both.step * k * size * max(1.0, count / blocks_of(_STEPPED[0], most)[0])
                    seconds += both.product * n * k * k
                else:
                    rates = self._of(assignment)
                    seconds += rates.statistics * seen * k * k + rates.solve(n, k)
        return seconds

    def _passes(self, group: InputGroup, experts: Mapping[str, int], active: float) -> float:
        """How many times a token is summed for a group: by the experts that it is sent to, and once for what
        their statistics are blended with."""
        if not group.experts:
            return 1.0
        return experts[group.experts] * active + (self._manager.plan.recipe.moe_calibration != "routed")

    def _active(self, experts: int) -> float:
        """The share of a layer's experts that a token is sent to; all where config.json does not say."""
        chosen = stated_active(self._skeleton.checkpoint.config)
        return min(chosen / experts, 1.0) if chosen else 1.0

    def _product_seconds(self) -> float:
        if self._product is None:
            x = torch.ones(_SIDE, _SIDE, dtype=self._skeleton.dtype, device=self._manager.device)
            self._product = self._timed(lambda: linear(x, x)) / _SIDE**3
        return self._product

    def _of(self, assignment: Assignment) -> Rates:
        if assignment not in self._rates:
            self._rates[assignment] = self._measured(assignment)
        return self._rates[assignment]

    def _of_both(self, assignment: Assignment) -> BothRates:
        if assignment not in self._both:
            self._both[assignment] = self._measured_both(assignment)
        return self._both[assignment]

    def _measured_both(self, assignment: Assignment) -> BothRates:
        manager, device = self._manager, self._manager.device
        quantizer, dtype = manager.quantizers[assignment], TORCH[manager.plan.dtype]
        needs, scheme = manager.blocks.solver.needs(assignment), assignment.scheme.weights
        (n, k), generator = _STEPPED, torch.Generator().manual_seed(0)
        blocks = blocks_of(n, manager.blocks.solver.outputs(assignment))
        inputs = torch.randn(n, n, generator=generator).to(device, self._skeleton.dtype)
        weight = torch.randn(n, k, generator=generator).to(device)
        square = inputs.float()

        def summed(features: int) -> Statistics:
            sums = GradientAccumulator(features, n, blocks, device, needs)
            sums.add(inputs[:, :features], inputs)
            return sums.finish()

        statistics = self._timed(lambda: summed(n)) / (n * (n * n + 2 * n * blocks[1]))
        product = getattr(quantizer, "products", _PRODUCTS) * self._timed(lambda: square @ square) / n**3
        seen = summed(k)
        solving = self._timed(
            lambda: quantize_many(quantizer, weight.clone()[None], [seen.copy()], scheme, dtype)
        )
        return BothRates(statistics, max(solving - product * n * k * k, 0.0) / (k * blocks[1]), product)

    def _measured(self, assignment: Assignment) -> Rates:
        narrow, wide = _INPUTS
        added, solved = self._on(assignment, _OUTPUTS, narrow)
        if "hessian" not in self._manager.blocks.solver.needs(assignment):
            return Rates(added / narrow**3, solved / (_OUTPUTS * narrow))
        small = solved / (_OUTPUTS * narrow)
        added, solved = self._on(assignment, _OUTPUTS, wide)
        large = solved / (_OUTPUTS * wide)
        # a wider input may take more by the weight than products explain: then all of it is theirs
        product = min(max(large - small, 0.0) / (wide - narrow), large / wide)
        return Rates(added / wide**3, large - product * wide, product)

    def _on(self, assignment: Assignment, n: int, k: int) -> tuple[float, float]:
        """Seconds of the statistics of K tokens, and of a solve with them."""
        manager = self._manager
        quantizer, suppressor = manager.quantizers[assignment], manager.suppressors[assignment]
        needs = manager.blocks.solver.needs(assignment)
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(k, k, generator=generator).to(manager.device, self._skeleton.dtype)
        weight = torch.randn(n, k, generator=generator).to(manager.device)
        dtype = TORCH[manager.plan.dtype]

        def summed() -> Statistics:
            sums = Accumulator(k, manager.device, needs)
            sums.add(inputs)
            return sums.finish()

        def solve() -> None:
            statistics = summed()
            if suppressor is not None:
                suppressor(weight, statistics, assignment.scheme, dtype, Place("norm"))
            quantize_many(quantizer, weight.clone()[None], [statistics], assignment.scheme.weights, dtype)

        adding = self._timed(summed)
        return adding, max(self._timed(solve) - adding, 0.0)

    def _timed(self, work: Callable[[], object]) -> float:
        """Seconds of something that has been done once before: kernels are loaded by then."""
        work()
        self._settle()
        start = time.perf_counter()
        work()
        self._settle()
        return time.perf_counter() - start

    def _settle(self) -> None:
        synchronize(self._manager.device)
