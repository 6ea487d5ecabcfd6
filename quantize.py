#!/usr/bin/env python3
"""The ``quant`` command: from a Hugging Face checkpoint to a quantized model that vLLM serves.

Every subcommand parses, makes one library call and renders what it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quant import defaults
from quant.backends import BACKENDS, NATIVE
from quant.errors import Problems, QuantError, UsageError, VerificationFailed, clipped
from quant.planning.options import engine_options, gpu_options
from quant.schemes import PRESETS
from quant.terminal import PATH, Output, common_options, run
from quant.vllm.releases import VLLM_VERSION

if TYPE_CHECKING:
    from quant.planning.memory import EngineRequest
    from quant.recipe import Recipe


class QuantGroup(click.Group):
    """Also takes the original one-command form: ``quantize.py --model-path M …`` means ``quantize``, with
    ``--layer-wise`` ``layer-wise``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("--help", "--version", "-h"):
            args = [
                "layer-wise" if "--layer-wise" in args else "quantize",
                *(a for a in args if a != "--layer-wise"),
            ]
        return super().parse_args(ctx, args)


@click.group(cls=QuantGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="quant", prog_name="quant")
def cli() -> None:
    """From a Hugging Face checkpoint to a quantized model that vLLM serves."""


@cli.command()
@click.option(
    "--gpu", metavar="NAME", help="Facts of a named GPU, no hardware needed; `list` shows all names."
)
@common_options
def detect(gpu: str | None, out: Output) -> None:
    """The GPUs here: memory, who uses it, what each computes natively.

    \b
    quant detect
    quant detect --gpu L40S-48GB --json
    """
    from quant.hardware import detect as look
    from quant.hardware import gpu_names, named_gpu
    from quant.planning.render import show_detection, show_gpus
    from quant.vllm.kernels import gpu_dict

    if gpu == "list":
        names = gpu_names()
        out.result({"names": names}, lambda console: console.print("\n".join(names)))
    elif gpu is not None:
        named = named_gpu(gpu)
        out.result({"gpus": [gpu_dict(named)]}, lambda console: show_gpus([named], console))
    else:
        found = look()
        value = found.to_dict() | {"gpus": [gpu_dict(g) for g in found.gpus]}
        out.result(value, lambda console: show_detection(found, console))


@cli.command()
@click.option("-m", "--model-path", type=PATH, help="A checkpoint directory; only its headers are read.")
@click.option(
    "--model", metavar="NAME", help="A model by name, where there is no checkpoint: Qwen2.5-7B-Instruct."
)
@gpu_options
@engine_options
@click.option("--scheme", metavar="NAME", help="Plan just this scheme (`none`: the checkpoint as it is).")
@click.option(
    "--policy", default="vllm", show_default=True, help="vllm, or rule-of-thumb (the original design's)."
)
@click.option("--scenario", metavar="NAME", help="chat, code, high-throughput, low-latency or multi-model.")
@common_options
def recommend(
    model_path: Path | None, model: str | None, gpu: str | None, gpu_count: int | None,
    gpu_memory: int | None, engine: EngineRequest,
    scheme: str | None, policy: str, scenario: str | None, out: Output,
) -> None:  # fmt: skip
    """Which scheme fits this model on this or a named GPU, and why. Exit status 3 when nothing fits.

    \b
    quant recommend --model-path ./Llama-3.1-8B-Instruct
    quant recommend --model Qwen2.5-32B-Instruct --gpu L40S-48GB --context 16384 --concurrency 4
    """
    from quant.planning.recommendation import recommend as choose
    from quant.planning.render import show_recommendation

    if (model_path is None) == (model is None):
        raise UsageError("give the model once: --model-path DIRECTORY, or --model NAME")
    if model == "":
        raise UsageError("--model is empty: give a name such as Qwen2.5-7B-Instruct")
    subject: str | Path = model_path if model_path is not None else str(model)
    found = choose(
        subject,
        gpu,
        engine,
        scenario=scenario,
        policy=policy,
        scheme=scheme,
        gpu_count=gpu_count,
        gpu_memory=gpu_memory,
    )
    out.result(found.to_dict(), lambda console: show_recommendation(found, console))
    if found.recommended is None:
        raise click.exceptions.Exit(3)


