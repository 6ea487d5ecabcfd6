"""Experts of mixtures: computed as transformers computes them, read from any layout, quantized one a name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quant.checkpoint.reader import open_checkpoint
from quant.errors import Problems
from quant.evaluation.compare import compare
from quant.evaluation.verify import verify
from quant.formats.reading import dequantized
from quant.models import experts
from quant.models.experts import Routed, experts_through, find_experts
from quant.models.linears import decoder_refs, expert_layout
from quant.models.skeleton import Skeleton
from quant.pipeline import expert_solves
from quant.pipeline.experts import at_a_time
from quant.pipeline.export import export
from tests.helpers import add_tokenizer, load_all, quantize, weight_files
from tests.models.mixtures import FAMILIES, mixture, save_mixture

TOKENS = torch.randint(3, 4000, (2, 24), generator=torch.Generator().manual_seed(0))
#: vLLM's words for gate, up and down where they are others.
W123 = {"mixtral"}


def _layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return list(model.model.layers)  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_experts_are_computed_as_transformers_does(family: str) -> None:
    model = mixture(family)
    model.config._experts_implementation = "eager"  # type: ignore[union-attr,assignment]
    with torch.no_grad():
        wanted = model(TOKENS).logits
        for block in _layers(model):
            assert len(find_experts(block)) == 1
        seen: list[Routed] = []
        with experts_through(_layers(model)[0], lambda path, stage, routed: seen.append(routed)):
            made = model(TOKENS).logits
        after = model(TOKENS).logits
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(after, wanted), "the block's own forward is back"
    assert len(seen) == 2 and int(seen[0].counts.sum()) == len(seen[0].index) == len(seen[1].rows)
    pairs = TOKENS.numel() * model.config.num_experts_per_tok  # type: ignore[union-attr,operator]
    assert len(seen[0].index) == pairs


class Watched(TorchDispatchMode):
    """Counts the products that it sees."""

    products = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += function.__name__.startswith(("mm", "addmm", "linear"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("skewed", [False, True])
def test_experts_are_computed_side_by_side_to_the_same_bits(
    skewed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By threads of one core each, unless one expert has most of the tokens or operations are watched, which
    those of other threads are not: what is read after a stop is learned so."""
    block = _layers(mixture("qwen3_moe"))[0]
    (one,) = find_experts(block)
    module, shared = block.get_submodule(one.path), experts.side_by_side
    used: list[int] = []
    monkeypatch.setattr(experts, "side_by_side", lambda n: (used.append(n), shared(n))[1])
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    rows = torch.randn(2048, module.down_proj.shape[1], generator=generator)
    top = torch.stack([torch.randperm(one.count, generator=generator)[:2] for _ in rows])
    if skewed:
        top = torch.zeros(2048, 1, dtype=torch.int64)
    weights = torch.rand(top.shape, generator=generator)
    made = {}
    try:
        with torch.no_grad(), experts_through(block, lambda path, stage, routed: None):
            for threads in (1, 2):
                torch.set_num_threads(threads)
                made[threads] = module(rows, top, weights)
            assert used == [1, 1, *([1, 1] if skewed else [2, 2])]
            with Watched() as watched:
                module(rows, top, weights)
            assert used[4:] == [1, 1] and watched.products >= 2 * len(top.unique())
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    if not skewed:
        assert torch.equal(made[1], made[2])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_block_is_filled_as_transformers_fills_it(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_mixture(tmp_path / "m", family)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    skeleton = Skeleton(open_checkpoint(folder), torch.device("cpu"))
    for index, block in enumerate(_layers(theirs)):
        mine = dict(skeleton.load_block(index).named_parameters())
        for name, parameter in block.named_parameters():
            assert torch.equal(mine[name], parameter), name
        skeleton.free_block(index)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_linears_of_a_file_are_those_that_the_model_multiplies_with(family: str, tmp_path: Path) -> None:
    folder = save_mixture(tmp_path / "m", family)
    checkpoint = open_checkpoint(folder)
    refs = decoder_refs(checkpoint.tensors, checkpoint.config)
    skeleton = Skeleton(checkpoint, torch.device("cpu"))
    block = skeleton.load_block(0)
    linears = skeleton.linears(0)
    assert {skeleton.block_prefix(0) + n for n in linears} == {n for n in refs if ".layers.0." in n}
    for name, linear in linears.items():
        stored = refs[skeleton.block_prefix(0) + name].read(checkpoint)
        assert torch.equal(linear.get(block), stored), name
        assert stored.shape == (linear.ref.n, linear.ref.k)
    layout = expert_layout(checkpoint.config)
    assert all(("w1" in n or "w3" in n or "w2" in n) == (family in W123) for n in linears if ".experts." in n)
    one = next(n for n in linears if n.endswith(f".experts.2.{layout.names['up_proj']}"))
    changed = copy.deepcopy(block)
    linears[one].set(changed, torch.zeros_like(linears[one].get(changed)))
    for name, linear in linears.items():
        assert bool((linear.get(changed) == 0).all()) == (name == one), "only its own values are set"


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("method", ["minmax", "gptq", "yaqa"])
def test_every_expert_is_quantized_by_its_name(family: str, method: str, tmp_path: Path) -> None:
    folder, out = save_mixture(tmp_path / "m", family), tmp_path / "out"
    report = quantize(folder, out, method=method, group_size=16, target="other")
    source, made = open_checkpoint(folder), open_checkpoint(out)
    refs = decoder_refs(source.tensors, source.config)
    experts = [n for n in refs if ".experts." in n]
    assert len(experts) == 2 * 4 * 3 and {x["name"] for x in report["layers"]} == set(refs)
    assert not any("gate_up_proj" in n or "input_linear" in n for n in made.tensors if not n.endswith("bias"))
    values = dequantized(made)
    for name in experts:
        error = (values.read(f"{name}.weight") - refs[name].read(source).float()).norm()
        # what gradients do not see may go far
        most = 0.3 if method == "yaqa" else 0.2
        assert error < most * refs[name].read(source).float().norm(), name
    assert verify(out, source=folder, target="other").failed == []
    if method != "minmax":
        coverage = report["experts"]
        assert len(coverage) == 2 and all(sum(c["tokens"]) for c in coverage.values())


def test_a_plain_checkpoint_keeps_the_layout_of_its_source(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, out = save_mixture(tmp_path / "m", "gpt_oss"), tmp_path / "out"
    quantize(folder, out, format="plain", group_size=16)
    before, after = load_all(folder), load_all(out)
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert not torch.equal(before[name], after[name])
    assert float((before[name] - after[name]).norm() / before[name].norm()) < 0.2
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32)(TOKENS).logits for p in (folder, out)
        ]
    assert float((logits[0] - logits[1]).norm() / logits[0].norm()) < 0.5


