"""Every format, symmetry and group size that vLLM's CPU build loads, computed by real vLLM and compared with
the values in the files.

One engine a checkpoint, with the arguments of the server that `quant verify --vllm` starts, and one start of
vLLM's interpreter for all (`score_many.py`); the server itself is in test_vllm_commands.py. Its answers are
compared with our dequantized reference, which must agree as far as
16-bit arithmetic lets them, and with references of damaged copies in which one linear of the model is wrong,
which must not: so the criterion is shown to see what it is for. Greedy text is compared under teacher
forcing: vLLM's own continuation runs through the reference, and each of its tokens must be the reference's
first choice, or nearer to it than 16-bit rounding can tell (free-running texts part for good at the first
such tie).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.checkpoint.reader import read_json
from quant.defaults import EFFORTS
from quant.errors import QuantError
from quant.evaluation.verify import verify
from quant.pruning import Depth, Width, drop_blocks, narrow
from quant.serving.installation import ServerError
from quant.serving.process import cpu_environment
from quant.serving.reference import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    PROMPTS,
    Answers,
    Reference,
    kernels,
    open_server,
    prompts,
)
from quant.vllm.config import quantization_config
from tests.helpers import make_checkpoint
from tests.vllm import corrupt
from tests.vllm.conftest import demand_4_bit_kernels, demand_8_bit_products, in_vllm

CT, GPTQ, AWQ = "compressed-tensors", "gptq", "awq"
#: Whether this machine has the tile instructions that vLLM's FP8 block kernels are made of.
AMX = Path("/proc/cpuinfo").exists() and "amx_tile" in Path("/proc/cpuinfo").read_text()
Damage = Callable[[Path, str], int]
#: format, symmetry, group size, method or effort (``best`` has negative scales)
CASES = [
    *((CT, "symmetric", g, m) for g, m in ((-1, "minmax"), (32, "gptq"), (64, "best"), (128, "gptq"))),
    *((CT, "asymmetric", g, m) for g, m in ((-1, "minmax"), (32, "minmax"), (64, "gptq"), (128, "minmax"))),
    *((GPTQ, "symmetric", g, m) for g, m in ((-1, "gptq"), (32, "minmax"), (64, "gptq"), (128, "best"))),
    *((AWQ, "symmetric", g, m) for g, m in ((-1, "minmax"), (128, "gptq"))),
    *((AWQ, "asymmetric", g, m) for g, m in ((-1, "minmax"), (32, "gptq"), (128, "minmax"))),
    ("plain", "symmetric", 128, "gptq"),
]
ONE_LAYER = "layers.1.mlp.down_proj"
MIXED = Path(__file__).with_name("mixed.yaml")
FP8 = ("--scheme", "w8a8-fp8", "--method", "minmax")
INT8 = ("--scheme", "w8a8-int8", "--method", "minmax", "--outlier-suppression", "none")
BLOCKS = ("--scheme", "fp8-block", "--method", "minmax")
STATIC, ASYMMETRIC = ("--activations", "static"), ("--asymmetric-activations",)
SCALES, INPUTS = corrupt.scales_of_the_wrong_output, corrupt.input_scales_of_half_the_range
#: Options, the kernel that vLLM must name, and what can be wrong. Activations, and K and V, are rounded in
#: the reference too. A number on the edge between two codes falls to either side in 16 bits, which is the
#: larger part of the noise: one layer's damage can hide in it, so here all down projections (or caches) are
#: damaged.
NUMBERS: dict[str, tuple[tuple[str, ...], str, tuple[Damage, ...]]] = {
    "int8 dynamic": (INT8, "CPUInt8ScaledMMLinearKernel", (SCALES,)),
    "int8 dynamic asymmetric": ((*INT8, *ASYMMETRIC), "CPUInt8ScaledMMLinearKernel", (SCALES,)),
    # vLLM's AMX path takes scales of tokens whatever the file says: there a wrong static scale is not seen
    "int8 static": ((*INT8, *STATIC), "CPUInt8ScaledMMLinearKernel", (SCALES,) if AMX else (SCALES, INPUTS)),
    "int8 static asymmetric": (
        (*INT8, *STATIC, *ASYMMETRIC),
        "CPUInt8ScaledMMLinearKernel",
        (SCALES, INPUTS, corrupt.input_zero_points_of_unsigned_codes),
    ),
    "fp8 channel": (FP8, "ChannelWiseTorchFP8ScaledMMLinearKernel", (SCALES,)),
    # with a scheme chosen for every layer: of what this build serves 4 bits in several ways, and 16
    "fp8 cache": (
        ("--target-bits", "4.4", "--gpu", "cpu", "--method", "minmax", "--kv-cache-scheme", "fp8"),
        "CPUWNA16LinearKernel",
        (corrupt.cache_scales_not_divided,),
    ),
    "mixed": (("--config", str(MIXED)), "CPUInt8ScaledMMLinearKernel", (SCALES,)),
    "fp8 blocks": (BLOCKS, "CPUFp8", (corrupt.scales_of_the_wrong_group,)),
    "native fp8 blocks": ((*BLOCKS, "--format", "fp8"), "CPUFp8", (corrupt.scales_of_the_wrong_group,)),
}


def _damages(form: str, symmetry: str, group: int) -> list[Callable[[Path, str], int]]:
    """What can be wrong in such a file without changing a shape."""
    if form == "plain":
        return []
    damages: list[Callable[[Path, str], int]] = [corrupt.nibble_order, corrupt.scales_of_the_wrong_output]
    return (
        damages
        + ([corrupt.zero_points] if symmetry == "asymmetric" else [])
        + ([corrupt.scales_of_the_wrong_group] if group != -1 else [])
    )


#: Blocks that a model goes without.
GONE = {"one block": (3,), "two blocks": (1, 2)}
REFUSED = ("w8a8-fp8-tensor", "nvfp4", "mxfp4")


def _demand(form: str) -> None:
    if form != "plain":
        demand_4_bit_kernels()


def _demand_kernel(case: str) -> None:
    """Skips a case of NUMBERS by name on a machine whose vLLM has no kernel for it."""
    kernel = NUMBERS[case][1]
    if kernel == "CPUFp8" and not AMX:
        pytest.skip(
            "this machine has no AMX (amx_tile in /proc/cpuinfo), of which vLLM's FP8 block kernels are made"
        )
    if case in ("fp8 cache", "mixed"):
        demand_4_bit_kernels()
    if kernel == "CPUInt8ScaledMMLinearKernel":
        demand_8_bit_products()


def _served(demand: Callable[[str], None], what: str) -> bool:
    try:
        demand(what)
    except pytest.skip.Exception:
        return False
    return True


def _options(form: str, symmetry: str, group: int, method: str) -> tuple[str, ...]:
    chosen = ("--effort", method, "--bits", "4") if method in EFFORTS else ("--method", method)
    return ("--format", form, f"--{symmetry}", "--group-size", str(group), *chosen)


def _narrower(folder: Path) -> Path:
    """A mixture with fewer experts, MLP channels (of the dense block) and heads, all in one model."""
    from tests.models.mixtures import FAMILIES, save_mixture

    whole, path = folder / "whole", folder / "narrower"
    sizes = {"mlp_only_layers": [0], "num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 64}
    sizes |= {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "qwen3_moe", FAMILIES["qwen3_moe"] | sizes)
        save_mixture(whole, "qwen3_moe")
    asked = Width(experts=4, channels=64, heads=2, multiple_of=32, samples=4, sequence_length=64)
    report = narrow(whole, path, asked)
    assert report.pruning is not None and [w["after"] for w in report.pruning.widths] == [4, 64, 2]
    return path


def _fewer_heads(folder: Path) -> Path:
    """A Qwen2 with fewer heads, which is a Llama."""
    sizes = {"hidden_size": 128, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    whole = make_checkpoint(folder / "qwen2", "qwen2", **sizes)
    narrow(whole, folder / "fewer heads", Width(heads=1, samples=4, sequence_length=64))
    return folder / "fewer heads"


@dataclass(frozen=True)
class Said:
    """What vLLM made of a checkpoint: answers, or why it did not start; and its log."""

    path: Path
    answers: Answers | None
    error: str
    log: str

    @property
    def sure(self) -> Answers:
        assert self.answers is not None, f"{self.error}\n{self.log[-2000:]}"
        return self.answers


@pytest.fixture(scope="module")
def said(
    make: Callable[..., Path], tinylm: Path, vllm_python: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Said]:
    """What vLLM says of every checkpoint that this machine's build has kernels for, and of those that it has
    none for; by the options that made it."""
    folder = tmp_path_factory.mktemp("values")

    def made() -> Iterator[tuple[str, Path]]:
        for case in CASES:
            if _served(_demand, case[0]):
                yield " ".join(_options(*case)), make(*_options(*case))
        for name, (options, _, _) in NUMBERS.items():
            if _served(_demand_kernel, name):
                yield name, make(*options)
        for name, gone in GONE.items():
            drop_blocks(tinylm, folder / name, Depth(blocks=gone))
            yield name, folder / name
        yield "narrower", _narrower(folder)
        yield "fewer heads", _fewer_heads(folder)
        for scheme in REFUSED:
            yield scheme, make("--scheme", scheme, "--method", "minmax")

    paths = dict(made())
    jobs: list[dict[str, Any]] = []
    for number, path in enumerate(paths.values()):
        with open_server(path, vllm_python) as server:
            words = server.command
        jobs.append(
            {
                "name": str(number), "path": str(path), "flags": words[words.index(str(path)) + 1 :],
                "environment": cpu_environment(exact=True), "rows": prompts(path).tolist(),
                "new_tokens": NEW_TOKENS,
            }
        )  # fmt: skip
    found = in_vllm("score_many.py", vllm_python, jobs, tmp_path_factory.mktemp("said"))
    return {
        name: Said(
            path,
            None
            if "error" in x
            else Answers(torch.tensor(x["tokens"]), torch.tensor(x["logs"]), PROMPT_TOKENS),
            x.get("error", ""),
            x["log"],
        )
        for (name, path), x in zip(paths.items(), found.values(), strict=True)
    }


@pytest.mark.parametrize(("form", "symmetry", "group", "method"), CASES)
def test_vllm_computes_with_the_values_that_are_in_the_files(
    form: str,
    symmetry: str,
    group: int,
    method: str,
    said: dict[str, Said],
    copy: Callable[[Path], Path],
    record_property: Callable[[str, object], None],
) -> None:
    _demand(form)
    told = said[" ".join(_options(form, symmetry, group, method))]
    path, answers, log = told.path, told.sure, told.log
    assert answers.tokens.shape == (PROMPTS, PROMPT_TOKENS + NEW_TOKENS)
    assert "'enable_weights_track': True" in log  # as vLLM understood its arguments
    assert ("CPUWNA16LinearKernel" in log) == (form != "plain")  # the packed weights were used as such
    found = Reference(path).compare(answers)
    print(f"{path.name}: {found.describe()}")
    record_property("comparison", found.to_dict())
    assert found.passed, found.describe()
    for damage in _damages(form, symmetry, group):
        damaged = copy(path)
        assert damage(damaged, ONE_LAYER) == 1
        seen = Reference(damaged).compare(answers, like=found)
        print(f"{path.name}, {damage.__name__} in one layer: {seen.describe()}")
        assert not seen.passed, f"{damage.__name__} in {ONE_LAYER}: {seen.describe()}"


@pytest.mark.parametrize("case", NUMBERS)
def test_vllm_computes_with_quantized_activations_and_caches_as_the_reference_does(
    case: str,
    said: dict[str, Said],
    copy: Callable[[Path], Path],
    record_property: Callable[[str, object], None],
) -> None:
    _demand_kernel(case)
    _, kernel, damages = NUMBERS[case]
    told = said[case]
    path, answers, log = told.path, told.sure, told.log
    if case == "fp8 cache":
        assert len(quantization_config(read_json(path / "config.json", "the config"))["config_groups"]) > 2
    assert kernel in log
    assert case != "mixed" or "CPUWNA16LinearKernel" in log
    used = kernels(log.splitlines())
    assert used.activations or case.endswith("blocks")
    assert not used.nearest_cache  # that of the CPU build
    found = Reference(path, used).compare(answers)
    print(f"{case}: {found.describe()}")
    record_property("comparison", found.to_dict())
    assert found.passed, found.describe()
    for damage in damages:
        damaged = copy(path)
        assert damage(damaged, "self_attn" if case == "fp8 cache" else "mlp.down_proj") > 0
        seen = Reference(damaged, used).compare(answers, like=found)
        print(f"{case}, {damage.__name__}: {seen.describe()}")
        assert not seen.passed, f"{damage.__name__}: {seen.describe()}"


@pytest.mark.parametrize("name", GONE)
def test_vllm_serves_a_model_without_some_of_its_blocks(
    name: str, tinylm: Path, said: dict[str, Said]
) -> None:
    answers = said[name].sure
    found = Reference(said[name].path).compare(answers)
    print(f"without {name}: {found.describe()}")
    assert found.passed, found.describe()
    other = Reference(tinylm).compare(answers, like=found)
    assert not other.passed, other.describe()  # it is the smaller model that was served


@pytest.mark.parametrize("name", ["narrower", "fewer heads"])
def test_vllm_serves_a_model_with_narrower_blocks(name: str, said: dict[str, Said]) -> None:
    found = Reference(said[name].path).compare(said[name].sure)
    print(f"{name}: {found.describe()}")
    assert found.passed, found.describe()


@pytest.mark.parametrize("scheme", REFUSED)
def test_numbers_without_a_cpu_kernel_pass_verify_and_are_refused_by_name(
    scheme: str, said: dict[str, Said]
) -> None:
    assert verify(said[scheme].path).passed
    assert said[scheme].answers is None
    print(f"{scheme}: {said[scheme].error}")


@pytest.mark.parametrize("form", [CT, GPTQ])
def test_eight_bits_pass_verify_but_find_no_kernel_on_a_cpu(
    form: str, make: Callable[..., Path], vllm_python: str
) -> None:
    path = make("--format", form, "--bits", "8", "--group-size", "128", "--method", "minmax")
    assert verify(path).passed
    if form == GPTQ:
        return  # one start shows the refusal
    with (
        open_server(path, vllm_python) as server,
        pytest.raises(ServerError, match="no kernel for the checkpoint's scheme") as error,
    ):
        server.start(timeout=300)
    assert error.value.cause is not None and error.value.cause.checkpoint
    assert "Failed to find a kernel" in str(error.value)  # vLLM's own words are quoted


def test_a_missing_scale_is_refused_before_vllm_starts(
    make: Callable[..., Path], copy: Callable[[Path], Path], vllm_python: str
) -> None:
    """vLLM without weight tracking would answer NaN."""
    from safetensors.torch import load_file, save_file

    path = copy(make("--format", CT, "--symmetric", "--group-size", "128", "--method", "gptq"))
    index = path / "model.safetensors.index.json"
    for file in sorted(path.glob("*.safetensors")):
        tensors = load_file(file)
        if tensors.pop("model.layers.1.mlp.down_proj.weight_scale", None) is not None:
            save_file(tensors, file, metadata={"format": "pt"})
    index.write_text(
        "\n".join(
            line
            for line in index.read_text().splitlines()
            if "layers.1.mlp.down_proj.weight_scale" not in line
        )
    )
    with pytest.raises(QuantError, match="layers.1.mlp.down_proj"):
        open_server(path, vllm_python)