def model_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("-m", "--model-path", type=PATH, required=True, help="Checkpoint directory.")(command)


class Alpha(click.ParamType):
    """A number, or ``auto``."""

    name = "float|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        return "auto" if value == "auto" else float(click.FLOAT.convert(value, param, ctx))


ALPHA = Alpha()


def _pairs(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> dict[str, Any] | None:
    """Settings of a method from KEY=VALUE; values are read as YAML reads them."""
    from quant.recipe import read_yaml

    found = {}
    for pair in given:
        key, separator, value = pair.partition("=")
        if not key or not separator:
            raise UsageError(f"--option is {pair!r}: KEY=VALUE is needed, such as iterations=20")
        if (name := key.replace("-", "_")) in found:
            raise UsageError(f"--option {key} is given twice: leave one of them out")
        found[name] = read_yaml(value, f"--option {clipped(pair)}: the value")
    return found or None


def calibration_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which text a method is calibrated with; fields of the recipe, like those of :func:`job_options`."""
    for option in reversed(
        [
            click.option(
                "--calibration-dataset", type=PATH, multiple=True,
                help="txt, jsonl, parquet or a directory; repeatable.  [default: the bundled text]",
            ),
            click.option("--samples", type=int, help=f"Calibration rows.  [default: {defaults.SAMPLES}]"),
            click.option("--sequence-length", type=int, help="Tokens a row.  [default: the smaller of "
                f"{defaults.SEQUENCE_LENGTH} and the model's]"),
            click.option("--shuffle", is_flag=True, default=None, help="Draw rows from the whole text "
                "instead of taking the first."),
            click.option("--chat-template/--no-chat-template", default=None, help="Send plain text through "
                "the chat template; or join messages as text."),
            click.option("--seed", type=int, help=f"Of --shuffle.  [default: {defaults.SEED}]"),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a quantization; each is a field of the recipe of the same name. Unset ones are left to
    the recipe file, then to its defaults."""
    options: list[Callable[..., Any]] = [
        click.option("-m", "--model-path", type=PATH, help="Source checkpoint directory."),
        click.option("-o", "--output-path", type=PATH,
        help="Output directory; it must not exist or be empty."),
        click.option("--method", help="Rounding method: minmax, gptq, awq, hqq; fp8, which is minmax with "
            "an FP8 scheme; none, for smoothing alone."),
        click.option("--scheme", help=f"{', '.join(PRESETS)}.  [default: w4a16]"),
        click.option("--bits", type=int, help="2, 3, 4 or 8."),
        click.option("--group-size", type=int, help="Inputs per scale; -1 for one scale per output channel. "
            " [default: 128]"),
        click.option("--symmetric/--asymmetric", default=None, help="Without or with zero points.  "
            "[default: symmetric]"),
        click.option("--activations", type=click.Choice(["dynamic", "static"]), help="Scales by token as "
            "they come, or calibrated.  [default: dynamic]"),
        click.option("--symmetric-activations/--asymmetric-activations", default=None, help="w8a8-int8: "
            "without or with zero points.  [default: symmetric]"),
        click.option("--kv-cache-scheme", type=click.Choice(["fp8"]), help="Calibrate and write scales of "
            "an FP8 KV cache."),
        click.option("--outlier-suppression", metavar="NAME", help="Scale inputs before rounding: "
            "smooth_quant, awq; none.  [default: awq for awq]"),
        click.option("--alpha", type=ALPHA, help="smooth_quant: share of the inputs' range that goes into "
            "the weights, 0 to 1, or auto.  [default: 0.5]"),
        click.option("--act-order", type=click.Choice(["none", "static"]), help="gptq: the order of "
            "columns.  [default: static]"),
        click.option("--damping", type=float, help="gptq: share of the Hessian's mean diagonal that is "
            "added to it.  [default: 0.01]"),
        click.option("--clip-search/--no-clip-search", default=None, help="Search each group's range for "
            "the least error.  [default: on for gptq and awq]"),
        click.option("--option", "options", metavar="KEY=VALUE", multiple=True, callback=_pairs,
        help="Any other setting of the method; repeatable."),
        click.option("--format", "format_", help="compressed-tensors (default), fp8, awq, gptq, or plain "
            "(dequantized values in the source's dtype)."),
        click.option("--target", type=click.Choice(["vllm", "other"]), help="Who must load it; other allows "
            "what vLLM refuses.  [default: vllm]"),
        calibration_options,
        click.option("--layers", help="Only these: 0,1,2 · 0-3,7 · first:2 · last:2 · globs over module "
            "names."),
        click.option("--ignore", multiple=True, help="Leave these unquantized: a glob, or re: and a regular "
            "expression; repeatable."),
        click.option("--config", type=PATH, help="Recipe (YAML); options on the command line win."),
        click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda where there is one]"),
        click.option("--tensor-parallel", type=int, help="Degree it will be served with: shapes are checked "
            "for it.  [default: 1]"),
        click.option("--gpu", metavar="NAME", help="GPU that will serve it: checked first, and without "
            "--method it decides the scheme."),
        click.option("--vllm-version", help="Release that will load it: checked first.  [default: "
            f"{VLLM_VERSION}]"),
        click.option("--dry-run", is_flag=True, help="Check everything, predict bytes, memory and time, "
            "write nothing."),
        click.option("--fresh", is_flag=True, default=None, help="Start over instead of going on with "
            "unfinished work."),
        click.option("--backend", type=click.Choice(["native", *BACKENDS]), help="Who quantizes; the others "
            "are archived libraries in a process of their own.  [default: native]"),
        click.option("--backend-python", type=PATH, help="Python of the environment that holds the "
            "backend's library.  [default: this one]"),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _values(options: dict[str, Any]) -> dict[str, Any]:
    """The recipe's values that a file and the options given make together."""
    from quant.recipe import read_recipe

    config = options.pop("config")
    values = read_recipe(config) if config else {}
    options["format"] = options.pop("format_")
    values.update(
        {k: list(v) if isinstance(v, tuple) else v for k, v in options.items() if v not in (None, ())}
    )
    missing = [f"--{k.replace('_', '-')}" for k in ("model_path", "output_path") if k not in values]
    if missing:
        raise UsageError(
            f"missing {', '.join(missing)}: give {'it' if len(missing) == 1 else 'them'} as options or in "
            "the recipe of --config"
        )
    return values


def _choose(out: Output, values: dict[str, Any]) -> dict[str, Any] | None:
    """Method and scheme of a job that names no method; None where the checkpoint fits as it is and nothing
    needs quantizing."""
    from quant.planning.target import choose, method_for, settings
    from quant.recipe import make_recipe

    # wrong values are mistakes of the request, whatever is recommended
    recipe = make_recipe({**values, "method": "gptq"})
    if "scheme" in values or "bits" in values:
        return {"method": method_for(recipe.resolved_scheme().name)}
    found = choose(
        recipe.model_path,
        recipe.output_path,
        gpu=recipe.gpu,
        tensor_parallel=values.get("tensor_parallel") and recipe.tensor_parallel,
        vllm_version=recipe.vllm_version,
    )
    if found.recommended == "none":
        lines = [
            f"Nothing to quantize: {found.reason}",
            "Nothing was written. To serve it as it is:",
            *found.commands,
        ]
        out.result(
            {**found.to_dict(), "output_path": None},
            lambda c: c.print("\n".join(lines), soft_wrap=True, markup=False),
        )
        return None
    out.note(f"{found.recommended} by {found.method}: {found.reason}")
    return settings(found)


def _quantize(out: Output, dry_run: bool, options: dict[str, Any], layer_wise: bool = False) -> None:
    from quant.recipe import make_recipe

    values = _values(options)
    if layer_wise and "layers" not in values:
        raise UsageError(
            "missing --layers: which ones to quantize, such as 0-3,7 or last:2; quant quantize takes all"
        )
    if "method" not in values and values.get("backend", NATIVE) == NATIVE:
        chosen = _choose(out, values)
        if chosen is None:
            return
        values = {**chosen, **values}
    recipe = make_recipe(values)
    if recipe.backend != NATIVE:
        _by_backend(out, dry_run, recipe)
        return

    from quant.pipeline.estimate import estimate
    from quant.pipeline.manager import QuantizationManager
    from quant.pipeline.plan import plan_job
    from quant.report import text

    plan = plan_job(recipe)
    if dry_run:
        with out.progress() as progress:
            prediction = estimate(plan, progress)
        out.result(prediction, lambda c: text.prediction(c, prediction))
        return
    with out.progress() as progress:
        report = QuantizationManager(plan, progress).run()
    out.result(report, lambda c: text.quantization(c, report))


def _by_backend(out: Output, dry_run: bool, recipe: Recipe) -> None:
    from quant.backends.run import plan_backend, quantize_with
    from quant.report import text

    plan = plan_backend(recipe)
    if dry_run:
        prediction = plan.to_dict() | {"backend": recipe.backend}
        out.result(prediction, lambda c: text.prediction(c, prediction))
        return
    with out.progress() as progress:
        report = quantize_with(plan, progress)
    out.result(report, lambda c: text.quantization(c, report))


@cli.command()
@job_options
@common_options
def quantize(out: Output, dry_run: bool, **options: Any) -> None:
    """Make a quantized checkpoint. Without a method, the recommendation for the GPU here (or of --gpu)
    decides.

    \b
    quant quantize -m models/Llama-3.1-8B -o out/Llama-3.1-8B-W4A16 --method gptq
    """
    _quantize(out, dry_run, options)


@cli.command("layer-wise")
@job_options
@common_options
def layer_wise(out: Output, dry_run: bool, **options: Any) -> None:
    """Quantize only the named layers; the others keep their precision.

    \b
    quant layer-wise -m models/Llama-3.1-8B -o out/mixed --method gptq --layers first:4
    """
    _quantize(out, dry_run, options, layer_wise=True)


@cli.command()
@click.option("-m", "--model-path", type=PATH, required=True, help="Source checkpoint directory.")
@click.option(
    "-o", "--output-path", type=PATH, required=True, help="Output directory; it must not exist or be empty."
)
@click.option(
    "--method",
    type=click.Choice(["smooth_quant"]),
    default="smooth_quant",
    show_default=True,
    help="How factors are chosen.",
)
@click.option(
    "--alpha",
    type=ALPHA,
    help="Share of the inputs' range that goes into the weights, 0 to 1, or auto.  [default: 0.5]",
)
@calibration_options
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda where there is one]")
@click.option(
    "--fresh", is_flag=True, default=None, help="Start over instead of going on with unfinished work."
)
@common_options
def smooth(out: Output, method: str, **options: Any) -> None:
    """Scale inputs into the weights that read them, and quantize nothing: a checkpoint in the source's dtype
    that computes the same.

    \b
    quant smooth -m models/Llama-3.1-8B -o out/Llama-3.1-8B-smooth
    """
    from quant.pipeline.manager import QuantizationManager
    from quant.pipeline.plan import plan_job
    from quant.recipe import make_recipe
    from quant.report import text

    values = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items() if v not in (None, ())}
    plan = plan_job(
        make_recipe({**values, "method": "none", "format": "plain", "outlier_suppression": method})
    )
    with out.progress() as progress:
        report = QuantizationManager(plan, progress).run()
    out.result(report, lambda c: text.quantization(c, report))


