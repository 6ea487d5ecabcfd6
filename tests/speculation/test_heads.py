"""Proposers over the target's hidden states, against the same network written out without a cache."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import load_file, save_file

import deploy_vllm
from quant.catalog import model_from_config
from quant.checkpoint.reader import open_checkpoint
from quant.errors import CheckpointError
from quant.speculation.dflash import dflash
from quant.speculation.heads import Head, Unmeasured, eagle3, native_head
from quant.speculation.measure import Acceptance, Latencies, generate, table
from quant.speculation.proposers import Model
from quant.speculation.run import SpeculationRequest, speculate
from quant.speculation.sampling import Sampling
from quant.vllm.speculation import HEADS, draft_method, eagle3_config, head_bytes, native_heads
from tests.helpers import change_config, copy_model
from tests.speculation import guessed
from tests.speculation.drafts import (
    KEPT,
    MASK,
    PLACES,
    TINY,
    Draft,
    Parallel,
    write_dflash,
    write_eagle3,
    write_mtp,
)

CPU = torch.device("cpu")


def _draft(kind: str) -> Draft:
    """One of random weights that are bf16 numbers, as the files have them."""
    torch.manual_seed(3)
    return _spread(Draft(kind))


_Network = TypeVar("_Network", Draft, Parallel)


def _spread(draft: _Network) -> _Network:
    draft.requires_grad_(False)
    for held in (draft.weights, draft.gains):
        for value in held.values():
            spread = 4 * value if held is draft.weights else value * (1 + 0.2 * torch.rand_like(value))
            value.copy_(spread.bfloat16().float())
    return draft


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model in fp32, so that no tie rounds either way, with a random draft of each kind."""
    folder = tmp_path_factory.mktemp("heads")
    paths = {
        "target": copy_model(TINY, folder / "target"),
        "eagle3": write_eagle3(folder / "eagle3", _draft("eagle3")),
        "mtp": write_mtp(folder / "mtp", _draft("mtp")),
    }
    for name in ("target", "mtp"):
        change_config(paths[name], dtype="float32", torch_dtype="float32")
    return paths


def _head(kind: str, paths: dict[str, Path], scratch: Path) -> tuple[Model, Head]:
    target = Model(paths["target" if kind == "eagle3" else "mtp"], CPU, scratch)
    return target, eagle3(target, paths["eagle3"]) if kind == "eagle3" else native_head(target, scratch)


class _Plain:
    """The same proposals without a cache: every row again for each token."""

    def __init__(self, kind: str, target: Model):
        self.kind, self.draft, self.model = kind, _draft(kind), target.model

    def propose(self, tokens: list[int], k: int) -> list[int]:
        rows, proposed = torch.tensor([tokens[:-1]]), list[int]()
        entering: list[torch.Tensor] = []
        handle = self.model.model.norm.register_forward_pre_hook(
            lambda module, given: entering.append(given[0])
        )
        out = self.model(rows, output_hidden_states=True)
        handle.remove()
        states = [*out.hidden_states[:-1], entering[0]]
        given = [states[p] for p in PLACES] if self.kind == "eagle3" else [out.hidden_states[-1]]
        state = self.draft.entered(given)
        for _ in range(k):
            embeds = self.model.model.embed_tokens(torch.tensor([[*tokens[1:], *proposed]]))
            if self.kind == "mtp":
                embeds = embeds * (torch.arange(embeds.shape[1]) > 0)[:, None]
            own, normed = self.draft(embeds, state)
            head = self.draft.weights["head"] if self.kind == "eagle3" else self.model.lm_head.weight
            best = int((normed[0, -1] @ head.T).argmax())
            proposed.append(int(KEPT[best]) if self.kind == "eagle3" else best)
            state = torch.cat([state, own[:, -1:]], 1)
        return proposed


@pytest.mark.parametrize("kind", ["eagle3", "mtp"])
@torch.no_grad()
def test_proposals_are_those_of_the_network_without_a_cache(
    kind: str, fp32: dict[str, Path], tmp_path: Path
) -> None:
    target, head = _head(kind, fp32, tmp_path)
    plain, random_text = _Plain(kind, target), random.Random(1)
    for prompt in ([11, 480, 77, 902, 33, 5], [7, 8]):  # the second time with another text
        tokens = list(prompt)
        for new in (1, 3, 1, 2):  # so many were accepted, after three were proposed
            target.logits([*tokens, 1, 2, 3][: len(tokens) + 2], 2)  # and some were rejected
            target.logits(tokens, 1)
            tokens += [random_text.randrange(4096) for _ in range(new)]
            target.logits([*tokens[:-1], 9, 9], 1)  # what is read beyond is of no concern
            found, probabilities = head.propose(tokens, 3)
            assert probabilities is None and found == plain.propose(tokens, 3)


