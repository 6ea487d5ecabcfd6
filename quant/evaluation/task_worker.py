"""lm-eval in its own environment: ``python task_worker.py JOB``. It imports nothing of this package.

The library chooses documents, writes prompts and judges. What a model thinks of tokens it asks the parent
for: a JSON line on stdout for all requests of all tasks, answered by one on stdin. The last line is the
result. Tokens are made as lm-eval's own ``hf`` model makes them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

#: stdout as it was: what libraries print goes to stderr.
_OUT = os.fdopen(os.dup(1), "w", encoding="utf-8")


def say(value: dict[str, Any]) -> None:
    _OUT.write(json.dumps(value) + "\n")
    _OUT.flush()


class Refused(Exception):
    """What cannot be done, in words for the parent."""


def asking(job: dict[str, Any]) -> Any:
    """A model of lm-eval whose every score the parent computes."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from transformers import AutoTokenizer

    class Asking(TemplateLM):
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = AutoTokenizer.from_pretrained(job["model"])
            self.max_length = job["max_length"]
            if self.prefix_token_id is None:
                raise Refused("the tokenizer has neither a start nor an end token, which lm-eval begins with")

        @property
        def eot_token_id(self) -> int:
            return self.tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            start = self.tokenizer.bos_token_id
            return self.eot_token_id if start is None else start

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            if add_special_tokens is None and string.startswith(
                str(self.tokenizer.decode(self.prefix_token_id))
            ):
                given = {"add_special_tokens": False}
            return list(self.tokenizer.encode(string, **given))

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            return self._ask([(context, continuation) for _, context, continuation in requests])

        def _ask(self, pairs: Any) -> list[tuple[float, bool]]:
            asked = []
            for context, continuation in pairs:
                if len(continuation) > self.max_length:
                    raise Refused(
                        f"an answer has {len(continuation)} tokens, the model's context {self.max_length}"
                    )
                whole = (context + continuation)[-(self.max_length + 1) :]
                asked.append([whole, len(continuation)])
            say({"requests": asked})
            answers = json.loads(sys.stdin.readline())
            return [(float(log), bool(greedy)) for log, greedy in answers]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            windows, counts = [], []
            for request in requests:
                made = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                own = [utils.make_disjoint_window(w) for w in made]
                windows += own
                counts.append(len(own))
            logs = [log for log, _ in self._ask(windows)]
            sums, at = [], 0
            for count in counts:
                sums.append(sum(logs[at : at + count]))
                at += count
            return sums

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            raise Refused(
                "a task lets the model write text, which is not run block by block: choose tasks that score "
                "answers, such as their multiple-choice forms"
            )

    return Asking()


def run(job: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's results, and of each document its scores."""
    from importlib.metadata import version

    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=job["tasks_path"])
    unknown = [t for t in job["tasks"] if not manager.match_tasks([t])]
    if unknown:
        raise Refused(
            f"{', '.join(unknown)}: lm-eval has no such task: `lm-eval ls tasks` lists them, and "
            "--tasks-path adds a folder of your own"
        )
    found = evaluator.simple_evaluate(
        model=asking(job),
        tasks=job["tasks"],
        num_fewshot=job["few_shot"],
        limit=job["limit"],
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=True,
        random_seed=0,
        numpy_random_seed=0,
        torch_random_seed=0,
        fewshot_random_seed=0,
    )
    assert found is not None
    results = {}
    for task, values in found["results"].items():
        metrics = {
            key.removesuffix(",none"): value
            for key, value in values.items()
            if isinstance(value, (int, float)) and "stderr" not in key and key.endswith(",none")
        }
        samples = found["samples"].get(task, [])
        results[task] = {
            "metrics": metrics,
            "higher_is_better": found["higher_is_better"].get(task, {}),
            "documents": len(samples),
            "scores": {
                name: [s[name] for s in samples]
                for name in metrics
                if samples and all(isinstance(s.get(name), (int, float)) for s in samples)
            },
        }
    return {"version": version("lm_eval"), "tasks": results}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sys.stdout = sys.stderr
    try:
        say({"results": run(job)})
    except Refused as error:
        say({"refused": str(error)})
    except Exception as error:  # whatever the library or a task of the user raises
        lines = [x.strip() for x in str(error).splitlines() if x.strip()]
        say({"failed": f"{type(error).__name__}: {lines[0][:300] if lines else ''}"})


if __name__ == "__main__":
    main()
