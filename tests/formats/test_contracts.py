"""Names, dtypes, shapes and words of each format as vLLM's contract has them, and the way back to equal
values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from quant.checkpoint.dtypes import HEADER
from quant.checkpoint.header import TensorInfo
from quant.errors import CheckpointError
from quant.formats import Contents, Format, FormatRegistry, find_format
from quant.quantizers import MinMaxQuantizer
from quant.schemes import WeightScheme, scheme_of
from quant.tensors import QuantizedTensor
from quant.vllm.layers import Linear
from tests.formats.test_packing import slow_pack

CT, GPTQ, PLAIN = (FormatRegistry.get(n) for n in ("compressed-tensors", "gptq", "plain"))
NAME = "model.layers.0.self_attn.q_proj"


def random_tensor(
    n: int, k: int, scheme: WeightScheme, dtype: torch.dtype = torch.bfloat16
) -> QuantizedTensor:
    """Codes, scales and zero points over their whole range."""
    generator = torch.Generator().manual_seed(n + k + scheme.bits)
    groups = scheme.groups(k)
    codes = torch.randint(scheme.low, scheme.high + 1, (n, k), generator=generator).to(torch.int8)
    zeros = torch.randint(scheme.low, scheme.high + 1, (n, groups), generator=generator).to(torch.int8)
    scales = (torch.rand(n, groups, generator=generator) + 0.01).to(dtype)
    return QuantizedTensor(codes, scales, None if scheme.symmetric else zeros, scheme)


def infos(tensors: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {n: TensorInfo(n, HEADER[t.dtype], tuple(t.shape), None, 0, 0) for n, t in tensors.items()}  # type: ignore[arg-type]


def read_back(form: Format, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> QuantizedTensor:
    found = find_format({"quantization_config": config}, infos(tensors))
    assert found is not None
    return form.unpack(found.linears[NAME], tensors, found.options)


def schemes(form: str) -> Iterator[WeightScheme]:
    for bits in (4, 8) if form == "compressed-tensors" else (2, 3, 4, 8):
        for symmetric in (True, False):
            for group in (-1, 32, 64, 96):
                yield WeightScheme(bits, group, symmetric)


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_is_packed_unpacks_to_bit_equal_codes_scales_zeros_and_values(
    form: str, dtype: torch.dtype
) -> None:
    entry = FormatRegistry.get(form)
    for scheme in schemes(form):
        n, k = 32, 192
        tensor, linear = random_tensor(n, k, scheme, dtype), Linear(NAME, n, k, scheme)
        packed = entry.pack(linear, tensor, dtype)
        assert {t: (HEADER[v.dtype], tuple(v.shape)) for t, v in packed.items()} == {
            s.name: (s.dtype, s.shape) for s in entry.specs(linear, HEADER[dtype])
        }
        again = read_back(entry, entry.config(Contents([linear], ["lm_head"])), packed)
        assert torch.equal(again.codes, tensor.codes) and torch.equal(again.scales, tensor.scales)
        assert again.scheme == scheme and again.group_index is None
        assert (again.zeros is None) == scheme.symmetric
        assert again.zeros is None or torch.equal(again.zeros, tensor.zeros)
        assert torch.equal(again.dequantize(), slow_values(tensor))


def slow_values(tensor: QuantizedTensor) -> torch.Tensor:
    n, k = tensor.codes.shape
    g = k // tensor.scales.shape[1]
    values = torch.empty(n, k)
    for c in range(k):
        zero = 0 if tensor.zeros is None else tensor.zeros[:, c // g].int()
        values[:, c] = (tensor.codes[:, c].int() - zero).float() * tensor.scales[:, c // g].float()
    return values


def test_compressed_tensors_writes_the_contract_of_pack_quantized() -> None:
    scheme = WeightScheme(4, 32, False)
    tensor = random_tensor(24, 64, scheme)
    packed = CT.pack(Linear(NAME, 24, 64, scheme), tensor, torch.bfloat16)
    assert {n.removeprefix(NAME + "."): (v.dtype, tuple(v.shape)) for n, v in packed.items()} == {
        "weight_packed": (torch.int32, (24, 8)),
        "weight_scale": (torch.bfloat16, (24, 2)),
        "weight_zero_point": (torch.int32, (3, 2)),
        "weight_shape": (torch.int64, (2,)),
    }
    assert packed[f"{NAME}.weight_shape"].tolist() == [24, 64]
    assert packed[f"{NAME}.weight_packed"].tolist() == [
        slow_pack([q + 8 for q in row], 4) for row in tensor.codes.tolist()
    ]
    assert tensor.zeros is not None
    columns = [slow_pack([z + 8 for z in column], 4) for column in tensor.zeros.t().tolist()]
    assert packed[f"{NAME}.weight_zero_point"].t().tolist() == columns


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        (range(-8, 8), [0x76543210, 0xFEDCBA98]),
        (range(-8, 2), [0x76543210, 0x00000098]),
    ],
)
def test_worked_vectors_of_compressed_tensors(codes: range, words: list[int]) -> None:
    row = torch.tensor([list(codes)], dtype=torch.int8)
    scheme = WeightScheme(4, -1, False)
    zeros = torch.arange(-8, 8, dtype=torch.int8)[:, None]
    tensor = QuantizedTensor(row.repeat(16, 1), torch.ones(16, 1), zeros, scheme)
    packed = CT.pack(Linear("x", 16, row.shape[1], scheme), tensor, torch.float32)
    assert [w & 0xFFFFFFFF for w in packed["x.weight_packed"][0].tolist()] == words
    assert [w & 0xFFFFFFFF for (w,) in packed["x.weight_zero_point"].tolist()] == [0x76543210, 0xFEDCBA98]


@pytest.mark.parametrize(("bits", "word"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_gptq_writes_the_v1_contract_with_zero_points_less_one(bits: int, word: int) -> None:
    scheme = WeightScheme(bits, 32, True)
    tensor = random_tensor(32, 64, scheme)
    packed = GPTQ.pack(Linear(NAME, 32, 64, scheme), tensor, torch.float16)
    per = 32 // bits
    assert {n.removeprefix(NAME + "."): (v.dtype, tuple(v.shape)) for n, v in packed.items()} == {
        "qweight": (torch.int32, (64 // per, 32)),
        "qzeros": (torch.int32, (2, 32 // per)),
        "scales": (torch.float16, (2, 32)),
        "g_idx": (torch.int32, (64,)),
    }
    assert set((packed[f"{NAME}.qzeros"].long() & 0xFFFFFFFF).flatten().tolist()) == {word}
    assert packed[f"{NAME}.g_idx"].tolist() == [0] * 32 + [1] * 32
    columns = [slow_pack([q + 2 ** (bits - 1) for q in row], bits) for row in tensor.codes.tolist()]
    assert packed[f"{NAME}.qweight"].t().tolist() == columns


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_files_whose_zero_points_are_stored_as_they_are_read_to_the_same_values(bits: int) -> None:
    """v2: the same file but for qzeros, one higher in every field."""
    scheme = WeightScheme(bits, 32, True)
    linear, tensor = Linear(NAME, 32, 64, scheme), random_tensor(32, 64, scheme)
    packed = GPTQ.pack(linear, tensor, torch.float16)
    middle = sum(2 ** (bits - 1) << shift for shift in range(0, 32, bits))
    packed[f"{NAME}.qzeros"] = torch.full_like(
        packed[f"{NAME}.qzeros"], middle - 2**32 if middle >= 2**31 else middle
    )
    config = GPTQ.config(Contents([linear]))
    assert config is not None
    assert config["checkpoint_format"] == "gptq" and config["sym"] is True and config["desc_act"] is False
    again = read_back(GPTQ, config | {"checkpoint_format": "gptq_v2"}, packed)
    assert torch.equal(again.dequantize(), slow_values(tensor)) and again.scheme.symmetric


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_asymmetric_v1_files_are_read_when_no_zero_point_is_zero(bits: int) -> None:
    scheme = WeightScheme(bits, 32, False)
    linear, tensor = Linear(NAME, 32, 64, scheme), random_tensor(32, 64, scheme)
    assert tensor.zeros is not None
    tensor = replace(tensor, zeros=tensor.zeros.clamp(min=scheme.low + 1))
    assert tensor.zeros is not None
    packed = GPTQ.pack(linear, tensor, torch.float16)
    stored = [slow_pack([z - scheme.low - 1 for z in column], bits) for column in tensor.zeros.t().tolist()]
    packed[f"{NAME}.qzeros"] = torch.tensor(stored, dtype=torch.int32)
    config = GPTQ.config(Contents([linear]))
    assert config is not None and config["checkpoint_format"] == "gptq_v2"
    again = read_back(GPTQ, config | {"checkpoint_format": "gptq"}, packed)
    assert torch.equal(again.dequantize(), slow_values(tensor))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_damaged_v1_zero_point_is_refused_not_read_as_another(bits: int) -> None:
    scheme = WeightScheme(bits, 32, False)
    linear = Linear(NAME, 32, 64, scheme)
    packed = GPTQ.pack(linear, random_tensor(32, 64, scheme), torch.float16)
    packed[f"{NAME}.qzeros"].fill_(-1)
    config = GPTQ.config(Contents([linear]))
    assert config is not None
    with pytest.raises(
        CheckpointError, match=rf"q_proj.qzeros: a zero point of 2\^{bits}: the word was damaged"
    ):
        read_back(GPTQ, config | {"checkpoint_format": "gptq"}, packed)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_reordered_group_index_is_read_and_applied(symmetric: bool) -> None:
    scheme = WeightScheme(4, 32, symmetric)
    linear, tensor = Linear(NAME, 32, 96, scheme), random_tensor(32, 96, scheme)
    index = (
        torch.arange(96)[torch.randperm(96, generator=torch.Generator().manual_seed(1))]
        .div(32, rounding_mode="floor")
        .int()
    )
    packed = GPTQ.pack(linear, replace(tensor, group_index=index), torch.float16)
    again = read_back(GPTQ, GPTQ.config(Contents([linear])) or {}, packed)
    assert again.group_index is not None and torch.equal(again.group_index, index)
    zeros = torch.zeros(32, 3) if tensor.zeros is None else tensor.zeros.float()
    wanted = torch.stack(
        [
            (tensor.codes[:, c].float() - zeros[:, index[c]])
            * tensor.scales.to(torch.float16).float()[:, index[c]]
            for c in range(96)
        ],
        1,
    )
    assert torch.equal(again.dequantize(), wanted)


def test_a_group_index_that_names_no_group_is_refused() -> None:
    scheme = WeightScheme(4, 32, True)
    linear = Linear(NAME, 32, 64, scheme)
    packed = GPTQ.pack(linear, random_tensor(32, 64, scheme), torch.float16)
    packed[f"{NAME}.g_idx"][5] = 2
    with pytest.raises(CheckpointError, match="q_proj.g_idx: names group 2, scales has 2"):
        read_back(GPTQ, GPTQ.config(Contents([linear])) or {}, packed)


def test_a_group_as_wide_as_the_input_keeps_its_declared_size() -> None:
    """Otherwise linears of one scheme would look like two, and exporting them to one format would be
    refused."""
    scheme = WeightScheme(4, 128, True)
    wide, narrow = Linear("a.wide", 32, 256, scheme), Linear("a.narrow", 32, 128, scheme)
    packed = {
        **GPTQ.pack(wide, random_tensor(32, 256, scheme), torch.float16),
        **GPTQ.pack(narrow, random_tensor(32, 128, scheme), torch.float16),
    }
    found = find_format({"quantization_config": GPTQ.config(Contents([wide, narrow], []))}, infos(packed))
    assert found is not None
    assert {x.weights for x in found.linears.values()} == {scheme}
    assert {GPTQ.unpack(x, packed, found.options).scheme for x in found.linears.values()} == {scheme}


def test_an_asymmetric_linear_whose_zero_points_happen_to_be_central_stays_asymmetric() -> None:
    """Its neighbours in a fused layer are asymmetric too: they must leave with one scheme."""
    scheme = WeightScheme(4, 32, False)
    linear = Linear(NAME, 32, 64, scheme)
    tensor = replace(random_tensor(32, 64, scheme), zeros=torch.zeros(32, 2, dtype=torch.int8))
    again = read_back(GPTQ, GPTQ.config(Contents([linear])) or {}, GPTQ.pack(linear, tensor, torch.float16))
    assert again.scheme == scheme and torch.equal(again.dequantize(), slow_values(tensor))


def test_plain_holds_the_values_rounded_once() -> None:
    tensor = random_tensor(8, 64, WeightScheme(3, 32, False))
    packed = PLAIN.pack(Linear(NAME, 8, 64, tensor.scheme), tensor, torch.bfloat16)
    assert list(packed) == [f"{NAME}.weight"]
    assert torch.equal(packed[f"{NAME}.weight"], slow_values(tensor).to(torch.bfloat16))


@pytest.mark.parametrize("target", ["vllm", "other"])
def test_what_vllm_refuses_is_refused_by_name_unless_the_target_is_another_engine(target: str) -> None:
    refused = {
        (form.name, str(scheme))
        for form in (CT, GPTQ, PLAIN)
        for scheme in (
            WeightScheme(b, g, s) for b in (2, 3, 4, 8) for g in (-1, 16, 32, 128, 256) for s in (True, False)
        )
        if form.refuse(scheme_of(scheme), target)
    }
    everything = {
        str(WeightScheme(b, g, s))
        for b in (2, 3, 4, 8)
        for g in (-1, 16, 32, 128, 256)
        for s in (True, False)
    }
    few = {s for s in everything if s.startswith(("W2", "W3"))}
    odd = {s for s in everything if "g16" in s or "g256" in s}
    wanted = {("compressed-tensors", s) for s in few}
    if target == "vllm":
        wanted |= {("compressed-tensors", s) for s in odd}
        wanted |= {("gptq", s) for s in everything if "asymmetric" in s or s in few or s in odd}
    assert refused == wanted


def test_refusals_say_what_to_do_instead() -> None:
    assert "use --symmetric, --format compressed-tensors, or --target other" in str(
        GPTQ.refuse(scheme_of(WeightScheme(4, 128, False)), "vllm")
    )
    assert "use --format plain" in str(CT.refuse(scheme_of(WeightScheme(3, 128, True)), "vllm"))
    assert "not 256" in str(GPTQ.refuse(scheme_of(WeightScheme(4, 256, True)), "vllm"))


@pytest.mark.parametrize(
    ("bits", "n", "k", "wrong"),
    [(4, 32, 36, "36 inputs"), (4, 12, 32, "12 outputs"), (3, 32, 40, "40 inputs"), (8, 6, 8, "6 outputs")],
)
def test_gptq_says_which_side_does_not_fill_words(bits: int, n: int, k: int, wrong: str) -> None:
    (problem,) = GPTQ.problems(Linear(NAME, n, k, WeightScheme(bits, -1)))
    assert problem.startswith(f"{NAME}: {wrong} do not fill whole 32-bit words at {bits} bits")


@pytest.mark.parametrize(
    ("bits", "n", "k", "symmetric", "wrong"),
    [
        (4, 32, 36, True, ["36 inputs"]),
        (4, 12, 32, False, ["12 outputs"]),
        (4, 12, 32, True, []),
        (8, 6, 8, False, ["6 outputs"]),
    ],
)
def test_compressed_tensors_says_which_side_does_not_fill_words(
    bits: int, n: int, k: int, symmetric: bool, wrong: list[str]
) -> None:
    problems = CT.problems(Linear(NAME, n, k, WeightScheme(bits, -1, symmetric)))
    assert [p.split(" do not")[0] for p in problems] == [f"{NAME}: {w}" for w in wrong]


HOSTILE: list[tuple[str, Any, str]] = [
    ("not an object", "gptq", "quantization_config is not an object"),
    ("an unknown method", {"quant_method": "exl2"},
    r"quantized as quant_method 'exl2', which is not read here; read are awq, compressed-tensors, "
    "fbgemm_fp8, fp8, gguf, gptq, modelopt, mxfp4: start from"),
    ("no method", {"bits": 4}, "quantized as quant_method"),
    ("no groups", {"quant_method": "compressed-tensors"}, "no config_groups"),
    ("groups that are numbers", {"quant_method": "compressed-tensors", "config_groups": {"a": 3}},
    "cannot be understood"),
    (
        "another format",
        {"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": {"a": {}}},
        "format marlin-24 is not read",
    ),
    (
        "no weights",
        {
            "quant_method": "compressed_tensors",
            "format": "pack-quantized",
            "config_groups": {"a": {"targets": ["Linear"]}},
        },
        "cannot be understood",
    ),
    ("bits that are text", {"quant_method": "compressed-tensors", "format": "pack-quantized",
     "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": "x", "strategy": "channel"}}}},
     "cannot be understood"),
    ("5 bits", {"quant_method": "compressed-tensors", "format": "pack-quantized",
     "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 5, "strategy": "channel"}}}},
     "cannot be understood.*bits is 5"),
    ("a group of 0", {"quant_method": "compressed-tensors", "format": "pack-quantized",
     "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group"}}}},
     "cannot be understood.*group size is 0"),
    ("a broken expression", {"quant_method": "compressed-tensors", "format": "pack-quantized",
     "config_groups": {"a": {"targets": ["re:("], "weights": {"num_bits": 4, "strategy": "channel"}}}},
     "cannot be understood"),
    ("no group for it", {"quant_method": "compressed-tensors", "format": "pack-quantized",
     "config_groups": {"a": {"targets": ["x"], "weights": {"num_bits": 4, "strategy": "channel"}}}},
     "no config group targets it"),
    ("a block strategy", {"quant_method": "compressed-tensors", "format": "pack-quantized",
     "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "block"}}}},
     "strategy 'block'"),
    ("gptq without bits", {"quant_method": "gptq"}, "lacks a whole number of bits"),
    ("marlin", {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        "'marlin' is not read "
        "here; read are gptq, gptq_v2"),
    ("16-bit words", {"quant_method": "gptq", "bits": 4, "pack_dtype": "int16"}, "'int16' is not read here"),
    ("gptq with other bits than its tensors", {"quant_method": "gptq", "bits": 8}, "do not fit together"),
    ("gptq with 0 bits", {"quant_method": "gptq", "bits": 0}, "cannot be understood|do not fit together"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "config", "message"), HOSTILE, ids=[c[0] for c in HOSTILE])
def test_a_quantization_config_that_is_not_understood_is_refused_in_words(
    case: str, config: Any, message: str
) -> None:
    scheme = WeightScheme(4, -1)
    linear, tensor = Linear(NAME, 32, 64, scheme), random_tensor(32, 64, scheme)
    tensors = {**CT.pack(linear, tensor, torch.float16), **GPTQ.pack(linear, tensor, torch.float16)}
    del tensors[f"{NAME}.g_idx"]
    with pytest.raises(CheckpointError, match=message):
        find_format({"quantization_config": config}, infos(tensors))


def test_a_missing_scale_is_an_error_because_vllm_would_read_nan() -> None:
    scheme = WeightScheme(4, 32)
    linear = Linear(NAME, 32, 64, scheme)
    for form, lost in ((CT, "weight_scale"), (GPTQ, "scales"), (GPTQ, "qzeros")):
        tensors = form.pack(linear, random_tensor(32, 64, scheme), torch.float16)
        del tensors[f"{NAME}.{lost}"]
        with pytest.raises(CheckpointError, match=f"q_proj is quantized but has no tensor '{NAME}.{lost}'"):
            find_format({"quantization_config": form.config(Contents([linear]))}, infos(tensors))


def test_the_config_is_found_where_vllm_looks_for_it() -> None:
    scheme = WeightScheme(4, 32)
    linear = Linear(NAME, 32, 64, scheme)
    tensors = infos(CT.pack(linear, random_tensor(32, 64, scheme), torch.float16))
    config = CT.config(Contents([linear]))
    for place in (
        {"quantization_config": config},
        {"text_config": {"quantization_config": config}},
        {"compression_config": config},
    ):
        found = find_format(place, tensors)
        assert found is not None and list(found.linears) == [NAME]
    with pytest.raises(CheckpointError, match="config.json has no quantization_config"):
        find_format({"text_config": {}}, tensors)


def test_several_schemes_are_written_by_name_and_found_again() -> None:
    few, many = WeightScheme(4, 32), WeightScheme(8, -1)
    linears = [Linear("m.0.a", 32, 64, few), Linear("m.0.b", 32, 64, many)]
    tensors: dict[str, torch.Tensor] = {}
    for linear in linears:
        tensors |= CT.pack(linear, random_tensor(32, 64, linear.weights), torch.float16)
    config = CT.config(Contents(linears, ["lm_head"])) or {}
    assert {g["targets"][0]: g["weights"]["num_bits"] for g in config["config_groups"].values()} == {
        "m.0.a": 4,
        "m.0.b": 8,
    }
    found = find_format({"quantization_config": config}, infos(tensors))
    assert found is not None and {n: x.weights for n, x in found.linears.items()} == {
        x.name: x.weights for x in linears
    }


def test_minmax_values_survive_every_format() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    for form in (CT, GPTQ):
        for scheme in schemes(form.name):
            if 128 % abs(scheme.group_size) == 0:
                tensor = MinMaxQuantizer()(weight, None, scheme, torch.bfloat16).tensor
                linear = Linear(NAME, 64, 128, scheme)
                again = read_back(
                    form, form.config(Contents([linear])) or {}, form.pack(linear, tensor, torch.bfloat16)
                )
                assert torch.equal(again.dequantize(), tensor.dequantize())
