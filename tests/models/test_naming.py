"""What a file calls the matrices of its blocks, beside what the family of its config calls them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from quant.checkpoint.header import TensorInfo
from quant.checkpoint.reader import open_checkpoint
from quant.data import load_json
from quant.models.implied import implied_problems
from tests.helpers import load_all, save_all
from tests.models.mixtures import save_mixture

ROOT = Path(__file__).resolve().parents[2]


def to_mixtral(name: str) -> str:
    for ours, theirs in (
        ("mlp.", "block_sparse_moe."),
        ("gate_proj", "w1"),
        ("up_proj", "w3"),
        ("down_proj", "w2"),
    ):
        name = name.replace(ours, theirs)
    return name


def replaced(*pairs: tuple[str, str]) -> Callable[[str], str]:
    def rename(name: str) -> str:
        for ours, theirs in pairs:
            name = name.replace(ours, theirs)
        return name

    return rename


RENAMED: dict[str, tuple[str, Callable[[str], str], dict[str, Any], str]] = {
    "mixtral's in qwen3_moe": ("qwen3_moe", to_mixtral, {}, "block_sparse_moe.experts.0."),
    "qwen3_moe's in mixtral": ("mixtral", replaced(
        ("block_sparse_moe", "mlp"), (".w1.", ".gate_proj."), (".w3.", ".up_proj."), (".w2.", ".down_proj.")
    ), {}, "mlp.experts.0."),
    "mixtral as qwen3_moe": ("mixtral", str, {"model_type": "qwen3_moe"}, "block_sparse_moe.experts.0."),
    "neox's MLP in llama": ("llama", replaced(("up_proj", "dense_h_to_4h")), {}, "mlp.dense_h_to_4h"),
    "internlm2's in llama": (
        "llama", replaced(("self_attn.", "attention."), ("q_proj", "wq")), {}, "0.attention."
    ),
    "llama as deepseek_v3": ("llama", str, {"model_type": "deepseek_v3"}, "self_attn.k_proj"),
    "one projection of one block": (
        "llama", replaced(("1.self_attn.q_proj", "1.self_attn.query")), {}, "layers.1.self_attn.query"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {"llama": llama}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_mixture(tmp_path_factory.mktemp(family) / "model", family)
        return made[family]

    return get


@pytest.mark.parametrize("case", RENAMED)
def test_names_of_another_family_are_told(case: str, model: Callable[[str], Path]) -> None:
    family, rename, changes, strange = RENAMED[case]
    checkpoint = open_checkpoint(model(family))
    assert implied_problems(checkpoint.tensors, checkpoint.config) == []
    headers = {rename(n): replace(i, name=rename(n)) for n, i in checkpoint.tensors.items()}
    said = implied_problems(headers, {**checkpoint.config, **changes})
    assert any(strange in line and "no matrix in a block of model_type" in line for line in said), said


@pytest.mark.parametrize(("architecture", "judged"), [("LlamaForCausalLM", True), ("OwnForCausalLM", False)])
def test_of_a_model_that_brings_code_names_are_judged_where_engines_run_their_own(
    architecture: str, judged: bool, model: Callable[[str], Path]
) -> None:
    _, rename, changes, strange = RENAMED["neox's MLP in llama"]
    checkpoint = open_checkpoint(model("llama"))
    brought = {"architectures": [architecture], "auto_map": {"AutoModelForCausalLM": "own.Own"}}
    headers = {rename(n): replace(i, name=rename(n)) for n, i in checkpoint.tensors.items()}
    said = implied_problems(headers, {**checkpoint.config, **changes, **brought})
    assert any(strange in line and "no matrix in a block" in line for line in said) == judged, said


@pytest.mark.parametrize("latent", [True, False])
def test_a_config_may_ask_for_attention_of_another_family(latent: bool, model: Callable[[str], Path]) -> None:
    """DeepSeek-OCR: DeepSeek V2's experts beside plain queries, keys and values."""
    checkpoint = open_checkpoint(model("llama"))
    config = checkpoint.config | {"model_type": "deepseek_v2", "use_mla": latent}
    said = implied_problems(checkpoint.tensors, config)
    assert any("self_attn.k_proj" in line and "no matrix in a block" in line for line in said) == latent, said


@pytest.mark.parametrize("model_type", [["qwen3_moe"], {"a": 1}, 7, None])
def test_model_types_that_are_no_words_are_of_no_family(
    model_type: object, model: Callable[[str], Path]
) -> None:
    checkpoint = open_checkpoint(model("llama"))
    assert implied_problems(checkpoint.tensors, {**checkpoint.config, "model_type": model_type}) == []


@pytest.mark.parametrize(
    "command",
    [["verify"], ["recommend", "--gpu", "L40S-48GB", "-m"], ["evaluate"],
     ["quantize", "--method", "minmax", "-o", "OUT", "-m"], ["export-vllm", "-o", "OUT", "-m"]],
    ids=lambda c: c[0],
)  # fmt: skip
def test_every_command_tells_them(
    command: list[str], model: Callable[[str], Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    folder = save_mixture(tmp_path / "model", "qwen3_moe")
    save_all(folder, {to_mixtral(n): t for n, t in load_all(folder).items()})
    done = cli(*(str(tmp_path / "out") if a == "OUT" else a for a in command), folder)
    assert done.code in (1, 4) and "no matrix in a block of model_type 'qwen3_moe'" in done.err, done.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("family", "beside", "message"),
    [
        ("qwen3_moe_fused", "mlp.experts.0.gate_proj.weight", "mlp.experts.gate_up_proj holds all experts"),
        ("llama", "self_attn.qkv_proj.weight", "self_attn.qkv_proj is in the file beside self_attn.q_proj"),
        ("llama", "mlp.gate_up_proj.weight", "mlp.gate_up_proj is in the file beside mlp.gate_proj"),
    ],
)
def test_matrices_that_are_there_twice_are_told(
    family: str, beside: str, message: str, model: Callable[[str], Path]
) -> None:
    checkpoint = open_checkpoint(model(family))
    name = f"model.layers.1.{beside}"
    extra = TensorInfo(name, "BF16", (64, 64), Path(), 0, 8192)
    said = implied_problems({**checkpoint.tensors, name: extra}, checkpoint.config)
    assert any(message in line and "keep one of them" in line for line in said), said


def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_names", ROOT / "docs" / "make_names.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


#: Of the second line, the default config does not build.
@pytest.mark.parametrize(
    "kind",
    ["llama", "qwen2_moe", "internlm3",
     "dbrx", "dots1", "hunyuan_v1_dense", "hunyuan_v1_moe", "lfm2_moe", "ministral", "nemotron"],
)  # fmt: skip
def test_the_table_is_what_its_program_makes(kind: str) -> None:
    made = maker()
    text, row = made.described(made.model_classes()[kind], made.small_config(kind))
    stored = dict(load_json("block_names.json")[text])
    switched = stored.pop("switched")
    assert {k: sorted(v) for k, v in row.items()} == {k: sorted(v) for k, v in stored.items()}
    assert row["vectors"] == stored["vectors"]
    if kind == "llama":
        assert made.switched(kind, made.model_classes()[kind], row["vectors"]) == switched
