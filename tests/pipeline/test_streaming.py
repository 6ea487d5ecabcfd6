"""Methods without data go through weights in pieces: nothing of the result may depend on where they are
cut."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.errors import CheckpointError
from quant.pipeline import pieces
from quant.pipeline.manager import QuantizationManager
from quant.pipeline.methods import make_quantizer
from quant.pipeline.pieces import PieceQuantizer
from quant.pipeline.plan import plan_job
from quant.quantizers import Quantized
from quant.schemes import PRESETS
from quant.tensors import QuantizedTensor, code_values
from tests.helpers import copy_model, files_of, load_all, quantize, recipe, save_all, weight_files

#: Three blocks of rows, the last one short, and columns that blocks do not divide.
SHAPES = {
    "hidden_size": 160,
    "intermediate_size": 320,
    "num_hidden_layers": 1,
    "head_dim": 64,
    "num_attention_heads": 4,
}
GATE = "model.layers.0.mlp.gate_proj"
SMALL = [
    n for n, s in PRESETS.items() if s.weights.group_size in (-1, 16, 32) or s.weights.strategy == "block"
]


def pieces_of(rows: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", {"cpu": rows * k, "cuda": rows * k})


def alone(plan: Any, name: str, scheme: str, options: dict[str, Any]) -> tuple[Quantized, float]:
    """What the pipeline makes of one linear in a scheme, whatever format can hold it; with the noise it
    reports."""
    manager = QuantizationManager(plan)
    assignment = type(plan.assignments[name])("minmax", PRESETS[scheme], tuple(options.items()))
    manager.quantizers[assignment] = make_quantizer(assignment)
    plan.assignments[name] = assignment
    tensor = manager.pieces.quantize(name)
    return Quantized(tensor), manager.records.layers[name].snr_db


@pytest.mark.parametrize("search", [False, True], ids=["whole ranges", "searched"])
@pytest.mark.parametrize("scheme", SMALL)
def test_pieces_make_the_tensor_that_the_whole_weight_makes(
    scheme: str,
    search: bool,
    checkpoints: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    source = checkpoints("llama", **SHAPES)
    plan = plan_job(recipe(source, tmp_path / "out", method="minmax", group_size=32))
    weight = plan.checkpoint.read(f"{GATE}.weight")
    weights = PRESETS[scheme].weights
    up = plan.checkpoint.read(GATE.replace("gate", "up") + ".weight")
    shared = (
        {"amax": torch.stack([weight.abs().amax(), up.abs().amax()]).amax().float()}
        if "tensor" in weights.strategy
        else {}
    )
    options = {"clip_search": True} if search else {}
    quantizer = make_quantizer(
        type(plan.assignments[GATE])("minmax", PRESETS[scheme], tuple(options.items()))
    )
    wanted = quantizer(weight.float(), None, weights, torch.bfloat16, **shared).tensor
    pieces_of(128, weight.shape[1], monkeypatch)
    found, snr = alone(plan, GATE, scheme, options)
    for part in ("codes", "scales", "zeros", "global_scale"):
        a, b = getattr(found.tensor, part), getattr(wanted, part)
        assert (a is None) == (b is None), part
        if a is not None:
            assert (
                a.dtype == b.dtype
                and a.shape == b.shape
                and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            ), part
    exact = weight.double()
    noise = (wanted.dequantize().bfloat16().double() - exact).square().sum()
    assert snr == pytest.approx(float(10 * torch.log10(exact.square().sum() / noise)), abs=0.011)


def test_files_do_not_depend_on_the_size_of_pieces(
    checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoints("llama", **SHAPES)
    job: dict[str, Any] = {"method": "minmax", "group_size": 32, "symmetric": False}
    whole = quantize(source, tmp_path / "whole", **job)
    pieces_of(128, 1, monkeypatch)
    pieces = quantize(source, tmp_path / "pieces", **job)
    assert whole["output_hash"] == pieces["output_hash"]
    a, b = files_of(tmp_path / "whole"), files_of(tmp_path / "pieces")
    assert (
        {n for n in a if n.endswith(".safetensors")} == {n for n in b if n.endswith(".safetensors")} != set()
    )
    assert all(a[n] == b[n] for n in a if n.endswith(".safetensors"))
    assert [x["snr_db"] for x in whole["layers"]] == [x["snr_db"] for x in pieces["layers"]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_damaged_number_in_the_last_piece_is_found(
    value: float, checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = copy_model(checkpoints("llama", **SHAPES), tmp_path / "damaged")
    tensors = load_all(source)
    tensors[f"{GATE}.weight"][-1, -1] = value
    save_all(source, tensors)
    pieces_of(128, 1, monkeypatch)
    with pytest.raises(
        CheckpointError, match="gate_proj.weight holds NaN or infinity: the source is damaged"
    ):
        quantize(source, tmp_path / "out", method="minmax", group_size=32)


def test_every_fp8_code_has_the_value_that_torch_gives_it() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(code_values(codes).nan_to_num(-1), codes.float().nan_to_num(-1))
    assert torch.equal(code_values(codes.view(16, 16).t()).isnan(), codes.float().isnan().view(16, 16).t())


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of torch's threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("scheme", ["w8a8-fp8-tensor", "w4a16-asym"])
def test_files_do_not_depend_on_the_number_of_workers(
    scheme: str, checkpoints: Callable[..., Path], tmp_path: Path, threads: Callable[[int], None]
) -> None:
    source = checkpoints("llama", **SHAPES | {"num_hidden_layers": 5})
    group = {"group_size": 32} if scheme == "w4a16-asym" else {}
    reports = {}
    for count in (1, 3):
        threads(count)
        reports[count] = quantize(source, tmp_path / str(count), method="minmax", scheme=scheme, **group)
        assert torch.get_num_threads() == count
    assert reports[1]["output_hash"] == reports[3]["output_hash"]
    assert weight_files(tmp_path / "1") == weight_files(tmp_path / "3")
    assert [(x["name"], x["snr_db"], x["unit"]) for x in reports[1]["layers"]] == [
        (x["name"], x["snr_db"], x["unit"]) for x in reports[3]["layers"]
    ]


def test_a_unit_that_fails_keeps_those_before_it_and_leaves_nothing_of_itself(
    checkpoints: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    threads: Callable[[int], None],
) -> None:
    source = checkpoints("llama", **SHAPES | {"num_hidden_layers": 5})
    threads(3)
    alone = PieceQuantizer.quantize

    def failing(quantizer: PieceQuantizer, name: str) -> QuantizedTensor:
        if name == "model.layers.2.mlp.up_proj":
            raise CheckpointError("this one")
        return alone(quantizer, name)

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="this one"):
        patch.setattr(PieceQuantizer, "quantize", failing)
        quantize(source, tmp_path / "out", method="minmax", group_size=32)
    work = tmp_path / "out.work"
    units = [json.loads(line).get("unit") for line in (work / "journal.jsonl").read_text().splitlines()]
    assert units == [None, "outside", "block 0", "block 1"]
    assert not (work / "model-00004-of-00006.safetensors").exists() and torch.get_num_threads() == 3
    found = quantize(source, tmp_path / "out", method="minmax", group_size=32)
    assert (
        found["output_hash"]
        == quantize(source, tmp_path / "undisturbed", method="minmax", group_size=32)["output_hash"]
    )


@pytest.mark.parametrize("value", [1e25, -3e38])
def test_numbers_whose_squares_overflow_are_not_taken_for_damage(
    value: float, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    source = copy_model(checkpoints("llama", **SHAPES), tmp_path / "large")
    tensors = load_all(source)
    tensors[f"{GATE}.weight"][5, 3] = value
    save_all(source, tensors)
    report = quantize(source, tmp_path / "out", method="minmax", scheme="w8a8-fp8")
    assert report["verify"]["passed"]
    codes = load_all(tmp_path / "out")[f"{GATE}.weight"]
    assert abs(float(codes[5, 3].float())) == 448.0
