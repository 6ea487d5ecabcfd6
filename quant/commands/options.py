"""The options that more than one subcommand takes: each has its name, type, default and help here. What
differs between subcommands is an argument: whether it is required, or what holds where it is not given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from quant import defaults
from quant.commands.types import MODEL, PATH, TOKENS, FiniteRange, ModelType, Size, TokenCount
from quant.errors import UsageError
from quant.schemes import SCHEMES, SchemeRegistry
from quant.vllm.releases import VLLM_VERSION, rules_for

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

FORMATS = (
    "compressed-tensors, fp8, awq, gptq, mxfp4 (gpt-oss' own) or plain (dequantized values in the source's "
    "dtype)"
)


def together(*options: Decorator) -> Decorator:
    """Several options as one decorator, listed by ``--help`` in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def given(names: dict[str, Any]) -> dict[str, Any]:
    """Of a subcommand's parameters those that the user gave, lists for those that repeat: the others are left
    to the recipe, which has the same defaults."""
    context = click.get_current_context()
    unset = (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in names.items()
        if context.get_parameter_source(name) not in unset
    }


def model_path(required: bool = True, download: bool = True, many: str | None = None) -> Decorator:
    """``download``: whether a model by Hub id is fetched that the cache lacks; plans need headers alone.
    ``many``: the option repeats, and the command receives a tuple by this name."""
    return click.option(
        "-m",
        "--model-path",
        many or "model_path",
        multiple=many is not None,
        type=ModelType(download),
        required=required,
        help="Checkpoint directory, Hub id (org/name[@revision]: the local cache first), or s3://, gs:// …, "
        "read range by range.",
    )


def output_path(required: bool = True) -> Decorator:
    return click.option(
        "-o",
        "--output-path",
        type=PATH,
        required=required,
        help="Output directory; it must not exist or be empty.",
    )


