"""Mamba-2 on CUDA: real models resolve to kernels, states are budgeted, kernels and engine keep the bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rvllm.backends.cpu.backend import CpuBackend
from rvllm.backends.cuda.backend import CudaBackend
from rvllm.backends.cuda.device.catalog import select
from rvllm.backends.cuda.device.driver import DeviceFacts
from rvllm.backends.cuda.layout.memory import Budget, state_line
from rvllm.backends.cuda.step_planner import StepPlanner
from rvllm.config import EngineConfig
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import Sampling
from rvllm.errors import CapacityError, MissingKernelError
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program
from support.kernels import gpu_engine, harness
from support.kernels import recurrent_checks as checks
from support.kernels.harness import DTYPES
from support.kernels.planned import A100, GB120, H200, built
from support.kernels.recurrent_planned import check_planned
from support.models.real_configs import CONFIGS
from support.models.tiny import ArrayCheckpoint, weights_of

REAL = {
    name: CONFIGS["Nemotron-H-8B"] | changes
    for name, changes in {
        "Nemotron-H-8B": {},
        "Nemotron-Nano-9B-v2": {
            "hidden_size": 4480, "intermediate_size": 15680, "mamba_head_dim": 80, "num_attention_heads": 40,
            "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
        },
        "Nemotron-H-56B, a few layers": {
            "hidden_size": 8192, "intermediate_size": 32768, "mamba_num_heads": 256, "ssm_state_size": 256,
            "num_attention_heads": 64, "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-",
        },
        "Nemotron-3-Nano-30B-A3B": CONFIGS["Nemotron-3-Nano-30B-A3B"],
    }.items()
}  # fmt: skip


def program(name: str = "Nemotron-H-8B", dtype: DType = DType.BF16, **changes: object) -> Program:
    return built(REAL[name], dtype, **changes)


def planner(
    given: Program, facts: DeviceFacts = H200, budget: Budget = GB120, config: EngineConfig | None = None
) -> StepPlanner:
    return StepPlanner.plan(given, config or EngineConfig(max_model_len=8192), facts, budget)[0]


@pytest.mark.parametrize("facts", [H200, A100], ids=lambda f: f.name)
@pytest.mark.parametrize("name", REAL)
def test_real_models_resolve_to_kernels(name: str, facts: DeviceFacts) -> None:
    names = planner(program(name, DType.F16 if facts is A100 else DType.BF16), facts).kernels()
    specs, missing = select(names, facts.capability)
    assert not missing
    assert {s.name for s in specs} == set(names)
    assert any("state_scan" in name for name in names)
    assert any("scan_keep" in name for name in names)


def test_a_recurrent_layer_is_five_launches_when_decoding() -> None:
    given = program(hybrid_override_pattern="MM*")
    ops = [p.op for p in planner(given).decode(4) if p.op.startswith("layers.1")]
    assert [op.split(".", 2)[2].split(" ")[0] for op in ops] == [
        "norm", "in", "conv", "gated_norm", "out",
    ]  # fmt: skip
    others = program(hybrid_override_pattern="MM*", mamba_hidden_act="gelu")
    assert len([p for p in planner(others).decode(4) if p.op.startswith("layers.1")]) == 6


def test_the_states_are_a_line_of_the_budget() -> None:
    given = program()
    plan = planner(given).memory
    assert plan.snapshots == 64
    states = 4 * given.state_elements_per_slot * (plan.shape.seqs + plan.snapshots)
    assert plan.lines[state_line(plan.shape.seqs, plan.snapshots)] == pytest.approx(states, rel=1e-3)
    assert sum(plan.lines.values()) <= GB120.ours
    assert GB120.ours - sum(plan.lines.values()) < plan.block_bytes


def test_as_many_sequences_run_as_states_fit() -> None:
    given = program()
    each = 4 * given.state_elements_per_slot
    weights = sum(w.elements for w in given.weights) * 2
    few = Budget(141 << 30, 1 << 30, weights + 40 * each)
    small = EngineConfig(max_model_len=512, max_num_batched_tokens=512)
    plan = planner(given, budget=few, config=small).memory
    assert 16 <= plan.shape.seqs <= 20
    assert plan.layout.seqs == plan.shape.seqs
    asked = replace(small, kv_cache_memory_gb=10.5 * each / 1e9)
    assert planner(given, budget=few, config=asked).memory.shape.seqs == 8, "and two snapshots"
    none = replace(asked, enable_prefix_caching=False)
    assert planner(given, budget=few, config=none).memory.shape.seqs == 10
    with pytest.raises(CapacityError, match="--num-state-snapshots 10: there is memory for 10 states"):
        planner(given, budget=few, config=replace(asked, num_state_snapshots=10))
    with pytest.raises(CapacityError, match="state of one sequence takes"):
        planner(given, budget=Budget(141 << 30, 1 << 30, weights + each))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"ssm_state_size": 96}, "states of 96"),
        ({"mamba_head_dim": 40}, "heads of 40"),
        ({"conv_kernel": 7}, "7 taps"),
        ({"mamba_num_heads": 124, "n_groups": 4}, "multiples of 8"),
    ],
)
def test_shapes_without_a_kernel_are_named(changes: dict[str, object], named: str) -> None:
    with pytest.raises(MissingKernelError, match=named):
        planner(program(**changes)).kernels()


# ---- kernels, through the emulator and on a GPU


@pytest.mark.parametrize(
    ("taps", "act", "dtype"), [(4, "silu", "bfloat16"), (3, "gelu", "float16"), (2, "silu", "float16")]
)
def test_the_convolution(
    gpu: harness.Machine, rng: np.random.Generator, taps: int, act: str, dtype: str
) -> None:
    checks.check_conv(gpu, rng, DTYPES[dtype], taps, act)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", checks.SCANS, ids=str)
def test_the_scan(
    gpu: harness.Machine, rng: np.random.Generator, shape: checks.ScanShape, dtype: str
) -> None:
    checks.check_scan(gpu, rng, DTYPES[dtype], shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", checks.SCANS, ids=str)
def test_the_convolution_within_the_scan(
    gpu: harness.Machine, rng: np.random.Generator, shape: checks.ScanShape, dtype: str
) -> None:
    checks.check_fused_conv(gpu, rng, DTYPES[dtype], shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gated_norm(gpu: harness.Machine, rng: np.random.Generator, dtype: str) -> None:
    checks.check_gated_norm(gpu, rng, DTYPES[dtype])


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16], ids=lambda d: d.value)
def test_planned_launches_compute_the_layer(
    gpu: harness.Machine, rng: np.random.Generator, dtype: DType
) -> None:
    check_planned(gpu, rng, TINY, dtype)


# ---- whole models on a GPU

TINY = gpu_engine.model(
    "NemotronHForCausalLM", hybrid_override_pattern="M-M*-M", head_dim=128, mlp_hidden_act="relu2",
    num_attention_heads=4, mamba_num_heads=8, mamba_head_dim=32, n_groups=2, ssm_state_size=64,
    layer_norm_epsilon=1e-5, time_step_min=0.001, use_conv_bias=True,
)  # fmt: skip
MIXTURE = TINY | {
    "hybrid_override_pattern": "MEM*E", "conv_kernel": 3, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5, "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 96, "norm_topk_prob": True, "use_conv_bias": False,
    "mamba_head_dim": 80, "n_groups": 1, "ssm_state_size": 128,
}  # fmt: skip
MODELS = {"dense": TINY, "mixture": MIXTURE}
TOLERANCE = {DType.BF16: 0.12, DType.F16: 0.02}  # of log-probabilities near 1, as in test_backend_gpu.py
AGREE = {"dense": 1.0, "mixture": 0.95}  # rounding may move a token to another expert
on_a_gpu = [pytest.mark.gpu, gpu_engine.needs_gpu]


def prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, TINY["vocab_size"], n).tolist() for n in lengths]


def core(model: str, device: str, dtype: DType = DType.BF16, **settings: Any) -> EngineCore:
    """An engine over the model: weights exact in `dtype`, decays and steps of a trained model's size."""
    config = MODELS[model]
    built = build_program(ModelConfig(config, "tiny"), DType.F32 if device == "cpu" else dtype)
    arrays = weights_of(built)
    for name, array in arrays.items():
        if name.endswith("A_log"):
            arrays[name] = np.log(np.linspace(0.3, 8.0, len(array)))
        elif name.endswith("dt_bias"):
            arrays[name] = 5 * array - 3
    exact = {k: v.astype(gpu_engine.ROUND[dtype]).astype(np.float32) for k, v in arrays.items()}
    engine = replace(gpu_engine.CONFIG, device=device, **settings)
    kind = CpuBackend if device == "cpu" else CudaBackend
    loaded = kind.load(built, ArrayCheckpoint(config, exact), engine)
    assert not loaded.limits.prefix_reuse
    return gpu_engine.core_of(loaded, config, engine)


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16], ids=lambda d: d.value)
@pytest.mark.parametrize("model", MODELS)
class TestEngine:
    pytestmark = on_a_gpu

    def test_greedy_equals_the_cpu_or_differs_where_logits_are_close(self, model: str, dtype: DType) -> None:
        sampling = Sampling(max_tokens=24, logprobs=3, prompt_logprobs=2)
        asked = [(prompt, sampling) for prompt in prompts(1, 5, 16, 33, 150)]
        found = {}
        for device in ("cpu", "cuda"):
            engine = core(model, device, dtype)
            found[device] = gpu_engine.run(engine, asked)
            engine.close()
        limit, apart = TOLERANCE[dtype], list[float]()
        for cpu, gpu in zip(found["cpu"], found["cuda"], strict=True):
            scored = zip(cpu[0].prompt_logprobs or [], gpu[0].prompt_logprobs or [], strict=True)
            apart += [abs(a.logprob - b.logprob) for a, b in scored]
            for a, b in zip(cpu, gpu, strict=True):
                (best,), (other,) = a.logprobs or [], b.logprobs or []
                apart.append(abs(best.logprob - other.logprob))
                if a.token_ids != b.token_ids:
                    close = best.top_logprobs[0] - best.top_logprobs[1] < limit
                    assert close or model == "mixture"
                    break
        assert np.median(apart) < limit / 8
        assert np.mean(np.less(apart, limit)) >= AGREE[model], sorted(apart)[-10:]


