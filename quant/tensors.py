"""The value that quantizers make and formats store: codes with their scales and zero points."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from quant.schemes import BLOCK, WeightScheme

#: Magnitudes of the E2M1 codes 0 … 7; a code is sign · 8 + index (OCP Microscaling Formats 1.0, table 5).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class InputParameters:
    """Calibrated numbers of a linear's input. Which ones are there is the activation scheme's business.

    Attributes:
        scale: fp32 [1]; x ≈ (code - zero) · scale.
        zero: int8 [1], of asymmetric integers; or None.
        global_scale: fp32 [1], the divisor of NVFP4 (448 · 6 / max |x|); or None.
    """

    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight [N, K]: integers as ``(codes - zeros) · scales``, floats as ``codes · scales``.

    Attributes:
        codes: integers int8 [N, K], signed, from ``scheme.low`` to ``scheme.high``; FP8 float8_e4m3fn [N, K];
            FP4 uint8 [N, K], one E2M1 code (0 … 15) each; of weights left as they are fp32 [N, K], the
            values.
        scales: as stored, [N, G], one column a group ([1, 1] of a tensor, [⌈N/128⌉, ⌈K/128⌉] of blocks):
            bf16, fp16 or fp32; of NVFP4 float8_e4m3fn; of MX formats uint8, the exponent plus 127 of a power
            of two.
        zeros: int8 [N, G] in the same range as codes, or None when the scheme is symmetric (all zero).
        group_index: int32 [K], the group of each input, or None for ``k // group_size``.
        global_scale: fp32 [1], by which all scales are divided (NVFP4); or None.
        inputs: calibrated numbers of the input; or None.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    scheme: WeightScheme
    group_index: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None
    inputs: InputParameters | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> torch.Tensor:
        """fp32 [N, K], exactly ``(codes - zeros) · scales`` with the product in fp32: the value every reader
        of the file must get."""
        if self.scheme.type == "int":
            return dequantize(self.codes, self.scales, self.zeros, self.group_index)
        n, k = self.shape
        scales = scale_values(self.scales, self.global_scale)
        values = code_values(self.codes)
        if self.scheme.strategy == "block":
            if not n % BLOCK and not k % BLOCK:
                return values.view(-1, BLOCK, k // BLOCK, BLOCK).mul_(scales[:, None, :, None]).view(n, k)
            return values.mul_(scales.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k])
        return values.view(n, scales.shape[1], -1).mul_(scales.unsqueeze(-1)).view(n, k)

    def rows(self, start: int, end: int) -> QuantizedTensor:
        """The same for outputs ``start`` to ``end``; of blocks both must be multiples of 128, or the last
        end."""
        zeros = None if self.zeros is None else self.zeros[start:end]
        scales = self.scales
        if self.scheme.strategy == "block":
            if start % BLOCK or (end % BLOCK and end != len(self.codes)):
                raise ValueError(f"rows {start} to {end} cut blocks of {BLOCK}")
            scales = scales[start // BLOCK : -(-end // BLOCK)]
        elif self.scheme.strategy != "tensor":
            scales = scales[start:end]
        return replace(self, codes=self.codes[start:end], scales=scales, zeros=zeros)


def code_values(codes: torch.Tensor) -> torch.Tensor:
    """fp32 numbers that float codes stand for: float8 as they are, E2M1 codes (uint8) likewise; a tensor of
    its own."""
    if codes.dtype == torch.float8_e4m3fn and codes.device.type == "cpu":
        return _e4m3_values(codes)
    return _e2m1_values(codes) if codes.dtype == torch.uint8 else codes.to(torch.float32, copy=True)


def _e2m1_values(codes: torch.Tensor) -> torch.Tensor:
    """The numbers of :data:`E2M1`, faster than from a table: moved under fp16's exponent, the bits of one are
    it times 2⁻¹⁴ (the biases are 1 and 15)."""
    wide = codes.to(torch.int16)
    # the sign wraps into the uppermost bit
    bits = (wide & 7).mul_(1 << 9).bitwise_or_((wide & 8).mul_(1 << 12))
    return bits.view(torch.float16).float().mul_(2.0**14)


def _e4m3_values(codes: torch.Tensor) -> torch.Tensor:
    """``codes.float()``, ten times as fast on a CPU, where torch widens E4M3 bit by bit.

    Moved under fp16's wider exponent, the bits of an E4M3 number, subnormal or not, are that number times
    2⁻⁸: the biases are 7 and 15. Only NaN, all ones, comes out as a number: 480.
    """
    # the sign is in the bit above the exponent, too
    bits = codes.view(torch.int8).to(torch.int16).mul_(128).bitwise_and_(~0x4000)
    values = bits.view(torch.float16).float().mul_(256.0)
    magnitudes = codes.view(torch.uint8).bitwise_and(0x7F)
    if magnitudes.numel() and int(magnitudes.amax()) == 0x7F:  # looked for where it costs least: on the codes
        values.masked_fill_(magnitudes == 0x7F, torch.nan)
    return values


def sum_of_squares(values: torch.Tensor) -> torch.Tensor:
    """fp32 [] of fp32 values of any shape: one pass, nothing as large as the values is made."""
    flat = values.reshape(-1)
    return torch.dot(flat, flat)


def all_finite(values: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity. A finite sum says so at less cost than looking at
    each."""
    total = values.sum(dtype=torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(values).all())


def largest_magnitude(values: torch.Tensor, dim: int | tuple[int, ...] = ()) -> torch.Tensor:
    """``values.abs().amax(dim)``; two readings cost less than to write the magnitudes down."""
    return torch.maximum(values.amax(dim), values.amin(dim).neg_())


def scale_values(scales: torch.Tensor, global_scale: torch.Tensor | None = None) -> torch.Tensor:
    """fp32 multipliers that stored scales stand for: uint8 is a power of two, others are numbers, divided by
    ``global_scale``."""
    if scales.dtype == torch.uint8:
        return torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.int() - 127)
    return scales.float() if global_scale is None else scales.float() / global_scale.float()


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """fp32 [N, K] from codes [N, K], scales [N, G], zeros [N, G] and an optional group index [K]; groups are
    equal runs without one."""
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
