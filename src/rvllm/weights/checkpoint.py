"""What a model on disk looks like to the rest of the code, whatever file format it came in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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

    @property
    def block(self) -> tuple[int, int]:
        """(elements, bytes) of one block along a row."""
        return _BLOCKS[self]


_BLOCKS = {
    TensorType.F32: (1, 4), TensorType.F16: (1, 2), TensorType.BF16: (1, 2),
    TensorType.Q4_0: (32, 18), TensorType.Q4_1: (32, 20), TensorType.Q5_0: (32, 22),
    TensorType.Q5_1: (32, 24), TensorType.Q8_0: (32, 34), TensorType.Q4_K: (256, 144),
    TensorType.Q5_K: (256, 176), TensorType.Q6_K: (256, 210),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor, under Hugging Face's name, in row-major order.

    unpermute_heads: not 0 where the file holds query or key rows in llama.cpp's order for interleaved
    rope (Llama, Mistral): rows must be put back into [head][half][dim/2] order; the number of heads.
    regroup_heads: not 0 where the file holds fused rows as [q|k|v][head][dim] and Transformers as
    [head][q|k|v][dim] (GPT-NeoX); the number of heads.
    add: a constant the file's numbers lack (llama.cpp stores Gemma's norms as 1 + w; then it is -1).
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
        """The tensor's bytes as a flat view of the memory-mapped file; nothing is copied."""
