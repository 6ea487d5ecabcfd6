"""Products of fp32 matrices by either of torch's libraries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quant.quantizers import products


def _lying(kind: str, rows: int, columns: int) -> torch.Tensor:
    """[rows, columns] of random numbers that lie in memory in one of the ways that a solver has them."""
    generator = torch.Generator().manual_seed(rows + columns)
    if kind == "transposed":
        return torch.randn(columns, rows, generator=generator).t()
    if kind == "block":
        return torch.randn(rows + 7, columns + 5, generator=generator)[3 : 3 + rows, 2 : 2 + columns]
    if kind == "transposed block":
        return torch.randn(columns + 7, rows + 5, generator=generator)[3 : 3 + columns, 2 : 2 + rows].t()
    if kind == "one of a batch":
        return torch.randn(rows, 3, columns, generator=generator)[:, 1]
    return torch.randn(rows, columns, generator=generator)


KINDS = ("whole", "transposed", "block", "transposed block", "one of a batch")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("left", KINDS)
@pytest.mark.parametrize("right", KINDS)
def test_product_is_exact_to_fp32(
    monkeypatch: pytest.MonkeyPatch, left: str, right: str, onednn: bool
) -> None:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: onednn)
    x, y = _lying(left, 96, 128), _lying(right, 128, 80)
    exact = x.double() @ y.double()
    made = products.product(x, y)
    assert made.dtype == torch.float32
    assert float((made - exact).abs().max()) < 1e-4
    total = torch.ones(80, 96).t()
    products.add_product(total, x, y, alpha=-2)
    assert float((total - (1 - 2 * exact)).abs().max()) < 1e-4


@pytest.mark.parametrize("left", KINDS)
@pytest.mark.parametrize("right", KINDS)
def test_operands_have_no_gaps(left: str, right: str) -> None:
    rows, columns = products._operands(_lying(left, 96, 128), _lying(right, 128, 80))
    assert rows.is_contiguous()
    assert columns.is_contiguous() or columns.t().is_contiguous()


@pytest.mark.parametrize("empty", [(0, 64, 64), (64, 0, 64), (64, 64, 1)])
def test_product_of_few(monkeypatch: pytest.MonkeyPatch, empty: tuple[int, int, int]) -> None:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    m, k, n = empty
    x, y = torch.ones(m, k), torch.ones(k, n)
    assert torch.equal(products.product(x, y), torch.full((m, n), float(k)))


def test_vendor(tmp_path: Path) -> None:
    table = tmp_path / "cpuinfo"
    table.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\n")
    assert products._vendor(table) == "AuthenticAMD"
    table.write_text("processor\t: 0\nFeatures\t: asimd\n")  # as on Arm
    assert products._vendor(table) == ""
