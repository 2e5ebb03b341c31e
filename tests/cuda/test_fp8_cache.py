"""A cache of keys and values in E4M3 on the GPU: kernels in the emulator, models, memory."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest

from rvllm.backends.cuda.device.driver import DeviceFacts
from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.known_gpus import CONTEXT_BYTES, KNOWN, known_gpu
from rvllm.backends.cuda.layout.memory import budget_of
from rvllm.backends.cuda.layout.preview import preview
from rvllm.backends.cuda.ops.attention.plan import decode_of, prefill_of
from rvllm.config import EngineConfig
from rvllm.engine.ipc.messages import Sampling
from rvllm.kernels.attention.specs import HEAD_DIMS
from rvllm.kernels.manifest import MANIFEST
from rvllm.models.config import ModelConfig
from rvllm.models.kv_cache import with_kv_cache
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Attention, Buffer, KVCache
from support.emulator import EMULATED, Emulator
from support.emulator.driver import emulated_driver
from support.kernels import attention_checks, fp8_cache_checks
from support.kernels.attention_checks import SHAPES, Shape
from support.kernels.gpu_engine import CONFIG, backend, check_draws, core_of, model, needs_gpu, run
from support.kernels.harness import BF16, DTYPES, Gpu
from support.models.real_configs import CONFIGS


class TestKernels:
    """In the emulator: bits of the 16-bit kernels over the same numbers."""

    pytestmark = EMULATED

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rows_are_rounded_into_their_places(
        self, emulator: Emulator, rng: np.random.Generator, dtype: str
    ) -> None:
        fp8_cache_checks.check_fill(emulator, rng, DTYPES[dtype])

    @pytest.mark.parametrize(("dtype", "shape"), [("bfloat16", SHAPES[1]), ("float16", Shape(80, 2, 1))])
    def test_decode(self, emulator: Emulator, rng: np.random.Generator, shape: Shape, dtype: str) -> None:
        attention_checks.check_decode(emulator, rng, DTYPES[dtype], shape, fp8=True)

    @pytest.mark.parametrize(
        ("dtype", "shape"),
        [("bfloat16", Shape(64, 2, 3)), ("float16", Shape(96, 1, 4, soft_cap=20.0, window=70))],
    )
    def test_prefill(self, emulator: Emulator, rng: np.random.Generator, shape: Shape, dtype: str) -> None:
        attention_checks.check_prefill(emulator, rng, DTYPES[dtype], shape, longest=30, fp8=True)

    def test_the_same_bits_in_any_company(self, emulator: Emulator, rng: np.random.Generator) -> None:
        attention_checks.check_invariance(emulator, rng, BF16, Shape(64, 1, 3), 270, fp8=True)

    def test_decode_with_rings(self, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
        """With as much shared memory as Hopper has; the lanes copy for the copy engine."""
        monkeypatch.setattr("support.emulator.launcher.SMEM", 232448)
        roomy = Emulator()
        roomy.facts = replace(roomy.facts, smem_per_block=232448)
        attention_checks.check_decode(roomy, rng, BF16, Shape(128, 2, 4, window=300), fp8=True)
        attention_checks.check_turning(roomy, rng, BF16, Shape(128, 1, 7), fp8=True)
        roomy.clear()


class TestModels:
    """Through the engine, on the emulated GPU."""

    pytestmark = EMULATED

    def test_the_tokens_of_the_cpu_and_the_same_bits_however_computed(self, rng: np.random.Generator) -> None:
        """In company, in chunks, with a prefix that is cached: the bits of alone."""
        config = model(num_hidden_layers=2, hidden_size=128, intermediate_size=200)
        asked = [(rng.integers(0, 515, n).tolist(), Sampling(max_tokens=4, logprobs=2)) for n in (14, 33, 61)]
        whole = replace(CONFIG, kv_cache_dtype="fp8")
        chunks = replace(whole, num_cpu_blocks=8, max_num_batched_tokens=16)
        with emulated_driver():
            core = core_of(backend(config, "cuda", DType.BF16, whole), config, whole)
            found = run(core, asked)
            (alone,) = run(core, asked[1:2])
            core.close()
            loaded = backend(config, "cuda", DType.BF16, chunks)
            tier = next(line.nbytes for line in loaded.ledger() if "pinned" in line.name)
            core = core_of(loaded, config, chunks)
            cut = run(core, asked)
            core.close()
        assert tier == 8 * 16 * 2 * 2 * 2 * 65, "of each token, layer and head: keys, values and their powers"
        assert [o.logprobs for o in alone] == [o.logprobs for o in found[1]]
        assert [[o.logprobs for o in one] for one in cut] == [[o.logprobs for o in one] for one in found]
        core = core_of(backend(config, "cpu", DType.BF16, whole), config, whole)
        check_draws(found, run(core, asked), 0.15, close=0.15)
        core.close()

    def test_norms_of_heads_come_first(self, rng: np.random.Generator) -> None:
        config = model("Qwen3ForCausalLM", num_hidden_layers=1, hidden_size=128, intermediate_size=128)
        engine = replace(CONFIG, kv_cache_dtype="fp8")
        asked = [(rng.integers(0, 515, 20).tolist(), Sampling(max_tokens=2, logprobs=1))]
        with emulated_driver():
            core = core_of(backend(config, "cuda", DType.BF16, engine), config, engine)
            (ours,) = run(core, asked)
            core.close()
        core = core_of(backend(config, "cpu", DType.BF16, engine), config, engine)
        (theirs,) = run(core, asked)
        core.close()
        (one,), (other,) = ours[0].logprobs or [], theirs[0].logprobs or []
        assert one.logprob == pytest.approx(other.logprob, abs=0.15)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
def test_on_a_gpu_the_same_bits_however_computed(dtype: DType, head_dim: int) -> None:
    """Alone, in company, in chunks, preempted, moved to host memory, from the prefix cache."""
    config, rng = model(head_dim=head_dim), np.random.default_rng(5)
    asked = [
        (rng.integers(0, 515, n).tolist(), Sampling(max_tokens=50, logprobs=2))
        for n in (3, 40, 64, 130, 300, 17)
    ]
    whole = replace(CONFIG, kv_cache_dtype="fp8")
    tight = replace(whole, num_gpu_blocks=45, num_blocks=45)
    ways = {
        "company": whole,
        "chunks": replace(whole, max_num_batched_tokens=33),
        "preempted": replace(tight, preemption_mode="recompute"),
        "swapped": replace(tight, num_cpu_blocks=100, preemption_mode="swap"),
    }
    core = core_of(backend(config, "cuda", dtype, whole), config, whole)
    alone = [run(core, [one])[0] for one in asked]
    assert [[o.logprobs for o in run(core, [one])[0]] for one in asked] == [
        [o.logprobs for o in one] for one in alone
    ], "from the prefix cache"
    core.close()
    for way, engine in ways.items():
        core = core_of(backend(config, "cuda", dtype, engine), config, engine)
        found = run(core, asked)
        assert [[o.logprobs for o in one] for one in found] == [[o.logprobs for o in one] for one in alone], (
            way
        )
        assert (core.counted.preemptions > 0) == (way in ("preempted", "swapped"))
        assert (core.counted.swaps > 0) == (way == "swapped")
        core.close()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[4], SHAPES[5], SHAPES[7]])
def test_on_a_gpu_the_bits_of_sixteen_bit_kernels(shape: Shape, dtype: str) -> None:
    gpu, rng = Gpu(), np.random.default_rng(int(os.environ.get("RVLLM_TEST_SEED", "0")))
    fp8_cache_checks.check_fill(gpu, rng, DTYPES[dtype])
    attention_checks.check_decode(gpu, rng, DTYPES[dtype], shape, fp8=True)
    attention_checks.check_prefill(gpu, rng, DTYPES[dtype], shape, fp8=True)
    attention_checks.check_invariance(gpu, rng, DTYPES[dtype], shape, fp8=True)
    for copies in (1, 40) if shape.dim == 128 and shape.group <= 8 else ():
        attention_checks.check_turning(gpu, rng, DTYPES[dtype], shape, copies, fp8=True)
    gpu.clear()


def planned(facts: DeviceFacts, kind: str) -> dict[str, int]:
    """The limits of Qwen2.5-7B's shape on a card."""
    config = EngineConfig(kv_cache_dtype=kind)
    plain = build_program(ModelConfig(CONFIGS["Qwen2.5-7B"], "7B"), DType.BF16)
    program = with_kv_cache(plain, kind)
    found = preview(program, config, facts, budget_of(config, facts.memory - CONTEXT_BYTES, facts.memory))
    assert sum(found.lines.values()) == found.total
    return dict(found.limits)


