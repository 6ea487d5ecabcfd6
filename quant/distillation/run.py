"""The training: AdamW on what the student may change, by what the teacher says of the same tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from quant import defaults
from quant.accelerator import device_name, device_of
from quant.calibration.text import Rows
from quant.checkpoint.journal import WorkFolder
from quant.checkpoint.reader import Checkpoint, open_checkpoint
from quant.checkpoint.writer import file_digest
from quant.distillation.student import Student, Trained, kind
from quant.distillation.teacher import LIKELIEST, Teacher, divergence, state_distance
from quant.errors import Problems, QuantError, UsageError
from quant.evaluation.agreement import file_problems
from quant.evaluation.quality import Runner
from quant.evaluation.verify import vllm_refusals
from quant.formats import find_format
from quant.offline import load_tokenizer
from quant.pipeline.checks import check_disk, output_problems
from quant.pipeline.fingerprint import fingerprint
from quant.pipeline.memory import peak_rss
from quant.pipeline.plain import write_plain
from quant.pipeline.rows import Measured, measured_rows
from quant.progress import Event, Progress, silent
from quant.report.files import write_report
from quant.report.value import Provenance, Report, Teaching
from quant.tensors import all_finite
from quant.vllm.config import block_count, stated, vocabulary_size, whole_number

#: Learning rates where none is given: of all weights, and of norms and scales as shares of themselves.
RATES: Mapping[str, float] = {"weights": 2e-4, "numbers": 5e-3}
#: Seconds between two states that are kept for a run that goes on.
_KEPT_EVERY = 60.0
#: The largest norm of a step's gradient.
_CLIP = 1.0
#: Blocks whose hidden states are held against the teacher's.
_FEATURES = 4
#: Share of the steps in which the learning rate rises.
_WARM_UP = 0.05


@dataclass(frozen=True)
class Distillation:
    """How a student is taught.

    Attributes:
        steps: of the optimizer; ``batch``: rows a step, ``accumulate`` as many times.
        learning_rate: the highest, from which it falls as a cosine to a hundredth; None: :data:`RATES`.
        temperature: at which both distributions are compared while training; ``alpha``: share of that in the
            loss, the rest being the cross-entropy of the text itself.
        feature_weight: of the distance of hidden states behind some blocks from those of the teacher's blocks
            that they were (:func:`matched`), beside the rest of the loss.
        train: ``weights`` or ``numbers``; None: what suits the student.
        held_out: rows that are judged on and not trained with; ``judge_every``: steps between two judgements;
            ``patience``: judgements without a better one after which it ends; 0: never.
        recompute: keep blocks' inputs alone, and run them again on the way back.
        calibration_dataset, samples, sequence_length, shuffle, seed: the text, as a recipe has it.
    """

    steps: int = 200
    batch: int = 4
    accumulate: int = 1
    learning_rate: float | None = None
    temperature: float = 1.0
    alpha: float = 1.0
    feature_weight: float = 0.0
    train: Trained | None = None
    held_out: int = 8
    judge_every: int = 20
    patience: int = 5
    recompute: bool = False
    calibration_dataset: Sequence[Path] = field(default_factory=list)
    samples: int = defaults.LESSON_SAMPLES
    sequence_length: int | None = None
    shuffle: bool = False
    seed: int = defaults.SEED
    device: str | None = None

    def __post_init__(self) -> None:
        least = {
            "samples": 1,
            "steps": 1,
            "batch": 1,
            "accumulate": 1,
            "held_out": 1,
            "judge_every": 1,
            "patience": 0,
        }
        for name, bound in least.items():
            if not bound <= getattr(self, name) <= 10_000_000:
                raise UsageError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}: a whole number from {bound} up"
                )
        if not (math.isfinite(self.temperature) and 0.05 <= self.temperature <= 100):
            raise UsageError(f"--teacher-temperature is {self.temperature}: a number from 0.05 to 100")
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"--teacher-share is {self.alpha}: the teacher's share of the loss, from 0 to 1")
        if not (math.isfinite(self.feature_weight) and 0 <= self.feature_weight <= 1000):
            raise UsageError(f"--feature-weight is {self.feature_weight}: a number from 0 to 1000")
        if self.learning_rate is not None and not 0 < self.learning_rate <= 1:
            raise UsageError(f"--learning-rate is {self.learning_rate}: above 0 and at most 1")

    def rate(self, step: int, trained: str) -> float:
        """The learning rate of a step."""
        highest = self.learning_rate or RATES[trained]
        warm = max(1, round(_WARM_UP * self.steps))
        if step < warm:
            return highest * (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        return highest * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))

    def settings(self) -> dict[str, Any]:
        """What decides the output's bytes."""
        skipped = ("calibration_dataset", "device")
        return {k: v for k, v in vars(self).items() if k not in skipped}


