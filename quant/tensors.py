"""The value that quantizers make and formats store: integer codes with their scales and zero points."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from quant.schemes import WeightScheme


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight [N, K] as ``(codes - zeros) · scales``.

    Attributes:
        codes: int8 [N, K], signed, from ``scheme.low`` to ``scheme.high``.
        scales: the stored dtype (bf16, fp16 or fp32) [N, G], one column a group.
        zeros: int8 [N, G] in the same range as codes, or None when the scheme is symmetric (all zero).
        group_index: int32 [K], the group of each input, or None for ``k // group_size``.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    scheme: WeightScheme
    group_index: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> torch.Tensor:
        """fp32 [N, K], exactly ``(codes - zeros) · scales`` with the product in fp32: the value every reader of the file must get."""
        return dequantize(self.codes, self.scales, self.zeros, self.group_index)

    def rows(self, start: int, end: int) -> QuantizedTensor:
        """The same for outputs ``start`` to ``end``."""
        zeros = None if self.zeros is None else self.zeros[start:end]
        return replace(self, codes=self.codes[start:end], scales=self.scales[start:end], zeros=zeros)


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None, group_index: torch.Tensor | None = None
) -> torch.Tensor:
    """fp32 [N, K] from codes [N, K], scales [N, G], zeros [N, G] and an optional group index [K]; groups are equal runs without one."""
    n, k = codes.shape
    groups = scales.shape[1]
    if group_index is not None:
        index = group_index.long()
        values = codes.float() if zeros is None else codes.float() - zeros.float()[:, index]
        return values * scales.float()[:, index]
    values = codes.float().view(n, groups, k // groups)
    if zeros is not None:
        values -= zeros.float().unsqueeze(-1)
    values *= scales.float().unsqueeze(-1)
    return values.view(n, k)
