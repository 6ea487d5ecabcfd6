"""What makes the input of a group of linears, and who else reads it, of a block whose family has no row:
found by running the block, and proved by scaling.

Scaling of an input can be moved into the module that makes it where every reader of it is known: a norm's
gain, or the rows of a linear up to element-wise steps (the up projection before the down projection, the
values before attention's output). Which module that may be is told by whose output the readers are given. A
candidate is proved: its outputs are divided by powers of two, every reader's columns are multiplied by them,
and the block's output must be the same, which such numbers leave exact; and another one where the readers
are left as they are. A reader that was overlooked, or a step in between that is not element-wise, fails this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from quant.models.adapter import InputGroup
from quant.models.binding import BlockLinear
from quant.models.experts import Routed, Stage, experts_through

#: Largest difference of a block's output, relative, where nothing has changed, and the least where something
#: has.
_SAME, _OTHER = 1e-3, 1e-2
#: Candidates that are tried for one input.
_MOST = 4

#: Where a tensor lies, and its elements: views of the whole are the same.
_Place = tuple[int, int]


def _place(tensor: torch.Tensor) -> _Place:
    return tensor.data_ptr(), tensor.numel()


@dataclass
class _Seen:
    """A pass: by module path, what it was given and what it put out, in the order of the calls; of experts,
    what they were given, by path and product."""

    given: dict[str, _Place] = field(default_factory=dict)
    made: dict[str, _Place] = field(default_factory=dict)
    routed: dict[tuple[str, Stage], _Place] = field(default_factory=dict)
    kept: list[torch.Tensor] = field(default_factory=list)  # alive, so that no place is used again


@dataclass(frozen=True)
class SourceFinder:
    """Of one block, filled.

    Attributes:
        run: the block's output for a few tokens.
        linears: by name, as :meth:`quant.models.skeleton.Skeleton.linears` has them.
        names: module path of each plain linear → its name.
        stored: parameter of the block → the name inside the block of the file tensor that it is equal to.
        head_size: features of an attention head.
    """

    block: nn.Module
    run: Callable[[], torch.Tensor]
    linears: Mapping[str, BlockLinear]
    names: Mapping[str, str]
    stored: Mapping[str, str]
    head_size: int

    def sourced(self, groups: Sequence[InputGroup]) -> tuple[InputGroup, ...]:
        """The groups with what makes their input, where that is proved."""
        seen = self._watch()
        paths = {name: path for path, name in self.names.items()}

        def place_of(group: InputGroup) -> _Place | None:
            if group.experts:
                return seen.routed.get((group.experts, group.stage))  # type: ignore[arg-type]
            return seen.given.get(paths[group.linears[0]])

        places = [place_of(group) for group in groups]
        proved: dict[_Place, InputGroup | None] = {}
        sourced = []
        for index, (group, place) in enumerate(zip(groups, places, strict=True)):
            if group.stage == "down":
                sourced.append(self._behind_experts(group))
                continue
            if place is None:
                sourced.append(group)
                continue
            if place not in proved:
                kin = [g for g, p in zip(groups, places, strict=True) if p == place]
                proved[place] = self._behind_norm(kin, place, seen)
            norm = proved[place]
            if norm is not None:
                sourced.append(
                    replace(group, source=norm.source, norm_offset=norm.norm_offset, readers=norm.readers)
                )
            else:
                sourced.append(self._behind_linear(group, groups[:index]))
        return tuple(sourced)

    def _watch(self) -> _Seen:
        seen, handles = _Seen(), []

        def expert(path: str, stage: Stage, routed: Routed) -> None:
            seen.kept.append(routed.rows)
            seen.routed[path, stage] = _place(routed.rows)

        for path, module in self.block.named_modules():

            def before(
                module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], path: str = path
            ) -> None:
                first = args[0] if args else next(iter(kwargs.values()), None)
                if isinstance(first, torch.Tensor):
                    seen.kept.append(first)
                    seen.given.setdefault(path, _place(first))

            def after(module: nn.Module, args: object, output: object, path: str = path) -> None:
                if isinstance(output, torch.Tensor):
                    seen.kept.append(output)
                    seen.made[path] = _place(output)

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        try:
            with experts_through(self.block, expert):
                self.run()
        finally:
            for handle in handles:
                handle.remove()
        return seen

    # --- norms ----------------------------------------------------------------------------------------------

    def _behind_norm(self, kin: Sequence[InputGroup], place: _Place, seen: _Seen) -> InputGroup | None:
        """What all groups of one input have in common that a norm makes: the norm, what it adds to its stored
        weight, and the matrices beside the groups' that read it too."""
        linears = [name for group in kin for name in group.linears]
        features = self.linears[linears[0]].ref.k
        taken = {self.linears[name].parameter for name in linears}
        readers = []
        for path, given in seen.given.items():
            weight = getattr(self.block.get_submodule(path), "weight", None)
            parameter = f"{path}.weight"
            if (
                given != place
                or parameter in taken
                or not isinstance(weight, nn.Parameter)
                or weight.ndim != 2
            ):
                continue
            name = self.stored.get(parameter, "")
            if weight.shape[1] != features or not name.endswith(".weight"):
                return None
            readers.append((parameter, name.removesuffix(".weight")))
        for path, made in seen.made.items():
            module = self.block.get_submodule(path)
            weight = getattr(module, "weight", None)
            name = self.stored.get(f"{path}.weight", "")
            if made != place or not isinstance(weight, nn.Parameter) or weight.shape != (features,):
                continue
            if not name.endswith(".weight"):
                continue
            for offset in (0.0, 1.0):
                if self._norm_proved(module, offset, linears, [p for p, _ in readers]):
                    return InputGroup(
                        (),
                        name.removesuffix(".weight"),
                        norm_offset=offset,
                        readers=tuple(n for _, n in readers),
                    )
        return None

    def _norm_proved(
        self, norm: nn.Module, offset: float, linears: Sequence[str], readers: Sequence[str]
    ) -> bool:
        weight, bias = norm.weight, getattr(norm, "bias", None)
        assert isinstance(weight, nn.Parameter)
        kept = weight.detach().clone(), None if not isinstance(bias, nn.Parameter) else bias.detach().clone()
        factors = _factors(len(weight), weight)

        def divide(by: torch.Tensor) -> None:
            weight.copy_(1 / by - offset)
            if kept[1] is not None:
                bias.copy_(kept[1] / by)  # type: ignore[union-attr]

        def multiply(by: torch.Tensor) -> None:
            for name in linears:
                self.linears[name].get(self.block).mul_(by)
            for parameter in readers:
                self.block.get_parameter(parameter).mul_(by)

        try:
            divide(torch.ones_like(factors))
            return self._proved(divide, multiply, factors, factors)
        finally:
            weight.copy_(kept[0])
            if kept[1] is not None:
                bias.copy_(kept[1])  # type: ignore[union-attr]

    # --- linears --------------------------------------------------------------------------------------------

    def _behind_linear(self, group: InputGroup, before: Sequence[InputGroup]) -> InputGroup:
        """The group with the linear that makes its input, where there is one."""
        inputs = self.linears[group.linears[0]].ref.k
        candidates = [n for g in reversed(before) if not g.experts for n in reversed(g.linears)]
        tried = 0
        for name in candidates:
            outputs = self.linears[name].ref.n
            shared = name.endswith("v_proj") and outputs % self.head_size == 0 and inputs % outputs == 0
            if (outputs != inputs and not shared) or tried == _MOST:
                continue
            tried += 1
            if self._rows_proved([name], list(group.linears), outputs, inputs):
                return replace(group, source=name)
        return group

    def _behind_experts(self, group: InputGroup) -> InputGroup:
        """The group of the experts' second product, with ``up_proj`` for a source where each expert's own
        makes its input; see :func:`expert_source`."""
        sources = [expert_source(name, self.linears) for name in group.linears]
        known = [name for name in sources if name is not None]
        sizes = {
            (self.linears[s].ref.n, self.linears[n].ref.k) for s, n in zip(known, group.linears, strict=False)
        }
        if len(known) != len(sources) or len(sizes) != 1 or len(set(*sizes)) != 1:
            return group
        ((outputs, inputs),) = sizes
        return (
            replace(group, source=known[0])
            if self._rows_proved(known, group.linears, outputs, inputs)
            else group
        )

    def _rows_proved(self, sources: Sequence[str], linears: Sequence[str], outputs: int, inputs: int) -> bool:
        first = self.linears[linears[0]].get(self.block)
        rows = _factors(outputs, first)
        index = torch.arange(inputs, device=first.device)
        if outputs != inputs:
            index = shared_heads(inputs, outputs, self.head_size, first.device)
        biases = [
            bias
            for name in sources
            if not self.linears[name].shared
            and isinstance(
                bias := getattr(self.block.get_submodule(self.linears[name].module), "bias", None),
                nn.Parameter,
            )
        ]

        def divide(by: torch.Tensor) -> None:
            for name in sources:
                self.linears[name].get(self.block).div_(by.unsqueeze(-1))
            for bias in biases:
                bias.div_(by)

        def multiply(by: torch.Tensor) -> None:
            for name in linears:
                self.linears[name].get(self.block).mul_(by)

        return self._proved(divide, multiply, rows, rows[index])

    def _proved(
        self,
        divide: Callable[[torch.Tensor], None],
        multiply: Callable[[torch.Tensor], None],
        rows: torch.Tensor,
        columns: torch.Tensor,
    ) -> bool:
        """Whether dividing and multiplying by powers of two gives the same output, and dividing alone another
        one. What was multiplied is divided again."""
        with torch.no_grad():
            wanted = self.run()
            divide(rows)
            try:
                if not _differs(self.run(), wanted, _OTHER):
                    return False
                with _undone(multiply, columns):
                    return not _differs(self.run(), wanted, _SAME)
            finally:
                divide(1 / rows)


