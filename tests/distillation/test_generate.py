"""Text made by a teacher: asked for once, kept as it comes, filtered at the end. The endpoint here misbehaves
as told; the real one's test is in tests/vllm."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quant.calibration.files import documents
from quant.distillation import generate as module
from quant.distillation.generate import Generation, fault, generate
from quant.errors import QuantError, UsageError
from quant.serving.client import Endpoint, EndpointError
from tests.serving.endpoint import FakeEndpoint, endpoint


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSES", (0.0,))


def words(faulty: Callable[[int], None] = lambda number: None) -> Callable[[int], str]:
    """Pieces of answers that are all different; ``faulty`` is told how many there were."""
    numbers = itertools.count()

    def piece(place: int) -> str:
        number = next(numbers)
        faulty(number)
        return f" word{number}"

    return piece


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Tell me about {i}."}) + "\n" for i in range(6)))
    return file


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_task_is_answered_and_says_where_it_is_from(
    tasks: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    with endpoint(answer=words(), itl=0.0) as fake:
        done = cli(
            "distill", "--generate", tasks, "--url", fake.url, "--chat", "-o", tmp_path / "out.jsonl",
            "--max-tokens", "12", "--answers", "2", "--json",
        )  # fmt: skip
        assert done.code == 0, done.err
        value = json.loads(done.out)
        assert (value["asked"], value["rows"], value["dropped"]) == (12, 12, {})
        assert len({body["seed"] for body in fake.behaviour.bodies}) == 12
        assert fake.most <= 8
        again = cli("distill", "--generate", tasks, "--url", fake.url, "-o", tmp_path / "out.jsonl")
        assert again.code == 2 and "it is there already" in again.err
    made = rows(tmp_path / "out.jsonl")
    assert [(r["made_by"]["task"], r["made_by"]["answer"]) for r in made] == [
        (t, a) for t in range(6) for a in range(2)
    ]
    assert made[3]["messages"][0] == {"role": "user", "content": "Tell me about 1."}
    assert made[3]["messages"][1]["role"] == "assistant" and made[3]["made_by"]["model"] == "m"
    assert len(list(documents([tmp_path / "out.jsonl"]))) == 12  # what calibration reads


def test_an_endpoint_that_dies_loses_nothing(tasks: Path, tmp_path: Path) -> None:
    asked = Generation(tasks, concurrency=1, max_tokens=12)
    fakes: list[FakeEndpoint] = []

    def dying(number: int) -> None:
        if number == 12 * 3 + 5:  # in the middle of the fourth answer
            fakes[0].behaviour.fault = "drop"

    with endpoint(answer=words(dying), itl=0.0) as fake:
        fakes.append(fake)
        with pytest.raises(
            EndpointError, match=r"[34] of 6 answers came and are kept .* run the same command"
        ):
            generate(asked, Endpoint(fake.url), tmp_path / "out.jsonl")
    beside = tmp_path / "out.jsonl.answers"
    kept = len(rows(beside)) - 1
    first = {r["task"]: r["text"] for r in rows(beside)[1:]}
    with beside.open("ab") as stream:
        stream.write(b'{"task": 5, "answer": 0, "te')  # a kill cut this line off
    with pytest.raises(UsageError, match=r"asked for otherwise \(max_tokens\)"), endpoint() as other:
        generate(Generation(tasks, max_tokens=13), Endpoint(other.url), tmp_path / "out.jsonl")
    later = itertools.count()
    with endpoint(answer=lambda place: f" later{next(later)}", itl=0.0) as fake:
        made = generate(asked, Endpoint(fake.url), tmp_path / "out.jsonl")
        assert len(fake.behaviour.bodies) == 6 - kept
    assert (made.asked, made.rows, made.dropped, made.tokens) == (6, 6, {}, 72)
    said = {r["made_by"]["task"]: r["text"] for r in rows(tmp_path / "out.jsonl")}
    for task, text in said.items():  # what came before the end, and the others of the second endpoint
        prompt = f"Tell me about {task}."
        assert text == prompt + first[task] if task in first else text.startswith(f"{prompt} later")
    assert list(said) == list(range(6)) and len(first) == kept and not beside.exists()


def test_a_task_that_is_refused_stops_no_other(tmp_path: Path) -> None:
    """One is beyond the endpoint's context; it is asked for once and counted with the reason."""
    file, beside = tmp_path / "tasks.jsonl", tmp_path / "out.jsonl.answers"
    prompts = ["long " * 20_000, *(f"Tell me about {i}." for i in range(4))]
    file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    asked, told = Generation(file, concurrency=1, max_tokens=12), list[str]()
    fakes: list[FakeEndpoint] = []

    def dying(number: int) -> None:
        if number == 12 * 2 + 5:  # in the middle of the third answer
            fakes[0].behaviour.fault = "drop"

    with endpoint(answer=words(dying), itl=0.0) as fake:
        fakes.append(fake)
        with pytest.raises(EndpointError, match=r"[34] of 5 answers came \(1 refused\)"):
            generate(asked, Endpoint(fake.url), tmp_path / "out.jsonl", lambda e: told.append(e.message))
    assert [t for t in told if t] == [
        t for t in told if "task 0 is left out: " in t and "beyond the context" in t
    ]
    assert [r["task"] for r in rows(beside)[1:] if "beyond the context" in r.get("refused", "")] == [0]
    with endpoint(answer=words(), itl=0.0) as fake:
        made = generate(asked, Endpoint(fake.url), tmp_path / "out.jsonl")
        assert fake.behaviour.seen["/v1/completions"] < 3
    assert made.rows + made.dropped.pop("said before", 0) == 4 and made.dropped == {"refused": 1}


