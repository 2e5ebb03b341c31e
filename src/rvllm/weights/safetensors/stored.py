"""A tensor of a safetensors file as it is stored, whatever its type, and the numbers in it."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rvllm.errors import ModelError
from rvllm.weights.checkpoint import TensorType
from rvllm.weights.gguf.blocks import dequantise

FLOAT_TYPES = {"F32": TensorType.F32, "F16": TensorType.F16, "BF16": TensorType.BF16}
FLOAT_KINDS = tuple(FLOAT_TYPES)
_INTEGERS = {"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64}
E8M0_BIAS = 127
E8M0_NAN = 255


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """kind: safetensors' name of its type; data: its bytes, flat, a view of the mapped file."""

    kind: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    data: NDArray[np.uint8]

    def piece(self, rows: slice = slice(None), columns: slice = slice(None)) -> StoredTensor:
        """A copy of some rows and columns of a matrix."""
        item = np.dtype(f"u{self.data.nbytes // max(math.prod(self.shape), 1) or 1}")
        found = np.ascontiguousarray(self.data.view(item).reshape(self.shape)[rows, columns])
        return StoredTensor(self.kind, found.shape, self.file, self.offset, found.reshape(-1).view(np.uint8))

    def words(self) -> NDArray[np.uint32]:
        """An I32 tensor's numbers, unsigned."""
        return self.data.view(np.uint32).reshape(self.shape)

    def integers(self) -> NDArray[np.int64]:
        """A small tensor's signed integers, int64 of its shape; raises ModelError where it has others."""
        if self.kind not in _INTEGERS:
            raise ModelError(f"{self.file}: {self.kind} at byte {self.offset}, integers must be there")
        return self.data.view(_INTEGERS[self.kind]).astype(np.int64).reshape(self.shape)

    def floats(self) -> NDArray[np.float32]:
        """The numbers of a small tensor of scales, float32 of its shape.

        F8_E8M0 holds powers of two: 2 ** (byte - 127), 255 for no number (OCP microscaling formats).
        """
        if self.kind == "F8_E8M0":
            powers = np.ldexp(np.float32(1), self.data.astype(np.int32) - E8M0_BIAS)
            return np.where(self.data == E8M0_NAN, np.float32(np.nan), powers).reshape(self.shape)
        return dequantise(FLOAT_TYPES[self.kind], self.data, self.shape)


def unpack(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """Levels of 4 or 8 bits packed into 32-bit words from the low end: [..., words * 32 / bits] uint8."""
    packed = np.ascontiguousarray(words).view(np.uint8)
    if sys.byteorder == "big":
        packed = packed.reshape(*words.shape, 4)[..., ::-1].reshape(packed.shape)
    if bits == 8:
        return packed
    levels = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=np.uint8)
    np.bitwise_and(packed, 15, out=levels[..., 0::2])
    np.right_shift(packed, 4, out=levels[..., 1::2])
    return levels


def require(
    stored: dict[str, StoredTensor],
    name: str,
    kinds: tuple[str, ...],
    shapes: tuple[tuple[int, ...], ...],
    whose: str,
) -> StoredTensor:
    """The tensor `name`, of one of these kinds and shapes; ModelError says what it belongs to."""
    found = stored.get(name)
    if found is None:
        raise ModelError(f"{stored[whose].file}: tensor {name} is missing, {whose} cannot be read without it")
    if found.kind not in kinds or (shapes and found.shape not in shapes):
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ModelError(
            f"{found.file}: tensor {name} is {found.kind} of shape {list(found.shape)}, to go with {whose} "
            f"it must be {' or '.join(kinds)}" + (f" of shape {wanted}" if wanted else "")
        )
    return found
