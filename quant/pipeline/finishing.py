"""The end of a job: side files, index and config, verification of what was written, the report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quant.accelerator import device_name, peak_bytes
from quant.calibration.text import Rows
from quant.checkpoint.journal import WorkFolder
from quant.errors import VerificationFailed
from quant.evaluation.preservation import Preservation, preservation
from quant.evaluation.verify import Verification, verify
from quant.pipeline.memory import peak_rss
from quant.pipeline.writing import method_settings, output_config, write_rest
from quant.progress import Event
from quant.report.files import write_report
from quant.report.value import Provenance, Quantization, Report, TensorsAccount
from quant.vllm.arguments import Argument, engine_arguments, vllm_config

if TYPE_CHECKING:
    from quant.pipeline.manager import QuantizationManager


@dataclass(frozen=True)
class _Checked:
    """What verification found of an output, and whether it is the source's function where it is meant to
    be; ``changed``, ``made``: names of tensors that a fold changed, and that the source does not have."""

    verification: Verification
    preserved: Preservation | None
    changed: list[str]
    made: list[str]


def finish(manager: QuantizationManager, work: WorkFolder, rows: Rows | None, start: float) -> Report:
    """What is left to do once all units are written; returns the report, which lies in the folder too.

    Args:
        start: of the job, by :func:`time.perf_counter`.

    Raises:
        VerificationFailed: the output is not what it is to be.
    """
    plan = manager.plan
    with manager.clock.phase("finish"):
        config = output_config(plan, method_settings(manager.quantizers))
        arguments = engine_arguments(config, tensor_parallel=plan.recipe.tensor_parallel)
        dropped = write_rest(work.path, plan.checkpoint, plan.units, plan.format, config, arguments)
    manager.progress(Event("verify"))
    with manager.clock.phase("verify"):
        checked = _checked(manager, work)
    report = _report(manager, rows, start, checked, dropped, arguments)
    chosen = plan.recipe.plain() if plan.allocation is not None else None
    write_report(work.path, report, plan.checkpoint, recipe=chosen)
    return report


def _checked(manager: QuantizationManager, work: WorkFolder) -> _Checked:
    """
    Raises:
        VerificationFailed: the output is not what it is to be.
    """
    plan = manager.plan
    changed = sorted({n for f in manager.records.folds.values() for n in f.changed})
    made = sorted({t.name for u in plan.units for t in u.made})
    verification = verify(
        work.path,
        tensor_parallel=plan.recipe.tensor_parallel,
        source=plan.checkpoint.path,
        target=plan.recipe.target,
        vllm_version=plan.recipe.vllm_version,
        served=plan.format.quant_method is not None,
        changed=changed,
        made=made,
    )
    if verification.failed:
        raise VerificationFailed(
            f"{work.path}: the output failed its own verification: "
            f"{'; '.join(verification.failed[:5])}. It was not published; --fresh makes it anew"
        )
    preserved = (
        preservation(plan.checkpoint.path, work.path, manager.device) if plan.methods == ["none"] else None
    )
    if preserved is not None and not preserved.preserved:
        raise VerificationFailed(
            f"{work.path}: the output is another function than the source: KL {preserved.kl:.2g} "
            f"nats per token, logits differ by {preserved.difference:.2%} at most. It was not "
            "published"
        )
    return _Checked(verification, preserved, changed, made)


def _report(
    manager: QuantizationManager,
    rows: Rows | None,
    start: float,
    checked: _Checked,
    dropped: Sequence[dict[str, str]],
    arguments: list[Argument],
) -> Report:
    """What the job did, for people and programs."""
    plan, records, preserved = manager.plan, manager.records, checked.preserved
    return Report(
        output_path=str(plan.recipe.output_path),
        source_path=str(plan.checkpoint.path),
        format=plan.format.name,
        source_bytes=plan.checkpoint.nbytes,
        output_bytes=plan.output_bytes,
        seconds={k: round(v, 3) for k, v in manager.clock.seconds.items()}
        | {"total": round(time.perf_counter() - start, 3)},
        peak_rss_bytes=peak_rss(),
        side_files_dropped=tuple(dropped),
        vllm=vllm_config(arguments),
        # where it is published
        verify=checked.verification.to_dict() | {"path": str(plan.recipe.output_path)},
        output_hash=checked.verification.content_hash,
        quantization=Quantization(
            method=plan.recipe.method,
            methods=tuple(plan.methods),
            scheme=plan.scheme_dict(),
            target=plan.recipe.target,
            settings=plan.recipe.settings(),
            bits_per_weight=plan.bits_per_weight,
            calibration=None if rows is None else rows.to_dict(),
            layers=tuple(records.layers[name] for name in plan.linears),
            tensors=TensorsAccount(
                quantized=tuple(f"{n}.weight" for n in plan.linears),
                copied=tuple(n for n in plan.copied if n not in set(checked.changed)),
                folded=tuple(checked.changed),
                added=tuple(checked.made),
                kept=tuple(f"{n}.weight" for n in plan.kept),
                dropped=tuple(plan.source.dropped) if plan.source else (),
            ),
            source=plan.source_summary,
            folds=records.folds,
            experts=records.experts,
            unquantized_linears=tuple(plan.unquantized),
            plain_in_vllm=plan.plain,
            left=plan.left,
            function=None if preserved is None else preserved.to_dict(),
            allocation=plan.allocation,
            scratch_bytes=manager.scratch_bytes,
            peak_gpu_bytes=peak_bytes(manager.device),
        ),
        provenance=Provenance.here(manager.command, device_name(manager.device)),
    )
