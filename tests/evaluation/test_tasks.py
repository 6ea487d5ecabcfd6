"""Tasks of lm-eval: what is judged here beside lm-eval's own model, and what cannot be run. The environment
is named by QUANT_TASKS_PYTHON; without it the tests that need it are skipped by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.checkpoint.reader import open_checkpoint
from quant.errors import CheckpointError, UsageError
from quant.evaluation.quality import Runner
from quant.evaluation.tasks import TaskRequest, _together, scores
from tests.helpers import TINYLM, quantize

VARIABLE = "QUANT_TASKS_PYTHON"
needed = pytest.mark.skipif(
    not os.environ.get(VARIABLE),
    reason=f"{VARIABLE} names no Python with lm-eval: python -m quant.evaluation.task_environment makes one",
)
YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: {metric}, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks with data of their own: choices, and text that has to be written."""
    path = tmp_path_factory.mktemp("tasks")
    subjects = ["The river", "The band", "The game", "The album", "The church", "A storm"]
    choices = [" released in the", " built", " the first of", " lost"]
    rows = [{"question": f"{s} was", "choices": choices, "answer": i % 4} for i, s in enumerate(subjects * 4)]
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, kind, metric in (
        ("own_choice", "multiple_choice", "acc"),
        ("own_text", "generate_until", "bleu"),
    ):
        text = YAML.format(name=name, data=path / "data.jsonl", kind=kind, metric=metric)
        (path / f"{name}.yaml").write_text(text)
    absent = YAML.format(name="absent", data="", kind="multiple_choice", metric="acc")
    absent = absent.replace("dataset_path: json", "dataset_path: nobody/has-this-data-set")
    (path / "absent.yaml").write_text(absent.replace("dataset_kwargs: {data_files: }\n", ""))
    return path


def test_scores_are_those_of_the_whole_model(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    requests: list[tuple[list[int], int]] = []
    for length, count in ((9, 3), (5, 4), (9, 1), (30, 2), (9, 8), (4, 0)):
        requests.append((torch.randint(4096, (length,), generator=generator).tolist(), count))
    # one whose end is what the model would say
    with torch.no_grad():
        likely = int(model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].argmax())
    requests.append(([5, 6, 7, likely], 1))
    found = scores(Runner(open_checkpoint(llama), torch.device("cpu")), requests, torch.device("cpu"))
    for (tokens, count), (log, greedy) in zip(requests, found, strict=True):
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([tokens])).logits[0, :-1].double().log_softmax(-1)
        wanted = torch.tensor(tokens[1:])
        last = slice(len(wanted) - count, None)
        assert log == pytest.approx(float(logs.gather(1, wanted[:, None])[last].sum()), abs=1e-3)
        assert greedy == bool((logs.argmax(-1) == wanted)[last].all())
    assert found[-1][1] and not found[0][1]
    with pytest.raises(CheckpointError, match="a task has token 4096, the model 4096"):
        scores(Runner(open_checkpoint(llama), torch.device("cpu")), [([4096, 1], 1)], torch.device("cpu"))


def test_nothing_is_padded_and_groups_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from quant.evaluation import tasks

    monkeypatch.setattr(tasks, "_TOGETHER", 40)
    monkeypatch.setattr(tasks, "_BATCH_TOKENS", 20)
    requests = [([0] * length, 1) for length in (10, 5, 10, 10, 5, 50)] + [([0] * 3, 0)]
    groups = _together(requests)
    assert sorted(i for g in groups for b in g for i in b) == [0, 1, 2, 3, 4, 5]
    assert all(len({len(requests[i][0]) for i in batch}) == 1 for g in groups for batch in g)
    assert [sum(len(requests[i][0]) for b in g for i in b) for g in groups] == [40, 50]


