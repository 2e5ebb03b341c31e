"""Keys and values in E4M3: each row, one token's and head's, times a power of two of its own.

A row of `dim` numbers is kept as `dim` codes and a byte, the power's exponent plus 127 (E8M0 of the OCP's
Microscaling Formats, 2023); 255 where a number of the row is not finite. The power is the least that
brings the largest magnitude to 448 or less, within [LOW, HIGH]: what is read back is exact in bfloat16.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]

LARGEST = np.float32(448)
LOW, HIGH = -40, 7  # exponents of the powers; float16 has those from LOW_F16 on
LOW_F16 = -15
_BIAS, _INFINITE = 127, 255
_POWERS: F32 = np.append(np.exp2(np.arange(_INFINITE) - _BIAS), np.nan).astype(np.float32)
_NUMBERS: F32 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def exponents(rows: F32, low: int = LOW) -> NDArray[np.int32]:
    """The exponents [...] of the powers of two of rows [..., dim] of finite numbers."""
    top: F32 = np.abs(rows).max(axis=-1)
    mantissa, exponent = np.frexp(top)  # mantissa in [0.5, 1): 448 is 0.875 * 2^9
    found = exponent - 9 + (mantissa > np.float32(0.875))
    return np.clip(np.where(mantissa == 0, low, found), low, HIGH).astype(np.int32)


def stored(rows: F32, low: int = LOW) -> Bytes:
    """float32 [..., dim] -> uint8 [..., dim + 1]: codes rounded to the nearest even, and the power's byte."""
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(rows).all(axis=-1, keepdims=True))
    power = exponents(np.where(finite, rows, 0), low)
    scaled = np.clip(np.ldexp(rows, -power[..., None]), -LARGEST, LARGEST)
    out = np.empty((*rows.shape[:-1], rows.shape[-1] + 1), np.uint8)
    out[..., :-1] = scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    out[..., -1] = np.where(finite[..., 0], power + _BIAS, _INFINITE)
    return out


def loaded(rows: NDArray[Any]) -> F32:
    """uint8 [..., dim + 1] -> float32 [..., dim]; a row that had a number that is not finite is NaN."""
    out: F32 = _NUMBERS[rows[..., :-1]] * _POWERS[rows[..., -1:]]
    return out
