"""Kernels for integer weights in the emulator."""

from __future__ import annotations

import numpy as np
import pytest

from rvllm.kernels.gemm.integer.specs import GGUF_LAYOUTS, LAYOUTS
from support.emulator import EMULATED, Emulator
from support.kernels import integer_checks
from support.kernels.harness import DTYPES

pytestmark = EMULATED


@pytest.mark.parametrize("kind", GGUF_LAYOUTS)
def test_blocks_are_packed_as_the_reference_packs_them(emulator: Emulator, kind: str) -> None:
    integer_checks.check_blocks(emulator, np.random.default_rng(len(kind)), kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [name for name, layout in LAYOUTS.items() if layout.integers])
def test_words_are_packed_as_the_reference_packs_them(emulator: Emulator, layout: str, dtype: str) -> None:
    integer_checks.check_words(emulator, np.random.default_rng(len(layout)), DTYPES[dtype], layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_products(emulator: Emulator, layout: str, dtype: str) -> None:
    integer_checks.check_products(
        emulator, np.random.default_rng(len(layout)), DTYPES[dtype], layout, (1, 33)
    )


@pytest.mark.parametrize("dtype", [*DTYPES.values(), np.dtype(np.float32)], ids=str)
def test_quantising(emulator: Emulator, dtype: np.dtype) -> None:
    integer_checks.check_quantise(emulator, np.random.default_rng(1), dtype)
