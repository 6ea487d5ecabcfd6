"""Whether two unquantized checkpoints are one function: the same logits for the same text, in fp32."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quant.calibration.files import bundled
from quant.calibration.text import evaluation_rows
from quant.checkpoint.reader import open_checkpoint
from quant.evaluation.quality import Runner
from quant.offline import load_tokenizer
from quant.progress import silent
from quant.vllm.context import context_length

ROWS, TOKENS = 4, 128
#: The most that KL may be, in nats per token. Rounding weights once to bf16 moves it by about 1e-5; a factor
#: that is missing on one side by whole nats.
LARGEST_KL = 1e-4


@dataclass(frozen=True)
class Preservation:
    """How far a checkpoint's logits are from its source's.

    Attributes:
        kl: mean KL(source ‖ candidate), nats per token.
        difference: the largest |candidate - source| of the logits, relative to the largest |source| of its
            token.
    """

    kl: float
    difference: float
    tokens: int

    @property
    def preserved(self) -> bool:
        return math.isfinite(self.difference) and self.kl < LARGEST_KL

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"preserved": self.preserved}


def preservation(source: Path, candidate: Path, device: torch.device) -> Preservation:
    """Runs a few rows of the bundled evaluation text through both.

    Raises:
        QuantError: one that cannot be run here.
    """
    checkpoint = open_checkpoint(source)
    length = min(TOKENS, context_length(checkpoint.config) or TOKENS)
    rows = evaluation_rows(load_tokenizer(source), bundled("wikitext-2-test"), length, ROWS)
    both = []
    for path in (source, candidate):
        runner = Runner(open_checkpoint(path), device)
        (hidden,) = runner.hidden([rows], silent, "check")
        with runner.skeleton.outside():
            both.append(runner.skeleton.logits(rows, hidden).float())
    wanted, got = both
    logs = wanted.log_softmax(-1)
    kl = float((logs.exp() * (logs - got.log_softmax(-1))).sum(-1).mean())
    difference = float(((got - wanted).abs().amax(-1) / wanted.abs().amax(-1).clamp_min(1e-30)).max())
    return Preservation(kl, difference, rows.numel())
