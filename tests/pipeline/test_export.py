"""Checkpoints of other programs through export: values kept, configs mended, what cannot be kept refused or
paid for in the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.errors import CheckpointError, Problems
from quant.evaluation.compare import compare
from quant.evaluation.verify import verify
from quant.pipeline.export import export
from tests.helpers import ROOT, TINYLM, change_config, copy_model, load_all, read_config, save_all

PEERS = ROOT / "tests" / "fixtures" / "peers"
LINEAR = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("form", ["compressed-tensors", "awq", "plain"])
@pytest.mark.parametrize("peer", ["awq-gemm", "awq-gemv", "awq-gemv_fast", "gptqmodel", "llmc"])
def test_checkpoints_of_other_programs_keep_their_values(peer: str, form: str, tmp_path: Path) -> None:
    report = export(PEERS / peer, tmp_path / "out", form, source=TINYLM).to_dict()
    assert report["verify"]["passed"] and report["linears"] == 14 and report["requantized"] == {}
    assert verify(tmp_path / "out").passed and (tmp_path / "out" / "tokenizer.json").is_file()
    found = compare(tmp_path / "out", PEERS / peer)
    assert not found.only_here and not found.only_there
    # what plain rounds to 16 bits, and scales in another 16-bit type than the model's, lose nothing that four
    # bits could hold
    assert all(t.equal or (t.snr_db or 0) > 45 for t in found.tensors), [
        t for t in found.tensors if not t.equal
    ]
    near = [t for t in compare(tmp_path / "out", PEERS / "source").tensors if "_proj" in t.name]
    assert len(near) == 14 and all(t.snr_db is not None and t.snr_db > 15 for t in near)


def test_the_default_format_of_a_gemv_file_is_gemm(tmp_path: Path) -> None:
    export(PEERS / "awq-gemv", tmp_path / "out")
    gemm, out = load_all(PEERS / "awq-gemm"), load_all(tmp_path / "out")
    assert gemm.keys() == out.keys() and all(torch.equal(out[k], gemm[k]) for k in gemm)


def test_groups_in_activation_order_are_refused_or_rounded_anew_at_a_price_that_is_told(
    tmp_path: Path,
) -> None:
    with pytest.raises(Problems, match="--requantize rounds those linears anew"):
        export(PEERS / "auto-gptq", tmp_path / "no", "compressed-tensors")
    assert not (tmp_path / "no").exists()
    plain = export(PEERS / "auto-gptq", tmp_path / "plain", "plain")
    assert plain.conversion is not None and plain.conversion.requantized == {}
    near = [t for t in compare(tmp_path / "plain", PEERS / "source").tensors if "_proj" in t.name]
    # read in its order: in another one it is noise
    assert len(near) == 14 and all(t.snr_db is not None and t.snr_db > 15 for t in near)
    report = export(PEERS / "auto-gptq", tmp_path / "out", "compressed-tensors", requantize=True).to_dict()
    differences = {
        t.name.removesuffix(".weight"): t.snr_db
        for t in compare(tmp_path / "out", tmp_path / "plain").tensors
        if not t.equal
    }
    assert differences.keys() == report["requantized"].keys() and len(differences) == 14
    for name, snr in differences.items():
        assert snr == pytest.approx(report["requantized"][name]["snr_db"], abs=0.02) and snr > 20


def test_groups_in_activation_order_are_kept_for_engines_that_read_them(tmp_path: Path) -> None:
    report = export(PEERS / "auto-gptq", tmp_path / "out", "gptq", target="other").to_dict()
    assert report["requantized"] == {} and report["verify"]["passed"]
    config = read_config(tmp_path / "out")["quantization_config"]
    assert (config["desc_act"], config["static_groups"]) == (True, False)
    before, after = load_all(PEERS / "auto-gptq"), load_all(tmp_path / "out")
    orders = [n for n in after if n.endswith(".g_idx")]
    assert len(orders) == 14 and all(torch.equal(after[n], before[n].int()) for n in orders)
    failed = "; ".join(verify(tmp_path / "out").failed)
    assert "desc_act is true with groups" in failed and "g_idx is reordered" in failed


def test_an_old_autogptq_folder_gets_its_config_and_file_names(tmp_path: Path) -> None:
    report = export(PEERS / "auto-gptq", tmp_path / "out", "awq", requantize=True).to_dict()
    assert "quantization_config taken from quantize_config.json into config.json" in report["repairs"]
    assert any("quant_method 'gptq' added" in r for r in report["repairs"])
    assert read_config(tmp_path / "out")["quantization_config"]["quant_method"] == "awq"
    assert not (tmp_path / "out" / "quantize_config.json").exists() and not list(
        (tmp_path / "out").glob("gptq_model*")
    )


def test_symmetric_weights_are_seen_behind_awq_zero_points(quantized: Any, tmp_path: Path) -> None:
    export(quantized(format="gptq"), tmp_path / "awq", "awq")
    assert set(load_all(tmp_path / "awq")[f"{LINEAR}.qzeros"].unique().tolist()) == {0x88888888 - (1 << 32)}
    export(tmp_path / "awq", tmp_path / "gptq", "gptq")  # which vLLM takes only when symmetric
    assert all(t.equal for t in compare(tmp_path / "gptq", quantized(format="gptq")).tensors)


def legacy(name: str, config: dict[str, Any], path: Path) -> None:
    """Puts an AWQ config where an older program would."""
    old = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    change_config(path, quantization_config=...)
    if name == "quant_config.json":
        (path / name).write_text(json.dumps(old))
    elif name == "old keys":
        change_config(path, quantization_config=old)
    elif name == "compression_config":
        change_config(path, compression_config=config)
    elif name == "text_config":
        change_config(path, text_config={"quantization_config": config})
    else:
        change_config(path, quantization_config=config, text_config={"quantization_config": config})


@pytest.mark.parametrize(
    ("name", "repair"),
    [
        ("quant_config.json", "taken from quant_config.json"),
        ("old keys", "w_bit and q_group_size renamed"),
        ("compression_config", "moved from compression_config"),
        ("text_config", "moved from text_config"),
        ("twice", "second quantization_config removed"),
    ],
)
def test_configs_of_older_programs_are_mended(name: str, repair: str, tmp_path: Path) -> None:
    path = copy_model(PEERS / "awq-gemm", tmp_path / "old")
    legacy(name, read_config(path)["quantization_config"], path)
    report = export(path, tmp_path / "out").to_dict()
    assert any(repair in r for r in report["repairs"]), report["repairs"]
    config = read_config(tmp_path / "out")
    assert config["quantization_config"]["bits"] == 4 and "w_bit" not in config["quantization_config"]
    assert "compression_config" not in config and "quantization_config" not in config.get("text_config", {})
    assert all(t.equal for t in compare(tmp_path / "out", PEERS / "awq-gemm").tensors)


def test_everything_that_is_missing_is_named_at_once(tmp_path: Path) -> None:
    path = copy_model(PEERS / "awq-gemm", tmp_path / "m")
    save_all(
        path, {k: v for k, v in load_all(path).items() if k not in (f"{LINEAR}.scales", f"{LINEAR}.qzeros")}
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(Problems) as error:
        export(path, tmp_path / "full", "compressed-tensors")
    assert len(error.value.problems) == 3
    assert (
        "is not empty" in str(error.value)
        and f"no qzeros ({LINEAR})" in str(error.value)
        and f"no scales ({LINEAR})" in str(error.value)
    )


def test_words_without_any_config_and_marlin_files_are_refused(tmp_path: Path) -> None:
    path = copy_model(PEERS / "awq-gemm", tmp_path / "m")
    change_config(path, quantization_config=...)
    with pytest.raises(
        CheckpointError, match="neither config.json nor quantize_config.json nor quant_config.json says"
    ):
        export(path, tmp_path / "out")
    marlin = copy_model(PEERS / "auto-gptq", tmp_path / "marlin")
    stated = json.loads((marlin / "quantize_config.json").read_text())
    (marlin / "quantize_config.json").write_text(json.dumps(stated | {"is_marlin_format": True}))
    with pytest.raises(CheckpointError, match="is_marlin_format is true"):
        export(marlin, tmp_path / "out")