@cli.command("export-vllm")
@model_option
@click.option(
    "-o", "--output-path", type=PATH, required=True, help="Output directory; it must not exist or be empty."
)
@click.option(
    "--format",
    "format_",
    help="Format to write: compressed-tensors, fp8, awq, gptq or plain.  [default: the checkpoint's own]",
)
@click.option(
    "--source", type=PATH, help="Where to take missing side files (tokenizer, generation config) from."
)
@click.option(
    "--requantize",
    is_flag=True,
    help="Round anew the linears whose groups are in activation order (g_idx), which vLLM has no path for.",
)
@click.option(
    "--tensor-parallel",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Degree it will be served with.",
)
@click.option("--max-model-len", type=click.IntRange(1), help="Context to serve.  [default: the model's]")
@click.option(
    "--target",
    type=click.Choice(["vllm", "other"]),
    default="vllm",
    show_default=True,
    help="Who must load it.",
)
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
) -> None:
    """Turn a checkpoint that can be read into one that vLLM serves.

    \b
    quant export-vllm -m old-gptq-model -o out --format compressed-tensors
    """
    from quant.pipeline.export import export
    from quant.report import text

    with out.progress() as progress:
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
        )
    out.result(report, lambda c: text.export(c, report))


@cli.command()
@click.argument("path", type=PATH, required=False)
@click.option("-m", "--model-path", type=PATH, help="Checkpoint directory (or give it as the argument).")
@click.option(
    "--tensor-parallel",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Degree it will be served with.",
)
@click.option("--source", type=PATH, help="Account for every tensor and side file of this checkpoint.")
@click.option(
    "--against", type=PATH, help="Compare every dequantized tensor with this checkpoint (takes torch)."
)
@click.option(
    "--vllm",
    "vllm_python",
    type=PATH,
    help="Python of an environment with vLLM: load it there, compare log-probabilities.",
)
@click.option(
    "--target",
    type=click.Choice(["vllm", "other"]),
    default="vllm",
    show_default=True,
    help="Whose rules to check.",
)
@common_options
def verify(
    out: Output,
    path: Path | None,
    model_path: Path | None,
    tensor_parallel: int,
    source: Path | None,
    against: Path | None,
    vllm_python: Path | None,
    target: str,
) -> None:
    """Check that vLLM will load a checkpoint, without vLLM. Exit status 4 when it will not.

    \b
    quant verify out/Llama-3.1-8B-W4A16 --tensor-parallel 2
    """
    from quant.evaluation.verify import verify as check
    from quant.report import text

    chosen = _one_path(path, model_path)
    result = check(chosen, tensor_parallel=tensor_parallel, source=source or against, target=target)
    value = result.to_dict()
    if against is not None and result.passed:
        from quant.evaluation.compare import compare

        value["tensors"] = compare(chosen, against).to_dict()
    if vllm_python is not None and result.passed:
        from quant.serving.reference import check_in_vllm

        value["vllm"] = check_in_vllm(chosen, vllm_python)
        value["passed"] = value["passed"] and value["vllm"]["passed"]
    out.result(value, lambda c: text.verification(c, value))
    if not value["passed"]:
        failed = result.failed or [value["vllm"]["detail"]]
        raise VerificationFailed(f"{chosen}: {failed[0]}")


