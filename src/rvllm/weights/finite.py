"""Looks for weights that are no numbers: bits that fell over on a disk or in a download without hashes."""

from __future__ import annotations

import numpy as np

from rvllm.errors import ModelError
from rvllm.weights.checkpoint import Checkpoint, TensorType

_EXPONENTS: dict[TensorType, tuple[str, int]] = {  # an element as an unsigned number; its exponent's bits,
    TensorType.F32: ("<u4", 0x7F800000),  # which are all ones in what is infinite or no number
    TensorType.F16: ("<u2", 0x7C00),
    TensorType.BF16: ("<u2", 0x7F80),
}
_AT_ONCE = 1 << 22  # elements


def check_finite(checkpoint: Checkpoint) -> None:
    """Raises ModelError naming the first tensor that holds an infinite number or none (NaN).

    Tensors in blocks and quantised ones are not looked at.
    """
    for info in checkpoint.tensors.values():
        kind = _EXPONENTS.get(info.type)
        if kind is None or info.quantised is not None:
            continue
        dtype, exponent = kind
        elements = np.asarray(checkpoint.raw(info)).view(dtype)
        for first in range(0, len(elements), _AT_ONCE):
            piece = elements[first : first + _AT_ONCE]
            if ((piece & elements.dtype.type(exponent)) == exponent).any():
                raise ModelError(
                    f"{info.file.name}: {info.name} holds infinite numbers or NaN; fetch the file again"
                )
