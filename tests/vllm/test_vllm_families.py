"""Families beside plain dense decoders in real vLLM: mixtures, latent attention, wrappers, hybrids.

One start of vLLM's interpreter scores them all (`score_many.py`), which takes kernels; another loads them all
(`load_many.py`), which takes none: that is the proof for experts, which the CPU build computes with on
machines with AMX alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.pipeline.export import export
from quant.pipeline.gguf import export_gguf
from quant.serving.reference import Answers, Reference, kernels
from tests.helpers import load_all, quantize, save_all
from tests.vllm import corrupt
from tests.vllm.conftest import demand_4_bit_kernels, demand_8_bit_products, in_vllm
from tests.vllm.families import EXPERTS, FAMILIES, LOADED, MIXTURES, save_family

SCHEMES: dict[str, dict[str, Any]] = {
    "w4a16": {"scheme": "w4a16", "group_size": 32},
    "w8a8-int8": {"scheme": "w8a8-int8", "outlier_suppression": "none"},
}
#: What is loaded: experts, too, whatever this machine has kernels for.
LOADED_SCHEMES: dict[str, dict[str, Any]] = SCHEMES | {
    "w8a8-fp8": {"scheme": "w8a8-fp8"},
    "nvfp4a16": {"scheme": "nvfp4a16"},
}
#: Levels of GGUF whose codes vLLM has a scheme for.
BACK = ("q4_0", "q8_0")
DEMANDS = {"w4a16": demand_4_bit_kernels, "w8a8-int8": demand_8_bit_products}
KERNELS = {"w4a16": "CPUWNA16LinearKernel", "w8a8-int8": "CPUInt8ScaledMMLinearKernel"}
CASES = [(family, scheme) for family in FAMILIES for scheme in SCHEMES]
ROWS = torch.randint(3, 4000, (8, 48), generator=torch.Generator().manual_seed(0))
#: Inputs beside text, which tests of text have none of.
NO_IMAGES = {"gemma3": ("image",), "qwen2_5_vl": ("image", "video")}


def _works_here(scheme: str) -> bool:
    try:
        DEMANDS[scheme]()
    except pytest.skip.Exception:
        return False
    return True


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: save_family(root / family, family) for family in LOADED}


# -- computed ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(sources: dict[str, Path]) -> dict[tuple[str, str], Path]:
    """Checkpoints that this machine's vLLM has kernels for, by family and scheme: of mixtures all but the
    experts is quantized."""
    paths = {}
    for family, scheme in CASES:
        if _works_here(scheme):
            path = sources[family].with_name(f"{family}-{scheme}")
            ignored = [EXPERTS] if family in MIXTURES else []
            if (family, scheme) == ("deepseek_v2", "w8a8-int8"):
                # latent attention takes this matrix apart once it is loaded, and the CPU's int8 kernel has
                # given its weights away by then
                ignored.append("*.kv_b_proj")
            quantize(sources[family], path, **SCHEMES[scheme], ignore=ignored)
            paths[family, scheme] = path
    return paths


@pytest.fixture(scope="module")
def scored(
    made: dict[tuple[str, str], Path], vllm_python: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    jobs: list[dict[str, Any]] = []
    for (family, _), path in made.items():
        without = {"limit_mm_per_prompt": dict.fromkeys(NO_IMAGES[family], 0)} if family in NO_IMAGES else {}
        jobs.append(
            {
                "name": path.name,
                "path": str(path),
                "rows": ROWS.tolist(),
                "new_tokens": 4,
                "arguments": without,
            }
        )
    return in_vllm("score_many.py", vllm_python, jobs, tmp_path_factory.mktemp("scored"))


@pytest.mark.parametrize(("family", "scheme"), CASES)
def test_vllm_computes_with_the_values_of_every_kind_of_model(
    family: str,
    scheme: str,
    made: dict[tuple[str, str], Path],
    scored: dict[str, dict[str, Any]],
    copy: Callable[[Path], Path],
    record_property: Callable[[str, object], None],
) -> None:
    DEMANDS[scheme]()
    path = made[family, scheme]
    found = scored[path.name]
    assert "error" not in found, found["error"] + found["log"][-2000:]
    assert KERNELS[scheme] in found["log"]
    answers = Answers(torch.tensor(found["tokens"]), torch.tensor(found["logs"]), ROWS.shape[1])
    used = kernels(found["log"].splitlines())
    compared = Reference(path, used).compare(answers)
    print(f"{path.name}: {compared.describe()}")
    record_property("comparison", compared.to_dict())
    assert compared.passed, compared.describe()
    damaged = copy(path)
    assert corrupt.scales_of_the_wrong_output(damaged, "self_attn") > 0
    seen = Reference(damaged, used).compare(answers, like=compared)
    assert not seen.passed, seen.describe()


# -- loaded --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(
    sources: dict[str, Path], vllm_python: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("loaded")
    for family in LOADED:
        for scheme, options in LOADED_SCHEMES.items():
            quantize(sources[family], root / f"{family}-{scheme}", **options)
    for level in BACK:  # written as GGUF, and exported from it
        file = root.with_name(f"{root.name}-{level}.gguf")
        export_gguf(sources["mixtral"], file, level)
        export(file, root / f"mixtral-from-{level}")
    # one expert of one layer is missing
    lost = root / "lost"
    shutil.copytree(root / "mixtral-w4a16", lost)
    tensors = {n: t for n, t in load_all(lost).items() if "layers.1.block_sparse_moe.experts.2." not in n}
    for file in lost.glob("*.safetensors*"):
        file.unlink()
    save_all(lost, tensors)
    jobs = [{"name": path.name, "path": str(path)} for path in sorted(root.iterdir())]
    return in_vllm("load_many.py", vllm_python, jobs, tmp_path_factory.mktemp("loads"))


@pytest.mark.parametrize("scheme", LOADED_SCHEMES)
@pytest.mark.parametrize("family", LOADED)
def test_no_parameter_of_vllms_model_is_left_by_the_file(
    family: str, scheme: str, loaded: dict[str, dict[str, Any]]
) -> None:
    found = loaded[f"{family}-{scheme}"]
    assert "error" not in found, found["error"] + found["log"][-2000:]
    # of weights alone, vLLM builds a scale for an expert's inputs all the same, and reads it nowhere
    unread = "_input_global_scale" if scheme == "nvfp4a16" else None
    assert not [n for n in found["unfilled"] if unread is None or not n.endswith(unread)]
    assert found["quantized"]
    routed = [x for x in found["experts"] if not x.startswith("CompressedTensors")]
    assert not routed and bool(found["experts"]) == (family in MIXTURES), found["experts"]


@pytest.mark.parametrize("level", BACK)
def test_vllm_loads_what_is_exported_from_a_gguf_file(level: str, loaded: dict[str, dict[str, Any]]) -> None:
    found = loaded[f"mixtral-from-{level}"]
    assert "error" not in found, found["error"] + found["log"][-2000:]
    assert not found["unfilled"] and found["quantized"]
    assert found["experts"] and all(x.startswith("CompressedTensors") for x in found["experts"])


def test_an_expert_that_is_missing_is_seen(loaded: dict[str, dict[str, Any]]) -> None:
    found = loaded["lost"]
    assert "error" not in found, found["log"][-2000:]
    names = {n.rpartition(".")[2] for n in found["unfilled"]}
    assert all(".layers.1." in n for n in found["unfilled"])
    assert {"w13_weight_packed", "w13_weight_scale", "w2_weight_packed", "w2_weight_scale"} <= names
