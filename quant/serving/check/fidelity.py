"""Does the endpoint compute with the checkpoint that it should serve, and read prompts as it must?"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quant.errors import CheckpointError, QuantError
from quant.serving.check.context import Context, together
from quant.serving.check.value import Check, Finding, Skip, Unexpected, judged, skipped, within

if TYPE_CHECKING:
    import torch

    from quant.serving.reference import Answers, Comparison

#: What is said where the endpoint computes something else than the checkpoint.
_OTHER = (
    "see that it serves this checkpoint, in the dtype of its config.json; quant verify --vllm tells "
    "whether this vLLM computes with it rightly"
)
_MESSAGES = (
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "Which colour has the sky on a clear day?"},
)
_COLOURS = ("red", "green")
_SCHEMA = {
    "type": "object",
    "properties": {"colour": {"type": "string", "enum": list(_COLOURS)}},
    "required": ["colour"],
    "additionalProperties": False,
}

_Read = Callable[[Mapping[str, Any], "torch.Tensor"], "Answers"]
_Ask = Callable[[str, "torch.Tensor"], dict[str, Any]]


async def _way_to_score(context: Context, row: torch.Tensor) -> tuple[_Ask, _Read]:
    """How this engine tells the log-probabilities of prompts.

    Raises:
        Skip: it does not.
        Unexpected: it refuses a plain completion of the same tokens too.
    """
    from quant.serving.reference import answers_in, echo_question, echoed_in, question

    ways: tuple[tuple[_Ask, _Read], ...] = ((question, answers_in), (echo_question, echoed_in))
    reasons = []
    for asked, read in ways:
        reply = await context.send("POST", "/v1/completions", asked(context.endpoint.model, row))
        if not reply.refused:
            try:
                read(reply.object(), row)
            except Unexpected:
                raise
            except QuantError as error:  # an engine that overlooks the keys it does not know
                reasons.append(str(error))
                continue
            return asked, read
        reasons.append(str(reply))
    plain = await context.complete(row[0].tolist())
    if plain.status != 200:
        raise Unexpected(f"a completion of {row.shape[1]} of the checkpoint's tokens: {plain}")
    raise Skip(f"the engine tells no log-probabilities of prompts: {reasons[-1]}")


async def _scores(
    context: Context, rows: Sequence[torch.Tensor], concurrency: int, way: tuple[_Ask, _Read]
) -> Answers:
    """Each row asked for in a request of its own, so many at a time."""
    import torch

    from quant.serving.reference import Answers

    asked, read = way
    gate, done = asyncio.Semaphore(concurrency), 0

    async def one(row: torch.Tensor) -> Answers:
        nonlocal done
        async with gate:
            reply = await context.send("POST", "/v1/completions", asked(context.endpoint.model, row))
        answers = read(reply.object(), row)
        done += 1
        context.say(f"log-probabilities, {concurrency} at a time", done, len(rows))
        return answers

    parts = await together([one(row) for row in rows])
    lengths = {p.tokens.shape[1] for p in parts}
    if len(lengths) > 1:
        raise Unexpected(f"answers have {sorted(lengths)} tokens where the same number was asked of each")
    return Answers(torch.cat([p.tokens for p in parts]), torch.cat([p.logs for p in parts]), parts[0].prompt)


def _compared(context: Context, answers: Sequence[Answers]) -> list[Comparison]:
    """Each set of answers beside the checkpoint's values; the engine's way of rounding as its log tells it,
    else whichever of those that there are is nearer."""
    import torch

    from quant.evaluation.simulation import Kernels
    from quant.serving.reference import Reference, judge, kernels

    ways = [Kernels(), Kernels(activations=False), Kernels(False, nearest_cache=False)]
    if context.start_of_log:
        ways = [kernels(context.start_of_log)]
    elif not _rounds_inputs(context):
        ways = ways[:1]
    tokens = torch.cat([a.tokens for a in answers])
    best: list[Comparison] = []
    for way in ways:
        truth = Reference(context.needs_checkpoint(), way).truth(tokens)
        found, at = [], 0
        for part in answers:
            rows = slice(at, at := at + len(part.tokens))
            found.append(judge(part, truth.rows(rows)))
        if not best or found[0].deviation < best[0].deviation:
            best = found
        if all(c.passed for c in found):
            return found
    return best


def _rounds_inputs(context: Context) -> bool:
    """Whether the checkpoint's scheme rounds inputs or the KV cache, which some kernels leave undone."""
    from quant.checkpoint.reader import open_checkpoint
    from quant.formats.base import find_format

    checkpoint = open_checkpoint(context.needs_checkpoint())
    layers = find_format(checkpoint.config, checkpoint.tensors)
    linears = [] if layers is None else layers.linears.values()
    settings = checkpoint.config.get("quantization_config") or {}
    return bool(settings.get("kv_cache_scheme")) or any(x.scheme.activations is not None for x in linears)


