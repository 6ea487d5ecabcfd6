"""Checkpoints as other programs publish them, quantized: made of an ordinary one by slow code of its own,
beside the values that each stands for."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import torch

from tests.helpers import copy_model, load_all, read_config, save_all

E4M3 = torch.float8_e4m3fn
#: The numbers of E2M1, by code.
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
LINEAR = re.compile(r"layers\.\d+\.(self_attn|mlp)\.(?!gate\.)(\w+\.|experts\.\d+\.\w+\.)weight$")
FUSED = re.compile(r"experts\.(gate_up_proj|down_proj)$")

#: Tensors of the file, by what follows the name of the weight's module; and the values that they stand for.
Made = tuple[dict[str, torch.Tensor], torch.Tensor]


def _e4m3(weight: torch.Tensor, scale: torch.Tensor) -> Made:
    codes = (weight / scale).clamp(-448, 448).to(E4M3)
    return {"weight": codes}, codes.float() * scale


def block(size: int, dtype: torch.dtype = torch.float32, power: bool = False, last: str = "weight_scale_inv"):
    def make(weight: torch.Tensor) -> Made:
        n, k = weight.shape
        scales = torch.empty(ceil(n / size), ceil(k / size))
        spread = torch.empty(n, k)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                place = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
                scale = (weight[place].abs().max() / 448).clamp_min(1e-12)
                scale = torch.exp2(torch.ceil(torch.log2(scale))) if power else scale
                scales[i, j] = spread[place] = float(scale.to(dtype).float())
        made, values = _e4m3(weight, spread)
        return {**made, last: scales.to(dtype)}, values

    return make


def tensor(weight_scale: str, input_scale: str | None = None, shape: tuple[int, ...] = ()):
    def make(weight: torch.Tensor) -> Made:
        scale = weight.abs().max() / 448
        made, values = _e4m3(weight, scale)
        more = {} if input_scale is None else {input_scale: torch.full(shape, 0.05)}
        return {**made, weight_scale: scale.reshape(shape), **more}, values

    return make


def channel(flat: bool = False):
    def make(weight: torch.Tensor) -> Made:
        scale = weight.abs().amax(1, keepdim=True) / 448
        made, values = _e4m3(weight, scale)
        return {**made, "weight_scale": scale.flatten() if flat else scale}, values

    return make


def _e2m1(values: torch.Tensor) -> torch.Tensor:
    table = torch.tensor(E2M1)
    codes = (values.abs().unsqueeze(-1) - table).abs().argmin(-1)
    return codes + 8 * (values < 0)


def _number(codes: torch.Tensor) -> torch.Tensor:
    return torch.tensor(E2M1)[codes % 8] * torch.where(codes >= 8, -1.0, 1.0)


def _halves(codes: torch.Tensor) -> torch.Tensor:
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)


def nvfp4(weight: torch.Tensor) -> Made:
    n, k = weight.shape
    second = weight.abs().max() / (448 * 6)
    groups = weight.reshape(n, k // 16, 16)
    scale = (groups.abs().amax(-1) / 6 / second).clamp(2**-9, 448).to(E4M3)
    codes = _e2m1(groups / (scale.float() * second).unsqueeze(-1))
    values = _number(codes) * scale.float().unsqueeze(-1) * second
    made = {
        "weight": _halves(codes.reshape(n, k)),
        "weight_scale": scale,
        "weight_scale_2": second.clone(),
        "input_scale": torch.tensor(0.01),
    }
    return made, values.reshape(n, k)


def mxfp8(weight: torch.Tensor) -> Made:
    n, k = weight.shape
    groups = weight.reshape(n, k // 32, 32)
    power = torch.ceil(torch.log2(groups.abs().amax(-1) / 448))
    made, values = _e4m3(groups, torch.exp2(power).unsqueeze(-1))
    return (
        {"weight": made["weight"].reshape(n, k), "weight_scale": (power + 127).to(torch.uint8)},
        values.reshape(n, k),
    )


def stacked_mxfp4(weight: torch.Tensor) -> Made:
    """Experts [E, K, N], as gpt-oss has them."""
    rows = weight.transpose(1, 2)
    groups = rows.reshape(*rows.shape[:2], -1, 32)
    power = torch.floor(torch.log2(groups.abs().amax(-1))) - 2
    codes = _e2m1(groups / torch.exp2(power).unsqueeze(-1))
    values = (_number(codes) * torch.exp2(power).unsqueeze(-1)).reshape(rows.shape).transpose(1, 2)
    return {"_blocks": _halves(codes), "_scales": (power + 127).to(torch.uint8)}, values


def stacked_block(weight: torch.Tensor) -> Made:
    """Experts [E, N, K], as transformers saves a mixture in FP8."""
    each = [block(128)(expert) for expert in weight]
    codes = torch.stack([m["weight"] for m, _ in each])
    scales = torch.stack([m["weight_scale_inv"] for m, _ in each])
    return {"": codes, "_scale_inv": scales}, torch.stack([v for _, v in each])


def stacked_rows(weight: torch.Tensor) -> Made:
    """Experts [E, K, N] with one multiplier an output, as FBGEMM's Llama 4 has them."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    made, values = _e4m3(weight, scale)
    return {"": made["weight"], "_scale": scale}, values


