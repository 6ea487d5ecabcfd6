"""Runs of columns as one operation of a device: what is dispatched, what it gives, and Triton's kernels."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quant.quantizers import GPTQQuantizer, factors, gptq, refining, rounding
from quant.quantizers.factors import smallest_last
from quant.schemes import WeightScheme
from tests.helpers import ROOT
from tests.quantizers.test_gptq import CASES, FP4, hessian_of, statistics, weight_of

#: Triton of this environment, or of vLLM's, which brings it: the package and what pip noted of it.
_VLLM = Path(os.environ.get("QUANT_VLLM_PYTHON", "")).parent.parent
_ELSEWHERE = sorted(_VLLM.glob("lib/python3*/site-packages/triton*")) if len(_VLLM.parts) > 1 else []
triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None and not _ELSEWHERE,
    reason="Triton is installed neither here nor beside vLLM (QUANT_VLLM_PYTHON)",
)


def _with_triton(words: list[str], folder: Path) -> Any:
    """What a Python program that has Triton prints, as JSON."""
    (folder / "packages").mkdir()
    for part in _ELSEWHERE:
        (folder / "packages" / part.name).symlink_to(part)
    path = os.pathsep.join(
        [str(ROOT), str(folder / "packages"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    environment = {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done on a device is done on the CPU."""
    for module in (gptq, refining, factors, rounding):
        monkeypatch.setattr(module, "on_accelerator", lambda tensor: True)


class _Counted(TorchDispatchMode):
    """Operations that a device is told to do: views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def _dispatched(k: int, n: int, scheme: WeightScheme) -> list[str]:
    weight, seen = weight_of(n, k), statistics(hessian_of(k, k))
    with _Counted() as counted:
        GPTQQuantizer()(weight, seen, scheme, torch.bfloat16)
    return counted.seen


@pytest.mark.parametrize("scheme", [WeightScheme(), WeightScheme(4, 32, False), WeightScheme(8, -1), FP4])
def test_a_linear_takes_a_sixteenth_of_its_columns_in_operations(scheme: WeightScheme, device: None) -> None:
    narrow, wide = (_dispatched(k, 4, scheme) for k in (256, 768))
    assert len(wide) - len(narrow) <= (768 - 256) / 16, sorted(set(wide))
    assert (
        len(narrow) <= 256 / 16 + 450
    )  # the search for scales, which is of all groups at once, is most of it
    for name in ("round_columns", "refine_columns"):
        assert wide.count(f"quant.{name}.default") == 768 // 128


def test_an_order_by_the_smallest_pivot_takes_eleven_operations_a_column_however_many_weights() -> None:
    def told(k: int, several: int) -> int:
        with _Counted() as counted:
            smallest_last(torch.stack([hessian_of(k)] * several))
        return len(counted.seen)

    assert told(128, 3) - told(128, 1) < 10  # what is left is copied from each of them
    # beside the steps, what was chosen is applied to all others once in 64 columns
    assert told(256, 1) - told(128, 1) == pytest.approx(11 * 128, rel=0.04)


@pytest.mark.parametrize("case", [*CASES, (256, 24, 16, True, 4, "fp4")], ids=str)
def test_runs_lose_what_single_columns_lose(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    k, n, size, symmetric, bits, order = case
    scheme = FP4 if order == "fp4" else WeightScheme(bits, size, symmetric)
    hessian, losses = hessian_of(k), []
    for elsewhere in (False, True):
        for module in (gptq, refining, factors):
            monkeypatch.setattr(module, "on_accelerator", lambda tensor, there=elsewhere: there)
        method = GPTQQuantizer(act_order="static" if order == "fp4" else order)
        made = method(weight_of(n, k), statistics(hessian), scheme, torch.float16).tensor
        error = weight_of(n, k) - made.dequantize()
        losses.append(float(((error @ hessian) * error).sum()))
    # sums are made in another order: a code on a tie falls otherwise, and all behind it are fed back to
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


@triton
def test_kernels_give_the_codes_of_the_steps_by_torch_to_the_bit(tmp_path: Path) -> None:
    found = _with_triton(["-m", "tests.quantizers.interpreted"], tmp_path)
    assert set(found["different"].values()) == {0}, found
    assert found["launched"] >= 2 * len(found["different"])
    # sums are made in another order here; a weight on a tie would fall otherwise
    for fed_back, descended, gain, changed in found["sides"].values():
        assert fed_back == descended == 0 and gain < 1e-4 and changed > 0, found


_COMPILE = """
import json, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from quant.quantizers import kernels

texts = []
for kernel, constants in (
    (kernels._round, {"BITS": 0, "ZEROS": True, "P": 128, "R": 32}),
    (kernels._refine, {"BITS": 4, "ZEROS": False, "FIT": True, "KIND": "e4m3", "P": 128, "R": 32}),
    (kernels._round_both, {"BITS": 0, "ZEROS": True, "C": 128, "R": 32}),
    (kernels._descend, {"BITS": 8, "B": 256}),
):
    kinds = {n: "*fp32" for n in ("errors", "feedback", "triangle", "inverse", "scales", "zeros", "pushed",
                                  "among", "divisor")}
    kinds |= {"groups": "*i64", "columns": "*i64"}
    kinds |= {n: "*fp32" for n in ("weights", "known", "corners", "units", "moved", "slopes", "outputs",
                                   "turned", "gains", "codes")}
    if kernel is kernels._round:
        kinds["codes"] = "*i8"
    if kernel in (kernels._round, kernels._refine):
        kinds["weights"] = "i32"
    kinds |= {n: "fp32" for n in ("low", "high", "least", "largest", "share")}
    types = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in kernel.arg_names}
    # a launch takes an integer of 1 for a number of Python's, unless the kernel forbids it
    free = [p.name for p in kernel.params if types[p.name] == "i32" and not p.do_not_specialize]
    for ones in ([], free):
        known = constants | dict.fromkeys(ones, 1)
        source = ASTSource(
            fn=kernel, signature=types | dict.fromkeys(ones, "constexpr"), constexprs=known
        )
        options = {"num_warps": 4, "enable_fp_fusion": False}
        texts.append(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
print(json.dumps([{"fused": "fma.rn" in text, "divided": "div.rn" in text} for text in texts]))
"""


@triton
def test_kernels_compile_for_a_gpu_without_fused_sums(tmp_path: Path) -> None:
    assert _with_triton(["-c", _COMPILE], tmp_path) == [{"fused": False, "divided": True}] * 8
