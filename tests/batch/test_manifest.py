"""Manifests: what they stand for, and that everything wrong is said at once."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from quant.batch.manifest import MOST_JOBS, Job, read_manifest
from quant.errors import QuantError

Read = Callable[[Any], tuple[Job, ...]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Reads a manifest, given as text or as the value that it holds, beside two models of which only the
    configs are there."""
    for name in ("models/a", "models/b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")

    def call(value: Any) -> tuple[Job, ...]:
        text = value if isinstance(value, str) else yaml.safe_dump(value)
        (tmp_path / "m.yaml").write_text(text)
        return read_manifest(tmp_path / "m.yaml")

    return call


def problems(read: Read, value: Any) -> list[str]:
    with pytest.raises(QuantError) as caught:
        read(value)
    assert caught.value.exit_code == 2
    return list(getattr(caught.value, "problems", [str(caught.value)]))


def job(output: str = "out", **changes: Any) -> dict[str, Any]:
    return {"model": "models/a", "output": output, "overrides": {"method": "minmax"}, **changes}


def test_a_matrix_is_every_combination_and_jobs_come_first(read: Read, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("method: gptq\ngroup_size: 32\ncalibration_dataset: [text.txt]\n")
    (tmp_path / "text.txt").write_text("x")
    found = read(
        {
            "defaults": {"overrides": {"samples": 8, "seed": 1}, "priority": 3, "evaluate": {"max_kl": 0.1}},
            "matrix": [
                {
                    "models": ["models/a", "./models/b"],
                    "recipes": ["r.yaml"],
                    "axes": {"scheme": ["w4a16", "w8a16"], "seed": [5]},
                    "output": "out/{model}-{recipe}-{scheme}",
                    "overrides": {"samples": 9},
                    "evaluate": None,
                }
            ],
            "jobs": [job("x/../alone", name="alone", retries=0)],
        }
    )
    assert [j.name for j in found] == [
        "alone", "out/a-r-w4a16", "out/a-r-w8a16", "out/b-r-w4a16", "out/b-r-w8a16",
    ]  # fmt: skip
    assert found[0].output == tmp_path / "alone" and found[0].retries == 0 and found[0].priority == 3
    assert found[0].evaluate is not None and found[0].evaluate.max_kl == 0.1
    assert found[0].values["samples"] == 8 and found[0].values["seed"] == 1
    last = found[-1]
    assert last.model == str(tmp_path / "models/b") and last.evaluate is None
    assert last.values == {
        "method": "gptq", "group_size": 32, "samples": 9, "seed": 5, "scheme": "w8a16",
        "calibration_dataset": [str(tmp_path / "text.txt")], "model_path": str(tmp_path / "models/b"),
        "output_path": str(tmp_path / "out/b-r-w8a16"),
    }  # fmt: skip


def test_what_decides_the_bytes_decides_the_digest(read: Read) -> None:
    def digest(**changes: Any) -> str:
        return read({"jobs": [job(**changes)]})[0].digest

    assert digest() == digest(output="other", priority=5, name="x", evaluate={"max_kl": 1})
    assert digest() == digest(overrides={"method": "minmax", "push_to_hub": "a/b"})
    assert len({digest(), digest(model="models/b"), digest(overrides={"method": "minmax", "seed": 2})}) == 3


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"jobs": [job(), job("./x/../out", name="b")]}, "output HERE/out: is that of 'out' and of 'b'"),
        ({"jobs": [job(), job("link", name="b")]}, "HERE/out is the same directory"),
        ({"jobs": [job(), job("out/b")]}, "output HERE/out/b: lies in the output of 'out'"),
        ({"jobs": [job("models/a/x")]}, "output HERE/models/a/x: lies in the model of 'models/a/x'"),
        ({"jobs": [job("models/a")]}, "output HERE/models/a: is the model of 'models/a', which is only read"),
        ({"jobs": [job(), job("out.work")]}, "is where the unfinished work of 'out' lies"),
        ({"jobs": [job("a", name="n"), job("b", name="n")]}, "name 'n' is that of two jobs"),
        ({"jobs": [job(model="./c")]}, "model HERE/c: there is no such directory"),
        ({"jobs": [job(model=".")]}, "model HERE: there is no config.json in it"),
        ({"jobs": [job(model="org/name")]}, "HF_HUB_OFFLINE forbids fetching it"),
        ({"jobs": [job(recipe="none.yaml")]}, "none.yaml: the recipe cannot be read"),
        ({"jobs": [job(overrides={"sampels": 1})]}, "recipe key is 'sampels': did you mean 'samples'"),
        ({"jobs": [job(overrides={"method": "gptq", "bits": 7})]}, "bits is 7: must be one of"),
        ({"jobs": [job(overrides={"output_path": "x"})]}, "overrides name output_path: the job's key output"),
        ({"jobs": [job(overrides={"fresh": True})]}, "fresh: a batch goes on where it stopped"),
        ({"jobs": [job(overrides={"calibration_dataset": ["no.txt"]})]}, "there is no HERE/no.txt"),
        ({"jobs": [job(samples=3)]}, "key is 'samples'"),
        ({"jobs": [job(samples=3)]}, "it is a recipe key: put it into overrides"),
        ({"jobs": [job(evaluate={"max_kll": 1})]}, "key is 'max_kll': did you mean 'max_kl'"),
        ({"jobs": [job(evaluate={"text": "no.txt"})]}, "evaluate.text: there is no HERE/no.txt"),
        ({"jobs": [job("n" * 251)]}, "more than 250 bytes are no file name"),
        ({"jobs": [job(priority="high")]}, "job 1: priority is 'high': input should be a valid integer"),
        ({"jobs": [{"model": "models/a"}]}, "job 1: output is missing"),
        ({"jobs": [7]}, "job 1 is 7: it must be a mapping"),
        ({"jobs": 7}, "jobs is 7: it must be a list"),
        ({"job": [job()]}, "manifest key is 'job': did you mean 'jobs'"),
        ({}, "no jobs: give them in jobs"),
        ("[1, 2]", "a manifest is a mapping"),
        ("jobs: [", "is not YAML"),
        ("jobs: 1\njobs: 2", "the key 'jobs' stands twice"),
        ("jobs: &a [*a]", "aliases"),
        ("a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{y}: &{y} [{','.join(['*' + x] * 10)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)
         ), "aliases"),
        ({"matrix": [{"models": ["models/a"], "axes": {"seed": [1, 2]}, "output": "o"}]}, "must hold {seed}"),
        ({"matrix": [{"models": ["models/a"], "output": "o-{x}"}]}, "placeholder is 'x'"),
        ({"matrix": [{"models": ["models/a"], "axes": {"seed": []}, "output": "o"}]}, "has no values"),
        ({"matrix": [{"models": ["models/a"], "axes": {"seed": [*range(200)], "samples": [*range(1, 101)]},
                      "output": "o-{seed}-{samples}"}]}, "stands for 20,000 jobs"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(value: Any, said: str, read: Read, tmp_path: Path) -> None:
    os.symlink("out", tmp_path / "link")
    found = problems(read, value)
    assert any(said.replace("HERE", str(tmp_path)) in p for p in found), found


@pytest.mark.parametrize(
    "change",
    [
        {"output": "a\0b"}, {"output": "a\nb"}, {"name": "two\nlines"}, {"model": "\0"}, {"recipe": "\0"},
        {"evaluate": {"text": "\0"}}, {"model": "m" * 5000}, {"overrides": {"calibration_dataset": ["\0"]}},
        {"overrides": {"method": "gptq", "options": {True: {None: 1, "a": 2}}}},
        {"overrides": {"method": "gptq", "gpu": float("nan")}}, {"retry_delay": float("nan")},
        {"evaluate": {"max_kl": float("inf")}}, {"output": "n" * 300},
    ],
    ids=lambda c: str(c)[:30],
)  # fmt: skip
def test_what_nobody_means_gives_no_traceback(change: dict[str, Any], read: Read) -> None:
    try:
        (found,) = read({"jobs": [job(**change)]})
    except QuantError as error:
        assert error.exit_code == 2
    else:
        assert found.slug and found.digest and json.dumps(found.settings)


def test_everything_wrong_is_said_at_once(read: Read) -> None:
    found = problems(
        read,
        {
            "wrong": 1,
            "defaults": {"retires": 1},
            "jobs": [job(model="nope"), job("out/b", overrides={"bits": 9}), job("./out", name="b")],
            "matrix": [{"models": ["models/a"], "output": "{y}"}],
        },
    )
    said = "\n".join(found)
    for part in ("'wrong'", "'retires'", "models", "bits is 9", "lies in the output", "is that of", "'y'"):
        assert part in said or part == "models", said
    assert len(found) == 7 and all(p.startswith(f"{found[0].split(': ')[0]}: ") for p in found)


def test_ten_thousand_jobs_are_read_in_seconds_and_their_problems_are_not_all_listed(read: Read) -> None:
    axes = {"seed": [*range(100)], "samples": [*range(1, 101)], "method": ["gptq"]}
    matrix = {"models": ["models/a"], "axes": axes, "output": "o/{seed}-{samples}"}
    start = time.process_time()
    found = read({"matrix": [matrix]})
    assert len(found) == MOST_JOBS == 10_000 and len({j.slug for j in found}) == MOST_JOBS
    assert time.process_time() - start < 60
    listed = problems(read, {"matrix": [{**matrix, "axes": {**axes, "bits": [9]}}]})
    assert len(listed) == 51 and listed[-1] == "and 9,950 more"
