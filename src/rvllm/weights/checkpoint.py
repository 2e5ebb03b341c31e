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

from rvllm.weights.mapped import MappedFile
from rvllm.weights.parallel import in_threads

SLAB = 64  # rows of a quantised matrix that a thread takes at a time


class TensorType(Enum):
    """How a tensor's elements are stored: its name, and (elements, bytes) of a block along a row."""

    F32 = "F32", 1, 4
    F16 = "F16", 1, 2
    BF16 = "BF16", 1, 2
    Q4_0 = "Q4_0", 32, 18
    Q4_1 = "Q4_1", 32, 20
    Q5_0 = "Q5_0", 32, 22
    Q5_1 = "Q5_1", 32, 24
    Q8_0 = "Q8_0", 32, 34
    Q4_K = "Q4_K", 256, 144
    Q5_K = "Q5_K", 256, 176
    Q6_K = "Q6_K", 256, 210
    Q2_K = "Q2_K", 256, 84
    Q3_K = "Q3_K", 256, 110
    IQ4_NL = "IQ4_NL", 32, 18
    IQ4_XS = "IQ4_XS", 256, 136
    MXFP4 = "MXFP4", 32, 17

    block: tuple[int, int]

    def __new__(cls, name: str, elements: int, nbytes: int) -> TensorType:
        kind = object.__new__(cls)
        kind._value_, kind.block = name, (elements, nbytes)
        return kind


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


@dataclass(frozen=True)
class Checkpoint:
    """An opened, validated model: every tensor lies within its file and overlaps no other.

    path: the directory or file it was opened from. config: in Hugging Face's names (`architectures`,
    `hidden_size`, ...); config_origin: what to call it in messages: `/models/x/config.json`,
    `x.gguf metadata`. generation_config: generation_config.json, or what a GGUF file says of it; empty when
    there is none. tensors: by name; empty for a config without weights.
    metadata: what a GGUF file says besides its tensors (tokenizer, chat template), by key; empty for
    safetensors, whose tokenizer lies in files of its own.
    unreadable: tensors that are there but of a type we do not read, with that type's name; a model that
    needs one of them is refused by name, others load.
    """

    path: Path
    config: Mapping[str, Any]
    config_origin: str
    generation_config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    files: Mapping[Path, MappedFile] = field(default_factory=dict, repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)
    unreadable: Mapping[str, str] = field(default_factory=dict)

    def raw(self, info: TensorInfo) -> NDArray[np.uint8]:
        """The tensor's bytes, flat: a view of the mapped file, nothing is copied.

        A quantised tensor's float32 numbers are computed here, each time, on several threads.
        """
        if info.quantised is not None:
            return _dequantised(info.quantised, info.shape)
        return self.files[info.file].bytes[info.offset : info.offset + info.nbytes]


def _dequantised(quantised: Quantised, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    out = np.empty(shape, dtype=np.float32)

    def work(start: int, stop: int) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # a scale that is no number gives none, quietly
            out[start:stop] = quantised.numbers(start, stop)

    in_threads(work, shape[0], SLAB)
    return out.reshape(-1).view(np.uint8)


def stored_formats(checkpoint: Checkpoint) -> tuple[str, int]:
    """How tensors are stored, `61 F32, 210 Q4_1` (empty without any), and their bytes in the files."""
    kinds = Counter(info.stored_as for info in checkpoint.tensors.values())
    total = sum(info.stored_nbytes for info in checkpoint.tensors.values())
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())), total