def test_what_cannot_run_is_refused_in_a_line_before_anything_is_measured(
    llama: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    asked = ["evaluate", llama, "--chunks", "2", "--length", "32", "--tasks"]
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho False\n")
    bare.chmod(0o755)
    for more, said in (
        (["arc_easy", "--tasks-python", bare], "has no lm-eval: make an environment with `python -m quant."),
        (["arc_easy", "--tasks-python", tmp_path / "none"], "it does not run (No such file or directory)"),
        (["", "--tasks-python", bare], "--tasks names none"),
        (["a", "--tasks-path", tmp_path / "none"], "it is not a folder"),
        (["a", "--vllm", sys.executable], "--tasks are run here"),
    ):
        found = cli(*asked, *more)
        assert found.code == 2 and said in found.err and found.out == "", found
    alone = cli("evaluate", llama, "--limit", "3")
    assert alone.code == 2 and "--limit is for --tasks" in alone.err
    with pytest.raises(UsageError, match="--tasks names none"):
        TaskRequest(()).check()


def test_what_was_judged_is_kept_and_shown_and_what_is_damaged_is_not_taken(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    from quant.commands.render import results
    from quant.evaluation.quality import evaluate
    from quant.report.files import EVALUATION, load_evaluation, save_evaluation

    quantize(llama, tmp_path / "out", group_size=32)
    metric = {
        "value": 0.5125, "standard_error": 0.01, "higher_is_better": True, "source": 0.5375,
        "difference": {"mean": -0.025, "standard_error": 0.004, "interval": [-0.033, -0.017]},
    }  # fmt: skip
    judged = {
        "version": "0.4.13",
        "limit": None,
        "tasks": {"arc": {"documents": 80, "metrics": {"acc": metric}}},
    }
    value = evaluate(tmp_path / "out", length=32, chunks=2).to_dict() | {"tasks": judged}
    save_evaluation(tmp_path / "out", value)
    html = (tmp_path / "out" / "quant_report.html").read_text()
    kept = load_evaluation(tmp_path / "out")
    assert kept is not None and kept["tasks"] == judged
    results.evaluation(Console(width=80, no_color=True), kept)
    for text in (html, capsys.readouterr().out):
        assert all(x in text for x in ("arc, 80 documents", "0.5125 ± 0.0100", "0.5375", "-0.0250 ± 0.0040"))
    for wrong in ({}, {"version": "1", "tasks": {"arc": {"documents": 80, "metrics": {"acc": {}}}}}):
        (tmp_path / "out" / EVALUATION).write_text(json.dumps(value | {"tasks": wrong}))
        assert load_evaluation(tmp_path / "out") is None


@needed
def test_accuracies_are_those_of_lm_evals_own_model(
    folder: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    """Where the environment has torch, its ``hf`` model is the oracle."""
    python = os.environ[VARIABLE]
    quantize(TINYLM, tmp_path / "out", bits=3, format="plain")
    asked = ["--tasks", "own_choice", "--tasks-path", folder, "--tasks-python", python]
    short = ["--chunks", "2", "--length", "32"]
    found = cli("evaluate", tmp_path / "out", "--against", TINYLM, *short, *asked, "--json")
    assert found.code == 0, found.err
    value = json.loads(found.out)
    ours = value["tasks"]["tasks"]["own_choice"]
    acc = ours["metrics"]["acc"]
    assert ours["documents"] == 24 and value["kl"]["mean"] > 0
    assert acc["difference"]["mean"] == pytest.approx(acc["value"] - acc["source"])
    shown = cli("evaluate", TINYLM, *short, *asked, "--limit", "4")
    assert "own_choice" in shown.out and "acc" in shown.out and "4 documents" in shown.out
    program = (
        "import json, sys\n"
        "from lm_eval import evaluator\n"
        "from lm_eval.tasks import TaskManager\n"
        "model = {'pretrained': sys.argv[1], 'dtype': 'float32', 'device': 'cpu'}\n"
        "found = evaluator.simple_evaluate('hf', model,\n"
        "    tasks=['own_choice'], task_manager=TaskManager(include_path=sys.argv[2]), bootstrap_iters=0)\n"
        "print('RESULT', found['results']['own_choice']['acc,none'])\n"
    )
    done = subprocess.run([python, "-c", program, tmp_path / "out", folder], capture_output=True, text=True)
    if "No module named 'torch'" in done.stderr or "No module named 'accelerate'" in done.stderr:
        pytest.skip("the environment has no torch: lm-eval's own model cannot run")
    assert float(done.stdout.split("RESULT")[1]) == acc["value"], done.stderr[-2000:]


@needed
@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("no_such_task", "no_such_task: lm-eval has no such task"),
        ("own_text", "a task lets the model write text"),
        ("absent", "its data set is not in the cache and cannot be fetched"),
    ],
)
def test_a_task_that_cannot_be_had_is_said(
    task: str, said: str, folder: Path, llama: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = ["--tasks", task, "--tasks-path", folder, "--tasks-python", os.environ[VARIABLE]]
    found = cli("evaluate", llama, "--chunks", "2", "--length", "32", *asked)
    assert found.code == 1 and said in found.err and "Traceback" not in found.err, found.err
