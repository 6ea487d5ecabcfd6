"""transformers' own model, built without weights, whose blocks are filled one at a time.

Parameters live on the meta device until a block is loaded. Buffers that no file holds (rotary frequencies,
embedding scales) are built for real by the model's constructor. To learn what each block is called with, the
model's own forward runs once per batch with every block replaced by a recorder; so embedding scales, rotary
tables, masks and per-layer attention kinds are the model's, not ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quant.checkpoint.dtypes import TORCH
from quant.checkpoint.reader import Checkpoint
from quant.errors import CheckpointError
from quant.models.adapter import InputGroup, ModelAdapter, adapter_for
from quant.offline import load_config, transformers

_HOW_TO_ADD = (
    "add a row for it as docs/adapters.md shows, or use a method that needs no data (--method "
    "minmax), which takes any architecture"
)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter that a module registers goes to the meta device; buffers are left real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class _Recorded(Exception):
    """Raised by the last recorder: what follows the blocks is not needed."""


class _TakesFirst(Exception):
    """Raised where the model goes on with the first part of what a block returns: its blocks return tuples."""


class _Recorder(nn.Module):
    """Stands in for a block: keeps what it is called with and passes the hidden states on, in a tuple for a
    model that wants one. The last one stops the forward pass, or goes on with the ``result`` that the blocks
    would have given."""

    def __init__(
        self,
        block: nn.Module,
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]],
        last: bool,
        result: torch.Tensor | None,
        tuples: bool,
    ):
        super().__init__()
        object.__setattr__(self, "_block", block)
        self._calls, self._last, self._result, self._tuples = calls, last, result, tuples

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor]:
        if self._calls and not self._tuples and hidden_states.shape == self._calls[-1][0][0].shape[1:]:
            raise _TakesFirst
        self._calls.append(((hidden_states, *args), kwargs))
        if self._last and self._result is None:
            raise _Recorded
        output = self._result if self._last and self._result is not None else hidden_states
        return (output,) if self._tuples else output

    # some models ask a block for its attention type before they call it
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with besides the hidden states; the same for all batches of one shape."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments of a block are equal, tensors inside them by value."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return type(a) is type(b)


def compute_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The dtype that blocks run in: the stored one; fp16 on a CPU runs as fp32, which a CPU multiplies
    faster."""
    stored = TORCH[checkpoint.dtype]
    if stored in (torch.bfloat16, torch.float32):
        return stored
    if stored == torch.float16:
        return stored if device.type == "cuda" else torch.float32
    return torch.bfloat16