def stacked_nvfp4(inputs_last: bool, each: bool):
    """Experts [E, K, N]; in the file two inputs share a byte, of the last dimension or of the one before;
    ``each``: every expert has its own second multiplier."""

    def make(weight: torch.Tensor) -> Made:
        experts, k, n = weight.shape
        rows = weight.transpose(1, 2)
        second = (rows.abs().amax((1, 2)) if each else rows.abs().amax().reshape(1)) / (448 * 6)
        groups = rows.reshape(experts, n, k // 16, 16) / second.view(-1, 1, 1, 1)
        scale = (groups.abs().amax(-1) / 6).clamp(2**-9, 448).to(E4M3)
        codes = _e2m1(groups / scale.float().unsqueeze(-1))
        values = _number(codes) * scale.float().unsqueeze(-1) * second.view(-1, 1, 1, 1)
        packed = _halves(codes.reshape(experts, n, k))
        made = {
            "": packed if inputs_last else packed.transpose(1, 2),
            "_weight_scale": scale if inputs_last else scale.view(torch.uint8).transpose(1, 2).view(E4M3),
            "_weight_scale_2": second if each else second.reshape(()),
            "_input_scale": torch.tensor(0.01),
        }
        return made, values.reshape(experts, n, k).transpose(1, 2)

    return make


def row_blocks(weight: torch.Tensor) -> Made:
    """Blocks of one output and 48 inputs, the last of fewer."""
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -k % 48)).reshape(n, -1, 48)
    scales = (padded.abs().amax(-1) / 448).clamp_min(1e-12)
    made, values = _e4m3(weight, scales.repeat_interleave(48, 1)[:, :k])
    return {**made, "weight_scale_inv": scales}, values


@dataclass(frozen=True)
class Kind:
    """How a kind of checkpoint is made: of its linears, of its fused experts; and what its config says."""

    config: Mapping[str, Any] | None
    linear: Callable[[torch.Tensor], Made] | None = None
    experts: Callable[[torch.Tensor], Made] | None = None
    files: Mapping[str, Any] = field(default_factory=dict)


def _fp8(**more: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", **more}


_BLOCKS = _fp8(weight_block_size=[128, 128])
_OLD = {
    "producer": {"name": "modelopt"},
    "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]},
}


def _modelopt(algorithm: str) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}


KINDS: dict[str, Kind] = {
    "fp8 block": Kind(_BLOCKS, block(128)),
    "fp8 block bf16": Kind(_BLOCKS, block(128, torch.bfloat16)),
    "fp8 block e8m0": Kind({**_BLOCKS, "scale_fmt": "ue8m0"}, block(128, torch.float8_e8m0fnu, True)),
    "fp8 block .scale": Kind(_BLOCKS, block(128, torch.float8_e8m0fnu, True, "scale")),
    "fp8 block 32": Kind(_fp8(weight_block_size=[32, 32]), block(32)),
    "fp8 tensor": Kind(_fp8(activation_scheme="static"), tensor("weight_scale", "input_scale", (1,))),
    "fp8 scalar": Kind(
        _fp8(activation_scheme="static", weight_block_size=None),
        tensor("weight_scale_inv", "activation_scale"),
    ),
    "fbgemm": Kind(
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": []}, channel()
    ),
    "modelopt fp8": Kind(_modelopt("FP8"), tensor("weight_scale", "input_scale")),
    "modelopt channel": Kind(_modelopt("FP8_PER_CHANNEL_PER_TOKEN"), channel(flat=True)),
    "modelopt nvfp4": Kind(_modelopt("NVFP4"), nvfp4),
    "modelopt mxfp8": Kind(_modelopt("MXFP8"), mxfp8),
    "modelopt old": Kind(None, tensor("weight_scale", "input_scale"), files={"hf_quant_config.json": _OLD}),
    "mxfp4 experts": Kind(
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
        experts=stacked_mxfp4,
    ),
    "fp8 experts": Kind(_BLOCKS, block(128), stacked_block),
    "fp8 rows": Kind(_fp8(weight_block_size=[1, 48]), row_blocks),
    "modelopt nvfp4 experts": Kind(_modelopt("NVFP4"), experts=stacked_nvfp4(False, False)),
    "modelopt nvfp4 rows": Kind(_modelopt("NVFP4"), experts=stacked_nvfp4(True, True)),
    "fp8 experts wide": Kind(_BLOCKS, block(128), stacked_block),
    "fbgemm experts": Kind(
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": []},
        experts=stacked_rows,
    ),
}


def publish(source: Path, folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Writes ``folder``, the ordinary checkpoint ``source`` in a kind of :data:`KINDS`; returns fp32 values
    of all of its tensors, by the names that an ordinary checkpoint has."""
    row = KINDS[kind]
    copy_model(source, folder)
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    written: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    for name, weight in load_all(source).items():
        if row.linear is not None and weight.ndim == 2 and LINEAR.search(name):
            made, values[name] = row.linear(weight.float())
            written |= {f"{name.removesuffix('weight')}{last}": t for last, t in made.items()}
        elif row.experts is not None and FUSED.search(name):
            made, values[name] = row.experts(weight.float())
            written |= {f"{name}{last}": t for last, t in made.items()}
        else:
            written[name], values[name] = weight, weight.float()
    save_all(folder, {n: t.contiguous() for n, t in written.items()})
    config = read_config(folder)
    if row.config is not None:
        config["quantization_config"] = dict(row.config)
    (folder / "config.json").write_text(json.dumps(config))
    for file_name, content in row.files.items():
        (folder / file_name).write_text(json.dumps(content))
    return values


def plain_twin(folder: Path, target: Path, values: Mapping[str, torch.Tensor]) -> Path:
    """The same model as an ordinary fp32 checkpoint of these values."""
    shutil.copytree(folder, target)
    for file in [*target.glob("*.safetensors"), *target.glob("*quant*")]:
        file.unlink()
    save_all(target, {n: v.contiguous() for n, v in values.items()})
    config = read_config(target)
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return target
