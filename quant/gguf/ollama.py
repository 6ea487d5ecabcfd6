"""A Modelfile for Ollama: the file, the chat template in Go's words, when to stop, the context.

Ollama does not run a checkpoint's own template, which is Jinja: without ``TEMPLATE`` it takes the nearest of
the templates that it knows, by the text of ``tokenizer.chat_template``. So a template is written where the
checkpoint's own is one of the rows here, which is found out by rendering both. Grammar: Ollama's
``docs/modelfile.mdx``; what templates may use: ``docs/template.mdx`` and Go's ``text/template``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from quant.gguf.header import Header

#: Tokens of context that a Modelfile asks for at the most: what is asked for is allocated.
_MOST_CONTEXT = 8192
_PROBES = (
    [("user", "one"), ("assistant", "two"), ("user", "three")],
    [("system", "zero"), ("user", "one")],
    [("system", "zero"), ("user", "one"), ("assistant", "two"), ("user", "three")],
)


@dataclass(frozen=True)
class Turns:
    """How a family writes the turns of a chat: what stands before and behind the text of each.

    Attributes:
        system: None: it stands before the text of the first user's turn, and ``joint`` between.
        answer: what the model's turn begins with.
        stops: texts that end it.
        default: what the system says where a chat does not begin with its turn.
    """

    name: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str
    stops: tuple[str, ...]
    system: tuple[str, str] | None = None
    joint: str = "\n\n"
    default: str = ""

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """What the row makes of a chat that the model answers."""
        text, waiting = "", ""
        if self.default and self.system is not None and messages[0][0] != "system":
            text = self.system[0] + self.default + self.system[1]
        for role, content in messages:
            if role == "system" and self.system is None:
                waiting = content + self.joint
                continue
            before, behind = {"system": self.system, "user": self.user}.get(role) or self.assistant
            text += before + (waiting if role == "user" else "") + content + behind
            waiting = waiting if role != "user" else ""
        return text + self.answer

    @property
    def template(self) -> str:
        """The same for Ollama: a Go template over ``.Messages``. An assistant's turn at the end is left
        open."""
        user, waiting = _go(self.user[0]) + "{{ .Content }}" + _go(self.user[1]), ""
        if self.system is None:
            waiting = '{{ $system := "" }}'
            system = "{{ $system = .Content }}"
            user = (
                _go(self.user[0]) + "{{ if $system }}{{ $system }}" + _go(self.joint)
                + '{{ $system = "" }}{{ end }}{{ .Content }}' + _go(self.user[1])
            )  # fmt: skip
        else:
            system = _go(self.system[0]) + "{{ .Content }}" + _go(self.system[1])
        said = "" if self.system is None else _go(self.system[0] + self.default + self.system[1])
        default = '{{ if and (eq $i 0) (ne .Role "system") }}' + said + "{{ end }}" if self.default else ""
        return (
            waiting + "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            + default + '{{ if eq .Role "system" }}' + system + '{{ else if eq .Role "user" }}' + user
            + '{{ else if eq .Role "assistant" }}' + _go(self.assistant[0]) + "{{ .Content }}"
            + "{{ if not $last }}" + _go(self.assistant[1]) + "{{ end }}{{ end }}"
            '{{ if and $last (ne .Role "assistant") }}' + _go(self.answer) + "{{ end }}{{ end }}"
        )  # fmt: skip


def _go(text: str) -> str:
    """Text as it stands in a Go template."""
    return text.replace("{{", '{{ "{{" }}')


def _alike(name: str, before: str, behind: str, *stops: str, assistant: str = "assistant") -> Turns:
    """Turns that differ in the role alone, which stands for ``@``."""
    system, user, own = (before.replace("@", role) for role in ("system", "user", assistant))
    return Turns(name, (user, behind), (own, behind), own, stops, (system, behind))


_CHATML = _alike("ChatML", "<|im_start|>@\n", "<|im_end|>\n", "<|im_end|>", "<|im_start|>")
_GEMMA_USER, _GEMMA_MODEL = "<start_of_turn>user\n", "<start_of_turn>model\n"
_GEMMA_END = "<end_of_turn>\n"
#: Known templates.
TURNS: tuple[Turns, ...] = (
    _CHATML,
    _alike("Llama 3", "<|start_header_id|>@<|end_header_id|>\n\n", "<|eot_id|>", "<|eot_id|>"),
    _alike("Phi-3", "<|@|>\n", "<|end|>\n", "<|end|>", "<|user|>"),
    _alike("Phi-4", "<|im_start|>@<|im_sep|>", "<|im_end|>", "<|im_end|>"),
    _alike("Zephyr", "<|@|>\n", "</s>\n", "</s>"),
    Turns(
        "Gemma", (_GEMMA_USER, _GEMMA_END), (_GEMMA_MODEL, _GEMMA_END), _GEMMA_MODEL, ("<end_of_turn>",)
    ),
    *(
        Turns(
            "Mistral", (f"[INST]{a}", f"{b}[/INST]"), (c, f"{d}</s>"), "", ("[INST]", "[/INST]", "</s>"), None
        )
        for a in ("", " ") for b in ("", " ") for c in ("", " ") for d in ("", " ")
    ),
)  # fmt: skip


def turns_of(template: str, special: Mapping[str, str]) -> Turns | None:
    """The row that writes chats as a Jinja template does; None: it is another one, or fails.

    Args:
        special: texts of special tokens, by ``bos_token`` and so on. One that begins a text is not counted:
            llama.cpp adds it.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: ""
    rendered: list[str | None] = []
    for probe in _PROBES:
        messages = [{"role": role, "content": content} for role, content in probe]
        try:
            made = environment.from_string(template).render(
                messages=messages, add_generation_prompt=True, **special
            )
        except Exception:  # what templates of others do, refusals of a system's turn among them
            rendered.append(None)
            continue
        rendered.append(made.removeprefix(special.get("bos_token") or "\0"))
    told = [(p, text) for p, text in zip(_PROBES, rendered, strict=True) if text is not None]
    if rendered[0] is None:
        return None
    rows = (_with_default(row, rendered[0]) for row in TURNS)
    return next((row for row in rows if all(row.render(p) == text for p, text in told)), None)