@cli.command()
@click.argument("paths", metavar="[PATH]...", type=PATH, nargs=-1)
@click.option("-m", "--model-path", type=PATH, help="Checkpoint directory (or give it as the argument).")
@click.option("--against", type=PATH, help="Source checkpoint: KL divergence and top-1 agreement with it.")
@click.option(
    "--text", "text_file", type=PATH, help="Text to evaluate on.  [default: the bundled wikitext-2 test]"
)
@click.option(
    "--length",
    type=click.IntRange(8),
    help=f"Tokens a chunk.  [default: the smaller of {defaults.EVALUATION_LENGTH} and the model's]",
)
@click.option(
    "--chunks", type=click.IntRange(2), default=defaults.EVALUATION_CHUNKS, show_default=True, help="Chunks."
)
@click.option(
    "--max-perplexity-increase",
    type=float,
    help="Exit status 4 when perplexity rises by more than this share (0.05 is 5 %).",
)
@click.option(
    "--plot",
    type=PATH,
    help="Picture of bits per weight against KL: a .html file, or a .png (takes matplotlib).",
)
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda where there is one]")
@common_options
def evaluate(
    out: Output,
    paths: tuple[Path, ...],
    model_path: Path | None,
    against: Path | None,
    text_file: Path | None,
    length: int | None,
    chunks: int,
    max_perplexity_increase: float | None,
    plot: Path | None,
    device: str | None,
) -> None:
    """Perplexity with its standard error; against a source, KL divergence and top-1 agreement. Several
    checkpoints make one table.

    \b
    quant evaluate out/Llama-3.1-8B-W4A16 --against models/Llama-3.1-8B
    quant evaluate out/a out/b out/c --against models/Llama-3.1-8B --plot quality.html
    """
    from quant.evaluation.comparison import check_plot, compare_outputs, demand
    from quant.evaluation.comparison import plot as draw
    from quant.evaluation.quality import evaluate as measure
    from quant.report import text

    if max_perplexity_increase is not None and not -1 <= max_perplexity_increase < float("inf"):
        raise UsageError(
            f"--max-perplexity-increase is {max_perplexity_increase}: a finite share is needed, such as "
            "0.05 for 5 %"
        )
    if max_perplexity_increase is not None and against is None:
        raise UsageError(
            "--max-perplexity-increase needs --against: the checkpoint whose perplexity it is compared with"
        )
    if plot is not None:
        if against is None:
            raise UsageError("--plot needs --against: it draws the KL divergence from that checkpoint")
        check_plot(plot)
    if len(paths) < 2 and plot is None:
        chosen = _one_path(paths[0] if paths else None, model_path)
        with out.progress() as progress:
            result = measure(
                chosen,
                against=against,
                text=text_file,
                length=length,
                chunks=chunks,
                device=device,
                progress=progress,
            )
        value = result.to_dict()
        out.result(value, lambda c: text.evaluation(c, value))
        result.demand(max_perplexity_increase)
        return
    chosen_paths = [*paths, *([model_path] if model_path else [])] or [_one_path(None, None)]
    done, failures = [], []

    def failed(path: str, error: QuantError) -> None:
        failures.append(str(error) if path in str(error) else f"{path}: {error}")
        if out.json:
            out.result({"path": path, "error": str(error), "exit_code": error.exit_code}, lambda c: None)

    with out.progress() as progress:
        for one in compare_outputs(
            chosen_paths,
            against=against,
            text=text_file,
            length=length,
            chunks=chunks,
            device=device,
            progress=progress,
            failed=failed,
        ):
            done.append(one)
            if out.json:
                out.result(one.to_dict(), lambda c: None)
    if done and not out.json:
        values = [one.to_dict() for one in done]
        out.result(values, lambda c: text.comparison(c, values))
    if done and plot is not None:
        draw(plot, done)
        out.note(f"{plot}: bits per weight against KL divergence of {len(done)} checkpoints")
    if failures:
        raise Problems(failures)
    demand(done, max_perplexity_increase)


@cli.command()
@click.argument("path", type=PATH, required=False)
@click.option("-m", "--model-path", type=PATH, help="Checkpoint directory (or give it as the argument).")
@common_options
def inspect(out: Output, path: Path | None, model_path: Path | None) -> None:
    """What is in a checkpoint: parameters by role, bytes by dtype, scheme, format.

    \b
    quant inspect out/Llama-3.1-8B-W4A16
    """
    from quant.evaluation.inspect import inspect as look
    from quant.report import text

    value = look(_one_path(path, model_path))
    out.result(value, lambda c: text.inspection(c, value))


def _one_path(path: Path | None, model_path: Path | None) -> Path:
    if (path is None) == (model_path is None):
        raise UsageError("give one checkpoint directory: as the argument, or as --model-path")
    return path or model_path  # type: ignore[return-value]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the ``quant`` command."""
    run(cli, "quant", argv)


if __name__ == "__main__":
    main()
