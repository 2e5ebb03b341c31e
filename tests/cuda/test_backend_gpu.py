"""The CUDA backend against the CPU backend on tiny models, and its promises: invariance, flat memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rvllm.backends.cuda.device.arena import Arena
from rvllm.backends.cuda.device.driver import Device
from rvllm.engine.ipc.messages import Sampling
from rvllm.errors import RvllmError
from rvllm.program.dtypes import DType
from support.kernels.gpu_engine import (
    CONFIG,
    backend,
    check_company,
    check_draws,
    core_of,
    model,
    needs_gpu,
    run,
    tokens_of,
)

pytestmark = [pytest.mark.gpu, needs_gpu]

MODELS: dict[str, dict[str, Any]] = {
    "llama": model(),
    "llama_biased_tied_llama3": model(
        attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
        rope_scaling={"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                      "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "mistral_window": model("MistralForCausalLM", sliding_window=37, head_dim=128),
    "qwen2": model("Qwen2ForCausalLM", num_attention_heads=7, num_key_value_heads=1, rope_theta=1e6),
    "llama_d80_gelu": model(head_dim=80, hidden_act="gelu"),
    "llama_d96_gelu_tanh": model(head_dim=96, hidden_act="gelu_pytorch_tanh"),
    "llama_d256_relu2": model(head_dim=256, hidden_act="relu2"),
}  # fmt: skip
LENGTHS = [1, 5, 16, 33, 70, 300]
TOLERANCE = {
    DType.BF16: 0.12,
    DType.F16: 0.02,
}  # of log-probabilities near 1; float32 sums, 16-bit activations


def prompts(vocab: int) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, vocab, n).tolist() for n in LENGTHS]


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16], ids=lambda d: d.value)
@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_the_cpu_or_differs_where_logits_are_close(name: str, dtype: DType) -> None:
    config = MODELS[name]
    asked = [
        (p, Sampling(max_tokens=24, logprobs=3, prompt_logprobs=2)) for p in prompts(config["vocab_size"])
    ]
    found = {}
    for device in ("cpu", "cuda"):
        core = core_of(backend(config, device, dtype), config)
        found[device] = run(core, asked)
        core.close()
    for cpu, gpu in zip(found["cpu"], found["cuda"], strict=True):
        scored_cpu, scored_gpu = cpu[0].prompt_logprobs or [], gpu[0].prompt_logprobs or []
        assert len(scored_cpu) == len(scored_gpu)
        for a, b in zip(scored_cpu, scored_gpu, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=TOLERANCE[dtype], rel=TOLERANCE[dtype] / 8)
    check_draws(found["cuda"], found["cpu"], TOLERANCE[dtype], close=TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["qwen2", "mistral_window"])
def test_a_request_gives_the_same_bits_alone_in_company_and_in_chunks(name: str) -> None:
    config = MODELS[name]
    loaded = backend(config, "cuda", DType.BF16)
    core = core_of(loaded, config)
    sampled = Sampling(max_tokens=40, temperature=1.0, seed=11, top_p=0.9, logprobs=2)
    asked = [
        (p, s) for p in prompts(config["vocab_size"]) for s in (Sampling(max_tokens=40, logprobs=2), sampled)
    ]
    check_company(core, asked)
    core.close()


def test_preempted_sequences_go_on_with_the_same_tokens() -> None:
    config = MODELS["qwen2"]
    engine = CONFIG.__class__(**{**CONFIG.__dict__, "num_gpu_blocks": 40, "enable_prefix_caching": False})
    core = core_of(backend(config, "cuda", DType.BF16, engine), config, engine)
    rng = np.random.default_rng(3)
    asked = [(rng.integers(0, 515, 60).tolist(), Sampling(max_tokens=120)) for _ in range(8)]
    together = [tokens_of(o) for o in run(core, asked)]
    assert core.stats().preemptions > 0
    assert together == [tokens_of(run(core, [request])[0]) for request in asked]
    core.close()


def test_sampling_draws_what_the_cpu_draws() -> None:
    config = MODELS["llama"]
    rng = np.random.default_rng(9)
    specs = [
        Sampling(max_tokens=16, temperature=0.8, seed=1),
        Sampling(max_tokens=16, temperature=1.2, top_k=7, seed=2),
        Sampling(max_tokens=16, temperature=1.0, top_p=0.6, seed=3),
        Sampling(max_tokens=16, temperature=1.0, min_p=0.2, seed=4),
        Sampling(max_tokens=16, repetition_penalty=1.7, presence_penalty=0.5, frequency_penalty=0.3),
        Sampling(max_tokens=16, logit_bias=((7, 9.0), (8, -100.0)), min_tokens=8, stop_token_ids=(7,)),
    ]
    asked = [(rng.integers(0, 515, 12).tolist(), spec) for spec in specs]
    drawn = {}
    for device in ("cpu", "cuda"):
        core = core_of(backend(config, device, DType.F16), config)
        drawn[device] = [tokens_of(o) for o in run(core, asked)]
        core.close()
    same = sum(a[:4] == b[:4] for a, b in zip(drawn["cpu"], drawn["cuda"], strict=True))
    assert same >= len(specs) - 1, drawn  # rounding may move one draw across a boundary


@pytest.mark.alone
def test_no_device_memory_is_taken_after_the_start() -> None:
    config = MODELS["llama"]
    engine = CONFIG.__class__(**{**CONFIG.__dict__, "capture_graphs": "eager"})
    loaded = backend(config, "cuda", DType.BF16, engine)
    core = core_of(loaded, config, engine)
    before = Device.free_memory()[0]
    rng = np.random.default_rng(1)
    for _ in range(4):
        run(
            core,
            [
                (rng.integers(0, 515, int(n)).tolist(), Sampling(max_tokens=20))
                for n in rng.integers(1, 200, 24)
            ],
        )
        assert Device.free_memory()[0] == before
    assert core.stats().blocks_used == 0
    core.close()


@pytest.mark.alone
def test_the_debug_check_ends_an_engine_whose_step_takes_memory() -> None:
    config = MODELS["llama"]
    engine = CONFIG.__class__(**{**CONFIG.__dict__, "capture_graphs": "eager", "check_device_memory": True})
    core = core_of(backend(config, "cuda", DType.BF16, engine), config, engine)
    asked = [([1, 2, 3], Sampling(max_tokens=8))]
    run(core, asked)
    taken = Arena(64 << 20)  # as a step that allocates would
    with pytest.raises(RvllmError, match=r"--check-device-memory: a step took [0-9]+ bytes"):
        run(core, asked)
    taken.close()
    core.close()


@pytest.mark.alone
def test_the_ledger_adds_up_to_what_the_driver_says_is_taken() -> None:
    engine = CONFIG.__class__(
        **{
            **CONFIG.__dict__,
            "num_gpu_blocks": None,
            "num_blocks": None,
            "gpu_memory_utilization": 0.6,
            "capture_graphs": "eager",
        }
    )
    loaded = backend(MODELS["qwen2"], "cuda", DType.BF16, engine)
    lines = {line.name: line.nbytes for line in loaded.ledger()}
    free, total = Device.free_memory()
    taken = sum(nbytes for name, nbytes in lines.items() if name != "free")
    assert taken == pytest.approx(total - free, rel=0.01)
    assert total - free <= 0.6 * total  # kernels and graphs included
    assert min(lines.values()) >= 0 and lines["kv cache"] > 0.5 * taken
    loaded.close()
