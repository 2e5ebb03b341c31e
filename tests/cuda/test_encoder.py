"""Encoders' kernels, block-sparse attention and fused row kernels: on a GPU, and emulated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rvllm.kernels.attention.specs import PREFILL_SM90_DIMS
from support.kernels import attention_checks, encoder_checks, harness
from support.kernels.harness import DTYPES

ROW_CHECKS = {check.__name__.removeprefix("check_"): check for check in encoder_checks.ROW_CHECKS}
NEW_HEADS = [attention_checks.Shape(32, 2, 4), attention_checks.Shape(160, 2, 4)]


def small(gpu: Any) -> bool:
    """Whether sizes have to be small."""
    return not isinstance(gpu, harness.Gpu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("check", ROW_CHECKS)
def test_row_kernels(gpu: Any, rng: np.random.Generator, check: str, dtype: str) -> None:
    ROW_CHECKS[check](gpu, rng, DTYPES[dtype])


def test_hidden_tokens(gpu: Any, rng: np.random.Generator) -> None:
    encoder_checks.check_hide(gpu, rng)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", encoder_checks.TEXT_HEAD_DIMS)
def test_text_attention(gpu: Any, rng: np.random.Generator, dim: int, dtype: str) -> None:
    lengths = (1, 2, 64, 65, 130) if small(gpu) else encoder_checks.LENGTHS
    encoder_checks.check_text_attention(gpu, rng, DTYPES[dtype], dim, lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", PREFILL_SM90_DIMS)
def test_text_attention_of_hopper(gpu: Any, rng: np.random.Generator, dim: int, dtype: str) -> None:
    if small(gpu) or gpu.facts.capability != 90:
        pytest.skip("wgmma is Hopper's")
    encoder_checks.check_text_attention_sm90(gpu, rng, DTYPES[dtype], dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", range(len(encoder_checks.SPARSE)))
def test_block_sparse_attention(gpu: Any, rng: np.random.Generator, case: int, dtype: str) -> None:
    shape, sparsity = encoder_checks.SPARSE[case]
    encoder_checks.check_sparse(gpu, rng, DTYPES[dtype], shape, sparsity, 330 if small(gpu) else 1300)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", NEW_HEADS, ids=lambda s: f"d{s.dim}")
@pytest.mark.parametrize("check", ["decode", "prefill", "invariance"])
def test_attention_of_more_head_sizes(
    gpu: Any, rng: np.random.Generator, check: str, shape: attention_checks.Shape, dtype: str
) -> None:
    if small(gpu):
        pytest.skip("on a GPU only: the sizes are its own")
    getattr(attention_checks, f"check_{check}")(gpu, rng, DTYPES[dtype], shape)
