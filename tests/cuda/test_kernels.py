"""Kernels against the NumPy reference, through the emulator and on a GPU; a model on the emulator.

`scripts/gpu/kernels_check.py` runs the same checks and times them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rvllm.backends.base import SamplingSpec
from rvllm.engine.ipc.messages import Sampling
from rvllm.program.dtypes import DType
from support.emulator import Emulator, available, needs_emulator
from support.emulator.driver import emulated_driver
from support.kernels import attention_checks, gemm_checks, op_checks, sampling_checks
from support.kernels.gpu_engine import backend, check_draws, core_of, model, needs_gpu, run
from support.kernels.harness import DTYPES, Gpu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("check", op_checks.ROW_CHECKS, ids=lambda check: check.__name__[6:])
def test_row_kernels(gpu: Any, rng: np.random.Generator, check: Any, dtype: str) -> None:
    check(gpu, rng, DTYPES[dtype])


def test_dequantisation_is_bit_exact(gpu: Any, rng: np.random.Generator) -> None:
    op_checks.check_dequant(gpu, rng)


def test_fill_and_checksum(gpu: Any, rng: np.random.Generator) -> None:
    op_checks.check_fill(gpu, rng)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", range(len(attention_checks.SHAPES)))
@pytest.mark.parametrize("check", ["decode", "prefill", "invariance"])
def test_attention_on_a_gpu(rng: np.random.Generator, check: str, shape: int, dtype: str) -> None:
    gpu = Gpu()
    getattr(attention_checks, f"check_{check}")(gpu, rng, DTYPES[dtype], attention_checks.SHAPES[shape])
    gpu.clear()


@pytest.mark.parametrize(
    ("dtype", "shape"), [("bfloat16", 1), ("float16", 4), ("bfloat16", 3), ("float16", 7)]
)
@pytest.mark.parametrize("check", ["decode", "prefill"])
@pytest.mark.emulated
def test_attention(emulator: Emulator, rng: np.random.Generator, check: str, shape: int, dtype: str) -> None:
    given = (emulator, rng, DTYPES[dtype], attention_checks.SHAPES[shape])
    if check == "decode":
        attention_checks.check_decode(*given)
    else:
        attention_checks.check_prefill(*given, longest=100)


@pytest.mark.parametrize(("dtype", "shape"), [("bfloat16", 1), ("float16", 6), ("bfloat16", 7)])
@pytest.mark.emulated
def test_attention_has_the_same_bits_in_any_company(
    emulator: Emulator, rng: np.random.Generator, shape: int, dtype: str
) -> None:
    attention_checks.check_invariance(emulator, rng, DTYPES[dtype], attention_checks.SHAPES[shape], 270)


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """With as much shared memory as Hopper has: decode attention with rings, whose tiles the lanes copy."""
    if not available():
        pytest.skip("the emulator needs g++")
    monkeypatch.setattr("support.emulator.launcher.SMEM", 232448)
    emulator = Emulator()
    emulator.facts = replace(emulator.facts, smem_per_block=232448)
    yield emulator
    emulator.clear()


@pytest.mark.parametrize(
    ("dtype", "shape"), [("bfloat16", 0), ("float16", 1), ("bfloat16", 4), ("float16", 6)]
)
@pytest.mark.emulated
def test_decode_attention_with_rings(
    roomy: Emulator, rng: np.random.Generator, shape: int, dtype: str
) -> None:
    attention_checks.check_decode(roomy, rng, DTYPES[dtype], attention_checks.SHAPES[shape])


@pytest.mark.parametrize(("dtype", "shape"), [("bfloat16", 1), ("float16", 6)])
@pytest.mark.emulated
def test_rings_give_the_same_bits_as_prompts(
    roomy: Emulator, rng: np.random.Generator, shape: int, dtype: str
) -> None:
    attention_checks.check_invariance(roomy, rng, DTYPES[dtype], attention_checks.SHAPES[shape], 270)


@pytest.mark.parametrize(
    ("dtype", "kv_heads", "sms"), [("bfloat16", 2, 132), ("float16", 8, 120), ("bfloat16", 8, 20)]
)
@pytest.mark.emulated
def test_decode_attention_that_rotates(
    roomy: Emulator, rng: np.random.Generator, dtype: str, kv_heads: int, sms: int
) -> None:
    """With four warps a split, with twice four, and with eight that walk over rows."""
    shape = attention_checks.Shape(128, kv_heads, 4, window=150 if dtype == "float16" else None)
    roomy.facts = replace(roomy.facts, sm_count=sms)
    attention_checks.check_turning(roomy, rng, DTYPES[dtype], shape)


@pytest.mark.parametrize(
    ("dtype", "shape", "rotated", "normed"),
    [
        ("bfloat16", (64, 3, 1, None), 16, False),
        ("float16", (64, 1, 8, 150), 0, False),
        ("bfloat16", (256, 1, 2, 300), 256, True),
    ],
)
@pytest.mark.emulated
def test_decode_attention_by_warps_that_rotates(
    roomy: Emulator,
    rng: np.random.Generator,
    dtype: str,
    shape: tuple[int, int, int, int | None],
    rotated: int,
    normed: bool,
) -> None:
    """A part of each head, none of it, and heads that are normalised before."""
    shape_of = attention_checks.Shape(*shape)
    attention_checks.check_turning(
        roomy, rng, DTYPES[dtype], shape_of, ring=False, rotated=rotated, normed=normed
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrix_kernels(gpu: Any, rng: np.random.Generator, dtype: str) -> None:
    gemm_checks.check_pack(gpu, rng, DTYPES[dtype])
    sizes = (1, 7, 16, 33, 70) if isinstance(gpu, Emulator) else (1, 7, 16, 33, 70, 500)
    gemm_checks.check_gemm(gpu, rng, DTYPES[dtype], sizes)
    gemm_checks.check_best(gpu, rng, DTYPES[dtype])
    gemm_checks.check_drawn(gpu, rng, DTYPES[dtype])


def test_sampling(gpu: Any, rng: np.random.Generator) -> None:
    for vocab in (1000,) if isinstance(gpu, Emulator) else (1000, 49152, 151936):
        sampling_checks.check_sampling(gpu, rng, vocab)
        gpu.clear()


def test_sampling_from_broken_logits(gpu: Any, rng: np.random.Generator) -> None:
    sampling_checks.check_broken_logits(gpu, rng, 1500 if isinstance(gpu, Emulator) else 151936)


def test_logprobs(gpu: Any, rng: np.random.Generator) -> None:
    for vocab in (503,) if isinstance(gpu, Emulator) else (503, 151936):
        sampling_checks.check_logprobs(gpu, rng, vocab)
        gpu.clear()


def test_an_edge_of_the_draw_is_the_neighbours_too() -> None:
    spec, tokens = SamplingSpec(temperature=1.0, seed=3, min_p=1e-12), np.zeros(2, np.int32)
    history = sampling_checks.History.begin(spec, tokens, 2, 8)
    u = sampling_checks.uniform(spec.seed, 0)
    weights = np.full(8, 1e-9)
    weights[2], weights[5] = u + 2e-6, 1 - u - 2e-6  # the draw falls just within token 2
    logits = np.log(weights).astype(np.float32)
    assert sampling_checks.draw(logits, history) == 2
    assert [sampling_checks.agrees(token, logits, history, None) for token in (1, 2, 5, 7)] == [
        False,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, DType.BF16), (128, DType.F16)])
@pytest.mark.emulated
@needs_emulator
def test_a_model_on_the_cuda_backend(rng: np.random.Generator, head_dim: int, dtype: DType) -> None:
    """Plans, loading, graphs, steps and sampling: the CPU backend's tokens, and the same bits in company."""
    config = model(num_hidden_layers=2, head_dim=head_dim, hidden_size=128, intermediate_size=200)
    asked = [(rng.integers(0, 515, n).tolist(), Sampling(max_tokens=4, logprobs=2)) for n in (5, 33, 70)]
    with emulated_driver():
        core = core_of(backend(config, "cuda", dtype), config)
        found = run(core, asked)
        (alone,) = run(core, asked[1:2])
        core.close()
    assert [o.logprobs for o in alone] == [o.logprobs for o in found[1]]
    core = core_of(backend(config, "cpu", dtype), config)
    check_draws(found, run(core, asked), 0.12 if dtype is DType.BF16 else 0.02, close=0.12)
    core.close()