def one_checkpoint(command: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpoint directory as the argument or as ``--model-path``; the command receives it as
    ``checkpoint``."""

    @click.argument("path", type=MODEL, required=False)
    @model_path(required=False)
    @functools.wraps(command)
    def wrapped(*args: Any, path: Path | None, model_path: Path | None, **kwargs: Any) -> Any:
        return command(*args, checkpoint=the_one(path, model_path), **kwargs)

    return wrapped


def the_one(path: Path | None, model_path: Path | None) -> Path:
    """The checkpoint that is given in one of two ways.

    Raises:
        UsageError: in none, or in both.
    """
    chosen = model_path if path is None else path
    if chosen is None or (path is not None and model_path is not None):
        raise UsageError("give one checkpoint directory: as the argument, or as --model-path")
    return chosen


def completed(kind: str) -> Callable[..., list[CompletionItem]]:
    """What a shell offers where a name of :data:`quant.listing.KINDS` is typed."""

    def complete(ctx: click.Context, param: click.Parameter, begun: str) -> list[CompletionItem]:
        from quant.listing import listing

        return [
            CompletionItem(item["name"], help=item["about"] or None)
            for item in listing(kind)
            if item["name"].lower().startswith(begun.lower())
        ]

    return complete


gpu = click.option(
    "--gpu",
    metavar="NAME",
    shell_complete=completed("gpus"),
    help="A GPU by name instead of those here, and how many: L40S-48GB, 4090, 2xH100, 'RTX 3070 Ti Laptop', "
    "cpu; `quant detect --gpu list` shows all.",
)

vllm_version = click.option(
    "--vllm-version", default=VLLM_VERSION, show_default=True, help="Release of vLLM that will serve it."
)

kv_cache_dtype = click.option(
    "--kv-cache-dtype", default="auto", show_default=True, help="auto (the model's own) or fp8."
)

context = click.option(
    "--context", type=TOKENS, help="Tokens of the longest request (vLLM's --max-model-len): 32k, 1M."
)

concurrency = click.option(
    "--concurrency",
    type=int,
    default=1,
    show_default=True,
    help="Requests of that length at the same time.",
)

#: A size that a checkpoint is to have.
target_size = together(
    click.option(
        "--target-bits",
        type=float,
        help="Choose a scheme for every layer, so that the decoder has so many bits per weight and the model "
        "loses least; search: or one for all.",
    ),
    click.option("--target-size", type=Size(), help="The same for so many bytes of tensors: 20GiB."),
    click.option(
        "--fit",
        is_flag=True,
        help="The same for the memory of the GPU here, or of --gpu, beside --context and --concurrency.",
    ),
)

max_num_seqs = click.option("--max-num-seqs", type=int, help="Sequences in one batch.")

check_profile = click.option(
    "--profile",
    default="chat",
    show_default=True,
    metavar="chat|batch|FILE",
    help="Thresholds; a FILE is YAML like those of configs/checks.",
)

made_for = click.option(
    "--vllm-version",
    show_default="the release that it was made for",
    help="Release of vLLM that will serve it.",
)

target = click.option(
    "--target",
    type=click.Choice(["vllm", "other"]),
    default="vllm",
    show_default=True,
    help="Who must load it: other allows what vLLM refuses.",
)

vllm_python = click.option(
    "--vllm-python",
    type=PATH,
    show_default="the variable QUANT_VLLM_PYTHON, or this one",
    help="Python of the environment with vLLM.",
)

start_timeout = click.option(
    "--timeout",
    type=FiniteRange(0, min_open=True),
    default=defaults.START_TIMEOUT,
    show_default=True,
    help="Seconds to wait until it is healthy.",
)

#: How an endpoint is asked that is there already.
served_model = click.option(
    "--served-model", "model", metavar="NAME", show_default="the first it serves", help="Model to ask for."
)
api_key_env = click.option(
    "--api-key-env", metavar="NAME", help="Environment variable that holds the API key."
)
certificates = together(
    click.option("--ca", type=PATH, help="File of certificates to trust instead of the system's."),
    click.option("--insecure", is_flag=True, help="Trust any certificate."),
)
stall = click.option(
    "--stall",
    type=FiniteRange(0, min_open=True),
    default=120.0,
    show_default=True,
    help="Seconds without a byte after which a request is given up.",
)

device = click.option(
    "--device", show_default="cuda where there is one", help="Where torch computes: cpu, cuda or cuda:N."
)

#: What a job may take of the machine; each is a field of the recipe of the same name.
budgets = together(
    click.option(
        "--max-memory",
        type=Size(),
        metavar="SIZE",
        show_default="256 MiB of calibration activations beside what a block takes",
        help="Most memory that the process may take, 6GiB: activations that it has no room for go to "
        "scratch, and more stay where there is room. Too little is refused before the work begins.",
    ),
    click.option(
        "--max-gpu-memory",
        type=Size(),
        metavar="SIZE",
        show_default="what is free",
        help="Most memory of the GPU that the process may take.",
    ),
    click.option(
        "--scratch-dir",
        type=PATH,
        show_default="the work folder beside the output",
        help="Folder for calibration activations that memory has no room for.",
    ),
)

devices = click.option(
    "--devices",
    metavar="LIST",
    help="Several processes, one for each device: 0,1 for GPUs, cpu,cpu for CPUs.",
)

gpu_memory_utilization = click.option(
    "--gpu-memory-utilization",
    type=click.FloatRange(0, 1, min_open=True),  # NaN is told with whatever else is wrong
    show_default=f"vLLM's own, {rules_for(VLLM_VERSION).utilization:g}",
    help="Share of a GPU's whole memory that vLLM may take.",
)


#: Where a finished output is uploaded to; each is an argument of :func:`quant.upload.destination`.
upload = together(
    click.option(
        "--push-to-hub",
        metavar="ORG/NAME",
        help="Upload the verified output to that repository of the Hub, or ORG/NAME@BRANCH; token and "
        "name are checked before the work begins.",
    ),
    click.option("--private", is_flag=True, help="--push-to-hub: a new repository is private."),
    click.option(
        "--commit-message",
        metavar="TEXT",
        show_default="what is uploaded",
        help="--push-to-hub: of the commit.",
    ),
    click.option(
        "--replace-on-hub",
        is_flag=True,
        help="--push-to-hub: replace a model that the repository holds already.",
    ),
)


exact_activations = click.option(
    "--exact-activations",
    is_flag=True,
    help="On CPUs with AMX: leave activations of 4-bit layers in 16 bits, which vLLM rounds to int8 for "
    "speed.",
)


def tensor_parallel(default: int | str = 1) -> Decorator:
    """``default``: a degree, or in words what None stands for."""
    return click.option(
        "--tensor-parallel",
        type=click.IntRange(1, 1024),
        default=default if isinstance(default, int) else None,
        show_default=True if isinstance(default, int) else default,
        help="GPUs that share every layer (vLLM's --tensor-parallel-size).",
    )


def max_model_len(default: str) -> Decorator:
    return click.option(
        "--max-model-len",
        type=TokenCount(1),
        show_default=default,
        help="Context to serve, in tokens: 32768, 32k, 1M.",
    )


_LEVELS = "or a level of GGUF (q4_k_m, q8_0 …: export-gguf --help lists them) for -o NAME.gguf"


class _Schemes(click.Option):
    """Its help lists the schemes of other packages too, which are looked for where it is shown and not
    before."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        others = [name for name in SchemeRegistry.names() if name not in SCHEMES]
        self.help = f"{', '.join([*SCHEMES, *others])}; {_LEVELS}."
        return super().get_help_record(ctx)


def scheme(default: str) -> Decorator:
    own = ", ".join(SCHEMES)
    return click.option(
        "--scheme",
        metavar="NAME",
        show_default=default,
        help=f"{own}; {_LEVELS}.",
        cls=_Schemes,
        shell_complete=completed("schemes"),
    )


def format_(default: str) -> Decorator:
    """The command receives it as ``format_``, and where it is not given None."""
    return click.option(
        "--format",
        "format_",
        metavar="NAME",
        show_default=default,
        help=f"{FORMATS}.",
        shell_complete=completed("formats"),
    )


def against(purpose: str) -> Decorator:
    return click.option("--against", type=MODEL, help=f"Source checkpoint to compare with: {purpose}.")


def vllm(purpose: str) -> Decorator:
    """The command receives it as ``vllm_python``."""
    return click.option(
        "--vllm", "vllm_python", type=PATH, help=f"Python of an environment with vLLM: {purpose}."
    )


def source(purpose: str) -> Decorator:
    return click.option("--source", type=MODEL, help=f"Checkpoint that it was made from: {purpose}.")


def by_method(otherwise: object, values: dict[str, Any]) -> str:
    """Words for a default that some methods have their own of.

    >>> by_method("w4a16", {"awq": "w4a16-asym", "gptq": "w4a16"})
    'w4a16; awq: w4a16-asym'
    """
    return "; ".join([str(otherwise), *(f"{k}: {v}" for k, v in values.items() if v != otherwise)])
