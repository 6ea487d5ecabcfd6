"""A Modelfile by Ollama's grammar, whose Go template writes chats as the checkpoint's own Jinja template
does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from quant.gguf.header import read_header
from quant.gguf.ollama import modelfile, turns_of
from quant.pipeline.gguf import export_gguf
from tests.helpers import copy_model

Chat = Sequence[tuple[str, str]]
_CHATS: tuple[Chat, ...] = (
    [("user", "Hi")],
    [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "1 < 2 {{ }}?")],
    [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
)
_LOOP = "{% for m in messages %}@{% endfor %}{% if add_generation_prompt %}#{% endif %}"
_GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{% if loop.first %}{{ first }}{% endif %}{{ m['content'] | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
_QWEN = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nI am Q.<|im_end|>\n' }}{% endif %}"


def _turns(before: str, behind: str, answer: str) -> str:
    turn = f"{{{{ '{before}' + m.role + '{behind[0]}' + m.content + '{behind[1]}' }}}}"
    return _LOOP.replace("@", turn).replace("#", f"{{{{ '{answer}' }}}}")


_IM = _turns("<|im_start|>", ("\n", "<|im_end|>\n"), "<|im_start|>assistant\n")  # type: ignore[arg-type]
#: Templates as published models have them → the name of their row, and whether they take a system's turn.
TEMPLATES: dict[str, tuple[str, str, bool]] = {
    "chatml": (_IM, "ChatML", True),
    "qwen2.5": (_QWEN + _IM, "ChatML", True),
    "llama 3": (
        "{{ bos_token }}"
        + _turns(
            "<|start_header_id|>", ("<|end_header_id|>\n\n", "<|eot_id|>"),  # type: ignore[arg-type]
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        "Llama 3", True,
    ),
    "phi-3": (_turns("<|", ("|>\n", "<|end|>\n"), "<|assistant|>\n"), "Phi-3", True),  # type: ignore[arg-type]
    "gemma": (_GEMMA, "Gemma", True),
    "mistral": (_MISTRAL, "Mistral", False),
}  # fmt: skip


class Go:
    """What these templates use of Go's ``text/template``: range, if, variables, comparisons."""

    def __init__(self, text: str):
        assert "{{-" not in text and "-}}" not in text
        self.parts = re.split(r"(\{\{ .*? \}\})", text)

    def run(self, chat: Chat) -> str:
        self.chat, self.names = [{"Role": r, "Content": c} for r, c in chat], dict[str, Any]()
        out: list[str] = []
        assert self._block(0, None, True, out) == len(self.parts)
        return "".join(out)

    def _block(self, at: int, dot: Any, live: bool, out: list[str]) -> int:
        """Runs until ``end`` or ``else``, whose place it gives."""
        while at < len(self.parts):
            part = self.parts[at]
            at += 1
            if not part.startswith("{{ "):
                out += [part] if live else []
                continue
            words = part[3:-3].strip()
            if words == "end" or words.startswith("else"):
                return at - 1
            if words.startswith("range "):
                match = re.fullmatch(r"range (\$\w+), (\$\w+) := \.Messages", words)
                assert match, words
                end = self._block(at, dot, False, out)
                for i, message in enumerate(self.chat if live else []):
                    self.names[match[1]] = i
                    self._block(at, message, True, out)
                at = end + 1
            elif words.startswith("if "):
                done = False
                while True:
                    taken = live and not done and bool(self._value(words.partition("if ")[2], dot))
                    at = self._block(at, dot, taken, out)
                    done = done or taken
                    words = self.parts[at][3:-3].strip()
                    at += 1
                    if words == "end":
                        break
            elif match := re.fullmatch(r"(\$\w+) :?= (.*)", words):
                if live:
                    self.names[match[1]] = self._value(match[2], dot)
            elif live:
                out.append(str(self._value(words, dot)))
        return at

    def _value(self, words: str, dot: Any) -> Any:
        parts = re.findall(r'\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)|"[^"]*"|\S+', words)
        values = [self._value(p[1:-1], dot) if p[0] == "(" else p for p in parts[1:]]
        head = parts[0]
        arguments = [self._value(v, dot) if isinstance(v, str) and v in parts[1:] else v for v in values]
        calls: dict[str, Callable[..., Any]] = {
            "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "not": lambda a: not a, "len": len,
            "and": lambda *a: all(a), "or": lambda *a: any(a), "slice": lambda a, i: a[i:],
        }  # fmt: skip
        if head in calls:
            return calls[head](*arguments)
        assert not arguments, words
        if head[0] == '"':
            return head[1:-1]
        if head.isdigit():
            return int(head)
        return self.chat if head == "$.Messages" else self.names[head] if head[0] == "$" else dot[head[1:]]


def parsed(text: str) -> list[tuple[str, str]]:
    """Instructions of a Modelfile, by Ollama's grammar: a word and its value, quoted by one or three quotes
    where it has to be."""
    pattern = re.compile(
        r"(FROM|TEMPLATE|SYSTEM|PARAMETER (?:stop|num_ctx|temperature|top_p|top_k)) "
        r'(?:"""(.*?)"""|"([^"\n]*)"|([^"\n]+))\n',
        re.S,
    )
    at, found = 0, []
    while at < len(text):
        match = pattern.match(text, at)
        assert match, text[at : at + 80]
        found.append((match[1], next(g for g in match.groups()[1:] if g is not None)))
        at = match.end()
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_go_template_writes_chats_as_the_jinja_one_does(name: str) -> None:
    import jinja2

    template, row, takes_system = TEMPLATES[name]
    turns = turns_of(template, {"bos_token": "<s>", "eos_token": "</s>"})
    assert turns is not None and turns.name == row
    own = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    for chat in _CHATS:
        if chat[0][0] == "system" and not takes_system:
            continue
        messages = [{"role": r, "content": c} for r, c in chat]
        wanted = own.render(messages=messages, add_generation_prompt=True, bos_token="", eos_token="</s>")
        assert Go(turns.template).run(chat) == wanted
    # an answer that was begun is gone on with: nothing stands behind it
    assert Go(turns.template).run([("user", "a"), ("assistant", "b")]).endswith("b")


def test_a_modelfile_has_the_template_and_its_stops(llama: Path, tmp_path: Path) -> None:
    folder = copy_model(llama, tmp_path / "model")
    file = folder / "tokenizer_config.json"
    for template, wanted in ((TEMPLATES["chatml"][0], True), ("{{ messages[0].content }} ->", False)):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
        made = tmp_path / f"{wanted}.gguf"
        export_gguf(folder, made, "q8_0")
        found = modelfile(read_header(made))
        said, note = parsed(found.text), found.note
        assert found.templated is wanted and found.context == 256
        assert said[0] == ("FROM", f"./{wanted}.gguf") and ("PARAMETER num_ctx", "256") in said
        assert ("TEMPLATE" in dict(said)) is wanted
        assert (("PARAMETER stop", "<|im_end|>") in said) is wanted
        assert ("ChatML" in note) if wanted else ("none of those" in note)
