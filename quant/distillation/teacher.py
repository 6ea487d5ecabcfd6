"""What the teacher says of every token, kept on disk: the log-probabilities of its likeliest tokens, and of
all others together.

The teacher runs once, block by block, so that it need not fit into memory beside its student; training reads
a row at a time. What is left of the vocabulary counts as one more token: the KL divergence between two such
coarsened distributions is a lower bound of the whole one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quant.checkpoint.journal import WorkFolder
from quant.checkpoint.writer import file_digest
from quant.evaluation.quality import Runner
from quant.progress import Event, Progress

#: Tokens of the vocabulary that are kept of each position.
LIKELIEST = 256
#: Rows that go through the teacher together; and values of logits that are in memory at a time.
_ROWS, _LOGITS = 8, 1 << 24
#: The least probability that what is left counts as.
_LEAST = 1e-9


@dataclass(frozen=True)
class Said:
    """Of some rows of tokens: ``tokens`` int64 [R, T, k], the likeliest, ``logs`` fp32 [R, T, k], their
    log-probabilities, and ``rest`` fp32 [R, T], the logarithm of what all others have together."""

    tokens: torch.Tensor
    logs: torch.Tensor
    rest: torch.Tensor

    def to(self, device: torch.device) -> Said:
        return Said(self.tokens.to(device), self.logs.to(device), self.rest.to(device))


def coarsened(
    logits: torch.Tensor, temperature: float | torch.Tensor, tokens: torch.Tensor | None = None
) -> Said:
    """The likeliest tokens of logits fp32 [..., V] at a temperature, or ``tokens`` [..., k], with their
    log-probabilities, and that of all others."""
    logs = torch.log_softmax(logits / temperature, -1)
    if tokens is None:
        top, tokens = logs.topk(min(LIKELIEST, logits.shape[-1]), -1)
    else:
        top = logs.gather(-1, tokens)
    left = (1 - top.exp().sum(-1)).clamp(min=_LEAST)
    return Said(tokens, top, left.log())


def divergence(teacher: Said, logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(teacher ‖ student) fp32 [...] of the coarsened distributions, in nats, from the student's logits
    [..., V]."""
    own = coarsened(logits, temperature, teacher.tokens)
    kept = (teacher.logs.exp() * (teacher.logs - own.logs)).sum(-1)
    return kept + teacher.rest.exp() * (teacher.rest - own.rest)


class Teacher:
    """The teacher's words on rows of tokens int64 [R, T], made once and read back from files in
    ``folder``; and its hidden states behind ``blocks``."""

    def __init__(self, folder: Path, rows: torch.Tensor, blocks: Sequence[int] = ()):
        self._folder, self._rows, self._blocks = folder, rows, tuple(blocks)

    @property
    def parts(self) -> int:
        """How many files there are."""
        return -(-len(self._rows) // _ROWS)

    def _file(self, part: int) -> Path:
        return self._folder / f"teacher-{part:05d}.safetensors"

    def ask(self, runner: Runner, temperatures: torch.Tensor, work: WorkFolder, progress: Progress) -> None:
        """Runs the teacher on those rows that no earlier run has asked it of.

        Args:
            temperatures: fp32 [R], at which each row's probabilities are wanted.
        """
        for part in range(self.parts):
            name = f"teacher {part}"
            progress(Event("teacher", part, self.parts))
            if name in work.finished:
                continue
            chosen = slice(part * _ROWS, (part + 1) * _ROWS)
            said = _asked(runner, self._rows[chosen], temperatures[chosen], self._blocks)
            save_file({k: v.contiguous() for k, v in said.items()}, self._file(part))
            work.finish_unit(name, {self._file(part): file_digest(self._file(part))}, {})
        progress(Event("teacher", self.parts, self.parts))

    def of(self, row: int) -> Said:
        """What it says of one row, [1, T - 1, k]."""
        part, place = divmod(row, _ROWS)
        with safe_open(self._file(part), "pt") as file:
            found = {k: file.get_slice(k)[place : place + 1] for k in ("tokens", "logs", "rest")}
        logs, rest = found["logs"].float(), found["rest"].float()
        # their sum is one but for what fp16 rounded off, with which a student's equal would be less than zero
        # away
        whole = torch.logsumexp(torch.cat([logs, rest[..., None]], -1), -1)
        return Said(found["tokens"].long(), logs - whole[..., None], rest - whole)

    def states(self, row: int) -> torch.Tensor:
        """Its hidden states of one row behind each of ``blocks``, fp32 [blocks, T, H]."""
        part, place = divmod(row, _ROWS)
        with safe_open(self._file(part), "pt") as file:
            found: torch.Tensor = file.get_slice("states")[place : place + 1]
        return found[0].float()


def state_distance(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """How far hidden states [..., H] are from the teacher's, fp32 []: the mean over tokens of ‖s - t‖² / ‖t‖²
    (the feature loss of Romero et al. 2015, arXiv:1412.6550, each token counted alike)."""
    apart = (student.float() - teacher).square().sum(-1)
    return (apart / teacher.square().sum(-1).clamp(min=1e-12)).mean()


def _asked(
    runner: Runner, rows: torch.Tensor, temperatures: torch.Tensor, blocks: Sequence[int]
) -> Mapping[str, torch.Tensor]:
    """Of rows [R, T]: int32 ``tokens`` and fp16 ``logs`` [R, T - 1, k], fp16 ``rest`` [R, T - 1]; where
    blocks are asked for, bf16 ``states`` [R, blocks, T, H]."""
    behind: dict[int, torch.Tensor] = {}

    def seen(block: int, hidden: list[torch.Tensor]) -> None:
        if block in blocks:
            behind[block] = hidden[0].bfloat16().cpu()

    (hidden,) = runner.hidden([rows], lambda event: None, "teacher", seen)
    skeleton = runner.skeleton
    step = max(1, _LOGITS // (skeleton.outputs * len(rows)))
    pieces = []
    with skeleton.outside(), torch.no_grad():
        for first in range(0, rows.shape[1] - 1, step):
            span = slice(first, min(first + step, rows.shape[1] - 1))
            states = hidden[..., span, :].contiguous()
            logits = skeleton.logits(rows[:, span], states).float()
            pieces.append(coarsened(logits, temperatures.to(logits.device)[:, None, None]))
    kept = {"states": torch.stack([behind[b] for b in blocks], 1)} if blocks else {}
    return kept | {
        "tokens": torch.cat([p.tokens for p in pieces], 1).int().cpu(),
        "logs": torch.cat([p.logs for p in pieces], 1).half().cpu(),
        "rest": torch.cat([p.rest for p in pieces], 1).half().cpu(),
    }