@pytest.mark.parametrize("card", ["h200", "rtx-4090", "a100-80gb"])
def test_the_same_memory_holds_nearly_twice_the_tokens(card: str) -> None:
    facts = known_gpu(card, None)
    plain, half = (planned(facts, kind)["tokens they hold"] for kind in ("auto", "fp8"))
    assert half / plain == pytest.approx(256 / 129, rel=0.01)


@pytest.mark.parametrize("card", KNOWN)
def test_every_generation_has_kernels_for_heads_of_128_and_less(card: str) -> None:
    """What plans choose exists, and asks for no more shared memory than the card has."""
    facts = known_gpu(card, None)
    chip = DeviceInfo(facts.capability, facts.sm_count, facts.smem_per_block)
    cache = KVCache("kv", 2, 0, 0, fp8=True)
    buffer = Buffer("qkv", "tokens", 0, DType.BF16)
    for dim in (dim for dim in HEAD_DIMS if dim <= 128):
        for seqs in (1, 256):
            op = Attention(
                name="attn", qkv=buffer, out=buffer, cache=cache, heads=8, kv_heads=2, head_dim=dim, scale=1.0
            )
            plans = decode_of(op, DType.F16, chip, seqs, 4096, 10**5), prefill_of(op, DType.F16, chip)
            for plan in plans:
                assert "_fp8_" in plan.kernel and plan.kernel in MANIFEST
                assert plan.smem <= min(MANIFEST[plan.kernel].smem, facts.smem_per_block)
