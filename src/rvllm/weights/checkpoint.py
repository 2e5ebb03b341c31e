"""What a model on disk looks like to the rest of the code, whatever file format it came in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class TensorType(Enum):
    """How a tensor's elements are stored: (elements a block, bytes a block)."""

    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    Q4_0 = "Q4_0"
    Q4_1 = "Q4_1"
    Q5_0 = "Q5_0"
    Q5_1 = "Q5_1"
    Q8_0 = "Q8_0"
    Q4_K = "Q4_K"
    Q5_K = "Q5_K"
    Q6_K = "Q6_K"
    Q2_K = "Q2_K"
    Q3_K = "Q3_K"
    IQ4_NL = "IQ4_NL"
    IQ4_XS = "IQ4_XS"
    MXFP4 = "MXFP4"

    @property
    def block(self) -> tuple[int, int]:
        """(elements, bytes) of one block along a row."""
        return _BLOCKS[self]


_BLOCKS = {
    TensorType.F32: (1, 4), TensorType.F16: (1, 2), TensorType.BF16: (1, 2),
    TensorType.Q4_0: (32, 18), TensorType.Q4_1: (32, 20), TensorType.Q5_0: (32, 22),
    TensorType.Q5_1: (32, 24), TensorType.Q8_0: (32, 34), TensorType.Q4_K: (256, 144),
    TensorType.Q5_K: (256, 176), TensorType.Q6_K: (256, 210),
    TensorType.Q2_K: (256, 84), TensorType.Q3_K: (256, 110), TensorType.IQ4_NL: (32, 18),
    TensorType.IQ4_XS: (256, 136), TensorType.MXFP4: (32, 17),
}  # fmt: skip


class Quantised(Protocol):
    """A matrix that the file holds as levels and scales in tensors of their own (FP8, GPTQ, AWQ ...)."""

    @property
    def format(self) -> str:
        """What to call it: `GPTQ 4-bit`."""

    @property
    def stored_nbytes(self) -> int:
        """Bytes of the stored tensors it is made of."""

    def numbers(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start to stop, dequantised: float32 [stop - start, width].

        Raises ModelError when what is stored contradicts itself.
        """


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor, under Hugging Face's name, in row-major order.

    unpermute_heads: not 0 where the file holds query or key rows in llama.cpp's order for interleaved
    rope (Llama, Mistral): rows must be put back into [head][half][dim/2] order; the number of heads.
    regroup_heads: not 0 where the file holds fused rows as [q|k|v][head][dim] and Transformers as
    [head][q|k|v][dim] (GPT-NeoX); the number of heads.
    add: a constant the file's numbers lack (llama.cpp stores Gemma's norms as 1 + w; then it is -1).
    logarithm: whether the file holds -exp(x) of each number x (llama.cpp's decays of Mamba layers).
    quantised: not None where the tensor is computed from others on the way in; type is F32 then, nbytes what
    its float32 numbers take, and file and offset are those of its levels.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    file: Path
    offset: int
    nbytes: int
    unpermute_heads: int = 0
    regroup_heads: int = 0
    add: float = 0.0
    logarithm: bool = False
    quantised: Quantised | None = field(default=None, compare=False, repr=False)

    @property
    def stored_as(self) -> str:
        """Its type, or the name of its quantised format."""
        return self.quantised.format if self.quantised else self.type.value

    @property
    def stored_nbytes(self) -> int:
        """Bytes it takes in the file, scales included."""
        return self.quantised.stored_nbytes if self.quantised else self.nbytes


class Checkpoint(Protocol):
    """An opened, validated model: every tensor lies within its file and overlaps no other."""

    @property
    def path(self) -> Path:
        """The directory or file it was opened from."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's config in Hugging Face's names (`architectures`, `hidden_size`, ...)."""

    @property
    def config_origin(self) -> str:
        """What to call the config in error messages: `/models/x/config.json`, `x.gguf metadata`."""

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """generation_config.json, or what a GGUF file says of it; empty when there is none."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name; empty for a config without weights."""

    def raw(self, info: TensorInfo) -> NDArray[np.uint8]:
        """The tensor's bytes, flat: a view of the memory-mapped file, nothing is copied.

        A quantised tensor's float32 numbers are computed here, each time, on several threads.
        """


def stored_formats(checkpoint: Checkpoint) -> tuple[str, int]:
    """How tensors are stored, `61 F32, 210 Q4_1` (empty without any), and their bytes in the files."""
    kinds = Counter(info.stored_as for info in checkpoint.tensors.values())
    total = sum(info.stored_nbytes for info in checkpoint.tensors.values())
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())), total
