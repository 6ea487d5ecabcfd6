"""Decoder blocks left out: the output is the model without them, those go that it needs least, and a killed
run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quant.checkpoint.reader import open_checkpoint
from quant.errors import CheckpointError, Problems, QuantError, UsageError
from quant.evaluation.compare import compare
from quant.evaluation.verify import verify
from quant.models.cutting import config_without_blocks
from quant.pipeline import plain
from quant.pipeline.rows import measured_rows
from quant.pruning import Depth, depth, drop_blocks
from quant.report.value import Report
from tests.helpers import TINYLM, change_config, copy_model, files_of, make_checkpoint, read_config

TEXT = {"samples": 3, "sequence_length": 64}


def logits(folder: Path, without: Sequence[int] = ()) -> torch.Tensor:
    """Of transformers' own model on some tokens, with blocks taken out of its list."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inner = model.model
    kept = [i for i in range(len(inner.layers)) if i not in without]
    inner.layers = torch.nn.ModuleList(inner.layers[i] for i in kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
    model.config.num_hidden_layers = len(kept)
    with torch.no_grad():
        return model(torch.arange(24)[None] + 5, use_cache=False).logits[0]


@pytest.mark.parametrize(
    ("kind", "gone"),
    [
        ("llama", (1,)),
        ("qwen2", (0, 2)),
        ("gemma3_text", (1,)),
        ("gemma3_text", (2,)),  # the only one with full attention
        ("mistral", (2, 3)),
    ],
)
def test_the_output_is_the_model_without_these_blocks(kind: str, gone: Sequence[int], tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", kind, num_hidden_layers=3 if "gemma" in kind else 4)
    report = drop_blocks(source, tmp_path / "out", Depth(blocks=tuple(gone)))
    assert report.pruning is not None and report.pruning.dropped == tuple(gone)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(source, gone), rtol=1e-4, atol=1e-4)
    again = Report.load(tmp_path / "out")
    assert again is not None and again.pruning == report.pruning
    assert verify(tmp_path / "out", source=source).passed
    same = compare(tmp_path / "out", source)
    assert all(t.equal for t in same.tensors) and not same.only_here and not same.only_there
    damaged = copy_model(tmp_path / "out", tmp_path / "damaged")
    file = next(damaged.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 0x11
    file.write_bytes(data)
    assert sum(not t.equal for t in compare(damaged, source).tensors) == 1


def test_the_block_goes_without_which_least_is_lost(tmp_path: Path) -> None:
    """What was measured is the loss of the model that comes out, as evaluate has it on the same rows."""
    from quant.evaluation.quality import Runner, Source, run_both

    report = drop_blocks(TINYLM, tmp_path / "out", Depth(drop=2, **TEXT))
    done = report.pruning
    assert done is not None and len(done.steps) == 2 and len(done.kept) == 2
    first, second = done.steps
    assert first["dropped"] == int(min(first["importance"], key=first["importance"].get))
    assert set(second["importance"]) == set(first["importance"]) - {str(first["dropped"])}
    rows = measured_rows(open_checkpoint(TINYLM), Depth(drop=2, **TEXT)).tokens
    device = torch.device("cpu")
    source = Source(TINYLM, length=64)
    found = run_both(Runner(open_checkpoint(tmp_path / "out"), device), source, rows, device, lambda e: None)
    assert found.kl is not None
    assert float(found.kl.double().mean()) == pytest.approx(
        second["importance"][str(second["dropped"])], rel=1e-3
    )


def test_angles_take_one_pass_and_are_those_of_the_states(tmp_path: Path) -> None:
    report = drop_blocks(TINYLM, tmp_path / "out", Depth(drop=1, measure="angle", **TEXT))
    assert report.pruning is not None
    rows = measured_rows(open_checkpoint(TINYLM), Depth(drop=1, **TEXT)).tokens
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(TINYLM, dtype=torch.float32)
    states = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda m, args: states.append(args[0]))
        layer.register_forward_hook(
            lambda m, args, out: states.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        model(rows, use_cache=False)
    for index, (before, after) in enumerate(zip(states[::2], states[1::2], strict=True)):
        wanted = torch.cosine_similarity(before, after, dim=-1).arccos().mean() / torch.pi
        assert report.pruning.steps[0]["importance"][str(index)] == pytest.approx(float(wanted), rel=1e-3)


def test_a_run_that_died_goes_on_with_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = drop_blocks(TINYLM, tmp_path / "whole", Depth(drop=1, **TEXT))
    write, calls = plain.write_unit, 0

    def dying(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return write(*given)

    with monkeypatch.context() as patch:
        patch.setattr(plain, "write_unit", dying)
        with pytest.raises(KeyboardInterrupt):
            drop_blocks(TINYLM, tmp_path / "out", Depth(drop=1, **TEXT))
    for what, told in (
        ("get_num_threads", "threads was"),
        ("backends.cpu.get_cpu_capability", "instructions"),
    ):
        with monkeypatch.context() as patch:  # sums in another order may tell another block
            patch.setattr(f"torch.{what}", lambda: 96)
            with pytest.raises(QuantError, match=told):
                drop_blocks(TINYLM, tmp_path / "out", Depth(drop=1, **TEXT))
    monkeypatch.setitem(depth.MEASURE, "kl", None)  # whoever measures again fails
    report = drop_blocks(TINYLM, tmp_path / "out", Depth(drop=1, **TEXT))
    assert report.pruning == wanted.pruning and report.output_hash == wanted.output_hash
    skipped = {"quant_report.json", "quant_report.html", "README.md"}
    made, other = files_of(tmp_path / "out"), files_of(tmp_path / "whole")
    assert {n: d for n, d in made.items() if n not in skipped} == {
        n: d for n, d in other.items() if n not in skipped
    }
    assert not (tmp_path / "out.work").exists()


WRONG: dict[str, tuple[Depth, str]] = {
    "neither": (Depth(), "one of the two"),
    "both": (Depth(drop=1, blocks=(1,)), "one of the two"),
    "a block that is not there": (Depth(blocks=(1, 4)), "--blocks names 4: the model has blocks 0 to 3"),
    "a block twice": (Depth(blocks=(1, 1)), "names a block twice"),
    "all of them": (Depth(drop=4), "4 of 4 blocks cannot go"),
    "all of them by name": (Depth(blocks=(0, 1, 2, 3)), "4 of 4 blocks cannot go"),
    "rows of one token": (
        Depth(drop=1, sequence_length=1),
        "--sequence-length is 1: two tokens are the least",
    ),
    "no rows": (Depth(drop=1, samples=0), "--samples is 0: at least one row"),
    "a seed below zero": (Depth(drop=1, seed=-1), "--seed is -1: a whole number from 0"),
    "a seed too large": (Depth(drop=1, seed=2**63), "--seed is 9223372036854775808"),
    "rows beyond the context": (Depth(drop=1, sequence_length=10**6), "the model's longest context is"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_are_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    given, message = WRONG[case]
    with pytest.raises(UsageError, match=message):
        drop_blocks(TINYLM, tmp_path / "out", given)
    assert not list(tmp_path.iterdir())


def test_sources_that_cannot_lose_a_block_say_why(
    tmp_path: Path, quantized: Callable[..., Path], llama: Path
) -> None:
    with pytest.raises(Problems, match="is already quantized"):
        drop_blocks(quantized(), tmp_path / "out", Depth(blocks=(0,)))
    whole = copy_model(TINYLM, tmp_path / "wrong")
    change_config(whole, num_hidden_layers=5)
    with pytest.raises(Problems, match="block"):
        drop_blocks(whole, tmp_path / "out", Depth(blocks=(0,)))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(Problems, match="is not empty"):
        drop_blocks(llama, tmp_path / "full", Depth(blocks=(0,)))
    with pytest.raises(CheckpointError, match="later blocks read keys and values"):
        config_without_blocks({"num_hidden_layers": 4, "num_kv_shared_layers": 2}, [0, 1, 3], 4)
    assert not (tmp_path / "out").exists()


def test_what_a_config_says_block_by_block_is_counted_anew() -> None:
    config = {
        "num_hidden_layers": 5,
        "layer_types": ["a", "b", "a", "b", "a"],
        "first_k_dense_replace": 2,
        "mlp_only_layers": [1, 3],
        "hidden_size": 5,
        "rope_scaling": {"long_factor": [1.0] * 5},
        "eos_token_id": [1, 2],
    }
    wrapped = {"model_type": "wrapper", "text_config": config, "vision_config": {"num_hidden_layers": 5}}
    made = config_without_blocks(wrapped, [1, 2, 4], 5)
    assert made["vision_config"] == {"num_hidden_layers": 5}
    assert made["text_config"] == config | {
        "num_hidden_layers": 3,
        "layer_types": ["b", "a", "a"],
        "first_k_dense_replace": 1,
        "mlp_only_layers": [0],
    }


def test_the_command_prunes_weights_too(cli: Callable[..., Any], tmp_path: Path) -> None:
    from tests.helpers import load_all

    text = ("--samples", "4", "--sequence-length", "64")
    done = cli("prune", "-m", TINYLM, "-o", tmp_path / "half", "--pattern", "2:4", "--method", "wanda", *text)
    assert done.code == 0, done.err
    source = load_all(TINYLM)
    for name, value in load_all(tmp_path / "half").items():
        if "_proj.weight" in name:
            assert ((value != 0).view(len(value), -1, 4).sum(2) <= 2).all()
            kept = value != 0
            assert torch.equal(value[kept], source[name][kept])
        else:
            assert torch.equal(value, source[name])
    assert "quantization_config" not in read_config(tmp_path / "half")
    card = (tmp_path / "half" / "README.md").read_text()
    assert "A pruned copy" in card and "wanda" in card and "quantized" not in card.split("---")[1]
    # and quantized like any other
    done = cli("quantize", "-m", tmp_path / "half", "-o", tmp_path / "small", "--method", "minmax", "--json")
    assert done.code == 0 and json.loads(done.out)["bits_per_weight"] < 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one of --sparsity and --pattern"),
        (["--sparsity", "0.5", "--drop-blocks", "1"], "give one of"),
        (["--sparsity", "1"], "sparsity is 1.0"),
        (["--sparsity", "0"], "sparsity is 0.0"),
        (["--pattern", "3:4:5"], "N:M is needed"),
        (["--pattern", "2:7"], "do not divide into groups of 7"),
        (["--drop-blocks", "1", "--method", "wanda"], "--method: not of --drop-blocks"),
        (["--sparsity", "0.5", "--importance", "angle"], "--importance: not of --sparsity"),
        (["--blocks", "1,x"], "numbers of blocks are needed"),
        (["--blocks", "3-1"], "3-1 is no range: numbers of blocks"),
        (["--drop-blocks", "0"], "at least one goes"),
        (["--drop-blocks", "-2"], "at least one goes"),
    ],
)
def test_wrong_options_end_in_one_line(
    options: list[str], message: str, cli: Callable[..., Any], tmp_path: Path
) -> None:
    done = cli("prune", "-m", TINYLM, "-o", tmp_path / "out", *options)
    assert done.code in (1, 2) and message in done.err and "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_what_an_earlier_quantization_left_beside_plain_weights_is_left_out(tmp_path: Path) -> None:
    source = copy_model(TINYLM, tmp_path / "source")
    said = {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": {"quant_algo": "FP8"}}
    (source / "hf_quant_config.json").write_text(json.dumps(said))
    drop_blocks(source, tmp_path / "out", Depth(blocks=(1,)))
    assert "quantization_config" not in read_config(tmp_path / "out")
    assert not (tmp_path / "out" / "hf_quant_config.json").exists() and verify(tmp_path / "out").passed