async def log_probabilities(context: Context) -> list[Finding]:
    from quant.checkpoint.reader import open_checkpoint
    from quant.serving.reference import Reference, difference, prompts
    from quant.vllm.context import context_length

    path = context.needs_checkpoint()
    try:
        await asyncio.to_thread(Reference, path)  # says at once what cannot be built
        longest = context_length(open_checkpoint(path).config)
        shortest = min((n for n in (longest, context.length) if n), default=None)
        rows = list((await asyncio.to_thread(lambda: prompts(path, longest=shortest))).split(1))
    except CheckpointError as error:
        raise Skip(f"the checkpoint cannot be run here: {error}") from error
    way = await _way_to_score(context, rows[0])
    many = context.profile.fidelity.concurrency
    alone = await _scores(context, rows, 1, way)
    crowd = await _scores(context, [rows[i % len(rows)] for i in range(max(many, len(rows)))], many, way)
    context.say("the checkpoint's own log-probabilities")
    found = await asyncio.to_thread(_compared, context, [alone, crowd])
    findings = [
        judged(
            f"log-probabilities, {count} at a time",
            c.passed,
            c.describe(),
            value=_finite(c.deviation),
            threshold=c.limit,
            todo=_OTHER,
        )
        for count, c in zip((1, many), found, strict=True)
    ]
    rms, worst, parted = difference(_repeated(alone, len(crowd.tokens)), crowd)
    # each of the two may be as far from the truth, independently
    limit, limit_worst = math.sqrt(2) * found[0].limit, 2 * found[0].limit_worst
    text = (
        f"{rms:.4f} nats between 1 and {many} at a time (worst {worst:.3f}; allowed are {limit:.4f} and "
        f"{limit_worst:.3f}); {parted} of {len(crowd.tokens)} continuations part"
    )
    findings.append(
        judged(
            "the same alone and in a batch",
            rms <= limit and worst <= limit_worst,
            text,
            value=_finite(rms),
            threshold=limit,
            todo="answers depend on what else is served: try --enforce-eager, another attention backend, "
            "without prefix caching; report it to the engine",
        )
    )
    return findings


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _repeated(answers: Answers, count: int) -> Answers:
    """The rows again and again until there are so many."""
    import torch

    from quant.serving.reference import Answers

    which = torch.arange(count) % len(answers.tokens)
    return Answers(answers.tokens[which], answers.logs[which], answers.prompt)


async def repeats(context: Context) -> list[Finding]:
    count = context.profile.fidelity.repeats
    texts = []
    for _ in range(count):
        texts.append((await context.complete("The history of the town begins", 32)).content())
    different = len(set(texts))
    return [
        judged(
            "greedy text repeats",
            different == 1,
            f"{different} different answers to {count} equal requests at temperature 0",
            value=different,
            threshold=1,
            todo="a near tie may fall either way where batches differ; different answers every time mean "
            "it heeds no temperature, or overwrites memory",
            # a tie gives two answers, chance gives as many as there are requests
            otherwise="FAIL" if different == count and count > 2 else "WARN",
        )
    ]


def _template(context: Context) -> Any:
    """The checkpoint's tokenizer, which has a chat template.

    Raises:
        Skip: it has none.
    """
    if not getattr(context.tokenizer, "chat_template", None):
        raise Skip("the checkpoint has no chat template")
    return context.tokenizer


def _templated(context: Context) -> tuple[list[Mapping[str, str]], list[int]]:
    """Messages that the template takes, and the tokens that it makes of them."""
    tokenizer = _template(context)
    reason = ""
    for messages in (_MESSAGES, _MESSAGES[1:]):  # some templates have no system's turn
        try:
            made = tokenizer.apply_chat_template(
                list(messages), tokenize=True, add_generation_prompt=True, return_dict=False
            )
            return list(messages), [int(t) for t in made]
        except Exception as error:  # a template raises whatever it likes
            reason = str(error)
    raise Skip(f"the checkpoint's chat template takes neither of our conversations: {reason[:200]}")


async def chat_template(context: Context) -> list[Finding]:
    messages, expected = _templated(context)
    reply = await context.chat(messages)
    counted = reply.prompt_tokens()
    plain = len(context.tokenizer("\n".join(m["content"] for m in messages))["input_ids"])
    asked = {"model": context.endpoint.model, "messages": messages, "add_generation_prompt": True}
    told = await context.send("POST", "/tokenize", asked)
    tokens = told.value.get("tokens") if told.status == 200 and isinstance(told.value, dict) else None
    same = counted == len(expected) and (tokens is None or tokens == expected)
    ids = "" if tokens is None else ", and the same ids" if tokens == expected else ", but other ids"
    return [
        judged(
            "chat template",
            same,
            f"the endpoint reads {counted} tokens{ids}, the checkpoint's template makes {len(expected)} (the "
            f"bare text is {plain})",
            value=counted,
            threshold=len(expected),
            todo="serve with the checkpoint's own template: see --chat-template and chat_template.jinja, and "
            "what stands between",
        )
    ]