@pytest.mark.parametrize("kind", ["eagle3", "mtp"])
def test_greedy_text_is_the_targets_own(kind: str, fp32: dict[str, Path], tmp_path: Path) -> None:
    target, head = _head(kind, fp32, tmp_path)
    prompt = [11, 480, 77, 902, 33, 5]
    made, found = generate(target, head, prompt, 12, 2, Sampling(), torch.Generator())
    plain = list(prompt)
    for _ in range(12):
        plain.append(int(target.logits(plain, 1)[0].argmax()))
    assert made == plain[6:] and found.draft_tokens == 2 * found.drafts


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Parallel]:
    """A DFlash draft of random weights, and the same written out."""
    torch.manual_seed(3)
    draft = _spread(Parallel())
    return write_dflash(tmp_path_factory.mktemp("parallel") / "dflash", draft), draft


@torch.no_grad()
def test_a_dflash_draft_guesses_as_its_blocks_written_out(
    fp32: dict[str, Path], parallel: tuple[Path, Parallel], tmp_path: Path
) -> None:
    target, random_text = Model(fp32["target"], CPU, tmp_path), random.Random(1)
    path, plain = parallel
    drafter, model, guesses = dflash(target, path), target.model, set[int]()
    for prompt in ([11, 480, 77, 902, 33, 5], [7, 8]):
        tokens = list(prompt)
        for new, k in ((1, 3), (3, 4), (2, 1)):
            target.logits([*tokens, 1, 2, 3][: len(tokens) + 2], 2)  # some were rejected
            target.logits(tokens, 1)
            tokens += [random_text.randrange(4096) for _ in range(new)]
            target.logits([*tokens[:-1], 9, 9], 1)
            states = model.model(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
            embeds = model.model.embed_tokens(torch.tensor([[tokens[-1], *[MASK] * k]]))
            wanted = plain([states[p] for p in PLACES[:2]] + [_entering_norm(model, tokens[:-1])], embeds)
            found, chances = drafter.propose(tokens, k)
            assert chances is None and found == (wanted[0, 1:] @ model.lm_head.weight.T).argmax(-1).tolist()
            guesses |= set(found)
    assert len(guesses) > 4


def test_a_dflash_draft_is_measured_charged_and_written(
    fp32: dict[str, Path], parallel: tuple[Path, Parallel]
) -> None:
    few = {"prompts": 1, "new_tokens": 6, "prompt_tokens": 16, "most": 2}
    asked = SpeculationRequest(draft=parallel[0], method="dflash", gpu="L40S-48GB", **few)  # type: ignore[arg-type]
    (found,) = speculate(fp32["target"], asked)["candidates"]
    assert found["name"] == "DFlash" and found["acceptance"]["num_drafts"] > 0
    assert found["speculative_config"].items() >= {"method": "dflash", "model": str(parallel[0])}.items()
    assert found["memory"]["draft_weights_bytes"] == open_checkpoint(parallel[0]).nbytes
    # a second guess costs the target's pass alone
    made = Acceptance(4, 4, 8, 4, (2, 2), 8)
    each, at_once = (
        table(made, Latencies(lambda n: 1.0, 0.5, "", way), 2)[1]["speed_up"] for way in (False, True)
    )
    assert each == pytest.approx(2 / 2) and at_once == pytest.approx(2 / 1.5)


def _entering_norm(model: Any, tokens: list[int]) -> torch.Tensor:
    held: list[torch.Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, given: held.append(given[0]))
    model(torch.tensor([tokens]))
    handle.remove()
    return held[0]


@pytest.mark.parametrize(
    ("stated", "error", "words"),
    [
        ({"mask_token_id": 4096}, CheckpointError, "mask_token_id of its config.json is 4096"),
        ({"target_layer_ids": [0, 1, 4]}, CheckpointError, "before block 5 of 4"),
        ({"target_layer_ids": [0, 1]}, CheckpointError, r"fc.weight is \[256, 768\], and 2 states"),
        ({"target_layer_ids": None}, CheckpointError, "no target_layer_ids"),
        ({"causal": True}, Unmeasured, "a draft with causal"),
        ({"use_swa": True}, Unmeasured, "a draft with windows"),
    ],
)
def test_a_dflash_draft_that_cannot_be_is_refused(
    stated: dict[str, Any],
    error: type[Exception],
    words: str,
    tiny: Model,
    parallel: tuple[Path, Parallel],
    tmp_path: Path,
) -> None:
    draft = copy_model(parallel[0], tmp_path / "d")
    own = json.loads((draft / "config.json").read_text())["dflash_config"] | stated
    change_config(draft, dflash_config={k: v for k, v in own.items() if v is not None})
    with pytest.raises(error, match=words):
        dflash(tiny, draft)


@pytest.mark.parametrize("family", guessed.FAMILIES)
@torch.no_grad()
def test_heads_of_each_family_go_on_from_their_own_states(family: str, tmp_path: Path) -> None:
    """Against the same block over every row again for each token; and whatever was rejected, recurrent states
    among what is cut back, the greedy text is the target's own."""
    path = guessed.write(family, tmp_path / family, "float32")
    target, other = (Model(path, CPU, tmp_path) for _ in range(2))
    head, layout = native_head(target, tmp_path), HEADS[family]
    net, tokens = head.network, [11, 480, 77, 902, 33, 5]
    for new in (1, 3, 2):
        target.logits(tokens, 1)
        target.logits([*tokens, 1, 2, 3], 4)  # and rejected
        rows = target.model.model(torch.tensor([tokens])).last_hidden_state[0]
        assert torch.allclose(target.states(target.blocks + 1)[: len(tokens)], rows, atol=1e-4)
        states, proposed = rows[:-1].clone(), list[int]()
        for _ in range(3):
            embeds = net.embed(torch.tensor([*tokens[1:], *proposed]))
            if layout.masked:
                embeds = embeds * (torch.arange(len(embeds)) > 0)[:, None]
            own = net.body(inputs_embeds=net.join(embeds, states)[None]).last_hidden_state[0, -1:]
            proposed.append(int(net.head(net.norm(own)).argmax()))
            states = torch.cat([states, net.norm(own) if layout.normed else own])
        assert head.propose(tokens, 3) == (proposed, None)
        tokens = [*tokens, *proposed[:new]]
    plain = [11, 480, 77]
    for _ in range(24):
        other.reset()
        plain.append(int(other.logits(plain, 1)[0].argmax()))
    target.reset()
    made, found = generate(target, head, plain[:3], 24, 3, Sampling(), torch.Generator())
    assert made == plain[3:] and 0 < found.accepted <= found.draft_tokens
    checkpoint = open_checkpoint(path)
    beside = layout.start.format(blocks=2)
    held = {n: i.nbytes for n, i in checkpoint.tensors.items() if n.startswith(beside)}
    tied = [n for name, n in held.items() if name.endswith(("head.head.weight", "embed_tokens.weight"))]
    assert head_bytes(checkpoint) == sum(held.values()) - sum(tied) > 0 and native_heads(checkpoint) == 1


def test_what_is_computed_elsewhere_is_said_to_be_unmeasured(fp32: dict[str, Path], tmp_path: Path) -> None:
    target = Model(fp32["mtp"], CPU, tmp_path)
    change_config(copy_model(fp32["eagle3"], tmp_path / "qwen"), model_type="qwen3")
    with pytest.raises(Unmeasured, match="qwen3 blocks"):
        eagle3(target, tmp_path / "qwen")
    change_config(copy_model(fp32["eagle3"], tmp_path / "parallel"), parallel_drafting=True)
    with pytest.raises(Unmeasured, match="parallel_drafting"):
        eagle3(target, tmp_path / "parallel")
    change_config(copy_model(fp32["mtp"], tmp_path / "two"), num_nextn_predict_layers=2)
    with pytest.raises(Unmeasured, match="2 heads"):
        native_head(Model(tmp_path / "two", CPU, tmp_path), tmp_path)
    with pytest.raises(Unmeasured, match="not those of llama"):
        native_head(Model(TINY, CPU, tmp_path), tmp_path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(TINY, CPU, tmp_path_factory.mktemp("tiny"))


def _damaged(path: Path, to: Path, change: Any) -> Path:
    copied = copy_model(path, to)
    tensors = load_file(copied / "model.safetensors")
    change(tensors)
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    return copied


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("fc.weight"), "fc.weight is missing"),
        (lambda t: t.pop("midlayer.hidden_norm.weight"), "lacks layers.0.hidden_norm.weight"),
        (lambda t: t.update({"midlayer.self_attn.q_norm.weight": torch.ones(64)}), "has no place for"),
        (lambda t: t.update(d2t=t["d2t"] + 4096), "beyond the 4096"),
        (lambda t: t.update({"fc.weight": torch.zeros(256, 512)}), "made for another model"),
        (lambda t: t.update({"norm.weight": torch.ones(8)}), "not as its config.json says"),
        (lambda t: t.update({"fc.weight": torch.zeros(768)}), r"fc.weight is \[768\].*makes \[256, 768\]"),
        (lambda t: t.update({"fc.weight": torch.zeros(128, 768)}), r"fc.weight is \[128, 768\]"),
        (lambda t: t.update({"fc.bias": torch.zeros(256)}), "fc.bias has no place"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:, :64].clone()}), "lm_head.weight is"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:64].clone()}), "lm_head.weight is"),
        (lambda t: t.update({"embed_tokens.weight": torch.zeros(4096, 64)}), r"makes \[4096, 256\]"),
        (lambda t: t.update({"embed_tokens.weight": torch.zeros(64, 256)}), r"makes \[4096, 256\]"),
        (lambda t: t.update({"embed_tokens.weight": torch.zeros(4096)}), r"makes \[4096, 256\]"),
        (lambda t: t.update(d2t=t["d2t"][:9].clone()), r"d2t is \[9\]"),
        (lambda t: t.update(d2t=t["d2t"].float()), "whole numbers"),
    ],
)
def test_a_draft_that_is_damaged_or_anothers_is_refused(
    change: Any, words: str, tiny: Model, fp32: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=words):
        eagle3(tiny, _damaged(fp32["eagle3"], tmp_path / "d", change))


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"hidden_size": None}, "hidden_size of its config.json is None"),
        ({"hidden_size": "256"}, "hidden_size of its config.json is '256'"),
        ({"hidden_size": 128}, "the target's, of 256 numbers a token, but its hidden_size is 128"),
        ({"num_hidden_layers": 0}, "num_hidden_layers of its config.json is 0"),
        ({"vocab_size": None}, "vocab_size of its config.json is None"),
        ({"draft_vocab_size": 17}, r"lm_head.weight is .* makes \[17, 256\]"),
        ({"num_attention_heads": 0}, "no blocks of its config.json"),
        ({"hidden_act": "no such"}, "no blocks of its config.json"),
        ({"eagle_config": 5}, "eagle_config of the draft's config.json is 5"),
        ({"eagle_aux_hidden_state_layer_ids": ["1", "2", "4"]}, r"is \['1', '2', '4'\]: a list of whole"),
        ({"eagle_aux_hidden_state_layer_ids": 3}, "is 3: a list of whole"),
        ({"eagle_aux_hidden_state_layer_ids": [True, 2, 4]}, "a list of whole"),
        ({"eagle_aux_hidden_state_layer_ids": [-1, 2, 4]}, "before block -1 of 4"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 5]}, "before block 5 of 4"),
    ],
)
def test_a_draft_whose_config_cannot_be_is_refused(
    stated: dict[str, Any], words: str, tiny: Model, fp32: dict[str, Path], tmp_path: Path
) -> None:
    draft = copy_model(fp32["eagle3"], tmp_path / "d")
    change_config(draft, **stated)
    with pytest.raises(CheckpointError, match=words) as refused:
        eagle3(tiny, draft)
    assert "leave --draft out" in str(refused.value)


