"""``quant-deploy plan`` and ``serve``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quant import defaults
from quant.commands import options
from quant.commands.options import together
from quant.commands.terminal import Output, common_options
from quant.commands.types import PATH, FiniteRange
from quant.engines import ENGINES
from quant.errors import UsageError
from quant.progress import Event
from quant.serving.artefacts import KINDS

if TYPE_CHECKING:
    from quant.serving.deployment import Deployment

#: What a deployment is asked for; each is a field of :class:`quant.serving.deployment.DeploymentRequest`.
deployment_options = together(
    options.model_path(),
    options.gpu,
    options.tensor_parallel("vllm_config.json's, or 1"),
    options.max_model_len("vllm_config.json's, or the model's"),
    options.gpu_memory_utilization,
    options.kv_cache_dtype,
    options.max_num_seqs,
    click.option("--host", default=defaults.HOST, show_default=True, help="Address to listen on."),
    click.option(
        "--port",
        type=click.IntRange(0, 65535),
        default=defaults.PORT,
        show_default=True,
        help="Port; serve takes 0 for a free one.",
    ),
    click.option("--name", show_default="the directory's name", help="What clients call the model."),
    click.option("--api-key-env", metavar="NAME", help="Environment variable that holds the API key."),
    click.argument("extra", nargs=-1, type=click.UNPROCESSED, metavar="[-- ENGINE_ARGUMENTS...]"),
)


def _planned(out: Output, model_path: Path, request: dict[str, Any], engine: str = "vllm") -> Deployment:
    from quant.serving.deployment import DeploymentRequest
    from quant.serving.engines import plan as make_plan

    with out.progress("looking at the checkpoint"):  # every value of it, where it will be served
        deployment = make_plan(model_path, DeploymentRequest(**request), engine)
    for warning in deployment.warnings:
        out.warn(warning)
    for note in deployment.notes:
        out.note(note)
    return deployment


@click.command()
@deployment_options
@click.option(
    "--engine",
    type=click.Choice(list(ENGINES)),
    default="vllm",
    show_default=True,
    help="What serves it: another engine gets its own words, where it reads this checkpoint.",
)
@click.option(
    "--output",
    "kind",
    type=click.Choice(KINDS),
    default="shell",
    show_default=True,
    help="What to print; monitoring is the alerts and the dashboard as objects of a cluster.",
)
@click.option(
    "--claim", metavar="NAME", help="PersistentVolumeClaim that holds the checkpoint, in a cluster."
)
@click.option("--claim-path", default="", help="Where in the claim it lies.")
@click.option(
    "--nodes",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Machines of a leaderworkerset or a ray-service.",
)
@click.option(
    "--price-per-hour",
    type=FiniteRange(0, min_open=True),
    help="Of all its hardware: the dashboard shows the cost of a million tokens.",
)
@options.check_profile
@common_options
def plan(
    out: Output,
    model_path: Path,
    engine: str,
    kind: str,
    claim: str | None,
    claim_path: str,
    nodes: int,
    price_per_hour: float | None,
    profile: str,
    **request: Any,
) -> None:
    """The exact command that serves a checkpoint, by vLLM or another engine, and why each flag has its value.
    For vLLM the context is fitted to the GPU.

    \b
    quant-deploy plan -m out/Llama-3.1-8B-W4A16 --output compose > compose.yaml
    quant-deploy plan -m out/Llama-3.1-8B-W4A16 --engine sglang
    """
    from quant.serving.artefacts import Placement, artefact

    if request["port"] == 0:
        raise UsageError("--port is 0: a plan names the port, from 1 to 65535; serve takes a free one for 0")
    # a plan is of config and headers: of the weights' gigabytes, or those in storage, nothing is read
    deployment = _planned(out, model_path, request | {"read_values": False}, engine)
    placement = Placement(claim, claim_path.strip("/"), nodes, price_per_hour, profile)
    text = artefact(deployment, kind, placement)
    out.result(
        deployment.to_dict() | {"output": kind, "artefact": text}, lambda c: click.echo(text, nl=False)
    )


@click.command()
@deployment_options
@click.option(
    "--engine",
    type=click.Choice(["vllm", *(e.name for e in ENGINES.values() if e.files)]),
    default="vllm",
    show_default=True,
    help="What serves it: llama.cpp and ollama take a .gguf file.",
)
@options.vllm_python
@click.option(
    "--llama-python",
    type=PATH,
    show_default="llama-server on PATH, else the variable QUANT_LLAMA_PYTHON, or this one",
    help="Python of an environment with xllamacpp, which brings llama.cpp's server.",
)
@options.start_timeout
@click.option("--check", is_flag=True, help="Stop after the test completion.")
@options.exact_activations
@common_options
def serve(
    out: Output,
    model_path: Path,
    engine: str,
    vllm_python: Path | None,
    llama_python: Path | None,
    timeout: float,
    check: bool,
    exact_activations: bool,
    **request: Any,
) -> None:
    """Start vLLM on a checkpoint, or llama.cpp or Ollama on a GGUF file, try a completion, report, serve
    until a signal.

    \b
    quant-deploy serve -m out/Llama-3.1-8B-W4A16 --port 8000 -- --max-num-seqs 64
    quant-deploy serve -m Llama-3.1-8B-q4_k_m.gguf --engine llama.cpp
    """
    from quant.commands.render import deployment as render
    from quant.serving.local import serve_file
    from quant.serving.process import serve as start

    given = {
        "--vllm-python": (vllm_python, "vllm"),
        "--exact-activations": (exact_activations or None, "vllm"),
        "--llama-python": (llama_python, "llama.cpp"),
    }
    for option, (value, owner) in given.items():
        if value is not None and engine != owner:
            raise UsageError(f"{option} has no use with --engine {engine}: it is for {owner}")
    deployment = _planned(out, model_path, request, engine)
    title = deployment.engine.title

    # what vLLM compiles and captures takes minutes in which its log is silent
    waiting = ExitStack()
    progress = waiting.enter_context(out.progress(f"starting {title}"))
    started = False

    def log(line: str) -> None:
        if started:
            out.note(line)
        else:
            progress(Event(f"starting {title}", message=line))

    def ready(value: dict[str, Any]) -> None:
        nonlocal started
        started = True
        waiting.close()
        out.result(value, lambda console: render.serving(console, value))
        if not check:
            out.note(f"serving {value['model']} on {value['url']}; Ctrl-C stops it")

    out.note(f"starting {title} on {deployment.model_path}")
    with waiting:
        common: dict[str, Any] = {"timeout": timeout, "check": check, "log": log, "ready": ready}
        if engine == "vllm":
            start(deployment, python=vllm_python, exact=exact_activations, **common)
        else:
            serve_file(deployment, python=llama_python, **common)
    out.note("stopped")
