"""Narrower blocks: the output is the source without these experts, channels and heads, and with the others
fitted to their loss; those go that count least."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from quant.checkpoint.reader import open_checkpoint
from quant.errors import CheckpointError, UsageError
from quant.evaluation.verify import verify
from quant.models.narrowing import Widths, again_narrowed, cuts, widths
from quant.pipeline.rows import measured_rows
from quant.pruning import Width, narrow
from quant.pruning import width as widths_module
from quant.pruning.saliency import best_of_groups, least_units, made_up_for
from quant.report.value import Report
from tests.helpers import LATENT, TINYLM, files_of, load_all, make_checkpoint, read_config
from tests.models.mixtures import save_mixture

TEXT: dict[str, Any] = {"samples": 3, "sequence_length": 48}


def built(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24)[None] + 5, use_cache=False).logits[0]


def kept(report: Report, kind: str) -> dict[int, list[int]]:
    assert report.pruning is not None
    (found,) = (w for w in report.pruning.widths if w["kind"] == kind)
    runs = {
        int(b): [list(map(int, r.split("-"))) for r in line.split(",")] for b, line in found["kept"].items()
    }
    return {b: [n for r in some for n in range(r[0], r[-1] + 1)] for b, some in runs.items()}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "phi3", "gemma3_text"])
def test_the_output_is_the_source_with_these_columns_alone(kind: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", kind, num_attention_heads=8, num_key_value_heads=4)
    asked = Width(channels=64, heads=2, multiple_of=32, **TEXT)
    report = narrow(source, tmp_path / "out", asked)
    config = read_config(tmp_path / "out")
    sizes = config["intermediate_size"], config["num_key_value_heads"], config["num_attention_heads"]
    assert sizes == (64, 2, 4)
    head = config["head_dim"]
    model, values = built(source), load_all(tmp_path / "out")
    for index, layer in enumerate(model.model.layers):
        heads = torch.tensor(kept(report, "heads")[index])[:, None] * 2 * head + torch.arange(2 * head)
        for module, places in (
            (layer.mlp.down_proj, torch.tensor(kept(report, "channels")[index])),
            (layer.self_attn.o_proj, heads.flatten()),
        ):
            name = "mlp.down_proj" if module is layer.mlp.down_proj else "self_attn.o_proj"
            with torch.no_grad():
                module.weight.zero_()
                module.weight[:, places] = values[f"model.layers.{index}.{name}.weight"].float()
    torch.testing.assert_close(logits(built(tmp_path / "out")), logits(model), rtol=1e-4, atol=1e-4)
    assert Report.load(tmp_path / "out").pruning == report.pruning  # type: ignore[union-attr]
    if kind == "qwen2":  # no config of its own can say of what size heads are
        assert config["architectures"] == ["LlamaForCausalLM"] and config["attention_bias"]
        assert all(not values[f"model.layers.{i}.self_attn.o_proj.bias"].any() for i in range(2))
        assert all(values[f"model.layers.0.self_attn.{n}_proj.bias"].any() for n in "qkv")
    verified = verify(tmp_path / "out", source=source)
    fitted = len(report.pruning.fitted)  # type: ignore[union-attr]
    assert verified.passed and any(f"{fitted} fitted to what was pruned" in c.detail for c in verified.checks)


def test_linear_attention_keeps_its_heads(tmp_path: Path) -> None:
    """Qwen3-Next's has heads of its own beside those that its config counts, three blocks of four."""
    source = make_checkpoint(
        tmp_path / "source", "qwen3_next", head_dim=16, num_hidden_layers=4, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32,
    )  # fmt: skip
    report = narrow(source, tmp_path / "out", Width(heads=1, **TEXT))
    (stays,) = kept(report, "heads")[3]
    before, after = load_all(source), load_all(tmp_path / "out")
    assert before.keys() == after.keys()
    different = {n for n in before if not torch.equal(before[n], after[n])}
    assert different == {f"model.layers.3.self_attn.{n}_proj.weight" for n in "qkvo"}
    model = built(source)
    output = model.model.layers[3].self_attn.o_proj.weight
    with torch.no_grad():
        output.zero_()
        output[:, 32 * stays : 32 * (stays + 1)] = after["model.layers.3.self_attn.o_proj.weight"].float()
    torch.testing.assert_close(logits(built(tmp_path / "out")), logits(model), rtol=1e-4, atol=1e-4)
    assert verify(tmp_path / "out", source=source).passed


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe_fused"])
def test_those_experts_stay_that_add_most(family: str, tmp_path: Path) -> None:
    """In the first block, whose inputs are the source's; each family holds experts in its own way."""
    source = save_mixture(tmp_path / "source", family)
    report = narrow(source, tmp_path / "out", Width(experts=3, **TEXT))
    assert built(tmp_path / "out").config.num_local_experts == 3
    assert verify(tmp_path / "out", source=source).passed
    rows = measured_rows(open_checkpoint(source), Width(samples=3, sequence_length=48)).tokens
    added, sent = torch.zeros(4), torch.zeros(4)
    model = built(source)

    def experts(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        hidden, index, gates = inputs
        for expert in range(4):
            alone = module.forward(
                hidden, torch.full_like(index[:, :1], expert), torch.ones_like(gates[:, :1])
            )
            for token, place in (index == expert).nonzero().tolist():
                added[expert] += alone[token].norm() * gates[token, place]
                sent[expert] += 1

    block = model.model.layers[0]
    (inner,) = (m for n, m in block.named_modules() if n.endswith("experts"))
    inner.register_forward_hook(experts)
    model.config._experts_implementation = "eager"
    with torch.no_grad():
        model(rows, use_cache=False)
    assert report.pruning is not None
    scores = torch.tensor(report.pruning.widths[0]["scores"]["0"])
    torch.testing.assert_close(scores, added / sent.clamp(min=1), rtol=1e-3, atol=1e-5)
    assert kept(report, "experts")[0] == sorted(scores.argsort(descending=True)[:3].tolist())
    again = again_narrowed(open_checkpoint(source), report.pruning.widths[0])
    values = load_all(tmp_path / "out")
    assert values.keys() == again.tensors.keys()
    assert all(torch.equal(values[n], again.read(n)) for n in values)


def test_the_cost_is_that_of_the_model_that_comes_out(tmp_path: Path) -> None:
    from quant.evaluation.quality import Runner, Source, run_both

    asked = Width(channels=640, heads=1, **TEXT)
    report = narrow(TINYLM, tmp_path / "out", asked)
    assert report.pruning is not None
    first, second = report.pruning.widths
    assert (first["called"], second["called"]) == ("MLP channels", "KV heads")
    assert 0 < first["kl"] < second["kl"]
    rows = measured_rows(open_checkpoint(TINYLM), Width(samples=11, sequence_length=48)).tokens[3:]
    device = torch.device("cpu")
    own = Runner(open_checkpoint(tmp_path / "out"), device)
    found = run_both(own, Source(TINYLM, length=48), rows, device, lambda e: None)
    assert found.kl is not None
    assert float(found.kl.double().mean()) == pytest.approx(second["kl"], rel=1e-3)


def test_a_run_that_died_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_mixture(tmp_path / "source", "qwen3_moe")
    wanted = narrow(source, tmp_path / "whole", Width(experts=2, heads=1, **TEXT))
    measure, calls = widths_module._Pass._columns, 0

    def dying(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return measure(*given)

    with monkeypatch.context() as patch:
        patch.setattr(widths_module._Pass, "_columns", dying)
        with pytest.raises(KeyboardInterrupt):
            narrow(source, tmp_path / "out", Width(experts=2, heads=1, **TEXT))
    monkeypatch.setattr(widths_module._Pass, "_experts", None)  # whoever measures again fails
    report = narrow(source, tmp_path / "out", Width(experts=2, heads=1, **TEXT))
    assert report.pruning == wanted.pruning and report.output_hash == wanted.output_hash
    skipped = {"quant_report.json", "quant_report.html", "README.md"}
    made, other = (
        {n: d for n, d in files_of(tmp_path / f).items() if n not in skipped} for f in ("out", "whole")
    )
    assert made == other


def test_units_go_by_what_the_others_cannot_make_up_for() -> None:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.eye(12) + 0.2 * torch.randn(12, 12, generator=generator)
    inputs = torch.randn(400, 12, generator=generator) @ mixed
    weight = torch.randn(5, 12, generator=generator)
    hessian = inputs.t() @ inputs / len(inputs)

    def loss(places: list[int]) -> float:
        """Of the best matrix that reads these inputs alone."""
        fitted = torch.linalg.lstsq(inputs[:, places], inputs @ weight.t()).solution
        return float((inputs[:, places] @ fitted - inputs @ weight.t()).square().sum(1).mean())

    for size in (1, 3):
        units = [list(range(u, u + size)) for u in range(0, 12, size)]
        losses = [loss([c for v in units if v is not u for c in v]) for u in units]
        stay, costs = least_units(weight, hessian.clone(), size, len(units) - 1)
        assert set(range(len(units))) - set(stay.tolist()) == {losses.index(min(losses))}
        assert float(costs.min()) == pytest.approx(min(losses), rel=0.1)  # damped
    places = torch.tensor([0, 2, 3, 7, 8])
    error = (inputs[:, places] @ made_up_for(weight, hessian, places).t() - inputs @ weight.t()).square()
    assert float(error.sum(1).mean()) == pytest.approx(loss(places.tolist()), rel=0.05)
    assert best_of_groups(torch.tensor([3.0, 9, 1, 2, 4, 4, 0, 5]), 4, 2).tolist() == [0, 1, 4, 7]


WRONG: dict[str, tuple[Width, str]] = {
    "nothing": (Width(), "give how many stay"),
    "all channels": (Width(channels=768), "from 1 to 767 can stay"),
    "no channels": (Width(channels=0), "from 1 to 767 can stay"),
    "uneven channels": (Width(channels=700), "no multiple of 128: .* ask for 640$"),
    "channels of ranks": (Width(channels=640, tensor_parallel=3), "tensor parallelism shares"),
    "more heads than there are": (Width(heads=3), "the model has 2 KV heads"),
    "heads of ranks": (Width(heads=1, tensor_parallel=4), "4 ranks of tensor parallelism cannot share"),
    "experts of a dense model": (Width(experts=2), "states no number of experts"),
    "no rows": (Width(channels=640, samples=0), "--samples is 0"),
    "rows beyond the context": (Width(channels=640, sequence_length=10**6), "longest context is"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_are_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    given, message = WRONG[case]
    with pytest.raises((UsageError, CheckpointError), match=message):
        narrow(TINYLM, tmp_path / "out", given)
    assert not list(tmp_path.iterdir())


def test_routers_set_what_can_stay(tmp_path: Path) -> None:
    grouped = Widths("experts", 16, active=4, groups=4, top_groups=2)
    assert "into 4 groups of one size" in str(Width(experts=10).problem(grouped))
    assert "a token visits 4 of them" in str(Width(experts=3).problem(grouped))
    assert "4 experts of 2 groups of 1, which are too few" in str(Width(experts=4).problem(grouped))
    assert Width(experts=8).problem(grouped) is None


def test_families_that_derive_the_size_of_heads_keep_theirs(tmp_path: Path) -> None:
    eight = make_checkpoint(tmp_path / "eight", "llama", num_attention_heads=8, num_key_value_heads=4)
    with pytest.raises(UsageError, match="--kv-heads is 3, with 6 query heads: .* ask for 1 or 2$"):
        narrow(eight, tmp_path / "out", Width(heads=3))
    source = make_checkpoint(tmp_path / "source", "qwen2", use_sliding_window=True, max_window_layers=1)
    with pytest.raises(CheckpointError, match="has no use_sliding_window, sliding_attention: cut"):
        narrow(source, tmp_path / "out", Width(heads=1))
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    mixture = make_checkpoint(tmp_path / "mixture", "qwen2_moe", **experts)
    with pytest.raises(CheckpointError, match="so heads cannot be cut"):
        narrow(mixture, tmp_path / "out", Width(heads=1))
    latent = make_checkpoint(tmp_path / "latent", "deepseek_v3", **LATENT)
    with pytest.raises(CheckpointError, match=r"its attention is latent \(MLA\)"):
        narrow(latent, tmp_path / "out", Width(heads=1))
    checkpoint = open_checkpoint(source)
    assert {n.rpartition("mlp.")[2] for n in cuts(checkpoint, 0, widths(checkpoint, "channels"))} == {
        "gate_proj.weight",
        "up_proj.weight",
        "down_proj.weight",
    }


def test_the_command_tells_what_each_kind_cost(cli: Callable[..., Any], tmp_path: Path) -> None:
    text = ("--samples", "2", "--sequence-length", "32")
    done = cli("prune", "-m", TINYLM, "-o", tmp_path / "out", "--kv-heads", "1", *text)
    assert done.code == 0, done.err
    assert "KV heads" in done.out and "nats per token" in done.out
    mixed = cli("prune", "-m", TINYLM, "-o", tmp_path / "no", "--kv-heads", "1", "--sparsity", "0.5")
    assert mixed.code == 2 and "give one of" in mixed.err
    foreign = cli("prune", "-m", TINYLM, "-o", tmp_path / "no", "--kv-heads", "1", "--method", "wanda")
    assert foreign.code == 2 and "--method: not of --kv-heads" in foreign.err


@pytest.mark.parametrize("last", ["mlp.gate_proj", "mlp.down_proj", "input_layernorm"])
def test_verify_finds_a_value_that_pruning_did_not_leave(last: str, tmp_path: Path) -> None:
    """Cut, fitted and copied ones; each is finite and of the right shape."""
    source = make_checkpoint(tmp_path / "source", "llama", num_attention_heads=8, num_key_value_heads=4)
    narrow(source, tmp_path / "out", Width(channels=64, heads=2, multiple_of=32, **TEXT))
    name = f"model.layers.1.{last}.weight"
    file = open_checkpoint(tmp_path / "out").info(name).file
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name] + 1}, file, metadata={"format": "pt"})
    problems = verify(tmp_path / "out", source=source).failed
    fitted = "values of its own: 4 were fitted when it was pruned"
    assert any(p.startswith(fitted) for p in problems)
    assert any(f"{name} differs from the source" in p for p in problems) == (last != "mlp.down_proj")
    # the same numbers, and others, in another dtype
    for other in (tensors[name].float(), tensors[name].float() * 3):
        save_file({**tensors, name: other}, file, metadata={"format": "pt"})
        found = any(f"{name} was BF16" in p for p in verify(tmp_path / "out", source=source).failed)
        assert found == (last != "mlp.down_proj")
