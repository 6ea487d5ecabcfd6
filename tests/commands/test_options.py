"""Options: one meaning in every subcommand, and in help the default that holds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from deploy_vllm import cli as deploy
from quant import defaults
from quant.outlier_suppression import SmoothQuant
from quant.planning.request import EngineRequest
from quant.quantizers import GPTQQuantizer, QuantizerRegistry
from quant.recipe import Recipe, make_recipe
from quant.serving.deployment import DeploymentRequest
from quantize import cli as quant
from tests.helpers import short_text

#: Options that say what the subcommand does with them: their beginning is the same.
PURPOSES = {
    "--against": "Source checkpoint to compare with: ",
    "--source": "Checkpoint that it was made from: ",
    "--text": "Text to ",
    "--seed": "Of ",
    "--dry-run": "Check everything, predict bytes, memory and time, write nothing",
    "--output": "File to write: ",
    "--vllm": "Python of an environment with vLLM: ",
    "--url": "Endpoint, such as http://127.0.0.1:8000",
}
#: What means something else in one subcommand, as scripts rely on: smoothing where the others round; a kind
#: of artefact and a folder where the others name a file; several loads one after another, and requests that
#: write text; a list of what a search would try; one file; what all jobs of a batch take together; engines
#: that are started, of those whose words are known.
OTHERWISE = {
    ("batch", "--max-memory"),
    ("export-gguf", "--output-path"),
    ("search", "--dry-run"),
    ("smooth", "--method"),
    ("prune", "--method"),
    ("plan", "--output"),
    ("bench", "--output"),
    ("bench", "--concurrency"),
    ("distill", "--concurrency"),
    ("serve", "--engine"),
}


def options() -> Iterator[tuple[str, click.Option]]:
    for group in (quant, deploy):
        context = click.Context(group)
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            yield from ((name, p) for p in command.params if isinstance(p, click.Option))


def option(command: str, name: str) -> click.Option:
    return next(o for c, o in options() if c == command and name in o.opts)


def shown(command: str, name: str) -> str:
    """An option as --help has it, in one line."""
    record = option(command, name).get_help_record(click.Context(click.Command("x")))
    assert record is not None
    return record[1]


def test_an_option_is_the_same_in_every_command_that_has_it() -> None:
    meanings: dict[str, set[str]] = {}
    count: dict[str, int] = {}
    for command, one in options():
        name = one.opts[-1]
        if (command, name) in OTHERWISE:
            continue
        text = str(one.help)
        if name in PURPOSES:
            assert text.startswith(PURPOSES[name])
            text = PURPOSES[name]
        meaning = json.dumps([one.opts, one.secondary_opts, one.type.to_info_dict(), one.metavar, text])
        meanings.setdefault(name, set()).add(meaning)
        count[name] = count.get(name, 0) + 1
    assert {n: m for n, m in meanings.items() if len(m) > 1} == {}
    assert sum(n > 1 for n in count.values()) >= 25


@pytest.mark.parametrize("name", ["samples", "seed", "target", "tensor_parallel", "vllm_version", "backend"])
def test_the_default_in_help_is_the_recipe_s(name: str) -> None:
    default = Recipe.model_fields[name].default
    assert option("quantize", f"--{name.replace('_', '-')}").default == default
    assert f"[default: {default}" in shown("quantize", f"--{name.replace('_', '-')}")


@pytest.mark.parametrize(
    ("command", "request_"),
    [("recommend", EngineRequest()), ("serve", DeploymentRequest())],
    ids=lambda v: str(v)[:9],
)
def test_the_defaults_of_planning_and_serving_are_the_library_s(command: str, request_: Any) -> None:
    fields = {f.name: getattr(request_, f.name) for f in dataclasses.fields(request_)}
    group = quant if command == "recommend" else deploy
    one = group.get_command(click.Context(group), command)
    assert one is not None
    values = one.make_context(command, ["-m", "x"]).params
    assert len(fields.keys() & values.keys()) >= 9
    assert {k: v for k, v in values.items() if k in fields} == {
        k: v for k, v in fields.items() if k in values
    }


def test_the_defaults_in_help_are_the_methods_own() -> None:
    assert option("quantize", "--damping").default == GPTQQuantizer().damping
    assert option("quantize", "--act-order").default == GPTQQuantizer().act_order
    assert option("quantize", "--alpha").default == SmoothQuant().alpha
    search = shown("quantize", "--clip-search")
    suppression = shown("quantize", "--outlier-suppression")
    assert set(defaults.CLIP_SEARCH) | set(defaults.SUPPRESSORS) <= set(QuantizerRegistry._entries)
    for name, kind in QuantizerRegistry._entries.items():
        own = getattr(kind(), "clip_search", None)
        assert (f"{name}: {'on' if own else 'off'}" in search) == (own is not None), name
        assert (f"{name}: {kind.suppressor}" in suppression) == bool(kind.suppressor), name


def test_the_defaults_in_help_are_those_of_each_method_s_scheme() -> None:
    def scheme(**given: Any) -> Any:
        recipe = make_recipe({"model_path": "m", "output_path": "o", **given})
        return recipe.resolved_scheme(recipe.method)

    plain, awq, fp8 = (scheme(method=m) for m in ("gptq", "awq", "fp8"))
    assert shown("quantize", "--scheme").endswith(
        f"[default: ({plain.name}; awq: {awq.name}; fp8: {fp8.name})]"
    )
    assert plain.weights.symmetric and not awq.weights.symmetric
    assert "the scheme's: symmetric; awq: asymmetric)" in shown("quantize", "--symmetric")
    sizes = (plain.weights.group_size, fp8.weights.group_size)
    assert "the scheme's: {}; fp8: {})".format(*sizes) in shown("quantize", "--group-size")
    assert "w8a8-int8: smooth_quant; nvfp4: smooth_quant; mxfp4: smooth_quant)" in shown(
        "quantize", "--outlier-suppression"
    )
    assert not scheme(method="gptq", scheme="w8a8-int8").activations.calibrated
    assert "[default: dynamic]" in shown("quantize", "--activations")


def test_a_default_on_the_command_line_wins_over_a_recipe_only_where_it_is_given(
    llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    (tmp_path / "r.yaml").write_text(
        "method: gptq\ngroup_size: 32\nsamples: 4\nsequence_length: 32\ndamping: 0.1\n"
    )
    text = ["--calibration-dataset", short_text()]
    job = [
        "quantize",
        "-m",
        llama,
        "-o",
        tmp_path / "out",
        "--config",
        tmp_path / "r.yaml",
        *text,
        "--dry-run",
        "--json",
    ]
    assert json.loads(cli(*job).out)["calibration_tokens"] == 4 * 32
    assert json.loads(cli(*job, "--samples", "128").out)["calibration_tokens"] == 128 * 32


def test_phases_and_their_seconds_are_told_with_verbose_alone(
    llama: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    job = ["quantize", "-m", llama, "--method", "minmax", "--group-size", "32"]
    plain = cli(*job, "-o", tmp_path / "a")
    assert "time: " not in plain.err and " s (" not in plain.out
    verbose = cli(*job, "-o", tmp_path / "b", "-v", "-q")
    (line,) = verbose.err.splitlines()
    assert line.startswith("time: ")
    evaluated = cli("evaluate", llama, "--length", "32", "--chunks", "2", "--text", short_text(), "-v", "-q")
    assert evaluated.err.startswith("time: ") and len(evaluated.err.splitlines()) == 1
