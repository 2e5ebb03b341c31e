"""Logits that are infinite or no numbers end their request with an error, and no other."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from rvllm.backends.base import BROKEN_ROW, SamplingSpec
from rvllm.backends.cpu.reference.sampler import History, draw
from rvllm.errors import ModelError
from rvllm.weights.checkpoint import TensorType
from rvllm.weights.finite import check_finite
from support.models import tiny

TOKENS = np.array([1, 2], dtype=np.int32)


@pytest.mark.parametrize("spec", [SamplingSpec(), SamplingSpec(temperature=1.0, seed=3, top_k=5, top_p=0.9)])
@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("share", [1, 97])
def test_one_broken_logit_is_enough(spec: SamplingSpec, broken: float, share: int) -> None:
    logits = np.random.default_rng(0).standard_normal(97).astype(np.float32)
    logits[:share] = broken
    assert draw(logits, History.begin(spec, TOKENS, 2, 97)) == BROKEN_ROW


def test_a_forbidden_token_may_be_anything() -> None:
    spec = SamplingSpec(temperature=1.0, seed=3)
    logits = np.random.default_rng(0).standard_normal(97).astype(np.float32)
    logits[5] = -np.inf
    assert 0 <= draw(logits, History.begin(spec, TOKENS, 2, 97)) < 97


@pytest.mark.parametrize("kind", [TensorType.F32, TensorType.F16, TensorType.BF16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_named(kind: TensorType, value: float) -> None:
    import ml_dtypes

    dtype = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[kind.value]
    good = np.random.default_rng(1).standard_normal((7, 5)).astype(dtype)
    bad = copy.deepcopy(good)
    bad[3, 2] = value
    with pytest.raises(ModelError, match="bad holds infinite numbers or NaN"):
        check_finite(tiny.ArrayCheckpoint({}, {"good": good, "bad": bad}, kind))
    check_finite(tiny.ArrayCheckpoint({}, {"good": good}, kind))