def _with_default(row: Turns, text: str) -> Turns:
    """The row, with what its system says where nobody asked it to, as a chat without its turn shows."""
    if row.system is None or not text.endswith(ending := row.render(_PROBES[0])):
        return row
    first = text.removesuffix(ending)
    before, behind = row.system
    said = first.removeprefix(before).removesuffix(behind)
    return replace(row, default=said) if first == before + said + behind and '"""' not in said else row


def _refuse(message: str) -> None:
    raise ValueError(message)


def usual_context(header: Header) -> int | None:
    """Tokens of context that a Modelfile asks for; None: the file does not say how many it takes."""
    length = header.fields.get(f"{header.fields.get('general.architecture')}.context_length")
    return min(length, _MOST_CONTEXT) if isinstance(length, int) else None


@dataclass(frozen=True)
class Modelfile:
    """What ``ollama create`` makes a model of.

    Attributes:
        text: of the file; empty: there is none.
        note: what is to be said of the chat template.
        templated: whether the text has one, so that Ollama does not look for one of its own.
        context: tokens that it asks for; None: it leaves them to Ollama.
    """

    text: str = ""
    note: str = ""
    templated: bool = False
    context: int | None = None


def modelfile(header: Header, file: str | None = None, context: int | None = None) -> Modelfile:
    """The Modelfile of a GGUF file.

    Args:
        file: where it is; None: in the Modelfile's own folder.
        context: tokens; None: :func:`usual_context`.
    """
    fields = header.fields
    words = fields.get("tokenizer.ggml.tokens")
    words = words if isinstance(words, list) and all(isinstance(w, str) for w in words[:1]) else []

    def text(key: str) -> str | None:
        i = fields.get(f"tokenizer.ggml.{key}_token_id")
        return words[i] if isinstance(i, int) and 0 <= i < len(words) else None

    special = {f"{role}_token": t for role in ("bos", "eos") if (t := text(role)) is not None}
    template = fields.get("tokenizer.chat_template")
    turns = turns_of(template, special) if isinstance(template, str) else None
    lines = [f"FROM {file or './' + header.files[0].name}"]
    if turns is not None:
        note = f"the chat template is {turns.name}'s"
        lines.append(f'TEMPLATE """{turns.template}"""')
    elif template:
        note = (
            "the chat template is none of those that are known here: Ollama takes the nearest of its own: "
            "compare what it makes of a chat, or write TEMPLATE by hand"
        )
    else:
        note = "there is no chat template: the model completes text"
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    stops = dict.fromkeys([*(turns.stops if turns else ()), *(t for k in ("eos", "eot") if (t := text(k)))])
    lines += [f'PARAMETER stop "{s}"' for s in stops if '"' not in s and "\n" not in s]
    context = context or usual_context(header)
    if context is not None:
        lines.append(f"PARAMETER num_ctx {context}")
    return Modelfile("\n".join(lines) + "\n", note, turns is not None or not template, context)
