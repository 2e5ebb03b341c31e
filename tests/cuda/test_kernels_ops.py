"""Kernels that are not matrix products, on a GPU.

`scripts/gpu/kernels_check.py` runs the same checks and times them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from rvllm.backends.cuda.device.driver import device_count
from support.kernels import attention_checks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device_count() == 0, reason="no NVIDIA GPU, or the cuda extra is not installed"),
]
if device_count():
    from support.kernels import gemm_checks, harness, op_checks, sampling_checks

DTYPES = ("bfloat16", "float16")


@pytest.fixture(scope="module")
def gpu() -> Iterator[harness.Gpu]:
    shared = harness.Gpu()
    yield shared
    shared.clear()


@pytest.fixture(autouse=True)
def release(gpu: harness.Gpu) -> Iterator[None]:
    yield
    gpu.clear()


def dtype_of(name: str) -> np.dtype:
    return harness.BF16 if name == "bfloat16" else harness.F16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("check", ["embed", "norm", "norm_groups", "rope", "activation", "gather_add"])
def test_row_kernels(gpu: harness.Gpu, rng: np.random.Generator, check: str, dtype: str) -> None:
    getattr(op_checks, f"check_{check}")(gpu, rng, dtype_of(dtype))


def test_dequantisation_is_bit_exact(gpu: harness.Gpu, rng: np.random.Generator) -> None:
    op_checks.check_dequant(gpu, rng)


def test_fill_and_checksum(gpu: harness.Gpu, rng: np.random.Generator) -> None:
    op_checks.check_fill(gpu, rng)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", range(len(attention_checks.SHAPES)))
@pytest.mark.parametrize("check", ["decode", "prefill", "invariance"])
def test_attention(gpu: harness.Gpu, rng: np.random.Generator, check: str, shape: int, dtype: str) -> None:
    run = getattr(attention_checks, f"check_{check}")
    run(gpu, rng, dtype_of(dtype), attention_checks.SHAPES[shape])


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrix_kernels(gpu: harness.Gpu, rng: np.random.Generator, dtype: str) -> None:
    gemm_checks.check_pack(gpu, rng, dtype_of(dtype))
    gemm_checks.check_gemm(gpu, rng, dtype_of(dtype), sizes=(1, 7, 16, 33, 70, 500))


@pytest.mark.parametrize("vocab", [1000, 49152, 151936])
def test_sampling(gpu: harness.Gpu, rng: np.random.Generator, vocab: int) -> None:
    sampling_checks.check_sampling(gpu, rng, vocab)


def test_sampling_from_broken_logits(gpu: harness.Gpu, rng: np.random.Generator) -> None:
    sampling_checks.check_broken_logits(gpu, rng, 151936)


@pytest.mark.parametrize("vocab", [503, 151936])
def test_logprobs(gpu: harness.Gpu, rng: np.random.Generator, vocab: int) -> None:
    sampling_checks.check_logprobs(gpu, rng, vocab)
