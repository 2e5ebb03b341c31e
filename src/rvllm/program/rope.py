"""Rotary position embeddings: frequencies and the position tables every backend reads.

Formulas: Su et al. 2021 (RoPE), Chen et al. 2023 (linear), the NTK-aware "dynamic" form, Peng et al.
2023 (YaRN), Llama 3.1's frequency bands, and LongRoPE's per-dimension factors, all as the published
model code defines them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]


@dataclass(frozen=True)
class Rope:
    """How positions rotate the first `dim` elements of each query and key head.

    interleaved: pairs are (0, 1), (2, 3), ... instead of (0, dim/2), (1, dim/2 + 1), ...
    attention_factor: multiplies cos and sin (YaRN and LongRoPE).
    short_attention_factor: what does so instead while LongRoPE's short factors are used.
    """

    dim: int
    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_attention_factor: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    interleaved: bool = False

    def table(self, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """cos and sin, each float32 [length, dim / 2], for positions 0 .. length - 1.

        Each position's row depends on that position alone, so a sequence's output does not depend on
        how long it will grow: `dynamic` scales position p as if the sequence ended there, and
        `longrope` uses its long factors when `length` exceeds the original context.
        """
        positions = np.arange(length, dtype=np.float64)[:, None]
        if self.kind == "dynamic" and length > self.original_max_position:
            angles = positions * self._dynamic_frequencies(length)
        else:
            angles = positions * self._frequencies(length)[None, :]
        factor = self.attention_factor
        if self.short_attention_factor is not None and length <= self.original_max_position:
            factor = self.short_attention_factor
        cos, sin = np.cos(angles) * factor, np.sin(angles) * factor
        return cos.astype(np.float32), sin.astype(np.float32)

    def _frequencies(self, length: int) -> NDArray[np.float64]:
        exponent = np.arange(0, self.dim, 2, dtype=np.float64) / self.dim
        base = 1.0 / self.theta**exponent
        if self.kind == "linear":
            return base / self.factor
        if self.kind == "llama3":
            return self._llama3(base)
        if self.kind == "yarn":
            return self._yarn(base)
        if self.kind == "longrope":
            chosen = self.long_factor if length > self.original_max_position else self.short_factor
            return base / np.asarray(chosen, dtype=np.float64)
        return base

    def _dynamic_frequencies(self, length: int) -> NDArray[np.float64]:
        """[length, dim / 2]: theta grows with the position beyond the trained context."""
        seen = np.maximum(np.arange(1, length + 1, dtype=np.float64), self.original_max_position)[:, None]
        growth = self.factor * seen / self.original_max_position - (self.factor - 1.0)
        theta = self.theta * growth ** (self.dim / (self.dim - 2))
        exponent = np.arange(0, self.dim, 2, dtype=np.float64)[None, :] / self.dim
        return 1.0 / np.power(theta, exponent)

    def _llama3(self, base: NDArray[np.float64]) -> NDArray[np.float64]:
        wavelength = 2 * math.pi / base
        low = self.original_max_position / self.low_freq_factor
        high = self.original_max_position / self.high_freq_factor
        smooth = (self.original_max_position / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        middle = (1 - smooth) * base / self.factor + smooth * base
        out = np.where(wavelength > low, base / self.factor, base)
        return np.where((wavelength <= low) & (wavelength >= high), middle, out)

    def _yarn(self, base: NDArray[np.float64]) -> NDArray[np.float64]:
        def correction(rotations: float) -> float:
            return (
                self.dim
                * math.log(self.original_max_position / (rotations * 2 * math.pi))
                / (2 * math.log(self.theta))
            )

        low, high = correction(self.beta_fast), correction(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        if low == high:
            high += 0.001
        ramp = np.clip((np.arange(self.dim // 2, dtype=np.float64) - low) / (high - low), 0.0, 1.0)
        return base / self.factor * ramp + base * (1 - ramp)