def distill(
    model_path: str | Path,
    teacher_path: str | Path,
    output_path: str | Path,
    how: Distillation,
    progress: Progress = silent,
    command: Sequence[str] | None = None,
    fresh: bool = False,
) -> Report:
    """Trains the student ``model_path`` by the teacher ``teacher_path`` and writes what it became: a
    checkpoint of the student's own format, names, shapes and codes.

    What the teacher said and the state of the training are kept, so that the same call goes on where one was
    killed, to the same bytes.

    Raises:
        Problems, UsageError, QuantError: what stands against it, all together, before any work.
    """
    start = time.perf_counter()
    output, device = Path(output_path), device_of(how.device)
    checkpoint, origin = open_checkpoint(model_path), open_checkpoint(teacher_path)
    problems = output_problems(checkpoint.path, output)
    for one in (checkpoint, origin):
        problems += [f"{one.path}: {line}" for line in file_problems(one, build=True)]
    sizes = [vocabulary_size(c.config) for c in (checkpoint, origin)]
    if sizes[0] != sizes[1]:
        problems.append(
            f"{checkpoint.path}: has a vocabulary of {sizes[0]}, its teacher {origin.path} one of {sizes[1]}"
            ": a teacher of the same tokens is needed"
        )
    problems += [p for p in output_problems(origin.path, output) if p not in problems]
    if problems:
        raise Problems(problems)
    _demand_one_tokenizer(checkpoint, origin)
    kind(checkpoint, how.train)
    target = _target(checkpoint, progress)
    places = matched(checkpoint, origin) if how.feature_weight else {}
    rows = _rows(checkpoint, how)
    width = len(places) * (whole_number(stated(origin.config, "hidden_size")) or 0)
    check_disk(output, 3 * checkpoint.nbytes + rows.tokens.numel() * (6 * LIKELIEST + 2 * width))
    # the last rows judge
    training = len(rows.tokens) - how.held_out
    work = WorkFolder(output.absolute(), fingerprint(checkpoint, how.settings(), rows, device, origin), fresh)
    try:
        teacher = Teacher(work.path, rows.tokens, list(places.values()))
        at = torch.ones(len(rows.tokens))
        at[:training] = how.temperature
        if any(f"teacher {p}" not in work.finished for p in range(teacher.parts)):
            teacher.ask(Runner(origin, device), at, work, progress)
        told = time.perf_counter()
        student = Student(checkpoint, device, how.train)
        student.watch(list(places))
        if how.recompute:
            student.run_again()
        lesson = _Lesson(student, teacher, rows.tokens, training, how, work, progress)
        lesson.go()
        taught = time.perf_counter()
        changed = student.changed()
        report = replace(
            write_plain(checkpoint, checkpoint, work, output, progress, changed, target),
            format=student.layers.format if student.layers else "plain",
            teaching=Teaching(trained=student.trained, changed=tuple(sorted(changed)), target=target),
        )
        end = time.perf_counter()
        report = _completed(
            report,
            origin,
            lesson,
            rows,
            {"teacher": told - start, "train": taught - told, "write": end - taught, "total": end - start},
            Provenance.here(command, device_name(device)),
        )
        write_report(work.path, report, checkpoint)
        work.publish(("teacher-*.safetensors", "state-*.safetensors"))
    finally:
        work.release()
    return report


def _target(checkpoint: Checkpoint, progress: Progress) -> str:
    """Who must load what is taught: whoever loads the student, whose format it keeps."""
    layers = find_format(checkpoint.config, checkpoint.tensors)
    refused = [] if layers is None else list(vllm_refusals(checkpoint, layers, layers.form))
    if refused:
        said = f"{checkpoint.path}: for another engine than vLLM, as what is made of it: {refused[0]}"
        progress(Event("student", message=said, warning=True))
    return "other" if refused else "vllm"


def _demand_one_tokenizer(checkpoint: Checkpoint, origin: Checkpoint) -> None:
    """
    Raises:
        UsageError: the teacher's tokenizer gives a token another number, so that it would teach nonsense.
    """
    if not (origin.path / "tokenizer_config.json").is_file():  # weights alone: the student's has to do
        return
    own, other = (load_tokenizer(c.path).get_vocab() for c in (checkpoint, origin))
    if different := sorted(t for t in own.keys() | other.keys() if own.get(t) != other.get(t)):
        raise UsageError(
            f"{checkpoint.path}: its tokenizer and that of the teacher {origin.path} differ in "
            f"{len(different)} tokens, {different[0]!r} is one: a teacher of the same tokens is needed"
        )


