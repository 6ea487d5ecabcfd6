"""The levels that a GGUF file is made at, and the blocks that its rows are stored in.

Blocks of 32 share a scale in fp16 (``ggml-common.h``): Q4_0 and Q8_0 are ``d · q`` with signed codes, Q4_1 is
``d · q + m`` with codes from 0. So integers that a checkpoint has already in groups of a multiple of 32 are
stored as they are, and nothing is rounded a second time. Everything else is rounded by the ``gguf`` package,
as llama.cpp's reference does. No torch at import.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from quant.errors import QuantError

if TYPE_CHECKING:
    import numpy as np

    from quant.schemes import WeightScheme
    from quant.tensors import QuantizedTensor

#: Numbers in a block of the plain types.
BLOCK = 32
#: What a tensor is to a level. Vectors and routers are added, multiplied and compared in fp32: ``vector``.
Place = Literal["vector", "linear", "embedding", "head"]


@dataclass(frozen=True)
class Level:
    """A level.

    Attributes:
        type: of most matrices, by ggml's name.
        file_type: llama.cpp's number of the level (``enum llama_ftype``).
        head: type of the head, and of an embedding that is the head as well.
        bits: largest codes that the type takes as they are; 0: none.
        symmetric: whether it takes codes without zero points.
    """

    type: str
    file_type: int
    head: str
    bits: int = 0
    symmetric: bool = True

    @property
    def wide(self) -> str:
        """Type of what stays in 16 bits."""
        return "BF16" if self.type == "BF16" else "F16"

    def type_of(self, place: Place, columns: int, *, tied: bool, coded: bool | None) -> str:
        """Type of a tensor of a file of this level.

        Args:
            place: what it is; of a linear, or a table of tokens that the source has quantized, ``linear``.
            columns: numbers in a row.
            tied: whether the embedding is the head as well.
            coded: whether the source has quantized it; None: it has quantized nothing. What it has left in
                16 bits beside its codes stays so, but for the head.
        """
        if place == "vector":
            return "F32"
        if place in ("head", "embedding"):
            both = place == "head" or tied or coded is not None
            type_ = self.head if both else self.type
        else:
            type_ = self.wide if coded is False else self.type
        return type_ if fits(type_, columns) else self.wide

    def takes(self, scheme: WeightScheme, inputs: int) -> bool:
        """Whether codes of a scheme, of a linear with so many inputs, are stored as they are."""
        return (
            0 < scheme.bits <= self.bits
            and scheme.type == "int"
            and scheme.symmetric == self.symmetric
            and inputs % BLOCK == 0
            and (inputs // scheme.groups(inputs)) % BLOCK == 0
        )


#: The levels of the plain types, by name.
LEVELS: Mapping[str, Level] = {
    "f16": Level("F16", 1, "F16"),
    "bf16": Level("BF16", 32, "BF16"),
    "q8_0": Level("Q8_0", 7, "Q8_0", bits=8),
    "q5_1": Level("Q5_1", 9, "Q8_0"),
    "q5_0": Level("Q5_0", 8, "Q8_0"),
    "q4_1": Level("Q4_1", 3, "Q8_0", bits=4, symmetric=False),
    "q4_0": Level("Q4_0", 2, "Q8_0", bits=4),
}
#: The levels that llama.cpp makes itself, by name, and its number of each.
OWN_LEVELS: Mapping[str, int] = {
    "q6_k": 18, "q5_k_m": 17, "q4_k_m": 15, "iq4_xs": 30, "q3_k_m": 12, "q2_k": 10,
}  # fmt: skip


def package() -> Any:
    """The ``gguf`` package.

    Raises:
        QuantError: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise QuantError(
            "GGUF files need the gguf package, which is not installed here: pip install 'quant[gguf]'"
        ) from error


def block_of(type_: str) -> tuple[int, int]:
    """Numbers and bytes of a block of a type, as the ``gguf`` package has them."""
    gguf = package()
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_]]
    return int(block), int(size)


def row_bytes(type_: str, columns: int) -> int:
    """Bytes of a row of ``columns`` numbers, a multiple of the type's block."""
    block, size = block_of(type_)
    return columns // block * size


def code_bits(type_: str) -> int:
    """Bits of a code of a type, whose blocks hold less than one more bit a number for scales.

    >>> code_bits("Q6_K"), code_bits("IQ4_XS"), code_bits("Q8_0")
    (6, 4, 8)
    """
    block, size = block_of(type_)
    return 8 * size // block


def fits(type_: str, columns: int) -> bool:
    """Whether rows of so many numbers are whole blocks of a type."""
    return columns % block_of(type_)[0] == 0


def rounded(values: np.ndarray, type_: str) -> np.ndarray:
    """Rows of fp32 [N, K] as a type stores them: uint8 [N, bytes of a row]."""
    import numpy as np

    gguf = package()
    made = gguf.quants.quantize(np.ascontiguousarray(values), gguf.GGMLQuantizationType[type_])
    return made.view(np.uint8).reshape(len(values), -1)


def carried(tensor: QuantizedTensor, type_: str) -> tuple[np.ndarray, int]:
    """Codes and scales of a linear as blocks of a type that :meth:`Level.takes` them.

    Returns:
        uint8 [N, bytes of a row], and how many scales (and minima) fp16 had to round.

    Raises:
        QuantError: a scale is beyond fp16.
    """
    import numpy as np
    import torch

    n, k = tensor.shape
    blocks = k // BLOCK
    scales = tensor.scales.float()
    each = blocks // scales.shape[1]
    low = -8 if type_ == "Q4_1" else 0
    head = [scales]
    if type_ == "Q4_1":
        zeros = torch.zeros_like(scales) if tensor.zeros is None else tensor.zeros.float()
        head.append((low - zeros) * scales)
    half = torch.stack(head, -1).half()
    if not bool(torch.isfinite(half).all()):
        raise QuantError(
            f"a scale of {float(scales.abs().max()):g} is beyond fp16, in which {type_} stores it: use "
            "--level bf16"
        )
    changed = int((half.float() != torch.stack(head, -1)).sum())
    shared = half.repeat_interleave(each, 1).numpy().view(np.uint8).reshape(n, blocks, -1)
    codes = tensor.codes.numpy().reshape(n, blocks, BLOCK)
    if type_ != "Q8_0":
        nibbles = (codes + np.int8(8)).astype(np.uint8)
        codes = nibbles[..., : BLOCK // 2] | (nibbles[..., BLOCK // 2 :] << 4)
    return np.concatenate([shared, codes.view(np.uint8)], -1).reshape(n, -1), changed
