"""A small sound engine for the endpoint of the tests: transformers' own forward of a checkpoint in its dtype,
with log-probabilities as vLLM tells them."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import torch

from quant.offline import load_tokenizer, transformers

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if tools %}tools{% endif %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


class Engine:
    """
    Args:
        path: what it computes with, which need not be what it is said to serve.
    """

    def __init__(self, path: Path):
        self.tokenizer = load_tokenizer(path)
        self.model = transformers().AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        self._known: dict[tuple[tuple[int, ...], int], tuple[list[int], torch.Tensor]] = {}
        self._lock = threading.Lock()

    def encode(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        return list(prompt[0]) if isinstance(prompt[0], list) else list(prompt)

    def chat(self, messages: list[dict[str, str]], bare: bool) -> list[int]:
        """``bare``: without the template."""
        if bare:
            return self.encode("\n".join(m["content"] for m in messages))
        made = self.tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=False
        )
        return list(made)

    def _continued(self, prompt: tuple[int, ...], count: int) -> tuple[list[int], torch.Tensor]:
        """Tokens with their greedy continuation, and the log-probability of each but the first."""
        with self._lock:
            if (prompt, count) not in self._known:
                tokens, given, cache = list(prompt), torch.tensor([prompt]), None
                with torch.no_grad():
                    for _ in range(count):
                        out = self.model(given, past_key_values=cache, use_cache=True)
                        given, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
                        tokens.append(int(given))
                    logs = self.model(torch.tensor([tokens])).logits[0, :-1].float().log_softmax(-1)
                said = logs.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
                self._known[prompt, count] = tokens, said
            return self._known[prompt, count]

    def complete(self, prompt: list[int], body: dict[str, Any], wrong: bool) -> dict[str, Any]:
        """A greedy continuation; ``wrong``: of other log-probabilities."""
        tokens, logs = self._continued(tuple(prompt), body["max_tokens"])
        said = logs - (0.5 if wrong else 0.0)
        new = tokens[len(prompt) :]
        text = self.tokenizer.decode(new)
        if "response_format" in body:
            text = json.dumps({"colour": "green"})
        call = {"function": {"name": "paint", "arguments": json.dumps({"colour": "red"})}}
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": "length",
            "token_ids": new,
            "logprobs": {"token_logprobs": said[len(prompt) - 1 :].tolist()},
            "prompt_logprobs": [None]
            + [{str(t): {"logprob": float(x)}} for t, x in zip(prompt[1:], said, strict=False)],
        }
        if "messages" in body:
            choice["message"] = {"content": text, "tool_calls": [call] if "tools" in body else []}
        else:
            choice["text"] = text
        return {"choices": [choice], "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(new)}}