def test_an_expert_that_alone_would_stay_is_named_by_its_number(tmp_path: Path) -> None:
    folder = save_mixture(tmp_path / "m", "qwen3_moe")
    with pytest.raises(Problems) as error:
        quantize(folder, tmp_path / "out", group_size=16, ignore=["*.experts.3.*"])
    problem = next(p for p in error.value.problems if "would stay unquantized" in p)
    assert "vLLM fuses down_proj, gate_proj, up_proj of experts 0, 1, 2 and 1 more into one layer" in problem
    assert "but down_proj, gate_proj, up_proj of expert 3 would stay unquantized" in problem


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_plain_export_is_what_transformers_reads_of_the_family(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, out, plain = save_mixture(tmp_path / "m", family), tmp_path / "out", tmp_path / "plain"
    quantize(folder, out, bits=8, group_size=16, target="other")
    export(out, plain, "plain", target="other")
    loaded, about = AutoModelForCausalLM.from_pretrained(plain, output_loading_info=True)
    assert not any(about.values()), "no parameter is left to chance"
    theirs = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    for name, value in loaded.named_parameters():
        error = (value.float() - theirs[name].float()).norm()
        assert error <= 0.02 * theirs[name].float().norm(), name
    assert verify(plain, source=out, target="other").failed == []
    for one, other in ((plain, out), (out, folder)):
        found = compare(one, other)
        assert not found.only_here and not found.only_there, "experts are compared in any layout"
        assert min(t.snr_db or 99.0 for t in found.tensors) > 30


@pytest.mark.parametrize("how", ["routed", "all", "blend"])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_moe_fused"])
def test_experts_that_see_nothing_are_rounded_and_named(
    how: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES[family], "num_experts", 6)
    model = mixture(family)
    with torch.no_grad():
        for layer in model.model.layers:
            gate = layer.mlp.gate.weight
            # whatever the token, two of the first four are above the others
            gate[1:4], gate[4:] = torch.tensor([[-1.0], [2.0], [-2.0]]) * gate[0], 0
    folder, out = tmp_path / "m", tmp_path / "out"
    model.bfloat16().save_pretrained(folder, save_original_format=not family.endswith("_fused"))
    add_tokenizer(folder)
    report = quantize(folder, out, method="gptq", group_size=16, moe_calibration=how, target="other")
    assert all(c["tokens"][4:] == [0, 0] and c["minimum"] == 0 for c in report["experts"].values())
    values = dequantized(open_checkpoint(out))
    source = open_checkpoint(folder)
    refs = decoder_refs(source.tensors, source.config)
    for name in (n for n in refs if ".experts." in n):
        weight = refs[name].read(source).float()
        error = (values.read(f"{name}.weight") - weight).norm()
        assert error < 0.2 * weight.norm(), name
    starved = [x for x in report["layers"] if ".experts.4." in x["name"]]
    assert len(starved) == 2 * 3
    if how != "all":
        assert all(any("sends it 0 calibration tokens" in note for note in x["notes"]) for x in starved)


@pytest.mark.parametrize("how", ["routed", "all", "blend"])
def test_how_many_experts_are_solved_together_does_not_show(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_mixture(tmp_path / "m", "qwen3_moe_fused")
    for several in (1, 3):  # of 4: the last is on its own
        monkeypatch.setattr(expert_solves, "at_a_time", lambda *_, several=several: several)
        quantize(
            folder, tmp_path / str(several), method="gptq", group_size=16, moe_calibration=how, target="other"
        )
    assert weight_files(tmp_path / "1") == weight_files(tmp_path / "3")


def test_inputs_of_experts_are_the_same_from_memory_and_from_the_scratch_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_mixture(tmp_path / "m", "mixtral")
    for resident in (0, 1 << 20):
        monkeypatch.setattr("quant.pipeline.experts.RESIDENT", resident)
        quantize(
            folder,
            tmp_path / str(resident),
            method="gptq",
            group_size=16,
            moe_calibration="all",
            target="other",
        )
    assert weight_files(tmp_path / "0") == weight_files(tmp_path / str(1 << 20))


def test_experts_that_are_solved_together_fit_what_is_set_aside() -> None:
    cpu = torch.device("cpu")
    assert at_a_time(1536, 2048, cpu) == 5 and at_a_time(64, 64, cpu) == 128
    assert at_a_time(1536, 4096, cpu) == 3, "as many as 512 MiB hold"
    assert at_a_time(28672, 8192, cpu) == 1, "one at least"
    assert at_a_time(1536, 2048, torch.device("cuda")) > 16


def test_a_mixture_under_names_that_vllm_has_no_modules_for_is_refused(tmp_path: Path) -> None:
    """As transformers 5 holds Mixtral in memory: real vLLM stops at ``layers.0.mlp``."""
    mixture("mixtral").bfloat16().save_pretrained(tmp_path / "m", save_original_format=False)
    add_tokenizer(tmp_path / "m")
    with pytest.raises(Problems, match=r"block_sparse_moe.*--target other"):
        quantize(tmp_path / "m", tmp_path / "out", group_size=16)
    quantize(tmp_path / "m", tmp_path / "out", group_size=16, target="other")
    assert any("block_sparse_moe" in problem for problem in verify(tmp_path / "out").failed)
