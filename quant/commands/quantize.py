"""``quant quantize``, ``layer-wise`` and ``smooth``: the subcommands that are jobs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quant import defaults
from quant.commands import options
from quant.commands.gguf_job import is_level, run_level
from quant.commands.options import by_method, given, together
from quant.commands.terminal import Output, common_options, resumable
from quant.commands.types import PATH, TOKENS, Alpha
from quant.errors import QuantError, UsageError, clipped
from quant.progress import Event, silent
from quant.schemes import DEFAULT_SCHEME, PRESETS, SCHEMES, ActivationScheme
from quant.torchrun import first_device, follows

if TYPE_CHECKING:
    from quant.report.value import Report
    from quant.steps import Pruned


def _pairs(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> dict[str, Any] | None:
    """Settings of a method from KEY=VALUE; values are read as YAML reads them."""
    from quant.recipe import read_yaml

    pairs = {}
    for pair in given:
        key, separator, value = pair.partition("=")
        if not key or not separator:
            raise UsageError(f"--option is {pair!r}: KEY=VALUE is needed, such as iterations=20")
        if (name := key.replace("-", "_")) in pairs:
            raise UsageError(f"--option {key} is given twice: leave one of them out")
        pairs[name] = read_yaml(value, f"--option {clipped(pair)}: the value")
    return pairs or None


#: Methods with a scheme of their own where none is named.
_OWN_SCHEMES = {method: row.name for row in SCHEMES.values() for method in row.default_of}


def _scheme_default(field: str, words: dict[Any, str] | None = None) -> str:
    """Words for a default that follows from the scheme, which follows from the method."""

    def of(scheme: str) -> object:
        value = getattr(PRESETS[scheme].weights, field)
        return value if words is None else words[value]

    own = {method: of(scheme) for method, scheme in _OWN_SCHEMES.items()}
    return f"the scheme's: {by_method(of(DEFAULT_SCHEME), own)}"


def _suppression_default() -> str:
    keys = {name: {**row.suits, **row.needs} for name, row in SCHEMES.items()}
    needed = {name: x for name, own in keys.items() if (x := own.get("outlier_suppression"))}
    return by_method("none", {**defaults.SUPPRESSORS, **needed})


alpha = click.option(
    "--alpha",
    type=Alpha(),
    default=defaults.ALPHA,
    show_default=True,
    help="smooth_quant: share of the inputs' range that goes into the weights, 0 to 1, or auto.",
)

fresh = click.option("--fresh", is_flag=True, help="Start over instead of going on with unfinished work.")


def text_options(samples: int | str = defaults.SAMPLES, length: str | None = None) -> options.Decorator:
    """Which text a method is calibrated with, or a model measured on or taught.

    Args:
        samples, length: rows, and tokens of each, that the command takes where none are given, as its help
            tells them.
    """
    return together(
        click.option(
            "--calibration-dataset",
            type=PATH,
            multiple=True,
            show_default="the bundled text",
            help="txt, jsonl, json, csv, parquet, arrow or a directory.",
        ),
        click.option(
            "--samples",
            type=int,
            default=None if isinstance(samples, str) else samples,
            show_default=samples if isinstance(samples, str) else True,
            help="Calibration rows.",
        ),
        click.option(
            "--sequence-length",
            type=TOKENS,
            show_default=length or f"the smaller of {defaults.SEQUENCE_LENGTH} and the model's",
            help="Tokens a row.",
        ),
        click.option(
            "--shuffle", is_flag=True, help="Draw rows from the whole text instead of taking the first."
        ),
        click.option(
            "--chat-template/--no-chat-template",
            default=None,
            help="Send plain text through the chat template; or join messages as text.",
        ),
        click.option(
            "--seed",
            type=int,
            default=defaults.SEED,
            show_default=True,
            help="Of --shuffle, and of yaqa's draws at the logits.",
        ),
    )


calibration_options = text_options()

#: Which linears a method is for.
selection_options = together(
    click.option(
        "--layers",
        metavar="SPEC",
        show_default="all; layer-wise asks for it",
        help="Only these: 0,1,2 · 0-3,7 · first:2 · last:2 · globs over module names.",
    ),
    click.option(
        "--ignore",
        metavar="PATTERN",
        multiple=True,
        help="Leave these as they are: a glob, or re: and a regular expression; repeatable.",
    ),
)

#: The options of a quantization; each is a field of the recipe of the same name. Those that are not given are
#: left to the recipe file, then to its defaults.
job_options = together(
    options.model_path(required=False),
    options.output_path(required=False),
    click.option(
        "--method",
        metavar="NAME",
        shell_complete=options.completed("methods"),
        show_default="that of --effort, for --scheme or the one that is recommended for the GPU",
        help="Rounding method: minmax, gptq, yaqa, awq, hqq; fp8, which is minmax with an FP8 scheme; none, "
        "for smoothing alone; magnitude, wanda, sparsegpt, which quant prune has options for.",
    ),
    click.option(
        "--effort",
        type=click.Choice([*defaults.EFFORTS]),
        default=defaults.EFFORT,
        show_default=True,
        help="Instead of --method: "
        + "; ".join(f"{name}: {means}" for name, means in defaults.EFFORTS.items())
        + ".",
    ),
    options.scheme(by_method(DEFAULT_SCHEME, _OWN_SCHEMES)),
    click.option("--bits", type=int, show_default="the scheme's", help="2, 3, 4 or 8."),
    click.option(
        "--group-size",
        type=int,
        show_default=_scheme_default("group_size"),
        help="Inputs per scale; -1 for one scale per output channel.",
    ),
    click.option(
        "--symmetric/--asymmetric",
        default=None,
        show_default=_scheme_default("symmetric", {True: "symmetric", False: "asymmetric"}),
        help="Without or with zero points.",
    ),
    click.option(
        "--activations",
        type=click.Choice(["dynamic", "static"]),
        default="dynamic" if ActivationScheme().dynamic else "static",
        show_default=True,
        help="Scales by token as they come, or calibrated.",
    ),
    click.option(
        "--symmetric-activations/--asymmetric-activations",
        default=ActivationScheme().symmetric,
        show_default="symmetric" if ActivationScheme().symmetric else "asymmetric",
        help="w8a8-int8: without or with zero points.",
    ),
    click.option(
        "--kv-cache-scheme",
        type=click.Choice(["fp8"]),
        help="Calibrate and write scales of an FP8 KV cache.",
    ),
    click.option(
        "--moe-calibration",
        type=click.Choice(["routed", "all", "blend"]),
        default=defaults.MOE_CALIBRATION,
        show_default=True,
        help="Experts see the tokens routed to them, all tokens, or the former with some of the layer's "
        "where they are "
        "few.",
    ),
    click.option(
        "--outlier-suppression",
        metavar="NAME",
        show_default=_suppression_default(),
        help="Scale inputs before rounding: smooth_quant, awq; none.",
    ),
    alpha,
    click.option(
        "--act-order",
        type=click.Choice(["none", "static"]),
        default=defaults.ACT_ORDER,
        show_default=True,
        help="gptq: the order of columns.",
    ),
    click.option(
        "--damping",
        type=float,
        default=defaults.DAMPING,
        show_default=True,
        help="gptq, yaqa: share of the Hessian's diagonal that is added to it.",
    ),
    click.option(
        "--clip-search/--no-clip-search",
        default=None,
        show_default=", ".join(f"{m}: {'on' if on else 'off'}" for m, on in defaults.CLIP_SEARCH.items()),
        help="Search each group's range for the least error.",
    ),
    click.option(
        "--option",
        "options",
        metavar="KEY=VALUE",
        multiple=True,
        callback=_pairs,
        help="Any other setting of the method; repeatable.",
    ),
    options.target_size,
    options.context,
    options.concurrency,
    options.format_(defaults.FORMAT),
    options.target,
    calibration_options,
    click.option(
        "--gradient-samples",
        type=int,
        show_default=f"{defaults.GRADIENT_SAMPLES}, or --samples where that is less",
        help="yaqa, and a size: rows that gradients are taken through, the first of --samples.",
    ),
    selection_options,
    click.option(
        "--keep-quantized",
        is_flag=True,
        help="Of a source that is quantized already: carry its codes over where --format can hold them, but "
        "those of --layers.",
    ),
    click.option("--config", type=PATH, help="Recipe (YAML); options on the command line win."),
    options.device,
    options.budgets,
    options.devices,
    options.tensor_parallel(1),
    options.gpu,
    options.vllm_version,
    click.option(
        "--dry-run",
        is_flag=True,
        help="Check everything, predict bytes, memory and time, write nothing; takes no --output-path.",
    ),
    fresh,
    click.option(
        "--evaluate",
        "measure",
        is_flag=True,
        help="Measure what was made against its source on texts of five domains, keep the numbers beside it "
        "and name the worst.",
    ),
    options.upload,
    click.option(
        "--backend",
        type=click.Choice([defaults.ENGINE, *defaults.LEGACY_ENGINES]),
        default=defaults.ENGINE,
        show_default=True,
        help="Who quantizes; the others are archived libraries in a process of their own.",
    ),
    click.option(
        "--backend-python",
        type=PATH,
        show_default="this one",
        help="Python of the environment that holds the backend's library.",
    ),
)


@click.command()
@job_options
@common_options
def quantize(out: Output, **asked: Any) -> None:
    """Make a quantized checkpoint. Without a method, the recommendation for the GPU here (or of --gpu)
    decides, and where the model fits as it is, nothing is written.

    \b
    quant quantize -m models/Llama-3.1-8B -o out/Llama-3.1-8B-W4A16 --method gptq
    """
    _job(out, asked)


@click.command("layer-wise")
@job_options
@common_options
def layer_wise(out: Output, **asked: Any) -> None:
    """Quantize only the named layers; the others keep their precision.

    \b
    quant layer-wise -m models/Llama-3.1-8B -o out/mixed --method gptq --layers first:4
    """
    _job(out, asked, needs_layers=True)


@click.command()
@options.model_path()
@options.output_path()
@click.option(
    "--method",
    type=click.Choice(["smooth_quant"]),
    default="smooth_quant",
    show_default=True,
    help="How factors are chosen.",
)
@alpha
@calibration_options
@options.device
@options.budgets
@options.devices
@fresh
@options.upload
@common_options
def smooth(out: Output, method: str, **asked: Any) -> None:
    """Scale inputs into the weights that read them, and quantize nothing: a checkpoint in the source's dtype
    that computes the same.

    \b
    quant smooth -m models/Llama-3.1-8B -o out/Llama-3.1-8B-smooth
    """
    alone = {"method": "none", "format": "plain", "outlier_suppression": method}
    run_job(out, {**given(asked), **alone})


def _job(out: Output, asked: dict[str, Any], needs_layers: bool = False) -> None:
    """A job of the options given and of the recipe file that they may name."""
    from quant.recipe import PRUNE, recipe_values

    config, dry_run, measure = asked.pop("config"), asked.pop("dry_run"), asked.pop("measure")
    if dry_run and measure:
        raise UsageError("--evaluate measures what was made, and --dry-run makes nothing: leave one out")
    values = recipe_values(config, {k.removesuffix("_"): v for k, v in given(asked).items()}, not dry_run)
    if needs_layers and "layers" not in values:
        raise UsageError(
            "missing --layers: which ones to quantize, such as 0-3,7 or last:2; quant quantize takes all"
        )
    first = values.pop(PRUNE, None)
    level = is_level(values.get("scheme"))
    if first is None:
        (run_level if level else run_job)(out, values, dry_run, measure)
        return
    if level:
        raise UsageError(
            f"scheme {values['scheme']}: a recipe prunes first for a checkpoint: leave {PRUNE} out, run "
            "quant prune, and quantize what it made"
        )
    if dry_run:
        raise UsageError("--dry-run: the recipe prunes first, and what comes out of that is not foreseen")
    run_pruned_job(out, first, values, measure)


def run_pruned_job(out: Output, step: Any, values: dict[str, Any], measure: bool) -> None:
    """The job of a recipe that prunes its model first."""
    from quant.hub import local_model
    from quant.recipe import make_recipe
    from quant.steps import check_output, prune_first, prune_step

    first = prune_step(step)
    if foreign := sorted({"devices", "push_to_hub"} & values.keys()):
        raise UsageError(f"{', '.join(foreign)}: not of a recipe that prunes first: leave it out")
    if values.get("method") in defaults.UNROUNDED:
        raise UsageError(f"a recipe prunes first for a method that quantizes: {values['method']} does not")
    if isinstance(values["model_path"], str):
        values = {**values, "model_path": str(local_model(values["model_path"]))}
    output = Path(values["output_path"])
    make_recipe(values if "backend" in values else {"method": "gptq", **values})  # wrong keys are told first
    with resumable(), out.progress() as progress:
        from quant.pipeline.memory import prepare_torch

        check_output(output, str(values["model_path"]))
        prepare_torch()
        pruned = prune_first(first, values, progress)
    run_job(out, {**values, "model_path": str(pruned.path)}, measure=measure, pruned=pruned)


def run_job(
    out: Output,
    values: dict[str, Any],
    dry_run: bool = False,
    measure: bool = False,
    pruned: Pruned | None = None,
) -> None:
    """Runs a job of these recipe keys and prints what was made; ``pruned``: of what its model comes."""
    from quant.commands.render import planning, results
    from quant.commands.uploading import finish
    from quant.hub import local_model

    if follows():  # rank 0 says what there is to say
        out.quiet = out.outcome.printed = True
    if isinstance(values["model_path"], str):  # of a recipe file: options are directories already
        values = {**values, "model_path": str(local_model(values["model_path"]))}
    named = "output_path" in values
    if not named:
        # a dry run writes nothing; its disk is judged where such an output is most likely to go
        values = {**values, "output_path": free_name(values["model_path"])}
    with resumable(), out.progress() as listener:
        progress = silent if follows() else listener
        from quant import jobs  # brings torch, which takes seconds
        from quant.upload import destination_of

        progress(Event("planning"))
        resolved = jobs.resolve(values)
        if isinstance(resolved, jobs.ResolvedJob):
            for note in resolved.notes:
                progress(Event("planning", message=note))
            if resolved.recommendation is not None:
                out.details(planning.sources(resolved.recommendation))
            report = None if dry_run else jobs.made(resolved.recipe)
            if pruned is not None:
                from quant import steps

                report = steps.quantized_already(pruned, resolved.recipe)
            if report is not None:
                doing = "uploading it" if pruned is None else "comparing its steps"
                message = f"{report.output_path}: made already, {report.provenance.date}: {doing}"
                progress(Event("planning", message=message))
            else:
                if dry_run:
                    prediction = jobs.foreseen(resolved.recipe, progress)
                else:
                    plan = jobs.plan(resolved.recipe, progress)
                    report = jobs.run(plan, progress, out.outcome.command)
            if pruned is not None and report is not None:
                report = steps.finish(pruned, report, progress, resolved.recipe.device)
    if follows():
        return
    if not isinstance(resolved, jobs.ResolvedJob):
        nothing = resolved
        value = {**nothing.to_dict(), "output_path": None}
        out.result(value, lambda console: planning.show_nothing_to_quantize(nothing, console))
        out.details(planning.sources(nothing))
        return
    if dry_run:
        prediction |= {} if named else {"output_path": None}
        out.result(prediction, lambda console: results.prediction(console, prediction))
        return
    assert report is not None
    out.seconds = dict(report.seconds)
    to = destination_of(resolved.recipe)
    if not measure:
        finish(out, report, to, results.quantization)
        return
    device, several = resolved.recipe.device, resolved.recipe.devices
    measured = _measured(out, report, device if several is None else first_device(several))

    known = measured if isinstance(measured, dict) else None
    finish(out, report, to, partial(results.quantization, measured=known), {"evaluation": known})
    if isinstance(measured, QuantError):
        raise QuantError(f"{report.output_path} is made; it was not measured: {measured}")


def _measured(out: Output, report: Report, device: str | None) -> dict[str, Any] | QuantError:
    """What an output lost on texts of several domains, kept beside it; or why that cannot be told."""
    from quant.evaluation.quality import evaluate
    from quant.report.files import save_evaluation

    try:
        with out.progress("evaluation") as progress:
            found = evaluate(
                report.output_path,
                against=report.source_path,
                domains=True,
                device=device,
                progress=progress,
            ).to_dict()
        save_evaluation(report.output_path, found)
    except QuantError as error:
        return error
    return found


def free_name(model_path: Any) -> Path:
    """A directory that is not there, for the output of a job that is only tried: here, or in the temporary
    folder where nothing can be written here."""
    import os
    import tempfile

    here = Path.cwd() if os.access(".", os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    if here.resolve().is_relative_to(Path(model_path).resolve()):
        here = Path(model_path).resolve().parent
    from quant.hub import model_name

    name = f"{model_name(Path(model_path))}-quantized"
    return next(p for n in range(10_000) if not (p := here / (f"{name}-{n}" if n else name)).exists())
