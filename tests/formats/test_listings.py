"""Names, dtypes and shapes of what we write, beside what llm-compressor writes of the same models: families
for which vLLM's CPU build has no kernels, so that it cannot serve both. `tests/fixtures/make_listings.py`
made the listing."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from docs.make_models import make
from quant.errors import Problems
from quant.evaluation.verify import verify
from quant.pipeline.layout import Unit
from quant.pipeline.plan import JobPlan, plan_job
from quant.pipeline.writing import output_config
from quant.recipe import make_recipe
from tests.helpers import ROOT, load_all, quantize, save_all

GROUP = 32
LISTING = json.loads((ROOT / "tests/fixtures/llm_compressor.json").read_text(encoding="utf-8"))
SCHEMES: dict[str, dict[str, Any]] = LISTING["schemes"]
#: Families of whose experts it writes other names than their own files have: we keep those. vLLM's loader of
#: Mixtral and Phi-3.5-MoE knows both, that of LFM2-MoE leaves every expert of its file empty
#: (`models/lfm2_moe.py`), and MiniMax-M2's asks for the family's names, too (`models/minimax_m2.py`).
RENAMED = frozenset({"lfm2_moe", "minimax_m2", "mixtral", "phimoe"})
_THEIR_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
#: Linears that it quantizes although vLLM builds them in 16 bits (`layers/mamba/mamba_mixer.py`), which stops
#: the load; of two schemes it cannot make them itself.
PLAIN = {"jamba": ("in_proj", "x_proj", "dt_proj", "out_proj")}


def _kinds(entries: Mapping[str, str]) -> list[tuple[str, str, int]]:
    """Name, what it is, how often."""
    split = [(name, kind.rsplit(" *", 1)) for name, kinds in entries.items() for kind in kinds.split(", ")]
    return [(name, kind, int(times)) for name, (kind, times) in split]


def theirs(family: str, scheme: str) -> Counter[str]:
    """Every tensor of its file, numbers in names as ``*``; of what is not quantized no dtype: it stores what
    transformers computes in fp32 as such, we what the file has."""
    becomes, entry = SCHEMES[scheme]["becomes"], LISTING["families"][family]
    held: Counter[str] = Counter()
    for name, kind, times in _kinds(entry["rest"]):
        held[f"{name} {kind.split()[1]}"] += times
    for module, kind, times in _kinds(entry["linears"]):
        head, _, last = module.rpartition(".")
        n, k = map(int, kind.split("x"))
        if last in PLAIN.get(family, ()):
            held[f"{module}.weight {n}x{k}"] += times
            continue
        if family in RENAMED and ".experts." in module:
            module = f"{head}.{_THEIR_NAMES[last]}"
        sides = {"N": n, "K": k, **{f"K/{d}": k // d for d in (2, 8, 16, 32)}, "1": 1, "2": 2}
        for part, (dtype, *shape) in becomes.items():
            # its scales of 8-bit codes are in the model's dtype; vLLM's parameters, and ours, are fp32
            eight = part == "weight_scale" and "weight" in becomes
            stored = "F32" if eight else dtype
            held[f"{module}.{part} {'x'.join(str(sides[s]) for s in shape)} {stored}"] += times
    return held


def ours(units: tuple[Unit, ...]) -> Counter[str]:
    """The same of a plan."""
    held: Counter[str] = Counter()
    for tensor in (t for unit in units for shard in unit.shards for t in shard.tensors):
        name = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", tensor.spec.name)
        shape = "x".join(map(str, tensor.spec.shape))
        held[f"{name} {shape}" if tensor.linear is None else f"{name} {shape} {tensor.spec.dtype}"] += 1
    return held


def _said(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a config says of numbers; how a range was observed is no part of them."""
    return {k: v for k, v in (arguments or {}).items() if v is not None and not k.startswith("observer")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("listings")


def _plan(source: Path, scheme: str) -> JobPlan:
    group = {"group_size": SCHEMES[scheme]["group"]["weights"]["group_size"]} if scheme == "w4a16" else {}
    request = {"model_path": source, "output_path": source.with_suffix(".out"), "method": "minmax"}
    return plan_job(make_recipe(request | {"scheme": scheme} | group))


@pytest.mark.filterwarnings("ignore:Casting complex values")  # of transformers' rotary tables
@pytest.mark.parametrize("family", [f for f in LISTING["families"] if f != "gpt_oss"])
def test_tensors_and_config_are_those_of_llm_compressor(family: str, folder: Path) -> None:
    source = folder / family
    make(family, source)
    for scheme, stated in SCHEMES.items():
        plan = _plan(source, scheme)
        assert ours(plan.units) == theirs(family, scheme)
        config = output_config(plan, {})["quantization_config"]
        assert (config["format"], list(config["config_groups"])) == (stated["format"], ["group_0"])
        group = config["config_groups"]["group_0"]
        assert group["targets"] == stated["group"]["targets"] == ["Linear"]
        for part in ("weights", "input_activations"):
            assert _said(group[part]) == _said(stated["group"][part])


def test_experts_under_names_that_vllm_does_not_look_for_are_not_passed(folder: Path) -> None:
    """What llm-compressor calls LFM2-MoE's: real vLLM leaves all of them empty."""
    make("lfm2_moe", folder / "renamed.source")
    out = folder / "renamed"
    quantize(folder / "renamed.source", out, group_size=GROUP)
    assert verify(out).passed
    theirs = {ours: theirs for theirs, ours in _THEIR_NAMES.items()}
    tensors = {
        re.sub(r"(\.experts\.\d+\.)(w[123])\.", lambda m: f"{m[1]}{theirs[m[2]]}.", name): t
        for name, t in load_all(out).items()
    }
    for file in [*out.glob("*.safetensors"), *out.glob("*.index.json")]:
        file.unlink()
    save_all(out, tensors)
    assert any("looks for experts as w1" in problem for problem in verify(out).failed)


def test_what_vllm_cannot_read_is_not_written_as_llm_compressor_writes_it(folder: Path) -> None:
    """gpt-oss: vLLM skips tensors of an expert's gate, up and down projection without a word
    (`models/gpt_oss.py::_load_weights_other`); it reads MXFP4 of all experts in one tensor."""
    assert any(name.endswith("experts.*.gate_proj") for name in LISTING["families"]["gpt_oss"]["linears"])
    make("gpt_oss", folder / "gpt_oss")
    with pytest.raises(Problems, match="--scheme mxfp4a16 in --format mxfp4"):
        _plan(folder / "gpt_oss", "w4a16")
