"""Element types of activations and weights: the one home of their sizes."""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np


class DType(Enum):
    """An element type that kernels compute or store in."""

    F32 = "float32"
    F16 = "float16"
    BF16 = "bfloat16"
    I32 = "int32"

    @property
    def size(self) -> int:
        """Bytes of one element."""
        return 4 if self in (DType.F32, DType.I32) else 2

    @property
    def numpy(self) -> np.dtype[Any]:
        """The NumPy dtype (bfloat16 through ml_dtypes)."""
        if self is DType.BF16:
            import ml_dtypes

            bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
            return bfloat16
        plain: np.dtype[Any] = np.dtype(self.value)
        return plain

    @classmethod
    def parse(cls, text: str) -> DType:
        """`float32`, `bfloat16`, `half`, `bf16`, `torch.float16`, ... as found in config files and flags.

        Raises ValueError for a name that is not known.
        """
        name = text.removeprefix("torch.").lower()
        aliases = {
            "half": "float16",
            "fp16": "float16",
            "f16": "float16",
            "bf16": "bfloat16",
            "float": "float32",
            "fp32": "float32",
            "f32": "float32",
        }
        return cls(aliases.get(name, name))
