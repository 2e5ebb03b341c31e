"""Checkpoints that exist only as a layout: every tensor of a program, said to be stored in some type."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rvllm.program.ops.dense import Program
from rvllm.weights.checkpoint import TensorInfo, TensorType
from rvllm.weights.safetensors.grouped import Grouped, PackedMatrix
from rvllm.weights.safetensors.scaled import Scaled
from rvllm.weights.safetensors.stored import StoredTensor

FILE = Path("layout.safetensors")
QUANTISED = ("fp8", "fp8_rows", "int8", "gptq", "awq", "packed")

_PACKED = {"gptq": "GPTQ 4-bit", "awq": "AWQ 4-bit", "packed": "packed 4-bit"}


def _stored(kind: str, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(kind, shape, FILE, 0, np.zeros(0, np.uint8))


def _quantised(stored: str, rows: int, columns: int) -> Scaled | Grouped:
    if stored in _PACKED:
        nothing: Any = lambda start, stop: np.zeros((0, 0))  # noqa: E731
        words, groups = {
            "gptq": (columns // 8, rows), "awq": (columns, rows // 8), "packed": (rows, columns // 8),
        }[stored], (columns // 128, rows)  # fmt: skip
        scales, zeros = groups[::-1] if stored == "packed" else groups, _stored("I32", (groups[0], rows // 8))
        packed = PackedMatrix(
            stored, 4, _stored("I32", words), _stored("F16", scales), None if stored == "packed" else zeros
        )
        return Grouped(_PACKED[stored], 0, nothing, nothing, nothing, 128, packed)
    levels = _stored("I8" if stored == "int8" else "F8_E4M3", (rows, columns))
    block = (128, 128) if stored == "fp8" else (1, columns)
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    return Scaled(levels, _stored("F32", grid), grid, block)


@dataclass
class Layout:
    """A checkpoint without numbers. stored: a TensorType's name, or one of QUANTISED for matrices of layers.

    Matrices whose rows a type's blocks do not divide are F16, as llama.cpp has them.
    """

    program: Program
    stored: str
    path: Path = FILE
    config: dict[str, Any] = field(default_factory=dict)
    config_origin: str = "layout"
    generation_config: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """By name."""
        return {
            part.source: self._info(part.source, part.shape)
            for weight in self.program.weights
            for part in weight.parts
        }

    def _info(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        matrix = len(shape) == 2 and min(shape) > 1
        if self.stored in QUANTISED:
            if matrix and "embed" not in name and "head" not in name.split(".", maxsplit=1)[0]:
                return TensorInfo(
                    name, shape, TensorType.F32, FILE, 0, 4 * math.prod(shape),
                    quantised=_quantised(self.stored, *shape),
                )  # fmt: skip
            return TensorInfo(name, shape, TensorType.BF16, FILE, 0, 2 * math.prod(shape))
        kind = TensorType(self.stored)
        if not matrix and kind.block[0] > 1:
            kind = TensorType.F32
        elif shape[-1] % kind.block[0]:
            kind = TensorType.F16
        return TensorInfo(name, shape, kind, FILE, 0, math.prod(shape) // kind.block[0] * kind.block[1])

    def raw(self, info: TensorInfo) -> np.ndarray:
        """There are no numbers."""
        raise AssertionError(f"{info.name} was read while planning")
