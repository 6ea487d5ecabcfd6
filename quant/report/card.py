"""The model card of an output: README.md with the metadata that the Hugging Face Hub reads (its docs,
"Model Cards": base_model, base_model_relation, tags, license), then what was made and how to serve it, then
what the source's card says."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quant import defaults
from quant.documents import YAML_FAULTS
from quant.hub import REPOSITORY, repository_of
from quant.report.value import Report
from quant.units import format_size, mean_and_error

CARD = "README.md"
#: What a card of ours begins its part with, and ends it.
_BEGIN, _END = "<!-- written by quant -->", "<!-- the source's card follows -->"
#: Metadata that hold for a quantized copy as well.
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")


def base_model(source: Path, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> str | None:
    """The Hub id of what a checkpoint was made from, where it is known: by the folder of the hub's cache that
    it lies in; by its own card, where that is of a quantized copy; by what config.json says it is from.
    """
    if (repository := repository_of(source)) is not None:
        return repository
    stated = metadata.get("base_model")
    if metadata.get("base_model_relation") == "quantized":
        stated = stated[0] if isinstance(stated, list) and stated else stated
        if isinstance(stated, str) and REPOSITORY.fullmatch(stated):
            return stated
    name = config.get("_name_or_path")
    if isinstance(name, str) and REPOSITORY.fullmatch(name) and not Path(name).exists():
        return name
    return None


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """A card's metadata and its text; without those that are no YAML mapping. Of a card of ours the text is
    the source's."""
    import yaml

    metadata: dict[str, Any] = {}
    match = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)(.*)", text, re.S)
    body = text
    if match:
        try:
            value = yaml.safe_load(match[1])
        except (yaml.YAMLError, *YAML_FAULTS):
            value = None
        if isinstance(value, dict):
            metadata, body = value, match[2]
    if _BEGIN in body:
        body = body.partition(_END)[2]
    return metadata, body.strip()


def card(
    report: Report,
    config: Mapping[str, Any],
    source_card: str,
    kl: Mapping[str, Any] | None,
    repository: str | None = None,
) -> str:
    """The text of README.md. Nothing in it varies between runs of one job.

    Args:
        config: config.json of the source.
        source_card: the source's README.md, or empty.
        kl: ``mean`` and ``standard_error`` in nats per token, with ``text``; None where it was not measured.
        repository: the Hub id that it is uploaded to, by which vLLM then serves it.
    """
    metadata, body = split_card(source_card)
    job, source = report.quantization, Path(report.source_path)
    origin = base_model(source, config, metadata)
    name = repository.partition("/")[2] if repository else Path(report.output_path).name
    schemes = list(dict.fromkeys(x.scheme for x in job.layers)) if job is not None else []
    scheme = str(job.scheme.get("name", "")) if job is not None else ""
    made = job is not None and not defaults.UNROUNDED.issuperset(job.methods)
    pruned = report.pruning is not None or (job is not None and job.prunes)
    bits = (job.scheme.get("weights") or {}).get("bits") if job is not None and made else None
    tags = ["quant", "vllm"]
    if made and job is not None:
        tags = ["quantized", *job.methods, scheme, *([f"{bits}-bit"] if bits else []), report.format, *tags]
    elif report.format != "plain":
        tags = ["quantized", report.format, *tags]
    elif pruned:
        tags = ["pruned", *(job.methods if job is not None else ()), *tags]
    head: dict[str, Any] = {k: metadata[k] for k in _KEPT if k in metadata}
    if origin is not None:
        head |= {"base_model": [origin]}
        if made or report.format != "plain":
            head["base_model_relation"] = "quantized"
    head["tags"] = list(dict.fromkeys(t for t in tags if t))
    what = f"[{origin}](https://huggingface.co/{origin})" if origin else f"`{source.name}`"
    rows = [("made from", what), ("format", report.format)]
    if job is not None:
        rows += [("scheme", ", ".join(schemes) or scheme), ("method", " and ".join(job.methods))]
        if job.bits_per_weight is not None:
            rows.append(("bits per weight", f"{job.bits_per_weight:g}"))
    rows.append(
        ("size", f"{format_size(report.source_bytes)} → {format_size(report.output_bytes)} of tensors")
    )
    if (cut := report.pruning) is not None:
        rows += cut.summary
    if (taught := report.teaching) is not None and taught.before is not None and taught.after is not None:
        rows.append(("taught by", Path(taught.teacher).name))
        rows.append(("held-out KL to it", f"{taught.before:.5f} → {taught.after:.5f} nats per token"))
    if job is not None and job.calibration:
        rows.append(
            ("calibration", f"{job.calibration.get('rows')} rows of {job.calibration.get('length')} tokens")
        )
    if kl is not None:
        rows.append(
            (
                "KL divergence to the source",
                f"{mean_and_error(kl, '.5f')} nats per token ({Path(kl['text']).name})",
            )
        )
    lines = ["---", _front(head), "---", _BEGIN, f"# {name}", ""]
    lines.append(
        f"A {'quantized ' if made else 'pruned ' if pruned else ''}copy of {what}, made with quant "
        f"{report.provenance.quant}."
    )
    lines += ["", "| | |", "|---|---|", *(f"| {k} | {_cell(v)} |" for k, v in rows), ""]
    if job is not None and job.fallbacks:
        lines += [
            f"{len(job.fallbacks)} layers were not made quite as asked: `quant_report.json` says of each "
            "what was done instead.",
            "",
        ]
    if report.serve_command is not None:
        arguments = " ".join(f"--{k} {v}" for k, v in report.vllm.items() if not isinstance(v, (dict, list)))
        lines += [
            "## Serve",
            "",
            "```sh",
            f"vllm serve {repository or f'./{_word(name)}'} {arguments}".rstrip(),
            "```",
            "",
        ]
        what = (
            f"`quant-deploy serve -m {repository}`" if repository else "`quant-deploy serve -m` this folder"
        )
        lines += [f"or {what}, which fits the context to the GPU.", ""]
    if job is not None and (settings := _settings(job.settings)):
        lines += ["## Recipe", "", "```yaml", settings, "```", ""]
    lines.append(_END)
    if body:
        lines += ["", "## The source's model card", "", body]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _word(name: str) -> str:
    import shlex

    return shlex.quote(name)


def _front(values: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, default_flow_style=False).strip()


#: Settings of a job that say nothing of the result, or that name a place on the machine that made it.
_LEFT_OUT = frozenset({"device", "fresh", "backend", "calibration_dataset", "gpu", "vllm_version"})


def _settings(settings: Mapping[str, Any]) -> str:
    """The settings that are not empty, as a recipe has them."""
    chosen = {
        k: v for k, v in settings.items() if k not in _LEFT_OUT and v not in (None, "", "[]", "{}", [], {})
    }
    return "\n".join(f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in chosen.items())


def source_card(folders: Sequence[Path]) -> str:
    """The first README.md of these folders, or nothing."""
    for folder in folders:
        try:
            return (folder / CARD).read_bytes().decode("utf-8", errors="replace")
        except OSError:
            continue
    return ""
