"""What a backward pass shows of experts, against autograd through the whole model; and jobs that go by it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.calibration.statistics import Statistics
from quant.models.experts import find_experts
from quant.pipeline import expert_gradients as module
from quant.pipeline import group_solves
from quant.pipeline.gradients import GradientStream
from quant.pipeline.plan import plan_job
from quant.pipeline.rows import job_rows
from tests.helpers import add_tokenizer, change_config, load_all, quantize, recipe, save_all, weight_files
from tests.models.mixtures import mixture, save_mixture
from tests.pipeline.test_gradients import draws_of

#: A job whose codes are nearly the weights: the second product is seen behind what the first one becomes.
YAQA: dict[str, Any] = {
    "method": "yaqa", "bits": 8, "group_size": 16, "target": "other", "format": "plain", "samples": 6,
}  # fmt: skip


def close(made: torch.Tensor | None, wanted: torch.Tensor, share: float = 0.03) -> bool:
    """Equal up to what rounding inputs to eight bits changes."""
    assert made is not None
    return float((made - wanted).norm() / wanted.norm()) < share


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Statistics]:
    """Copies of the statistics that experts are solved with, in the order of the work."""
    seen: list[Statistics] = []
    inner = group_solves.quantize_many

    def spy(quantizer: Any, weights: Any, statistics: Sequence[Statistics], *rest: Any) -> Any:
        if weights.shape[1] in (96, 48, 192, 64) and len(weights) > 1:
            seen.extend(s.copy() for s in statistics)
        return inner(quantizer, weights, statistics, *rest)

    monkeypatch.setattr(group_solves, "quantize_many", spy)
    return seen


def reference(folder: Path, tokens: torch.Tensor, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each product of each expert, in the order of the work, what it reads [n, K] and the gradients at its
    outputs [n, N], by autograd through the whole model. The experts are computed one by one as their
    definition has it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def one(block: int, stage: int, expert: int, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> Any:
        made = x @ weight.t() + (0 if bias is None else bias)
        made.register_hook(lambda g: found.__setitem__((block, stage, expert), (x.detach(), g)))
        return made

    def forward(block: int, inner: Any, hidden: torch.Tensor, index: Any = None, gates: Any = None) -> Any:
        rows, total = hidden.reshape(-1, hidden.shape[-1]), torch.zeros_like(hidden)
        each = len(hidden) // len(inner.down_proj)
        for expert in range(len(inner.down_proj)):
            if index is None:  # every expert has rows of its own, zero where it is sent none
                at = hidden[expert * each : (expert + 1) * each].any(-1).nonzero().squeeze(1) + expert * each
                weight = torch.ones(len(at))
            else:
                at, place = (index == expert).nonzero(as_tuple=True)
                weight = gates[at, place]
            up, down = inner.gate_up_proj[expert], inner.down_proj[expert]
            turned = up.shape[-1] != hidden.shape[-1] or getattr(inner, "is_transposed", index is None)
            up, down = (up.t(), down.t()) if turned else (up, down)
            biases = [getattr(inner, f"{n}_bias", None) for n in ("gate_up_proj", "down_proj")]
            biases = [None if b is None else b[expert] for b in biases]
            first = one(block, 0, expert, rows[at], up, biases[0])
            if hasattr(inner, "_apply_gate"):
                middle = inner._apply_gate(first)
            else:
                gate, plain = first.chunk(2, -1)
                middle = plain * inner.act_fn(gate)
            last = one(block, 1, expert, middle, down, biases[1])
            total = total.index_add(0, at, last * weight.unsqueeze(-1))
        return total

    layers: list[Any] = list(model.model.layers)
    for number, layer in enumerate(layers):
        experts = layer.get_submodule(find_experts(layer)[0].path)
        experts.forward = lambda *args, n=number, e=experts: forward(n, e, *args)
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    logits.backward(draws_of(logits.detach(), seed))
    order = sorted(found, key=lambda at: (-at[0], at[1], at[2]))
    interleaved = find_experts(layers[0])[0].interleaved
    made = []
    for block, stage, expert in order:
        x, g = found[block, stage, expert]
        if stage == 0 and interleaved:  # gates first
            g = torch.cat([g[:, ::2], g[:, 1::2]], 1)
        made.append((x, g))
    return made


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text", "granitemoe_fused"])
def test_statistics_are_those_of_autograd_through_the_whole_model(
    family: str, tmp_path: Path, given: list[Statistics]
) -> None:
    """Of experts stored plain; transposed and interleaved, with biases; given sorted tokens; fused."""
    folder = tmp_path / "m"
    mixture(family).save_pretrained(folder)
    add_tokenizer(folder)
    job = recipe(folder, tmp_path / "out", **YAQA, moe_calibration="routed")
    tokens = job_rows(plan_job(job)).tokens
    quantize(folder, tmp_path / "out", **YAQA, moe_calibration="routed")
    wanted = reference(folder, tokens, seed=0)
    assert len(given) == len(wanted) == 2 * 2 * 4
    for made, (x, g) in zip(given, wanted, strict=True):
        assert made.tokens == len(x)
        weighted = x * g.norm(dim=1, keepdim=True)
        assert close(made.hessian, weighted.t() @ weighted / len(x))
        g = g * x.norm(dim=1, keepdim=True)
        assert made.gradients is not None and len(made.gradients) == 1
        assert close(made.gradients[0], g.t() @ g / len(x))


@pytest.mark.parametrize("how", ["routed", "blend", "all"])
def test_experts_are_solved_with_what_is_asked_for(
    how: str, tmp_path: Path, given: list[Statistics], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block, six batches of a row: all tokens are a prior of their own size, because features are
    many."""
    seen: list[tuple[str, int, torch.Tensor, torch.Tensor]] = []
    inner = module._at_product

    def spy(layer: Any, expert: int, places: Any, rows: torch.Tensor, gradients: torch.Tensor) -> Any:
        made = inner(layer, expert, places, rows, gradients)
        seen.append((layer.group.stage, expert, *made))
        return made

    monkeypatch.setattr(module, "_at_product", spy)
    folder = save_mixture(tmp_path / "m", "qwen3_moe")
    report = quantize(folder, tmp_path / "out", **YAQA, moe_calibration=how, layers="1")
    tokens = report["experts"]["model.layers.1.mlp.experts"]["tokens"]
    assert sum(tokens) == 2 * 6 * 64 and len(given) == 2 * 4

    def means(x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, g = x.float(), g.float()
        weighted, scaled = x * g.norm(dim=1, keepdim=True), g * x.norm(dim=1, keepdim=True)
        return weighted.t() @ weighted / len(x), scaled.t() @ scaled / len(x)

    for number, made in enumerate(given):
        stage, expert = ("up", "down")[number // 4], number % 4
        parts = [(x, g) for s, e, x, g in seen if (s, e) == (stage, expert)]
        if how == "all":  # batch by batch
            assert len(parts) == 6
            parts = [(torch.cat([x for x, _ in parts]), torch.cat([g for _, g in parts]))]
        assert len(parts) == (2 if how == "blend" else 1)
        sizes = [len(x) for x, _ in parts]
        assert sizes[0] == (6 * 64 if how == "all" else tokens[expert])
        wanted_i, wanted_o = means(*parts[0])
        if how == "blend":
            block, features = wanted_o.shape[0], wanted_i.shape[0]
            count = 2 * block if stage == "up" else 2 * max(block, features)
            assert sizes[1] <= count
            prior_i, prior_o = means(*parts[1])
            share = min(2 * block, sizes[1]) / (min(2 * block, sizes[1]) + tokens[expert])
            wanted_o = (1 - share) * wanted_o + share * prior_o * wanted_o.trace() / prior_o.trace()
            assert made.tokens == tokens[expert] + min(2 * block, sizes[1])
            if stage == "down":
                share = min(2 * features, sizes[1]) / (min(2 * features, sizes[1]) + tokens[expert])
                wanted_i = (1 - share) * wanted_i + share * prior_i * wanted_i.trace() / prior_i.trace()
        assert made.gradients is not None and close(made.gradients[0], wanted_o)
        if how != "blend" or stage == "down":  # before the first product the prior is of all tokens
            assert close(made.hessian, wanted_i)
        assert close(made.hessian, made.hessian.t())


def test_an_expert_without_tokens_has_what_its_layer_reads(tmp_path: Path) -> None:
    folder = save_mixture(tmp_path / "m", "mixtral")
    change_config(folder, num_experts_per_tok=1)
    tensors = load_all(folder)
    for name in [n for n in tensors if n.endswith(".gate.weight")]:
        tensors[name][[0, 3]], tensors[name][2] = 0, -tensors[name][1]  # one of two is always chosen
    save_all(folder, tensors)
    reports = {
        how: quantize(folder, tmp_path / how, **(YAQA | {"bits": 4}), moe_calibration=how)
        for how in ("routed", "blend")
    }
    for how, report in reports.items():
        none = [x for x in report["layers"] if ".experts." in x["name"] and not x["tokens"]]
        assert len(none) == 2 * 2 * 3
        for layer in none:
            assert ("zero on all calibration tokens" in (layer["fallback"] or "")) == (how == "routed")
            assert any("sends it 0 calibration tokens" in note for note in layer["notes"])


@pytest.mark.parametrize("where", ["backward", "solve"])
def test_a_mixture_whose_job_was_stopped_goes_on_to_the_same_bytes(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, options = save_mixture(tmp_path / "m", "qwen3_moe_fused"), YAQA | {"bits": 4}
    wanted = quantize(folder, tmp_path / "undisturbed", **options)
    calls: list[int] = []
    place: Any = GradientStream if where == "backward" else module.GradientExpertSolver
    name = where if where == "backward" else "statistics"
    inner = getattr(place, name)

    def stopping(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == (2 if where == "backward" else 3):  # two groups in the last block
            raise KeyboardInterrupt
        return inner(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(place, name, stopping)
        quantize(folder, tmp_path / "stopped", **options)
    work = tmp_path / "stopped.work"
    assert '"block 1"' in (work / "journal.jsonl").read_text()
    if where == "solve":  # as a power loss leaves files
        (work / "activations.bin").write_bytes(bytes(1 << 12))
        (shard,) = work.glob("*.safetensors")
        shard.write_bytes(shard.read_bytes()[:200] + bytes(shard.stat().st_size - 200))
    found = quantize(folder, tmp_path / "stopped", **options)
    assert found["output_hash"] == wanted["output_hash"] and found["experts"] == wanted["experts"]
    assert weight_files(tmp_path / "stopped") == weight_files(tmp_path / "undisturbed")
