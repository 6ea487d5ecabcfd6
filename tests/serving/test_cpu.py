"""What vLLM's CPU build makes of a checkpoint, told from the CPU's instruction sets before it is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quant.errors import VerificationFailed
from quant.hardware import cpu_device
from quant.planning.recommendation import recommend
from quant.schemes import PRESETS
from quant.serving import process
from quant.serving.deployment import DeploymentRequest, plan
from quant.serving.installation import Installation, ServerError
from quant.serving.reference import saturation
from quant.vllm.kernels import kernel_problem
from tests.helpers import quantize
from tests.models.mixtures import save_mixture
from tests.speculation import guessed
from tests.speculation.drafts import TINY

AVX2 = frozenset({"avx", "avx2"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16"}
AMX = AVX512 | {"amx_tile", "amx_int8", "amx_bf16"}


class Started(Exception):
    """The server would have been started now."""


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[frozenset[str]], None]:
    """This machine, with other instruction sets and a CPU build of vLLM that is never started."""

    def start(*args: object, **options: object) -> None:
        raise Started

    def become(instructions: frozenset[str]) -> None:
        monkeypatch.setattr("quant.hardware.cpu_instructions", lambda: instructions)
        monkeypatch.setattr("quant.serving.reference.cpu_instructions", lambda: instructions)
        monkeypatch.setattr(process, "find_vllm", lambda python: Installation("python", "0.32.0", True))
        monkeypatch.setattr(process, "Server", start)

    return become


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("cpu")
    source = save_mixture(root / "mixtral", "mixtral")

    def get(name: str) -> Path:
        scheme, _, part = name.partition(" ")
        path = root / name.replace(" ", "-")
        if not path.exists():
            ignored: dict[str, Any] = {"ignore": ["*.experts.*"]} if part == "attention" else {}
            own = {"w4a16": {"group_size": 32}, "w8a8-int8": {"outlier_suppression": "none"}}.get(scheme, {})
            quantize(source, path, scheme=scheme, **own, **ignored)
        return path

    return get


@pytest.mark.parametrize(
    ("name", "instructions", "refused"),
    [
        ("w4a16 attention", AVX2, "no AVX512"),
        ("w4a16 attention", AVX512, None),
        ("w4a16", AVX512, "no AMX"),
        ("w4a16", AMX, None),
        ("w8a8-int8", AVX512, "no AMX"),
        ("nvfp4a16 attention", AMX, "no kernel for nvfp4"),
    ],
)
def test_serve_refuses_before_it_starts_what_the_cpu_has_no_kernel_for(
    name: str,
    instructions: frozenset[str],
    refused: str | None,
    made: Callable[[str], Path],
    on: Callable[[frozenset[str]], None],
) -> None:
    on(instructions)
    deployment = plan(made(name), DeploymentRequest())
    if refused is None:
        with pytest.raises(Started):
            process.serve(deployment)
        return
    with pytest.raises(ServerError, match=refused) as error:
        process.serve(deployment)
    assert str(made(name)) in str(error.value) and error.value.cause is not None
    with pytest.raises(VerificationFailed, match=refused):
        plan(made(name), DeploymentRequest(gpu="cpu"))


def test_products_that_overflow_are_a_warning_and_not_a_refusal(
    made: Callable[[str], Path], on: Callable[[frozenset[str]], None]
) -> None:
    on(AVX2)
    said: list[str] = []
    with pytest.raises(Started):
        process.serve(plan(made("w8a8-int8 attention"), DeploymentRequest()), log=said.append)
    assert len(said) == 1 and "no VNNI" in said[0]
    chosen = ["Selected CPUInt8ScaledMMLinearKernel for CompressedTensorsW8A8Int8"]
    assert "no VNNI" in (saturation(chosen) or "") and saturation(["another kernel"]) is None
    on(AVX512)
    assert saturation(chosen) is None


def test_latent_attention_that_is_turned_wrongly_is_a_warning(tmp_path: Path) -> None:
    latent = guessed.write("deepseek_v3", tmp_path / "latent")
    (said,) = plan(latent, DeploymentRequest(gpu="cpu")).warnings
    assert "latent attention (MLA)" in said and not plan(TINY, DeploymentRequest(gpu="cpu")).warnings


def test_an_fp8_cache_takes_avx512(made: Callable[[str], Path], on: Callable[[frozenset[str]], None]) -> None:
    request = DeploymentRequest(extra=("--kv-cache-dtype", "fp8"))
    on(AVX2)
    with pytest.raises(ServerError, match="FP8 KV cache"):
        process.serve(plan(made("w8a8-int8 attention"), request))
    on(AVX512)
    with pytest.raises(Started):
        process.serve(plan(made("w8a8-int8 attention"), request))


def test_a_scheme_for_a_cpu_is_refused_by_what_the_cpu_lacks(on: Callable[[frozenset[str]], None]) -> None:
    on(AVX2)
    said = kernel_problem(PRESETS["w4a16"], cpu_device(2**36)) or ""
    assert "AVX512" in said and "capability" not in said and "w8a8-fp8" in said
    on(AVX512)
    assert kernel_problem(PRESETS["w4a16"], cpu_device(2**36)) is None


def test_quantized_experts_are_recommended_for_cpus_with_tiles_alone(
    on: Callable[[frozenset[str]], None],
) -> None:
    for instructions, refused in ((AVX512, True), (AMX, False)):
        on(instructions)
        for name, moe in (("mistralai/Mixtral-8x7B-v0.1", True), ("mistralai/Mistral-7B-v0.1", False)):
            (found,) = recommend(name, cpu_device(2**39), scheme="w4a16").plans
            assert ("no AMX" in found.why) == (moe and refused), (name, found.why)
