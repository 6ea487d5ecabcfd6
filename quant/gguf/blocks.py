"""Blocks of 32 back to codes and scales, and rows of any of ggml's types back to numbers.

A block of Q4_0, Q5_0 and Q8_0 is ``d · q``: fp16 ``d``, then codes of 4 and 5 bits that are stored from 0, of
8 bits as they are; of Q5_0 the fifth bits stand in a word of their own (``ggml-common.h``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quant.errors import CheckpointError
from quant.gguf.header import Entry
from quant.gguf.levels import BLOCK, package, row_bytes
from quant.remote import open_weights
from quant.schemes import WeightScheme

if TYPE_CHECKING:
    import numpy as np
    import torch

#: Types whose codes a scheme holds → the scheme. A code of 5 bits is one of 8. Of Q4_1 only where its minima
#: are whole steps, which :func:`zeros_of` tells.
SCHEMES: Mapping[str, WeightScheme] = {
    "Q4_0": WeightScheme(4, BLOCK),
    "Q4_1": WeightScheme(4, BLOCK, symmetric=False),
    "Q5_0": WeightScheme(8, BLOCK),
    "Q8_0": WeightScheme(8, BLOCK),
}
#: Types whose blocks of 32 begin with their step.
STEP_FIRST = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
#: Types that are numbers by themselves → the header's name of them.
WIDE: Mapping[str, str] = {"F32": "F32", "F16": "F16", "BF16": "BF16", "F64": "F64"}


def codes_of(blocks: np.ndarray, type_: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 [N, K] and scales fp16 [N, K / 32] of rows of blocks, uint8 [N, bytes of a row].
    Codes are signed, those of Q4_1 too.

    A block of zeros has the scale 0, for which no engine has a use: it becomes 1, with codes of 0.
    """
    import numpy as np

    size = row_bytes(type_, BLOCK)
    parts = blocks.reshape(len(blocks), -1, size)
    scales = np.ascontiguousarray(parts[..., :2]).view("<f2")[..., 0].copy()
    if type_ == "Q8_0":
        codes = parts[..., 2:].view(np.int8).copy()
    else:
        nibbles = parts[..., -BLOCK // 2 :]
        codes = np.concatenate([nibbles & 15, nibbles >> 4], -1).astype(np.int8)
        if type_ == "Q5_0":
            words = np.ascontiguousarray(parts[..., 2:6]).view("<u4")
            codes |= ((words >> np.arange(BLOCK, dtype=np.uint32)) & 1).astype(np.int8) << 4
        codes -= 16 if type_ == "Q5_0" else 8
    empty = scales == 0
    codes[empty], scales[empty] = 0, 1
    return codes.reshape(len(blocks), -1), scales


def zeros_of(blocks: np.ndarray) -> np.ndarray | None:
    """Zero points int8 [N, K / 32] of rows of Q4_1, for codes from -8 on: ``d · q + m`` is
    ``(code - zero) · d`` where ``m`` is what fp16 makes of ``-(8 + zero) · d``; None where one is not."""
    import numpy as np

    parts = blocks.reshape(len(blocks), -1, row_bytes("Q4_1", BLOCK))
    head = np.ascontiguousarray(parts[..., :4]).view("<f2").astype(np.float32)
    scales, minima = head[..., 0], head[..., 1]
    steps = np.rint(np.divide(minima, scales, out=np.zeros_like(scales), where=scales != 0))
    whole = (steps >= -15) & (steps <= 0) & ((steps * scales).astype(np.float16) == minima)
    return (-8 - steps).astype(np.int8) if bool(whole.all()) else None


def steps_of(blocks: np.ndarray, type_: str) -> np.ndarray | None:
    """Root mean square of the steps between codes, fp32 [N] of rows of blocks uint8 [N, bytes of a row]: of
    the types whose blocks of 32 begin with their fp16 step; None of others."""
    import numpy as np

    if type_ not in STEP_FIRST:
        return None
    parts = blocks.reshape(len(blocks), -1, row_bytes(type_, BLOCK))
    steps = np.ascontiguousarray(parts[..., :2]).view("<f2")[..., 0].astype(np.float32)
    return np.sqrt(np.square(steps).mean(-1))


@dataclass(frozen=True, eq=False)
class Rows:
    """A tensor of a file as rows [N, K], of which any can be read by themselves.

    Attributes:
        entry: where it is.
        first, count: rows of the whole tensor that it is.
        order: int64 [N], where each row stands in the file; None: they are in order.
        offset: what the file has added to the numbers.
        shape: of the tensor in the checkpoint.
    """

    entry: Entry
    first: int
    count: int
    shape: tuple[int, ...]
    order: np.ndarray | None = None
    offset: float = 0.0

    @property
    def columns(self) -> int:
        return self.entry.shape[-1]

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.entry.type, self.columns)

    @property
    def start(self) -> int:
        """Of its bytes in the file."""
        return self.entry.start + self.first * self.row_bytes

    def raw(self, start: int, end: int) -> np.ndarray:
        """Bytes of rows, uint8 [end - start, bytes of a row], in the checkpoint's order.

        Raises:
            CheckpointError: the file ends, or cannot be read.
        """
        import numpy as np

        places = None if self.order is None else self.order[start:end]
        low, high = (start, end) if places is None else (int(places.min()), int(places.max()) + 1)
        data = bytearray((high - low) * self.row_bytes)
        try:
            with open_weights(self.entry.file) as stream:
                stream.seek(self.start + low * self.row_bytes)
                view = memoryview(data)
                while view:
                    read = stream.readinto(view)  # type: ignore[attr-defined]
                    if not read:
                        raise CheckpointError(
                            f"{self.entry.file}: ends inside tensor {self.entry.name!r}: the file was "
                            "truncated while it was read"
                        )
                    view = view[read:]
        except OSError as error:
            raise CheckpointError(
                f"{self.entry.file}: cannot be read at tensor {self.entry.name!r}: {error.strerror or error}"
            ) from error
        rows = np.frombuffer(data, np.uint8).reshape(high - low, self.row_bytes)
        return rows if places is None else rows[places - low]

    def values(self, start: int, end: int) -> torch.Tensor:
        """Numbers of rows [end - start, …]: as they are stored where they are floats and nothing was added to
        them, else fp32, dequantized by the ``gguf`` package."""
        import numpy as np
        import torch

        vector = len(self.shape) == 1  # one row, or one of one number each
        raw, kind = self.raw(*((0, self.count) if vector else (start, end))), self.entry.type
        if kind in WIDE:
            from quant.checkpoint.dtypes import TORCH

            made = torch.from_numpy(np.ascontiguousarray(raw)).view(TORCH[WIDE[kind]])
            if self.offset:
                made = made.float() - self.offset
        else:
            gguf = package()
            numbers = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
            made = torch.from_numpy(np.ascontiguousarray(numbers, np.float32))
        return made.reshape(-1)[start:end] if vector else made.reshape(end - start, *self.shape[1:])

    def whole(self) -> torch.Tensor:
        """All of it."""
        return self.values(0, self.shape[0])

    @property
    def nbytes(self) -> int:
        return self.count * self.row_bytes


def rows_of(entry: Entry) -> int:
    """Rows of a tensor, those of all experts counted."""
    return math.prod(entry.shape[:-1])
