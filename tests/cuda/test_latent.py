"""Latent attention on CUDA: kernels against the reference, planning, engines."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rvllm.backends.cuda.backend import CudaBackend
from rvllm.backends.cuda.device.catalog import select
from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.device.launches import Counts
from rvllm.backends.cuda.layout.joining import joined
from rvllm.backends.cuda.ops.mla.plan import LatentShape, plan_decode, plan_prefill, plan_prefill_sm90
from rvllm.config import EngineConfig
from rvllm.engine.ipc.messages import Sampling
from rvllm.errors import MissingKernelError
from rvllm.kernels.mla.specs import splits_of
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import LatentRopeKV
from rvllm.weights.open import open_checkpoint
from support.emulator import Emulator, needs_emulator
from support.emulator.driver import emulated_driver
from support.kernels import latent_checks as checks
from support.kernels.gpu_engine import CONFIG, core_of, model, run
from support.kernels.harness import BF16, DTYPES, Machine
from support.kernels.latent_checks import LITE, MANY, TINY, Sizes
from support.kernels.planned import A100, GB125, H100, L40, built, declared, kinds, planner
from support.models import archs_moe_gguf
from support.models.real_configs import CONFIGS, on_one_card
from support.models.tiny import ArrayCheckpoint, weights_of

SIZES = {"lite": LITE, "tiny": TINY, "many": MANY}
V2_LITE, V3 = CONFIGS["DeepSeek-V2-Lite"], on_one_card("DeepSeek-V3")[1]


# ---- kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "shape", "tail"),
    [(1, (2, 40, 24), 8), (3, (16, 128, 512), 0), (70, (2, 72, 136), 16), (9, (3, 50, 312), 0)],
    ids=["odd", "values", "tail", "three segments"],
)
def test_products_of_heads(
    gpu: Machine, rng: np.random.Generator, tokens: int, shape: tuple[int, int, int], tail: int, dtype: str
) -> None:
    checks.check_head_linear(gpu, rng, DTYPES[dtype], tokens, shape, tail)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("name", SIZES)
def test_preparing_queries_and_cache(
    gpu: Machine, rng: np.random.Generator, name: str, interleaved: bool, dtype: str
) -> None:
    lens = [1, 2] if name == "lite" and isinstance(gpu, Emulator) else [30, 1, 41]
    checks.check_prepare(gpu, rng, DTYPES[dtype], SIZES[name], lens, interleaved)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SIZES)
def test_decode(gpu: Machine, rng: np.random.Generator, name: str, dtype: str) -> None:
    lens = [1, 2, 16, 17, 63, 64, 65, 255, 256, 257, 600, 2048, 2310]
    few = {"lite": [1, 90, 300], "many": [1, 63, 64, 300, 800], "tiny": lens}
    checks.check_decode(
        gpu, rng, DTYPES[dtype], SIZES[name], few[name] if isinstance(gpu, Emulator) else lens
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SIZES)
def test_prefill(gpu: Machine, rng: np.random.Generator, name: str, dtype: str) -> None:
    lens, chunks = [40, 300, 1, 33, 200, 300, 531], [1, 1, 1, 33, 130, 37, 300]
    if isinstance(gpu, Emulator):
        lens, chunks = (
            ([40, 30, 33, 260], [1, 1, 7, 5]) if name != "tiny" else (lens, [1, 1, 1, 33, 13, 37, 20])
        )
    checks.check_prefill(gpu, rng, DTYPES[dtype], SIZES[name], lens, chunks)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [16, 20, 128])
def test_prompts_by_wgmma_have_the_same_bits(
    gpu: Machine, rng: np.random.Generator, heads: int, dtype: str
) -> None:
    if isinstance(gpu, Emulator) or gpu.facts.capability != 90:
        pytest.skip("wgmma is Hopper's")
    lens = [40, 64, 129, 700, 2100, 2433, 3001]
    chunks = [40, 3, 129, 100, 70, 33 if heads > 20 else 2433, 33]
    assert checks.check_prefill_sm90(gpu, rng, DTYPES[dtype], heads, lens, chunks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SIZES)
def test_a_token_has_the_same_bits_however_it_is_computed(
    gpu: Machine, rng: np.random.Generator, name: str, dtype: str
) -> None:
    length, picks = 1300, 60
    if isinstance(gpu, Emulator):
        length, picks = {"lite": (20, 1), "many": (70, 4), "tiny": (300, 12)}[name]
    assert checks.check_invariance(gpu, rng, DTYPES[dtype], SIZES[name], length, picks=picks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [TINY, MANY, Sizes(130, 32, 16, value=6)], ids=["tiny", "many", "130 heads"]
)
def test_values_of_decodes_in_parts(gpu: Machine, rng: np.random.Generator, sizes: Sizes, dtype: str) -> None:
    checks.check_values(gpu, rng, DTYPES[dtype], sizes)


# ---- planning


@pytest.mark.parametrize("facts", [H100, A100, L40], ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
@pytest.mark.parametrize("config", [V2_LITE, V3], ids=["v2-lite", "v3"])
def test_deepseek_resolves_to_kernels(config: dict[str, Any], facts: Any, dtype: DType) -> None:
    given = planner(built(config, dtype, num_hidden_layers=2), facts, EngineConfig(max_model_len=8192), GB125)
    specs, missing = select(given.kernels(), facts.capability)
    assert not missing
    known = {spec.name: spec for spec in specs}
    for planned in (*given.decode(1), *given.decode(64), *given.body(4096)):
        if "latent" in planned.kernel:
            assert planned.smem <= min(max(known[planned.kernel].smem, 48 << 10), facts.smem_per_block)
            assert min(planned.grid(Counts(64, 64, 64))) >= 1


def test_v2_lite_fits_an_h200_and_its_attention_takes_five_launches_a_layer() -> None:
    given = planner(built(V2_LITE), H100, EngineConfig(max_model_len=8192), GB125)
    assert 31e9 < given.memory.lines["weights"] < 32.5e9
    assert given.memory.block_bytes == 27 * 576 * 2 * 16
    assert given.memory.lines["attention workspace"] < 300e6
    for seqs, launches in (
        (1, 5),
        (2, 6),
    ):  # queries and latents, preparing, decode, (merging,) values, output
        layer = [p.kernel for p in given.decode(seqs) if p.op.startswith("layers.5.")]
        ends = next(i for i, kernel in enumerate(layer) if "route" in kernel)
        attention = [k for k in layer[:ends] if "norm" not in k]
        assert len(attention) == launches, attention


def test_hopper_computes_prompts_by_wgmma_with_what_the_kernel_declares() -> None:
    for dtype, tag in ((DType.BF16, "bf16"), (DType.F16, "f16")):
        given = planner(built(V2_LITE, dtype, num_hidden_layers=1), H100, EngineConfig(max_model_len=4096))
        (launch,) = [p for p in given.body(4096) if "latent_prefill" in p.kernel]
        assert launch.kernel == f"sm90_{tag}_latent_prefill"
        assert kinds(launch) == declared("mla/prefill_sm90.cu", "latent_prefill_sm90")
    assert plan_prefill_sm90(DType.BF16, LatentShape(16, 256, 64), DeviceInfo(90, 132, 232448)) is None


def test_queries_and_latents_are_one_product_where_that_is_possible() -> None:
    given = built(V2_LITE, num_hidden_layers=2)
    once = joined(given)
    assert len(once.ops) == len(given.ops) - 2
    assert joined(once) == once
    assert sum(w.elements for w in once.weights) == sum(w.elements for w in given.weights)
    op = next(op for op in once.ops if isinstance(op, LatentRopeKV))
    assert op.q == op.kv and op.q.width == 16 * 192 + 576
    for other in (built(V3, num_hidden_layers=1), built(V2_LITE, num_hidden_layers=1, attention_bias=True)):
        assert joined(other) == other


def test_sizes_without_a_kernel_are_named() -> None:
    odd = built(V2_LITE, num_hidden_layers=1, kv_lora_rank=520, first_k_dense_replace=1)
    with pytest.raises(MissingKernelError, match="latent of 520 elements"):
        planner(odd, H100, EngineConfig(), GB125)
    odd = built(V2_LITE, num_hidden_layers=1, qk_nope_head_dim=100, first_k_dense_replace=1)
    with pytest.raises(MissingKernelError, match=r"layers\.0\.absorb.*multiples of 8"):
        planner(odd, H100, EngineConfig(), GB125).kernels()
    odd = built(V2_LITE, num_hidden_layers=1, qk_nope_head_dim=520, first_k_dense_replace=1)
    with pytest.raises(MissingKernelError, match="the inner one at most 512"):
        planner(odd, H100, EngineConfig(), GB125).kernels()
    with pytest.raises(MissingKernelError, match="--max-num-seqs"):
        decode_plan(max_seqs=5000)
    decode_plan(max_seqs=2048, max_model_len=1 << 21)
    with pytest.raises(MissingKernelError, match="cannot list 2048 sequences"):  # its products have 32 bits
        decode_plan(max_seqs=2048, max_model_len=1 << 22)


def decode_plan(max_seqs: int = 64, max_model_len: int = 8192, smem: int = 232448) -> Any:
    return plan_decode(
        DType.BF16, LatentShape(16, 512, 64), max_seqs=max_seqs, max_model_len=max_model_len,
        num_blocks=10**6, sm_count=132, smem_per_block=smem,
    )  # fmt: skip


def test_parts_of_results_have_room_for_the_worst_cut() -> None:
    for seqs in (1, 2, 7, 300):
        plan = decode_plan(seqs)
        most = splits_of(8192)
        for contexts in (np.full(seqs, most), np.full(seqs, 1), np.arange(seqs) % most + 1):
            items, before = int(contexts.sum()), np.cumsum(contexts) - contexts
            for block in range(plan.grid):
                begin, end = items * block // plan.grid, items * (block + 1) // plan.grid
                of = np.searchsorted(before, np.arange(begin, end), side="right") - 1
                others = before[of] < begin
                assert others.sum() <= plan.spare
        assert plan.partial_bytes == 4 * plan.grid * (plan.spare + 1) * 16 * 514


def test_splits_are_short_at_first() -> None:
    found = [splits_of(n) for n in (1, 64, 65, 2048, 2049, 2304, 2305, 163840)]
    assert found == [1, 1, 2, 32, 33, 33, 34, 32 + 632]


def test_less_shared_memory_takes_smaller_kernels() -> None:
    assert decode_plan().kernel == "sm80_bf16_latent_decode"
    assert decode_plan(max_seqs=1).kernel == "sm80_bf16_latent_decode_small"
    assert decode_plan(smem=101376).kernel == "sm80_bf16_latent_decode_small"
    assert plan_prefill(DType.F16, LatentShape(16, 512, 64), 232448).rows == 32
    small = plan_prefill(DType.F16, LatentShape(16, 512, 64), 101376)
    assert (small.rows, small.kernel) == (16, "sm80_f16_latent_prefill_small")
    with pytest.raises(MissingKernelError, match="48 KB"):
        plan_prefill(DType.F16, LatentShape(16, 512, 64), 48 << 10)


# ---- loading

SMALL = {
    **model("DeepseekV2ForCausalLM"), "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 72,
    "vocab_size": 99, "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "moe_intermediate_size": 24,
    "q_lora_rank": None, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3,
    "first_k_dense_replace": 1, "topk_method": "greedy", "routed_scaling_factor": 1.0,
}  # fmt: skip


@pytest.mark.emulated
@needs_emulator
@pytest.mark.skipif(os.environ.get("RVLLM_TEST_EMULATE") == "1", reason="the driver is emulated already")
def test_files_of_both_kinds_give_the_same_bits(tmp_path: Path) -> None:
    program = built(SMALL)
    arrays = {k: v.astype(BF16).astype(np.float32) for k, v in weights_of(program).items()}
    checkpoints: list[Any] = [ArrayCheckpoint(SMALL, arrays)]
    for apart in (True, False):  # keys and values of all heads as two tensors, or as one
        path = archs_moe_gguf.write(tmp_path / f"{apart}.gguf", SMALL, arrays, apart=apart)
        checkpoints.append(open_checkpoint(path))
    found = []
    for checkpoint in checkpoints:
        with emulated_driver():
            core = core_of(CudaBackend.load(program, checkpoint, replace(CONFIG, device="cuda")), SMALL)
            given = [(list(range(n)), Sampling(max_tokens=3, logprobs=2)) for n in (1, 7)]
            found.append([[(o.token_ids, o.logprobs) for o in outputs] for outputs in run(core, given)])
            core.close()
    assert found[0] == found[1] == found[2]
