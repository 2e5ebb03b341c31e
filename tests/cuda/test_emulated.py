"""Kernels through the emulator against the NumPy reference: the checks that a GPU runs too."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import attention_checks
import harness
import numpy as np
import op_checks
import pytest
import sampling_checks
from emulator import Emulator, available

pytestmark = pytest.mark.skipif(not available(), reason="the emulator needs g++")
DTYPES = {"bfloat16": harness.BF16, "float16": harness.F16}


@pytest.fixture(scope="module")
def shared() -> Emulator:
    return Emulator()


@pytest.fixture
def gpu(shared: Emulator) -> Iterator[Emulator]:
    yield shared
    shared.clear()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    seed = int(os.environ.get("RVLLM_TEST_SEED", "0"))
    return np.random.default_rng([seed, zlib.crc32(request.node.name.encode())])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("check", op_checks.ROW_CHECKS, ids=lambda check: check.__name__[6:])
def test_row_kernels(gpu: Emulator, rng: np.random.Generator, check: object, dtype: str) -> None:
    check(gpu, rng, DTYPES[dtype])  # type: ignore[operator]


def test_dequantisation_is_bit_exact(gpu: Emulator, rng: np.random.Generator) -> None:
    op_checks.check_dequant(gpu, rng)


def test_fill_and_checksum(gpu: Emulator, rng: np.random.Generator) -> None:
    op_checks.check_fill(gpu, rng)


@pytest.mark.parametrize(("dtype", "shape"), [("bfloat16", 1), ("float16", 4), ("bfloat16", 3)])
@pytest.mark.parametrize("check", ["decode", "prefill"])
def test_attention(gpu: Emulator, rng: np.random.Generator, check: str, shape: int, dtype: str) -> None:
    run = getattr(attention_checks, f"check_{check}")
    run(gpu, rng, DTYPES[dtype], attention_checks.SHAPES[shape])


def test_sampling(gpu: Emulator, rng: np.random.Generator) -> None:
    sampling_checks.check_sampling(gpu, rng, 1000)


def test_logprobs(gpu: Emulator, rng: np.random.Generator) -> None:
    sampling_checks.check_logprobs(gpu, rng, 503)
