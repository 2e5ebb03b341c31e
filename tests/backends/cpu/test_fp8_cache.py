"""Keys and values in E4M3 on the CPU: rounding, memory, and the same bits however a sequence is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from rvllm.backends.cpu.backend import CpuBackend
from rvllm.backends.cpu.compiled.library import in_use
from rvllm.backends.cpu.compiled.model import chosen
from rvllm.backends.cpu.reference import fp8_cache
from rvllm.config import EngineConfig
from rvllm.engine.ipc.messages import Output, Sampling
from rvllm.errors import UsageError
from rvllm.models.config import ModelConfig
from rvllm.models.kv_cache import with_kv_cache
from rvllm.models.registry import build_program
from rvllm.program.cost import StepShape, kv_bytes_per_token, program_cost
from rvllm.program.dtypes import DType
from support.kernels.gpu_engine import CONFIG, backend, core_of, model, run, tokens_of
from support.models import tiny
from support.models.arch_cases import MODELS

FP8 = replace(CONFIG, kv_cache_dtype="fp8")


def nearest(rows: np.ndarray, power: np.ndarray) -> np.ndarray:
    """Each number's nearest of all that E4M3 has, times the row's power of two; of two as near, either."""
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    all_of_them = np.unique(codes[np.isfinite(codes)])
    scaled = rows.astype(np.float64) / 2.0 ** power[..., None]
    return np.abs(scaled[..., None] - all_of_them).min(axis=-1) * 2.0 ** power[..., None]


def test_rows_are_rounded_to_the_nearest_code_of_their_power() -> None:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((40, 3, 32)).astype(np.float32) * np.exp2(
        rng.integers(-60, 12, (40, 3, 1)).astype(np.float32)
    )
    rows[7, 1], rows[8, 0, 5] = 0, 448.0
    power = fp8_cache.exponents(rows)
    found = fp8_cache.loaded(fp8_cache.stored(rows))
    distance = np.abs(found.astype(np.float64) - rows)
    saturated = np.abs(rows) > 448 * 2.0**fp8_cache.HIGH
    assert (distance[~saturated] <= nearest(rows, power)[~saturated]).all()
    assert (np.abs(found[saturated]) == 448 * 2.0**fp8_cache.HIGH).all()
    assert (found == found.astype(ml_dtypes.bfloat16).astype(np.float32)).all(), "exact in bfloat16"
    top = np.abs(rows).max(axis=-1)
    inside = (power > fp8_cache.LOW) & (power < fp8_cache.HIGH)
    assert (top[inside] <= 448 * 2.0 ** power[inside]).all(), "nothing saturates"
    assert (top[inside] > 224 * 2.0 ** power[inside]).all(), "and no smaller power would do"
    assert (fp8_cache.loaded(fp8_cache.stored(found)) == found).all(), "what is rounded stays as it is"


def test_a_row_with_a_number_that_is_not_finite_is_none() -> None:
    rows = np.ones((3, 16), np.float32)
    rows[0, 3], rows[1, 4] = np.inf, np.nan
    found = fp8_cache.loaded(fp8_cache.stored(rows))
    assert np.isnan(found[:2]).all() and (found[2] == 1).all()


def test_a_token_takes_a_byte_an_element_and_one_a_row() -> None:
    plain = build_program(ModelConfig(model(), "tiny"), DType.BF16)
    program = with_kv_cache(plain, "fp8")
    assert kv_bytes_per_token(plain) == 3 * 2 * 2 * 64 * 2
    assert kv_bytes_per_token(program) == 3 * 2 * 2 * 65
    shape = StepShape(8, 1, 1000)
    assert program_cost(program, shape).kv_bytes == program_cost(plain, shape).kv_bytes * 65 // 128
    loaded = backend(model(), "cpu", DType.BF16, FP8)
    (line,) = [line for line in loaded.ledger() if line.name == "kv cache"]
    assert line.nbytes == 128 * 16 * kv_bytes_per_token(program)
    assert sum(a.nbytes for pair in loaded._model.caches.values() for a in pair) == line.nbytes // 128 * 129
    loaded.close()


ASKED = [
    (np.random.default_rng(n).integers(0, 515, n).tolist(), Sampling(max_tokens=40, logprobs=1))
    for n in (5, 33, 70)
]
WAYS: dict[str, Callable[[], EngineConfig]] = {
    "in company": lambda: FP8,
    "in chunks": lambda: replace(FP8, max_num_batched_tokens=16),
    "preempted": lambda: replace(FP8, num_blocks=12),
    "swapped": lambda: replace(FP8, num_blocks=12, num_cpu_blocks=64, preemption_mode="swap"),
}


@pytest.fixture(scope="module")
def alone() -> list[list[Output]]:
    config = model()
    core = core_of(backend(config, "cpu", DType.BF16, FP8), config, FP8)
    found = [run(core, [one])[0] for one in ASKED]
    cached = [run(core, [one])[0] for one in ASKED]  # found in the prefix cache
    assert [[o.logprobs for o in one] for one in cached] == [[o.logprobs for o in one] for one in found]
    core.close()
    return found


@pytest.mark.parametrize("way", WAYS)
def test_a_request_has_the_same_bits(way: str, alone: list[list[Output]]) -> None:
    config, engine = model(), WAYS[way]()
    core = core_of(backend(config, "cpu", DType.BF16, engine), config, engine)
    found = run(core, ASKED)
    assert (core.counted.preemptions > 0) == (way in ("preempted", "swapped"))
    assert (core.counted.swaps > 0) == (way == "swapped")
    assert [tokens_of(one) for one in found] == [tokens_of(one) for one in alone]
    assert [[o.logprobs for o in one] for one in found] == [[o.logprobs for o in one] for one in alone]
    core.close()


def test_what_others_left_in_a_block_touches_nobody() -> None:
    config = tiny.CASES["qwen2_layer_types"] | {"max_position_embeddings": 256}
    program = with_kv_cache(build_program(ModelConfig(config, "tiny"), DType.F32), "fp8")
    loaded = CpuBackend.load(program, None, EngineConfig(device="cpu", num_blocks=40, max_num_seqs=4))
    prompt = tiny.prompt_of(config, 61, 1)
    before = tiny.logits_of(loaded, prompt)
    for keys, values in loaded._model.caches.values():
        keys[:-1], values[:-1] = 255, 255
    assert np.array_equal(tiny.logits_of(loaded, prompt), before)
    loaded.close()


def test_what_has_no_fp8_cache_is_refused_by_name() -> None:
    def refused(config: dict[str, object], kind: str, dtype: DType = DType.BF16) -> str:
        with pytest.raises(UsageError) as caught:
            with_kv_cache(build_program(ModelConfig(config, "tiny"), dtype), kind)
        return str(caught.value)

    assert "latents" in refused(MODELS["deepseek_v2"].config, "fp8")
    assert "recurrent" in refused(MODELS["nemotron_h"].config, "fp8")
    assert "block-sparse" in refused(MODELS["phi3small"].config, "fp8")
    assert "--dtype float16" in refused(model(), "fp16")
    assert "float32" in refused(model(), "bf16", DType.F32)
    plain = build_program(ModelConfig(model(), "tiny"), DType.BF16)
    assert with_kv_cache(plain, "bf16") is plain and with_kv_cache(plain, "auto") is plain
    with pytest.raises(UsageError, match="--kv-cache-dtype auto"):
        chosen("compiled", with_kv_cache(plain, "fp8"))
    assert not chosen("auto", with_kv_cache(plain, "fp8"))
    assert in_use("auto", fp8_cache=True).startswith("NumPy")