def test_a_refused_draft_ends_the_command_with_its_reason(
    fp32: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = copy_model(fp32["eagle3"], tmp_path / "d")
    change_config(draft, vocab_size=...)
    with pytest.raises(SystemExit) as stop:
        deploy_vllm.main(["speculate", str(TINY), "--draft", str(draft), "--proposer", "eagle3"])
    assert stop.value.code == 1 and "vocab_size of its config.json is missing" in capsys.readouterr().err


def test_kinds_of_drafts_are_told_by_their_configs() -> None:
    assert draft_method({"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}) == "eagle3"
    assert draft_method({"architectures": ["DFlashDraftModel"], "model_type": "qwen3"}) == "dflash"
    assert draft_method({"speculators_model_type": "eagle3"}) == "eagle3"
    assert draft_method({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}) == "draft_model"
    told = {
        "speculators_model_type": "eagle3", "draft_vocab_size": 9, "architectures": ["Eagle3Speculator"],
        "transformer_layer_config": {"model_type": "llama", "hidden_size": 8},
    }  # fmt: skip
    own = eagle3_config(told)
    assert own["hidden_size"] == 8 and own["draft_vocab_size"] == 9
    assert own["norm_before_residual"] and not own["parallel_drafting"]


def test_heads_and_drafts_are_measured_chosen_and_charged(fp32: dict[str, Path], tmp_path: Path) -> None:
    few = {"prompts": 1, "new_tokens": 8, "prompt_tokens": 16, "most": 2}
    value = speculate(fp32["mtp"], SpeculationRequest(method="mtp", gpu="L40S-48GB", **few))  # type: ignore[arg-type]
    (found,) = value["candidates"]
    assert value["chosen"] == "mtp" and found["acceptance"]["num_drafts"] > 0
    assert value["speculative_config"] == {"method": "mtp", "num_speculative_tokens": found["best"]["k"]}
    weights = head_bytes(open_checkpoint(fp32["mtp"]))
    assert found["memory"]["draft_weights_bytes"] == weights
    attention, experts = 256 * 256 * (1 + 0.5 + 0.5 + 1), 3 * (3 * 768 * 256)
    assert weights == 2 * (attention + 2 * 256 * 256 + experts + 2 * 256 + 5 * 256) + 2 * 4  # bf16, no head
    value = speculate(fp32["target"], SpeculationRequest(draft=fp32["eagle3"], gpu="L40S-48GB", **few))  # type: ignore[arg-type]
    by_name = {c["name"]: c for c in value["candidates"]}
    assert set(by_name) == {"ngram", "EAGLE-3", "suffix"}
    assert by_name["EAGLE-3"]["speculative_config"]["model"] == str(fp32["eagle3"])
    assert by_name["EAGLE-3"]["memory"]["kv_tokens_with"] < by_name["EAGLE-3"]["memory"]["kv_tokens_without"]
    assert "arctic-inference" in by_name["suffix"]["note"]
    assert by_name["suffix"]["speculative_config"]["method"] == "suffix" and by_name["suffix"]["rows"]


@pytest.mark.parametrize(("most", "new"), [(1, 2), (32, 3)])
def test_the_shortest_passes_are_taken_where_all_are_long(
    most: int, new: int, fp32: dict[str, Path], tmp_path: Path
) -> None:
    """A single proposal has read the whole prompt; a target that judges 32 never reads fewer than 33."""
    few = SpeculationRequest(
        draft=fp32["eagle3"], method="eagle3", prompts=1, prompt_tokens=64, new_tokens=new, most=most
    )
    (found,) = speculate(fp32["target"], few)["candidates"]
    assert len(found["rows"]) == most and all(0 < row["speed_up"] < 99 for row in found["rows"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--proposer", "mtp"], "no prediction heads"),
        (["--proposer", "eagle3"], "name the draft with --draft"),
        (["--proposer", "eagle3", "--draft", str(TINY)], "of kind draft_model"),
    ],
)
def test_a_proposer_that_is_not_there_is_refused(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        deploy_vllm.main(["speculate", str(TINY), *options])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_the_stand_in_of_a_mixture_is_the_bundled_model(fp32: dict[str, Path], tmp_path: Path) -> None:
    """What the tests' target with a head computes is what the bundled model does."""
    tokens = [11, 480, 77, 902, 33, 5]
    a, b = (Model(fp32[n], CPU, tmp_path).logits(tokens, 6) for n in ("target", "mtp"))
    assert torch.allclose(a, b, atol=1e-4)
    assert model_from_config(json.loads((fp32["mtp"] / "config.json").read_text())).layers == 4


def test_heads_are_found_by_their_tensors_where_a_config_is_silent() -> None:
    def found(config: dict[str, Any], *names: str) -> int | None:
        held: Any = SimpleNamespace(config={"num_hidden_layers": 2, **config}, tensors=dict.fromkeys(names))
        return native_heads(held)

    assert found({}, "model.layers.1.x", "mtp.fc.weight") == 1  # Qwen3-Next as it was released
    assert found({"num_nextn_predict_layers": 2}, "model.layers.2.x", "model.layers.3.x") == 2
    assert found({"num_nextn_predict_layers": 1}, "model.layers.1.x") is None  # told, and left out
    assert found({}, "model.layers.1.x") is None


def test_a_model_whose_states_are_not_found_is_named(
    checkpoints: Callable[..., Path], fp32: dict[str, Path], tmp_path: Path
) -> None:
    target = Model(checkpoints("gptj"), CPU, tmp_path)
    with pytest.raises(CheckpointError, match="GPTJModel has no layers and norm"):
        eagle3(target, fp32["eagle3"])
