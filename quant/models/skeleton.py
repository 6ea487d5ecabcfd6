"""transformers' own model, built without weights, whose blocks are filled one at a time.

Parameters live on the meta device until a block is loaded. Buffers that no file holds (rotary frequencies,
embedding scales) are built for real by the model's constructor. To learn what each block is called with, the
model's own forward runs once per batch with every block replaced by a recorder; so embedding scales, rotary
tables, masks and per-layer attention kinds are the model's, not ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from quant.checkpoint.dtypes import TORCH
from quant.checkpoint.reader import Checkpoint
from quant.errors import CheckpointError, NotFinite, first_line
from quant.models.adapter import InputGroup, adapter_for
from quant.models.binding import BlockLinear, bind
from quant.models.calls import BlockCall, CallSharing, call_block
from quant.models.classes import CannotRun, text_models
from quant.models.experts import STAGES, Experts, experts_passed_over, find_experts
from quant.models.products import linears_widened
from quant.models.roles import leftover
from quant.models.sources import SourceFinder
from quant.offline import load_config
from quant.tensors import all_finite
from quant.vllm.config import head_size, model_types, text_config
from quant.vllm.layers import is_head
from quant.vllm.names import unread_note

#: Modules of a wrapper that no text goes through.
_TOWER = re.compile(
    r"(^|\.)(visual|vision|audio|image|multi_modal|mm_|connector|embed_vision|embed_audio)\w*(\.|$)"
)
#: Tokens that a block is run on to see what makes its inputs.
_SOURCE_TOKENS = 8


class _Recorded(Exception):
    """Raised by the last recorder: what follows the blocks is not needed."""


class _TakesFirst(Exception):
    """Raised where the model goes on with the first part of what a block returns: its blocks return
    tuples."""


class _Recorder(nn.Module):
    """Stands in for a block: keeps what it is called with and passes the hidden states on, in a tuple of as
    many values as the model wants. The ``last`` one stops the forward pass, or goes on with the ``result``
    that the blocks would have given."""

    def __init__(
        self,
        block: nn.Module,
        index: int,
        calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]],
        last: bool,
        result: torch.Tensor | None,
        values: int,
    ):
        super().__init__()
        object.__setattr__(self, "_block", block)
        self._index, self._calls, self._last, self._result = index, calls, last, result
        self._values = values

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
        before = next(reversed(self._calls.values()), None)
        if before and not self._values and hidden_states.shape == before[0][0].shape[1:]:
            raise _TakesFirst
        if self._index in self._calls:
            raise CheckpointError(f"the model's forward calls block {self._index} more than once")
        self._calls[self._index] = ((hidden_states, *args), kwargs)
        if self._last and self._result is None:
            raise _Recorded
        output = self._result if self._last and self._result is not None else hidden_states
        return (output, *[None] * (self._values - 1)) if self._values else output

    # some models ask a block for its attention type before they call it
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)


def compute_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The dtype that blocks run in: the stored one; fp16 on a CPU runs as fp32, which a CPU multiplies
    faster."""
    stored = TORCH[checkpoint.dtype]
    if stored in (torch.bfloat16, torch.float32):
        return stored
    if stored == torch.float16:
        return torch.float32 if device.type == "cpu" else stored
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
        text = text_config(checkpoint.config)
        self.kind = str(text.get("model_type") or checkpoint.config.get("model_type"))
        self._row = adapter_for(text) or adapter_for(checkpoint.config)
        config = load_config(checkpoint.path)
        for part in (config, config.get_text_config()):
            if hasattr(part, "quantization_config"):
                del (
                    part.quantization_config
                )  # weights come dequantized; transformers would build quantized modules
        problem: CannotRun | None = None
        for model in text_models(config, checkpoint, self.dtype, self.kind):
            try:
                self._take(model)
                break
            except CannotRun as error:  # another class of the model may have the names of the file
                problem = problem or error
        else:
            assert problem is not None
            raise problem
        self._values = 0  # in the tuple that the model wants from a block; 0: it wants the states alone
        self._last: int | None = None  # the last block that is called; None until a pass has shown it
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
        self._traced: dict[Any, tuple[InputGroup, ...]] = {}
        self._sourced: dict[Any, tuple[InputGroup, ...]] = {}
        self._probes: dict[tuple[int, ...], tuple[torch.Tensor, list[BlockCall]]] = {}

    def _take(self, model: nn.Module) -> None:
        """Makes a model, whose parameters are on the meta device, the one whose blocks are filled.

        Raises:
            CannotRun: it has no list of blocks, or others than the file.
        """
        self.model = model.eval()
        for module in model.modules():
            part = getattr(module, "config", None)
            if part is not None and hasattr(part, "_experts_implementation"):
                part._experts_implementation = "eager"  # one expert after another, on any device
        self.config = model.config.get_text_config()  # type: ignore[operator,union-attr]
        self.blocks_path = self._row.blocks if self._row else self._find_blocks()
        try:
            blocks: Any = model.get_submodule(self.blocks_path)
        except AttributeError as error:  # of a row that is written for another class
            raise CannotRun(f"model type {self.kind!r} has no blocks at {self.blocks_path!r}") from error
        self.blocks: nn.ModuleList = blocks
        self.binding = bind(model, self.blocks_path, len(self.blocks), self.checkpoint)
        self._left_out = [
            re.compile(pattern)
            for module in model.modules()
            for pattern in getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
        ]
        self._check_names()

    @property
    def norm_offset(self) -> float:
        """What is added to a norm's stored weight to get its gain."""
        return self._row.norm_offset if self._row else 0.0

    @property
    def block_count(self) -> int:
        return len(self.blocks)

    @property
    def vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]

    @property
    def outputs(self) -> int:
        """Logits of a token: those of the head, which may be fewer than the embedding has rows (Llama 3.2
        Vision's image token has no logit)."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        return int(head.weight.shape[0]) if isinstance(head, nn.Linear) else self.vocabulary

    def block_prefix(self, index: int) -> str:
        """What comes before the names inside a block, as the file has them."""
        return self.binding.prefixes[index]

    def linears(self, index: int) -> Mapping[str, BlockLinear]:
        """The linears of a block by their names inside it, as the file has them."""
        return self.binding.linears[index]

    def groups(self, index: int) -> tuple[InputGroup, ...]:
        """The linears of a block that share an input; their names are the file's.

        Raises:
            CheckpointError: a family without a row, and a block that cannot be run to see it.
        """
        if self._row is not None:
            return self._row.groups
        kind = self.layout(index)
        if kind not in self._traced:
            self._traced[kind] = self._trace(index)
        return self._traced[kind]

    def sourced_groups(self, index: int) -> tuple[InputGroup, ...]:
        """:meth:`groups` with what makes their inputs, where a family without a row shows it; see
        :mod:`quant.models.sources`."""
        groups = self.groups(index)
        if self._row is not None or not groups:
            return groups
        kind = self.layout(index)
        if kind not in self._sourced:
            self._sourced[kind] = self._find_sources(index, groups)
        return self._sourced[kind]

    def layout(self, index: int) -> tuple[Any, ...]:
        """What blocks that are laid out alike have in common."""
        block = self.blocks[index]
        return (
            type(block),
            tuple(self.linears(index)),
            tuple((n, p.shape) for n, p in block.named_parameters()),
        )

    def _find_sources(self, index: int, groups: tuple[InputGroup, ...]) -> tuple[InputGroup, ...]:
        count = min(_SOURCE_TOKENS, self.vocabulary)
        hidden, calls = self.probe(range(count))
        self.give_state(index, [hidden], [calls])
        loaded = not any(p.is_meta for p in self.blocks[index].parameters())
        block = self.blocks[index] if loaded else self.load_block(index)
        path, prefix = f"{self.blocks_path}.{index}.", self.block_prefix(index)
        stored = {
            parameter.removeprefix(path): tensor.removeprefix(prefix)
            for parameter, tensor in self.binding.tensors.items()
            if parameter.startswith(path) and tensor.startswith(prefix)
        }
        try:
            with torch.no_grad():
                return SourceFinder(
                    block,
                    lambda: call_block(block, hidden.clone(), calls[index].trial()),
                    self.linears(index),
                    self.binding.modules[index],
                    stored,
                    head_size(self.checkpoint.config) or 1,
                ).sourced(groups)
        finally:
            if not loaded:
                self.free_block(index)

    def _find_blocks(self) -> str:
        """Path of the list of modules as long as config.json says (which may count two layers to each,
        LongCat), of a family without a row; of several the one with the most parameters."""
        count = getattr(self.config, "num_hidden_layers", None)
        lists: dict[str, nn.ModuleList] = {}
        for path, module in self.model.named_modules():
            if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{p}.") for p in lists):
                lists[path] = module
        fitting = [p for p, m in lists.items() if len(m) == count]
        fitting = fitting or [p for p, m in lists.items() if count and len(m) and count % len(m) == 0]
        if not fitting:
            raise CannotRun(f"model type {self.kind!r} has no list of {count} blocks", row=True)
        return max(fitting, key=lambda path: sum(p.numel() for p in lists[path].parameters()))

    def _check_names(self) -> None:
        """Every parameter of the blocks must be filled by tensors of its shape, and every matrix be used."""
        wrong = []
        tied = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        for index, block in enumerate(self.blocks):
            for name, parameter in block.named_parameters():
                full = f"{self.blocks_path}.{index}.{name}"
                tensor, parts = self.binding.tensors.get(full), self.binding.experts.get(full)
                if parts is not None:
                    place = {p: self._expert_shape(index, full, p) for _, p in parts}
                    short = len(parts) < self._experts_of(index, full).count * len(place)
                    wrong += [f"{full} lacks experts in the file"] if short else []
                    wrong += [
                        f"{ref.name} is {(ref.n, ref.k)} in the file, {place[p]} in the model"
                        for (_, p), ref in parts.items()
                        if (ref.n, ref.k) != place[p]
                    ]
                elif full in self.binding.converted:
                    pass  # transformers' own conversion checks the shapes
                elif tensor is None and (stored := self.binding.tensors.get(tied.get(full, ""))):
                    raise CannotRun(
                        f"{self.checkpoint.path}: blocks of model type {self.kind!r} share weights: {full} "
                        f"is {stored}, which the file has once, and calibration gives each block its own"
                    )
                elif tensor is None:
                    wrong.append(f"{full} is missing in the file")
                elif (shape := self.checkpoint.info(tensor).shape) != tuple(parameter.shape):
                    wrong.append(f"{tensor} is {shape} in the file, {tuple(parameter.shape)} in the model")
        wrong += [f"{n} is in the file only" for n in self.binding.unused if self._is_lost(n)]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise CannotRun(
                f"{self.checkpoint.path}: the file's tensors and the blocks of model type {self.kind!r} do "
                f"not match one to one: {'; '.join(wrong[:3])}{more}"
            )

    def _is_lost(self, tensor: str) -> bool:
        """Whether the model, which has no parameter for a tensor of the file, would compute without what it
        says. A bias of zeros says nothing: files of GPTQ have them beside every linear."""
        info = self.checkpoint.info(tensor)
        if leftover(info) or self._leaves_out(tensor):
            return False
        if len(info.shape) > 1:
            return True
        return tensor.endswith((".weight", ".bias")) and bool(self.checkpoint.read(tensor).any())

    def _leaves_out(self, tensor: str) -> bool:
        """Whether the model says itself that it has no parameter for a tensor of its files, as Gemma 3n and 4
        of the keys and values of layers that read another layer's."""
        return any(pattern.search(tensor) for pattern in self._left_out)

    def _expert_shape(self, index: int, parameter: str, projection: str) -> tuple[int, int]:
        """N and K of an expert's projection in the model."""
        value = self.model.get_parameter(parameter)
        part = self._experts_of(index, parameter).place(projection, 0, value.shape).view(value)
        return part.shape[0], part.shape[1]

    def _experts_of(self, index: int, parameter: str) -> Experts:
        """The experts module of a block that has a parameter."""
        path = parameter.removeprefix(f"{self.blocks_path}.{index}.").rpartition(".")[0]
        return next(e for e in find_experts(self.blocks[index]) if e.path == path)

    def _trace(self, index: int) -> tuple[InputGroup, ...]:
        """Which linears of a block share an input, found by running it on two tokens and comparing the
        inputs' identity."""
        groups: dict[Any, list[str]] = {}
        inputs: list[torch.Tensor] = []  # keeps them alive, so that identities are not reused
        names = self.binding.modules[index]
        loaded = not any(p.is_meta for p in self.blocks[index].parameters())
        handles = []

        def experts(path: str) -> None:
            for stage in STAGES:
                groups.setdefault((path, stage), [])

        try:
            hidden, calls = self.probe((0, 0))
            if not calls[index].runs:
                return ()
            self.give_state(index, [hidden], [calls])
            block = self.blocks[index] if loaded else self.load_block(index, experts=False)
            for path, name in names.items():

                def note(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                    inputs.append(args[0])
                    groups.setdefault(id(args[0]), []).append(name)

                handles.append(block.get_submodule(path).register_forward_pre_hook(note))
            with torch.no_grad(), experts_passed_over(block, experts):
                output = block(hidden, *calls[index].args, **calls[index].kwargs)
                self._values = len(output) if isinstance(output, tuple) else 0
        except CheckpointError:
            raise
        except Exception as error:  # whatever a foreign model's code raises
            raise CannotRun(
                f"block {index} of model type {self.kind!r} cannot be run ({first_line(error, 200)})",
                row=True,
            ) from error
        finally:
            for handle in handles:
                handle.remove()
            if not loaded:
                self.free_block(index)
        made = []
        for key, members in groups.items():
            if isinstance(key, tuple):
                if linears := self._expert_linears(index, *key):
                    made.append(InputGroup(linears, "", experts=key[0], stage=key[1]))
            else:
                made.append(InputGroup(tuple(dict.fromkeys(members)), ""))
        return tuple(made)

    def _expert_linears(self, index: int, path: str, stage: str) -> tuple[str, ...]:
        """Names of all experts' linears of one product, expert by expert; none where transformers makes the
        experts of the file's tensors in a way of its own."""
        if f"{self.blocks_path}.{index}.{path}.down_proj" not in self.binding.experts:
            return ()
        experts = next(e for e in find_experts(self.blocks[index]) if e.path == path)
        wanted = experts.projections if stage == "up" else ("down_proj",)
        places = {
            (x.place.expert, x.parameter, x.place.first): n for n, x in self.linears(index).items() if x.place
        }
        names = []
        for expert in range(experts.count):
            for projection in wanted:
                shape = self.blocks[index].get_parameter(experts.parameter(projection)).shape
                place = experts.place(projection, expert, shape)
                names.append(places[expert, experts.parameter(projection), place.first])
        return tuple(names)

    def _read_by_text(self, parameter: str) -> bool:
        """Whether a parameter outside of the blocks may be reached by text: it is no part of what a wrapper
        has for its other inputs."""
        above = self.blocks_path.rpartition(".")[0]
        return not _TOWER.search(parameter) and (
            parameter.startswith(f"{above}.") or is_head(parameter.rpartition(".")[0])
        )

    @contextmanager
    def outside(self, head: bool = True) -> Iterator[None]:
        """Holds everything but the blocks in memory: embeddings, final norm, and, unless ``head`` is false, a
        head of its own.

        Raises:
            CannotRun: the file lacks one.
            CheckpointError: it has parts by names that are not those of published files.
            NotFinite: one holds NaN or infinity.
        """
        kept = {names[0]: self.model.get_parameter(names[0]) for names in self._outside}
        try:
            for names in self._outside:
                if not head and all(is_head(n.rpartition(".")[0]) for n in names):
                    continue
                stored = next((self.binding.tensors[n] for n in names if n in self.binding.tensors), None)
                if stored is None and not any(self._read_by_text(n) for n in names):
                    continue
                if stored is None:
                    note = unread_note(model_types(self.checkpoint.config), self.checkpoint.tensors)
                    if note is not None:
                        raise CheckpointError(f"{self.checkpoint.path}: {note}")
                    raise CannotRun(
                        f"{self.checkpoint.path}: has no tensor {names[0]!r}, which the model needs, or has "
                        "it by another name"
                    )
                value = self._parameter(self._finite(stored))
                for name in names:
                    self._set(name, value)
            yield
        finally:
            for names in self._outside:
                for name in names:
                    self._set(name, kept[names[0]])

    def _run_outside(
        self, module: nn.Module, tokens: torch.Tensor, result: torch.Tensor | None, gradients: bool = False
    ) -> tuple[Any, torch.Tensor, list[tuple[tuple[Any, ...], dict[str, Any]] | None]]:
        """Runs ``module`` (the whole model, or it without its head) on token ids [B, T] with recorders for
        blocks; the values that each is called with, None of one that is not called, are not copied.
        ``gradients``: those of what comes of ``result`` can be taken."""
        calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        parent_path, _, name = self.blocks_path.rpartition(".")
        parent, count, output = self.model.get_submodule(parent_path), len(self.blocks), None
        last = count - 1 if self._last is None else self._last
        recorders = (
            _Recorder(b, i, calls, i == last, result, self._values) for i, b in enumerate(self.blocks)
        )
        setattr(parent, name, nn.ModuleList(recorders))
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        widened = nullcontext() if head is None else linears_widened(head)
        try:
            with torch.set_grad_enabled(gradients), widened:
                output = module(input_ids=tokens.to(self.device), use_cache=False)
        except _Recorded:
            pass
        except _TakesFirst:
            self._values = 1
            return self._run_outside(module, tokens, result, gradients)
        except ValueError as error:
            wanted = re.match(r"not enough values to unpack \(expected (\d+)", str(error))
            if wanted is None or int(wanted[1]) <= self._values:
                raise
            self._values = int(wanted[1])
            return self._run_outside(module, tokens, result, gradients)
        finally:
            setattr(parent, name, self.blocks)
        if not calls:
            raise CannotRun(f"the model's forward called none of its {count} blocks")
        if self._last is None:
            self._last = max(calls)
            if result is not None and self._last != last:
                return self._run_outside(module, tokens, result, gradients)
        return (
            output,
            calls[min(calls)][0][0],
            [None if (call := calls.get(i)) is None else (call[0][1:], call[1]) for i in range(count)],
        )

    def embed(self, batches: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[list[BlockCall]]]:
        """Runs everything before the blocks.

        Args:
            batches: token ids, int64 [B, T] each.

        Returns:
            hidden states of each batch, as the model's own embedding makes them ([B, T, H]; Gemma 3n: [P, B,
            T, H], P versions of each), and by batch the call of every block.
        """
        calls: list[list[BlockCall]] = []
        return list(self.embedded(batches, calls.append)), calls

    def probe(self, tokens: Sequence[int]) -> tuple[torch.Tensor, list[BlockCall]]:
        """:meth:`embed` of one short text, for a block that is run on trial: hidden states [1, T, H], and the
        call of every block. The head is not read, and the embedding once for all trials with this text, as
        both may be of some GiB; where blocks leave something for others, once for each trial."""
        key = tuple(tokens)
        if (found := self._probes.get(key)) is None:
            calls: list[list[BlockCall]] = []
            (hidden,) = self.embedded([torch.tensor([key])], calls.append, head=False)
            found = hidden, calls[0]
            if not any(call.state for call in found[1]):
                self._probes[key] = found
        return found[0].clone(), found[1]

    def embedded(
        self,
        batches: Sequence[torch.Tensor],
        keep: Callable[[list[BlockCall]], None],
        head: bool = True,
    ) -> Iterator[torch.Tensor]:
        """:meth:`embed` batch by batch, for those who do not want all hidden states in memory at once;
        ``keep`` is given each batch's calls on the way. ``head``: of :meth:`outside`."""
        base = getattr(self.model, str(self.model.base_model_prefix), self.model)
        sharing = CallSharing()
        with self.outside(head):
            for batch in batches:
                _, states, recorded = self._run_outside(base, batch, None)
                keep(sharing.calls(states, recorded))
                yield states

    def logits(
        self, batch: torch.Tensor, hidden: torch.Tensor, columns: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Logits [B, T, V] that the model's own norm and head make of the last block's output; call it inside
        :meth:`outside`.

        Args:
            columns: of the vocabulary, from the first to before the second of these numbers, of a head that
                :meth:`head_can_be_cut`: the model's own forward runs with these rows of it.
        """
        with self._head_rows(columns):
            output, _, _ = self._run_outside(self.model, batch, hidden)
        return output.logits

    @contextmanager
    def _head_rows(self, columns: tuple[int, int] | None) -> Iterator[None]:
        """While it lasts, the head has these rows alone."""
        if columns is None:
            yield
            return
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        whole = {n: p for n, p in head._parameters.items() if p is not None}
        try:
            # set behind the module's back: a tied embedding keeps its own
            for name, parameter in whole.items():
                head._parameters[name] = nn.Parameter(parameter[slice(*columns)], requires_grad=False)
            yield
        finally:
            head._parameters.update(whole)

    def head_can_be_cut(
        self, batch: torch.Tensor, hidden: torch.Tensor, ranges: Sequence[tuple[int, int]]
    ) -> bool:
        """Whether logits come a few columns at a time as they come all at once: the head is a plain linear,
        and what the model makes of its output (a cap, a scale) takes each value by itself. It is tried; call
        it inside :meth:`outside`.

        Args:
            batch, hidden: a few tokens, and their states.
            ranges: of columns that are to be asked for.
        """
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        if not isinstance(head, nn.Linear):
            return False
        whole = self.logits(batch, hidden)
        try:
            parts = torch.cat([self.logits(batch, hidden, columns) for columns in ranges], -1)
        except Exception:  # whatever a foreign model's code raises
            return False
        return parts.shape == whole.shape and torch.allclose(parts, whole, rtol=1e-4, atol=1e-4)

    def head_gradient(
        self, batch: torch.Tensor, hidden: torch.Tensor, upstream: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Gradient [B, T, H], by the last block's output, of what has the gradient ``upstream(logits)`` by
        the logits [B, T, V]; call it inside :meth:`outside`."""
        leaf = hidden.detach().requires_grad_()
        output, _, _ = self._run_outside(self.model, batch, leaf, gradients=True)
        logits = output.logits
        given = upstream(logits.detach()).to(logits.dtype)
        (made,) = torch.autograd.grad(logits, leaf, given)
        return made

    def give_state(
        self, index: int, hidden: Sequence[torch.Tensor], calls: Sequence[Sequence[BlockCall]]
    ) -> None:
        """Makes a block that reads what an earlier one leaves (keys and values) fit to run by itself, on
        states [B, T, H] that have not gone through the blocks before it: those nearest before it are run,
        until it has what it reads. Nothing is done for other blocks.

        Args:
            hidden, calls: as :meth:`embed` gives them.
        """
        if not any(call[index].state for call in calls):
            return
        states = min(range(len(hidden)), key=lambda b: hidden[b].numel())
        loaded = not any(p.is_meta for p in self.blocks[index].parameters())
        for earlier in range(index, -1, -1):
            if earlier < index:
                block = self.load_block(earlier)
                try:
                    with torch.no_grad():
                        for batch, call in zip(hidden, calls, strict=True):
                            call_block(block, batch.clone(), call[earlier])
                except (KeyError, TypeError):  # it reads what a still earlier one leaves, and leaves nothing
                    continue
                finally:
                    self.free_block(earlier)
            block = self.blocks[index] if loaded else self.load_block(index)
            try:
                with torch.no_grad():
                    call_block(block, hidden[states].clone(), calls[states][index].trial())
                return
            except (KeyError, TypeError):  # what it looks for is not there
                continue
            finally:
                if not loaded:
                    self.free_block(index)

    def load_block(
        self, index: int, replaced: Mapping[str, torch.Tensor] | None = None, *, experts: bool = True
    ) -> nn.Module:
        """Fills a block from the checkpoint, or from ``replaced`` (file tensor name → value) where it has the
        name; without ``experts`` those stay empty.

        Raises:
            NotFinite: a weight with NaN or infinity.
        """
        block, prefix = self.blocks[index], f"{self.blocks_path}.{index}."
        for name in [n for n, _ in block.named_parameters()]:
            parts = self.binding.experts.get(prefix + name)
            if (conversion := self.binding.converted.get(prefix + name)) is not None:
                made = conversion.value(self.checkpoint, self.model)
                self._set(prefix + name, self._parameter(made))
                continue
            if parts is None:
                tensor = self.binding.tensors[prefix + name]
                value = replaced[tensor] if replaced and tensor in replaced else self._finite(tensor)
                self._set(prefix + name, self._parameter(value))
                continue
            if not experts:
                continue
            whole = torch.zeros(block.get_parameter(name).shape, dtype=self.dtype, device=self.device)
            for linear in self.linears(index).values():
                if linear.parameter == name and linear.place is not None:
                    kept = replaced.get(f"{linear.ref.name}.weight") if replaced else None
                    if kept is None and replaced and linear.ref.tensor in replaced:
                        kept = linear.ref.weight.view(replaced[linear.ref.tensor])
                    value = kept if kept is not None else linear.ref.read(self.checkpoint)
                    # one by one: of all at once the check itself would take half of their memory
                    if not all_finite(value):
                        raise NotFinite(self.checkpoint.info(linear.ref.tensor).file, linear.ref.tensor)
                    linear.place.view(whole).copy_(value)
            self._set(prefix + name, nn.Parameter(whole, requires_grad=False))
        for name, buffer in block.named_buffers():
            if (stored := self.binding.tensors.get(prefix + name)) is not None:
                buffer.copy_(self.checkpoint.read(stored))
        return block

    def _finite(self, tensor: str) -> torch.Tensor:
        """A tensor of the file.

        Raises:
            NotFinite: it holds NaN or infinity.
        """
        value = self.checkpoint.read(tensor)
        if not all_finite(value):
            raise NotFinite(self.checkpoint.info(tensor).file, tensor)
        return value

    def free_block(self, index: int) -> None:
        """Gives the block's memory back."""
        for name, parameter in list(self.blocks[index].named_parameters()):
            empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
            self._set(f"{self.blocks_path}.{index}.{name}", empty)

    def _parameter(self, value: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(value.to(self.device, self.dtype), requires_grad=False)

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        path, _, last = name.rpartition(".")
        self.model.get_submodule(path)._parameters[last] = parameter