class Skeleton:
    """A causal language model without weights. ``block_count`` blocks; :meth:`load_block` fills one,
    :meth:`free_block` empties it.

    Raises:
        CheckpointError: a model type transformers does not know, or blocks whose parameters and the file's
            tensors do not match one to one.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None = None):
        self.checkpoint, self.device = checkpoint, device
        self.dtype = dtype or compute_dtype(checkpoint, device)
        kind = str(checkpoint.config.get("model_type"))
        row = adapter_for(checkpoint.config)
        config = load_config(checkpoint.path)
        if hasattr(config, "quantization_config"):
            # weights come dequantized; transformers would build quantized modules
            del config.quantization_config
        try:
            with _parameters_on_meta(), torch.no_grad():
                self.model: nn.Module = transformers().AutoModelForCausalLM.from_config(
                    config, dtype=self.dtype
                )
        # an unknown class is a ValueError; a contradictory config fails inside a constructor in any way
        except Exception as error:
            raise CheckpointError(
                f"{checkpoint.path}: model type {kind!r} cannot be built as a causal language model "
                f"({str(error).splitlines()[0][:200]}): {_HOW_TO_ADD}"
            ) from error
        self.model.eval()
        self.config = config
        self.blocks_path = row.blocks if row else self._find_blocks(kind)
        self.blocks: nn.ModuleList = self.model.get_submodule(self.blocks_path)
        self._check_names(kind)
        self._tuples = False  # whether the model wants tuples from its blocks
        self._aliases: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            # a tied head is the embedding under a second name
            self._aliases.setdefault(id(parameter), []).append(name)
        self._outside = [
            names for names in self._aliases.values() if not names[0].startswith(self.blocks_path + ".")
        ]
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        self.adapter = row or ModelAdapter(kind, (kind,), self._probe_groups(kind), blocks=self.blocks_path)

    @property
    def block_count(self) -> int:
        return len(self.blocks)

    @property
    def vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]

    def block_prefix(self, index: int) -> str:
        return f"{self.blocks_path}.{index}."

    def _find_blocks(self, kind: str) -> str:
        """Path of the one list of equal modules as long as config.json says, of a family without a row."""
        count = getattr(self.config, "num_hidden_layers", None)
        paths = [
            path
            for path, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList)
            and len(module) == count
            and len({type(m) for m in module}) == 1
        ]
        if len(paths) != 1:
            raise CheckpointError(
                f"model type {kind!r} has {len(paths)} lists of {count} equal blocks, one is needed: "
                f"{_HOW_TO_ADD}"
            )
        return paths[0]

    def _check_names(self, kind: str) -> None:
        """Parameters of the blocks and tensors of the file must be the same names with the same shapes."""
        wrong = []
        for index in range(self.block_count):
            prefix = self.block_prefix(index)
            wanted = {prefix + n: tuple(p.shape) for n, p in self.blocks[index].named_parameters()}
            present = {n: i.shape for n, i in self.checkpoint.tensors.items() if n.startswith(prefix)}
            buffers = {prefix + n for n, _ in self.blocks[index].named_buffers()}
            wrong += [f"{n} is missing in the file" for n in wanted if n not in present]
            wrong += [f"{n} is in the file only" for n in present if n not in wanted and n not in buffers]
            wrong += [
                f"{n} is {present[n]} in the file, {wanted[n]} in the model"
                for n in wanted
                if present.get(n, wanted[n]) != wanted[n]
            ]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise CheckpointError(
                f"{self.checkpoint.path}: the file's tensors and the blocks of model type {kind!r} do not "
                "match one to one: "
                f"{'; '.join(wrong[:3])}{more}. {_HOW_TO_ADD[0].upper()}{_HOW_TO_ADD[1:]}"
            )

    def _probe_groups(self, kind: str) -> tuple[InputGroup, ...]:
        """Which linears of a block share an input, found by running the first block on two tokens and
        comparing the inputs' identity."""
        groups: dict[int, list[str]] = {}
        inputs: list[torch.Tensor] = []  # keeps them alive, so that identities are not reused
        handles = []
        try:
            (hidden,), calls = self.embed([torch.zeros(1, 2, dtype=torch.int64)])
            _, others = self.embed([torch.ones(1, 2, dtype=torch.int64)])
            if not all(
                _same(a.args, b.args) and _same(a.kwargs, b.kwargs)
                for a, b in zip(calls[1], others[1], strict=True)
            ):
                raise CheckpointError(
                    f"model type {kind!r} calls its blocks with values that depend on the tokens: "
                    f"{_HOW_TO_ADD}"
                )
            block = self.load_block(0)
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear):

                    def note(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                        inputs.append(args[0])
                        groups.setdefault(id(args[0]), []).append(name)

                    handles.append(module.register_forward_pre_hook(note))
            with torch.no_grad():
                self._tuples = isinstance(block(hidden, *calls[1][0].args, **calls[1][0].kwargs), tuple)
        except CheckpointError:
            raise
        except Exception as error:  # whatever a foreign model's code raises
            raise CheckpointError(
                f"a block of model type {kind!r} cannot be run ({str(error).splitlines()[0][:160]}): "
                f"{_HOW_TO_ADD}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
            self.free_block(0)
        if not groups:
            raise CheckpointError(f"a block of model type {kind!r} has no plain linear: {_HOW_TO_ADD}")
        return tuple(InputGroup(tuple(names), "") for names in groups.values())

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Holds everything but the blocks in memory: embeddings, final norm, head."""
        kept = {names[0]: self.model.get_parameter(names[0]) for names in self._outside}
        try:
            for names in self._outside:
                stored = next((n for n in names if n in self.checkpoint.tensors), None)
                if stored is None:
                    raise CheckpointError(
                        f"{self.checkpoint.path}: has no tensor {names[0]!r}, which the model needs, or has "
                        f"it by another name: {_HOW_TO_ADD}"
                    )
                value = self._parameter(self.checkpoint.read(stored))
                for name in names:
                    self._set(name, value)
            yield
        finally:
            for names in self._outside:
                for name in names:
                    self._set(name, kept[names[0]])

    def _run_outside(
        self, module: nn.Module, tokens: torch.Tensor, result: torch.Tensor | None
    ) -> tuple[Any, torch.Tensor, list[BlockCall]]:
        """Runs ``module`` (the whole model, or it without its head) on token ids [B, T] with recorders for
        blocks."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        parent_path, _, name = self.blocks_path.rpartition(".")
        parent, count, output = self.model.get_submodule(parent_path), len(self.blocks), None
        recorders = (
            _Recorder(b, calls, i == count - 1, result, self._tuples) for i, b in enumerate(self.blocks)
        )
        setattr(parent, name, nn.ModuleList(recorders))
        try:
            with torch.no_grad():
                output = module(input_ids=tokens.to(self.device), use_cache=False)
        except _Recorded:
            pass
        except _TakesFirst:
            self._tuples = True
            return self._run_outside(module, tokens, result)
        finally:
            setattr(parent, name, self.blocks)
        if len(calls) != count:
            raise CheckpointError(
                f"the model's forward called {len(calls)} of its {count} blocks: {_HOW_TO_ADD}"
            )
        return output, calls[0][0][0], [BlockCall(args[1:], kwargs) for args, kwargs in calls]

    def embed(self, batches: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], dict[int, list[BlockCall]]]:
        """Runs everything before the blocks.

        Args:
            batches: token ids, int64 [B, T] each.

        Returns:
            hidden states [B, T, H] of each batch, and by batch size the call of every block.
        """
        calls: dict[int, list[BlockCall]] = {}
        return list(self.embedded(batches, calls)), calls

    def embedded(
        self, batches: Sequence[torch.Tensor], calls: dict[int, list[BlockCall]]
    ) -> Iterator[torch.Tensor]:
        """:meth:`embed` batch by batch, for those who do not want all hidden states in memory at once;
        ``calls`` is filled on the way."""
        base = getattr(self.model, str(self.model.base_model_prefix), self.model)
        with self.outside():
            for batch in batches:
                _, states, recorded = self._run_outside(base, batch, None)
                calls.setdefault(len(batch), recorded)
                yield states

    def logits(self, batch: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] that the model's own norm and head make of the last block's output; call it inside
        :meth:`outside`."""
        output, _, _ = self._run_outside(self.model, batch, hidden)
        return output.logits

    def load_block(self, index: int, replaced: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
        """Fills a block from the checkpoint, or from ``replaced`` (file tensor name → value) where it has the
        name.

        Raises:
            CheckpointError: a weight with NaN or infinity.
        """
        prefix = self.block_prefix(index)
        for name in [n for n, _ in self.blocks[index].named_parameters()]:
            full = prefix + name
            value = replaced[full] if replaced and full in replaced else self.checkpoint.read(full)
            if not bool(torch.isfinite(value.sum(dtype=torch.float32))) and not bool(
                torch.isfinite(value).all()
            ):
                raise CheckpointError(
                    f"{self.checkpoint.info(full).file}: {full} holds NaN or infinity: the source is "
                    "damaged, fetch it again"
                )
            self._set(full, self._parameter(value))
        return self.blocks[index]

    def free_block(self, index: int) -> None:
        """Gives the block's memory back."""
        for name, parameter in list(self.blocks[index].named_parameters()):
            self._set(
                self.block_prefix(index) + name,
                nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False),
            )

    def _parameter(self, value: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(value.to(self.device, self.dtype), requires_grad=False)

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        path, _, last = name.rpartition(".")
        self.model.get_submodule(path)._parameters[last] = parameter