async def tool_calls(context: Context) -> list[Finding]:
    template = _template(context).chat_template
    if "tools" not in str(template):
        raise Skip("the checkpoint's chat template has no tools")
    function = {"name": "paint", "description": "Paints the wall.", "parameters": _SCHEMA}
    reply = await context.chat(
        [{"role": "user", "content": "Paint the wall red."}],
        64,
        tools=[{"type": "function", "function": function}],
        tool_choice={"type": "function", "function": {"name": "paint"}},
    )
    if reply.refused:
        raise Skip(f"the engine takes no tools: {reply}")
    choice = reply.choice()
    message = choice.get("message")
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    first = calls[0] if isinstance(calls, list) and calls else None
    call = first.get("function") if isinstance(first, dict) else None
    if not isinstance(call, dict) or call.get("name") != "paint":
        text = f"no call of the tool that was demanded: {reply.content()[:80]!r}"
        todo = "serve with --enable-auto-tool-choice and the model's --tool-call-parser"
        return [Finding("tool calls", "FAIL", text, todo=todo)]
    return [_constrained("tool calls", str(call.get("arguments")), choice)]


async def json_mode(context: Context) -> list[Finding]:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": _SCHEMA, "strict": True}}
    text = "Answer in JSON. The colour of the grass is:"
    try:
        _template(context)
        reply = await context.chat([{"role": "user", "content": text}], 64, response_format=form)
    except Skip:
        reply = await context.complete(text, 64, response_format=form)
    if reply.refused:
        raise Skip(f"the engine has no JSON mode here: {reply}")
    return [_constrained("JSON mode", reply.content(), reply.choice())]


def _constrained(name: str, text: str, choice: Mapping[str, Any]) -> Finding:
    """Whether a text keeps the schema; one that was cut while it did says nothing."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, dict) and set(value) == {"colour"} and value["colour"] in _COLOURS:
        return Finding(name, "PASS", f"keeps the schema: {text.strip()[:60]}", value["colour"], "the schema")
    bare = re.sub(r"\s", "", text)
    begun = any(json.dumps({"colour": c}, separators=(",", ":")).startswith(bare) for c in _COLOURS)
    if bare and begun and choice.get("finish_reason") == "length":
        return skipped(name, "the answer keeps the schema and was cut before its end (blanks are free)")
    todo = "the engine does not hold the model to the schema: check its structured-output backend"
    return Finding(name, "FAIL", f"does not keep the schema: {text[:80]!r}", text[:80], "the schema", todo)


async def kernels(context: Context) -> list[Finding]:
    from quant.checkpoint.reader import open_checkpoint
    from quant.formats.base import find_format
    from quant.vllm.kernels import formats_of, kernel_of
    from quant.vllm.log import chosen_kernels, weight_only

    if not context.start_of_log:
        raise Skip("no --log of the server is given")
    checkpoint = open_checkpoint(context.needs_checkpoint())
    layers = find_format(checkpoint.config, checkpoint.tensors)
    wanted = sorted({kernel_of(x.scheme) for x in layers.linears.values()}) if layers is not None else []
    if not wanted:
        raise Skip("the checkpoint is not quantized")
    chosen = chosen_kernels(context.start_of_log)
    if not chosen:
        raise Skip("the log names no kernel: it is not of a vLLM at log level INFO, or lacks its start")
    names = ", ".join(f"{k.name} for {k.purpose}" for k in chosen)
    if not context.gpus:
        raise Skip(f"{names}; what was planned is not known: name the GPU with --gpu")
    gpu = context.gpus[0]
    states = {k: formats_of(gpu).get(k, "no") for k in wanted}
    planned = ", ".join(f"{k} {state}" for k, state in states.items())
    slower = weight_only(context.start_of_log) and set(states.values()) == {"native"}
    emulated = any(k.emulated for k in chosen)
    return [
        judged(
            "kernels as planned",
            not slower and not emulated and "no" not in states.values(),
            f"{names}; planned on {gpu.name}: {planned}",
            value=[k.name for k in chosen],
            threshold=states,
            todo="the engine computes otherwise than planned: figures of quant recommend do not hold; see "
            "--gpu, and the log for why it refused the others",
            otherwise="FAIL" if emulated else "WARN",
        )
    ]


def _whole(context: Context) -> float:
    """The questions of the log-probabilities are bounded one by one, the checkpoint's own run by its size."""
    return math.inf


CHECKS = (
    Check("log-probabilities", log_probabilities, _whole),
    Check("greedy text repeats", repeats, within(300)),
    Check("chat template", chat_template, within(180)),
    Check("tool calls", tool_calls, within(120)),
    Check("JSON mode", json_mode, within(120)),
    Check("kernels as planned", kernels, within(60)),
)