@contextmanager
def _undone(multiply: Callable[[torch.Tensor], None], by: torch.Tensor) -> Iterator[None]:
    multiply(by)
    try:
        yield
    finally:
        multiply(1 / by)


def _factors(count: int, like: torch.Tensor) -> torch.Tensor:
    """[count] of 1/8 and 8, in the dtype of ``like``: large, so that a reader left out is noticed."""
    exponents = torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(count))
    return torch.exp2(exponents * 6.0 - 3.0).to(like.device, like.dtype)


def _differs(got: torch.Tensor, wanted: torch.Tensor, by: float) -> bool:
    got, wanted = got.float(), wanted.float()
    return not bool((got - wanted).norm() <= by * wanted.norm())


def expert_source(down: str, linears: Mapping[str, object]) -> str | None:
    """The up projection of the expert whose down projection it is, under the names of either convention."""
    head, _, last = down.rpartition(".")
    up = {"down_proj": "up_proj", "w2": "w3"}.get(last, "")
    return f"{head}.{up}" if f"{head}.{up}" in linears else None


def shared_heads(inputs: int, outputs: int, head_size: int, device: torch.device) -> torch.Tensor:
    """int64 [inputs]: the output of the value projection that each input of attention's output projection is,
    where several query heads read one KV head."""
    index = torch.arange(inputs, device=device)
    shared = inputs // outputs
    return index // (head_size * shared) * head_size + index % head_size