def test_refusals_of_everything_end_a_run(tmp_path: Path) -> None:
    """Before an answer they say that the request is wrong, and are asked again; many in a row, after one, end
    the run, and the next goes on behind them."""
    file, beside = tmp_path / "tasks.jsonl", tmp_path / "out.jsonl.answers"
    file.write_text("".join(json.dumps({"prompt": f"Tell me about {i}."}) + "\n" for i in range(15)))
    asked = Generation(file, concurrency=1, max_tokens=12)
    with (
        endpoint(fault="400") as fake,
        pytest.raises(EndpointError, match="'because': the request was refused"),
    ):
        generate(asked, Endpoint(fake.url), tmp_path / "out.jsonl")
    assert fake.behaviour.seen["/v1/completions"] == module._REFUSALS and len(rows(beside)) == 1
    fakes: list[FakeEndpoint] = []

    def changing(number: int) -> None:
        fakes[0].behaviour.fault = "400" if number >= 11 else ""

    with endpoint(answer=words(changing), itl=0.0) as fake:
        fakes.append(fake)
        with pytest.raises(EndpointError, match=r"11 of 15 answers came \(10 refused\)"):
            generate(asked, Endpoint(fake.url), tmp_path / "out.jsonl")
    with endpoint(answer=words(), itl=0.0) as fake:
        made = generate(asked, Endpoint(fake.url), tmp_path / "out.jsonl")
        assert fake.behaviour.seen["/v1/completions"] == 4
    assert made.dropped["refused"] == module._REFUSALS


def test_of_many_tasks_more_may_be_refused_in_a_row(tmp_path: Path) -> None:
    """Twelve that are too long stand behind one another among two hundred."""
    file, long = tmp_path / "tasks.jsonl", range(130, 142)
    prompts = ["long " * 20_000 if i in long else f"Tell me about {i}." for i in range(200)]
    file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    with endpoint(answer=words(), itl=0.0) as fake:
        asked = Generation(file, concurrency=1, max_tokens=12)
        made = generate(asked, Endpoint(fake.url), tmp_path / "out.jsonl")
    assert made.rows == 188 and made.dropped == {"refused": 12}


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ({"fault": "500"}, "the server failed"),
        ({"fault": "html"}, "the answer is not a stream"),
        ({"fault": "404"}, "does not have that model or route"),
        ({"key": "secret"}, "the key was refused"),
    ],
)
def test_bad_endpoints_are_told(behaviour: dict[str, Any], message: str, tasks: Path, tmp_path: Path) -> None:
    with endpoint(**behaviour) as fake, pytest.raises(EndpointError, match=message):
        generate(Generation(tasks), Endpoint(fake.url), tmp_path / "out.jsonl")
    with pytest.raises(EndpointError, match="no connection"):
        generate(Generation(tasks), Endpoint("http://127.0.0.1:9"), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_what_says_nothing_new_is_left_out(tasks: Path, tmp_path: Path) -> None:
    with endpoint(answer=lambda i: f" w{i}", itl=0.0) as fake:
        made = generate(Generation(tasks, max_tokens=12), Endpoint(fake.url), tmp_path / "out.jsonl")
    assert made.rows == 1 and made.dropped == {"said before": 5}
    with endpoint(answer=lambda i: ".", itl=0.0) as fake, pytest.raises(QuantError, match="6 too short"):
        generate(Generation(tasks, max_tokens=12), Endpoint(fake.url), tmp_path / "none.jsonl")
    assert (tmp_path / "none.jsonl.answers").exists()
    seen, runs = set[str](), set[int]()
    text = " ".join(f"word{i}" for i in range(40))
    assert fault(text, "a", 20, seen, runs) == ""
    assert fault(f"{text} and the end", "a", 20, seen, runs) == "nearly said before"
    assert fault("again and " * 30, "a", 20, seen, runs) == "repeating itself"
    assert fault("Name twelve animals, please!", "name twelve animals please", 20, seen, runs) == (
        "the task repeated"
    )
    assert fault("?!" * 30, "a", 20, seen, runs) == "not text"


def test_options_of_the_other_use_are_refused(cli: Callable[..., Any], tasks: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out.jsonl")
    for given, message in (
        (("--generate", tasks), "give --url"),
        (("--generate", tasks, "--url", "http://h", "--steps", "3"), "--steps: not of --generate"),
        (("--generate", tasks, "--url", "http://h", "--answers", "0"), "--answers is 0"),
        (("--generate", tasks, "--url", "http://h", "--seed", "-3"), "--seed is -3"),
        (("--generate", tmp_path / "none", "--url", "http://h"), "--generate is"),
        (("--concurrency", "3"), "--concurrency: of --generate alone"),
        ((), "--model-path, --teacher is missing"),
    ):
        done = cli("distill", *given, *out)
        assert done.code == 2 and message in done.err.replace("\n", " "), done.err
