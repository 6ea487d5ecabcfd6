"""What lies beside the tensors of an output for people: its report, its page, its model card, and what was
measured of it later."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from quant.checkpoint.reader import Checkpoint, open_checkpoint
from quant.checkpoint.writer import write_text
from quant.documents import read_document, whole_characters
from quant.errors import QuantError, UsageError
from quant.report.card import CARD, card, source_card
from quant.report.page import PAGE, page
from quant.report.value import REPORT, Report

#: The recipe of an output whose schemes were chosen for it.
RECIPE = "quant_recipe.yaml"
#: What ``quant evaluate --save`` measured.
EVALUATION = "quant_evaluation.json"
#: Of it, means with their errors, as far as they are there.
_MEASURED = ("kl", "top1", "source_perplexity", "top5", "kl_p99", "loss")


def write_report(
    folder: Path,
    report: Report,
    source: Checkpoint,
    others: Sequence[Path] = (),
    recipe: Mapping[str, Any] | None = None,
) -> None:
    """Writes the report, the page and the model card of a finished output, and its recipe where that was
    chosen.

    Args:
        folder: where the output is now; the report says where it will be.
        source: what it was made from.
        others: folders whose card is taken where the source has none.
        recipe: plain values that make the same output.
    """
    write_text(folder / REPORT, report.to_json())
    if recipe is not None:
        head = (
            f"# quant quantize --config {RECIPE} -o OUTPUT\n"
            "# makes this checkpoint again; how it was chosen is in the report.\n"
        )
        write_text(folder / RECIPE, head + yaml.safe_dump(dict(recipe), sort_keys=False, width=10**6))
    text = source_card([source.path, *others])
    write_text(folder / CARD, card(report, source.config, text, None))
    write_text(folder / PAGE, page(report, open_checkpoint(folder), None))


def load_evaluation(folder: str | Path) -> dict[str, Any] | None:
    """What was measured of an output; None where nothing was, or nothing that can be read."""
    try:
        value = whole_characters(read_document(Path(folder) / EVALUATION))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and _whole(value) else None


def _whole(value: Mapping[str, Any]) -> bool:
    def measured(x: object) -> bool:
        numbers = [x.get("mean"), x.get("standard_error")] if isinstance(x, dict) else [None]
        return all(isinstance(n, (int, float)) for n in numbers)

    return (
        isinstance(value.get("text"), str)
        and isinstance(value.get("tokens"), int)
        and isinstance(value.get("chunks"), int)
        and measured(value.get("perplexity"))
        and all(value.get(k) is None or measured(value[k]) for k in _MEASURED)
        and all(_whole_parts(value.get(k)) for k in ("domains", "positions"))
        and _whole_tasks(value.get("tasks"))
    )


def _whole_tasks(value: Any) -> bool:
    """Whether what lm-eval judged is all there, if it did."""
    if value is None:
        return True
    tasks = value.get("tasks") if isinstance(value, dict) else None
    return (
        isinstance(tasks, dict)
        and isinstance(value.get("version"), str)
        and all(
            isinstance(task, dict)
            and isinstance(task.get("documents"), int)
            and isinstance(task.get("metrics"), dict)
            and all(
                isinstance(m, dict)
                and isinstance(m.get("value"), (int, float))
                and all(isinstance(m.get(k), (int, float, type(None))) for k in ("source", "standard_error"))
                and isinstance(m.get("difference"), (dict, type(None)))
                for m in task["metrics"].values()
            )
            for task in tasks.values()
        )
    )


def _whole_parts(parts: Any) -> bool:
    """Whether what was measured by domain or position is all there; files of before have none."""
    if parts is None:
        return True
    judged = ("top1", "top5", "kl_p99")
    numbers = ("kl_max", "perplexity_increase")
    return isinstance(parts, list) and all(
        isinstance(p, dict)
        and isinstance(p.get("name"), str)
        and isinstance(p.get("tokens"), int)
        and (
            p.get("kl") is None
            or all(isinstance(p.get(k), dict) for k in judged)
            and all(isinstance(p.get(k), float) for k in numbers)
        )
        for p in parts
    )


def measured_kl(evaluation: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The divergence of :func:`load_evaluation` with the text that it was measured on, as a card has it."""
    if evaluation is None or not evaluation.get("kl"):
        return None
    return {**evaluation["kl"], "text": evaluation["text"]}


def savable(folder: str | Path) -> str | None:
    """Why numbers cannot be kept beside a checkpoint, or None."""
    if Report.load(folder) is not None:
        return None
    return (
        f"{folder}: --save keeps the numbers beside a {REPORT}, and there is none: it was not made by quant "
        "quantize or export-vllm; take --json instead"
    )


def save_evaluation(folder: str | Path, value: Mapping[str, Any]) -> list[Path]:
    """Keeps what was measured beside the output, and renews its page and its card.

    Args:
        value: as :meth:`quant.evaluation.quality.Evaluation.to_dict` has it.

    Returns:
        the files that were written.

    Raises:
        QuantError: the folder has no report of ours.
    """
    folder = Path(folder)
    report = Report.load(folder)
    if report is None:
        raise QuantError(savable(folder))
    checkpoint = open_checkpoint(folder)
    write_text(folder / EVALUATION, json.dumps(dict(value), indent=2) + "\n")
    kept = load_evaluation(folder)
    write_text(folder / PAGE, page(report, checkpoint, kept))
    old = source_card([folder])
    write_text(folder / CARD, card(report, checkpoint.config, old, measured_kl(kept)))
    return [folder / name for name in (EVALUATION, PAGE, CARD)]


def write_page(
    folders: Sequence[Path], values: Sequence[Mapping[str, Any]], output: Path | None = None
) -> Path:
    """Writes the page of one output, or of several; returns where.

    Args:
        values: of :func:`quant.report.compare.summaries`.
        output: the file; None: the page in the only folder.

    Raises:
        UsageError: a file that is there and no page, or a folder that is not there.
    """
    from quant.report.compare import comparison_page

    if len(folders) == 1:
        report = Report.load(folders[0])
        assert report is not None  # its summary was made of it
        text = page(report, open_checkpoint(folders[0]), load_evaluation(folders[0]))
        output = folders[0] / PAGE if output is None else output
    else:
        text = comparison_page(values)
    assert output is not None
    if output.is_dir() or not output.absolute().parent.is_dir():
        kind = "is a folder" if output.is_dir() else "lies in a folder that is not there"
        raise UsageError(f"--output is {str(output)!r}: it {kind}: name an .html file")
    if output.exists() and not output.read_bytes()[:15].lower().startswith(b"<!doctype html"):
        raise UsageError(f"--output is {str(output)!r}: a file is there that is no page: name another one")
    write_text(output, text)
    return output
