"""``quant export-vllm``."""

from __future__ import annotations

from pathlib import Path

import click

from quant.commands import options
from quant.commands.terminal import Output, common_options
from quant.errors import QuantError
from quant.progress import Event


@click.command("export-vllm")
@options.model_path()
@options.output_path()
@options.format_("the checkpoint's own")
@options.source("missing side files (tokenizer, generation config) are taken from it")
@click.option(
    "--requantize",
    is_flag=True,
    help="Round anew the linears whose groups are in activation order (g_idx), which vLLM has no path for.",
)
@options.tensor_parallel(1)
@options.max_model_len("the model's")
@options.target
@options.upload
@common_options
def export_vllm(
    out: Output,
    model_path: Path,
    output_path: Path,
    format_: str | None,
    source: Path | None,
    requantize: bool,
    tensor_parallel: int,
    max_model_len: int | None,
    target: str,
    push_to_hub: str | None,
    private: bool,
    commit_message: str | None,
    replace_on_hub: bool,
) -> None:
    """Turn a checkpoint that can be read into one that vLLM serves.

    \b
    quant export-vllm -m old-gptq-model -o out --format compressed-tensors
    """
    from quant.commands.render import results
    from quant.commands.uploading import finish

    with out.progress() as progress:
        from quant.pipeline.memory import prepare_torch

        prepare_torch()
        from quant.pipeline.export import export
        from quant.upload import destination, exported_already, upload_problem

        to = destination(push_to_hub, private, commit_message, replace_on_hub)
        report = None
        if to is not None:
            report = exported_already(output_path, model_path, format_, tensor_parallel, max_model_len)
            if report is not None:
                made = f"{output_path}: made already, {report.provenance.date}: uploading it"
                progress(Event("upload", message=made))
            elif problem := upload_problem(to):
                raise QuantError(problem)
        if report is None:
            report = export(
                model_path,
                output_path,
                format_,
                source=source,
                requantize=requantize,
                tensor_parallel=tensor_parallel,
                max_model_len=max_model_len,
                target=target,
                progress=progress,
                command=out.outcome.command,
            )
    finish(out, report, to, results.export)