def matched(checkpoint: Checkpoint, origin: Checkpoint) -> dict[int, int]:
    """Blocks of a student behind which its hidden states are held against the teacher's, and the teacher's
    blocks that they were: :data:`_FEATURES` at even distances, the last one among them.

    Raises:
        UsageError: it is not known which of the teacher's blocks they were, or states are of another size.
    """
    counts = [block_count(c.config) or 0 for c in (checkpoint, origin)]
    report = Report.load(checkpoint.path)
    cut = None if report is None else report.pruning
    kept = list(cut.kept) if cut is not None and cut.blocks == counts[1] else list(range(counts[1]))
    sizes = [stated(c.config, "hidden_size") for c in (checkpoint, origin)]
    if len(kept) != counts[0] or sizes[0] != sizes[1]:
        raise UsageError(
            f"--feature-weight: {checkpoint.path} has {counts[0]} blocks of {sizes[0]} values, its teacher "
            f"{counts[1]} of {sizes[1]}, and no report of quant prune says which became which: leave it out"
        )
    number = min(_FEATURES, counts[0])
    return {b: kept[b] for b in (counts[0] * (n + 1) // number - 1 for n in range(number))}


def _rows(checkpoint: Checkpoint, how: Distillation) -> Rows:
    """Those of the lesson, and behind them those that judge."""
    text = Measured(
        how.calibration_dataset, how.samples + how.held_out, how.sequence_length, how.shuffle, how.seed
    )
    return measured_rows(checkpoint, text)


class _Lesson:
    """The loop over steps, and its state between two of them."""

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        rows: torch.Tensor,
        training: int,
        how: Distillation,
        work: WorkFolder,
        progress: Progress,
    ):
        self.student, self.teacher, self.rows, self.training = student, teacher, rows, training
        self.how, self.work, self.progress = how, work, progress
        self.optimizer = torch.optim.AdamW(
            list(student.values.values()), lr=1.0, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.step = 0
        self.losses: list[float] = []
        self.judged: list[tuple[int, float]] = []
        self.best = {n: v.detach().clone() for n, v in student.values.items()}
        self._saved = time.monotonic()

    @property
    def least(self) -> float:
        return min(kl for _, kl in self.judged)

    def go(self) -> None:
        """Trains to the end, from the state of an earlier run where there is one; the student has its best
        values then."""
        if (entry := self.work.finished.get("training")) is not None:
            self._restore(entry)
        if not self.judged:
            self._judge()
        ended = self._ended()
        while self.step < self.how.steps and not ended:
            self.losses.append(self._one())
            self.step += 1
            if self.step % self.how.judge_every == 0 or self.step == self.how.steps:
                self._judge()
                ended = self._ended()
            if ended or self.step == self.how.steps or time.monotonic() - self._saved > _KEPT_EVERY:
                self._save()
        with torch.no_grad():
            for name, value in self.best.items():
                self.student.values[name].copy_(value)

    def _ended(self) -> bool:
        values = [kl for _, kl in self.judged]
        since = len(values) - 1 - values.index(min(values))
        return bool(self.how.patience) and since >= self.how.patience

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed((self.how.seed + 1_000_003 * epoch) % 2**63)
        return torch.randperm(self.training, generator=generator).tolist()

    def _next(self, number: int) -> int:
        """The row that comes at a place of the whole training."""
        epoch, place = divmod(number, self.training)
        return int(self._order(epoch)[place])

    def _one(self) -> float:
        """A step; returns its loss."""
        how, total = self.how, 0.0
        each = how.batch * how.accumulate
        for group in self.optimizer.param_groups:
            group["lr"] = how.rate(self.step, self.student.trained)
        self.optimizer.zero_grad(set_to_none=True)
        for part in range(how.accumulate):
            first = self.step * each + part * how.batch
            chosen = [self._next(first + i) for i in range(how.batch)]
            overrides = self.student.overrides()
            with self.student.computing(overrides):
                loss = sum(self._loss(row) for row in chosen) / each
                assert isinstance(loss, torch.Tensor)
                loss.backward()
            total += float(loss.detach())
        values = list(self.student.values.values())
        torch.nn.utils.clip_grad_norm_(values, _CLIP)
        if not math.isfinite(total) or not all(v.grad is None or all_finite(v.grad) for v in values):
            raise QuantError(
                f"the loss or its gradients are not finite at step {self.step}: use a lower --learning-rate "
                f"than {how.learning_rate or RATES[self.student.trained]:g}, with --fresh"
            )
        self.optimizer.step()
        self.progress(Event("training", self.step + 1, how.steps, detail=f"loss {total:.4f}"))
        return total

    def _loss(self, row: int) -> torch.Tensor:
        """Of one row: the divergence from the teacher times T², as Hinton et al. 2015 (arXiv:1503.02531) have
        it, the cross-entropy of the text, and the distance of hidden states."""
        how, tokens = self.how, self.rows[row : row + 1]
        logits = self.student.logits(tokens)[:, :-1]
        loss = torch.zeros((), device=logits.device)
        if how.alpha:
            said = self.teacher.of(row).to(logits.device)
            loss = loss + how.alpha * how.temperature**2 * divergence(said, logits, how.temperature).mean()
        if how.alpha < 1:
            wanted = tokens[:, 1:].flatten().to(logits.device)
            text = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted)
            loss = loss + (1 - how.alpha) * text
        if how.feature_weight:
            pairs = zip(self.teacher.states(row), self.student.states.values(), strict=True)
            far = [state_distance(said.to(own.device), own) for said, own in pairs]
            loss = loss + how.feature_weight * torch.stack(far).mean()
        return loss

    def _judge(self) -> None:
        """KL to the teacher on held-out rows; the best values are kept."""
        total = 0.0
        with torch.no_grad(), self.student.computing(self.student.overrides()):
            for row in range(self.training, len(self.rows)):
                self.progress(Event("judging", row - self.training, len(self.rows) - self.training))
                logits = self.student.logits(self.rows[row : row + 1])[:, :-1]
                total += float(divergence(self.teacher.of(row).to(logits.device), logits).mean())
        kl = max(
            0.0, total / (len(self.rows) - self.training)
        )  # sums of a student like its teacher are rounded
        if not self.judged or kl < self.least:
            self.best = {n: v.detach().clone() for n, v in self.student.values.items()}
        self.judged.append((self.step, kl))
        self.progress(Event("training", message=f"step {self.step}: held-out KL {kl:.5f}"))

    def _save(self) -> None:
        """Keeps the state, and lets the one before go."""
        tensors = {}
        for name, value in self.student.values.items():
            tensors[f"value {name}"], tensors[f"best {name}"] = value.detach(), self.best[name]
            for key, kept in self.optimizer.state[value].items():
                tensors[f"{key} {name}"] = kept if isinstance(kept, torch.Tensor) else torch.tensor(kept)
        file = self.work.path / f"state-{self.step:08d}.safetensors"
        save_file({k: v.cpu().contiguous().clone() for k, v in tensors.items()}, file)
        facts = {"training": {"step": self.step, "losses": self.losses, "judged": self.judged}}
        self.work.finish_unit("training", {file: file_digest(file)}, facts)
        for other in self.work.path.glob("state-*.safetensors"):
            if other != file:
                other.unlink()
        self._saved = time.monotonic()

    def _restore(self, entry: Mapping[str, Any]) -> None:
        tensors = load_file(self.work.path / entry["files"][0]["name"])
        device = self.student.device
        for name, value in self.student.values.items():
            with torch.no_grad():
                value.copy_(tensors[f"value {name}"])
            self.best[name] = tensors[f"best {name}"].to(device)
            keys = [k.partition(" ")[0] for k in tensors if k.partition(" ")[2] == name]
            self.optimizer.state[value] = {
                k: tensors[f"{k} {name}"].to(device if k != "step" else "cpu")
                for k in keys
                if k not in ("value", "best")
            }
        found = entry["training"]
        self.step, self.losses = int(found["step"]), [float(x) for x in found["losses"]]
        self.judged = [(int(s), float(kl)) for s, kl in found["judged"]]
        self.progress(Event("training", message=f"resuming at step {self.step} of {self.how.steps}"))


def _completed(
    report: Report,
    origin: Checkpoint,
    lesson: _Lesson,
    rows: Rows,
    seconds: Mapping[str, float],
    provenance: Provenance,
) -> Report:
    """The report with all that was measured on the way."""
    assert report.teaching is not None
    how = lesson.how
    teaching = replace(
        report.teaching,
        teacher=str(origin.path),
        steps=lesson.step,
        rows=lesson.training,
        losses=tuple(lesson.losses),
        judged=tuple(lesson.judged),
        settings=how.settings() | {"learning_rate": how.learning_rate or RATES[report.teaching.trained]},
        calibration=rows.to_dict(),
    )
    return replace(
        report,
        seconds={k: round(v, 3) for k, v in seconds.items()},
        peak_rss_bytes=peak_rss(),
        teaching=teaching,
        provenance=provenance,
    )
