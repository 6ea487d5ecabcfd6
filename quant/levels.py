"""A job whose output is a GGUF file of a level: its codes are rounded, or chosen by a method of ours, which
quantizes a checkpoint first that is stored as it is.

That checkpoint stands beside the output until the file is made, so that a killed run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.progress import Event, Progress, silent

if TYPE_CHECKING:
    from quant.pipeline.gguf import GgufFile
    from quant.recipe import Recipe

#: Levels whose codes a method of ours can choose → the numbers of the checkpoint that holds them until the
#: file is written.
CHOSEN: Mapping[str, Mapping[str, Any]] = {
    "q4_0": {"scheme": "w4a16", "symmetric": True},
    "q4_1": {"scheme": "w4a16", "symmetric": False},
    "q8_0": {"scheme": "w8a16", "symmetric": True},
}
#: Options of calibration, which the importance matrix takes.
CALIBRATION = ("calibration_dataset", "samples", "sequence_length", "shuffle", "chat_template", "seed")


def make_level(
    values: Mapping[str, Any],
    chosen: bool,
    progress: Progress = silent,
    command: Sequence[str] | None = None,
) -> GgufFile:
    """Makes the file of a job.

    Args:
        values: keys of a recipe; ``scheme`` is a level, ``output_path`` the file.
        chosen: whether a method, named or by effort, chooses the codes: of a level of :data:`CHOSEN`.
        command: what the checkpoint's report says that it was made by.

    Raises:
        Problems, QuantError: what stands against it, or what went wrong.
    """
    from quant.hub import model_name
    from quant.pipeline.gguf import check_export, export_gguf

    output, level = Path(values["output_path"]), str(values["scheme"]).lower()
    calibration = {k: values[k] for k in CALIBRATION if k in values}
    if not chosen:
        return export_gguf(values["model_path"], output, level, calibration=calibration, progress=progress)
    check_export(Path(values["model_path"]), output, level)
    codes = output.with_name(f".{output.name}.{_key(values)}.codes")
    if not (codes / "config.json").is_file():
        _choose(values, level, codes, progress, command)
    made = export_gguf(codes, output, level, name=model_name(Path(values["model_path"])), progress=progress)
    shutil.rmtree(codes)
    return made


def _key(values: Mapping[str, Any]) -> str:
    """What was asked, in a name: another job does not go on with this one's work."""
    return hashlib.sha256(json.dumps(dict(values), default=str, sort_keys=True).encode()).hexdigest()[:8]


def _choose(
    values: Mapping[str, Any], level: str, codes: Path, progress: Progress, command: Sequence[str] | None
) -> None:
    """The checkpoint whose codes the level stores."""
    from quant import jobs

    asked = {k: v for k, v in values.items() if k != "scheme"} | dict(CHOSEN[level])
    # what vLLM has no kernel for, llama.cpp may have
    asked |= {"output_path": codes, "group_size": 32, "format": "compressed-tensors", "target": "other"}
    resolved = jobs.resolve(asked)
    assert isinstance(resolved, jobs.ResolvedJob)
    for note in resolved.notes:
        progress(Event("planning", message=note))
    jobs.run(jobs.plan(_signed(resolved.recipe), progress), progress, command)


def _signed(recipe: Recipe) -> Recipe:
    """A recipe whose method searches among negative scales, where it can and nobody said otherwise: every
    engine of these files reads them, because llama.cpp's own rounding makes them."""
    from quant.quantizers import QuantizerRegistry

    kind = QuantizerRegistry.get(recipe.method)
    searched = recipe.options.get("clip_search", recipe.clip_search)
    if "signed" in recipe.options or searched is False or not hasattr(kind, "signed"):
        return recipe
    return recipe.model_copy(update={"options": {**recipe.options, "signed": True}})