@pytest.mark.parametrize("model", MODELS)
class TestPromises:
    pytestmark = on_a_gpu

    def test_a_request_gives_the_same_bits_alone_in_company_and_in_chunks(self, model: str) -> None:
        engine = core(model, "cuda", max_num_batched_tokens=48)
        sampled = Sampling(max_tokens=20, temperature=1.0, seed=11, top_p=0.9, logprobs=2)
        kinds = (Sampling(max_tokens=20, logprobs=2), sampled)
        asked = [(prompt, kind) for prompt in prompts(1, 15, 33, 90) for kind in kinds]
        gpu_engine.check_company(engine, asked)
        engine.close()

    def test_preempted_sequences_go_on_with_the_same_tokens(self, model: str) -> None:
        engine = core(model, "cuda", num_gpu_blocks=24)
        asked = [(prompt, Sampling(max_tokens=60)) for prompt in prompts(*[40] * 6)]
        together = [gpu_engine.tokens_of(o) for o in gpu_engine.run(engine, asked)]
        assert engine.stats().preemptions > 0
        alone = [gpu_engine.tokens_of(gpu_engine.run(engine, [request])[0]) for request in asked]
        assert together == alone
        engine.close()

    def test_prompts_that_begin_alike_go_on_from_kept_states(self, model: str) -> None:
        asked = [(prompt, Sampling(max_tokens=20)) for prompt in prompts(150, 90)]
        asked += [(prompt[:70] + other, sampling) for prompt, sampling in asked for other in prompts(9, 30)]
        told = []
        for snapshots in (0, 3):
            engine = core(model, "cuda", num_state_snapshots=snapshots)
            told.append([gpu_engine.tokens_of(gpu_engine.run(engine, [one])[0]) for one in asked * 2])
            assert (engine.stats().cached_prompt_tokens > 200) == bool(snapshots)
            engine.close()
        assert told[0] == told[1]
