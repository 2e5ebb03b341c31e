"""Tiny models with experts and with latent attention on a GPU: the CPU's scores, the same bits in company."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rvllm.engine.ipc.messages import Sampling
from rvllm.program.dtypes import DType
from support.kernels.gpu_engine import backend, check_company, core_of, model, needs_gpu, run

pytestmark = [pytest.mark.gpu, needs_gpu]
_TINY = {
    "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 24, "q_lora_rank": None,
    "num_key_value_heads": 6, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3,
    "moe_intermediate_size": 40, "first_k_dense_replace": 3, "topk_method": "greedy",
    "routed_scaling_factor": 1.0,
}  # fmt: skip
_SCALED = {
    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "beta_fast": 32, "beta_slow": 1,
    "mscale": 0.707, "mscale_all_dim": 0.4,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": model("MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2, intermediate_size=168),
    "qwen3_moe": model(
        "Qwen3MoeForCausalLM", num_experts=16, num_experts_per_tok=4, moe_intermediate_size=96,
        norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[1],
    ),
    "v2_dense": model("DeepseekV2ForCausalLM", **_TINY),
    "v2_queries_yarn_biased": model(
        "DeepseekV2ForCausalLM", **{**_TINY, "q_lora_rank": 40}, rope_scaling=_SCALED, attention_bias=True,
    ),
    "v2_real_heads": model(
        "DeepseekV2ForCausalLM", num_attention_heads=20,
        **{**_TINY, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
           "num_key_value_heads": 20},
    ),
    "v3_dense_halves": model(
        "DeepseekV3ForCausalLM",
        **{**_TINY, "topk_method": "noaux_tc", "n_group": 4, "topk_group": 2, "rope_interleave": False},
    ),
    "v2_experts": model("DeepseekV2ForCausalLM", **{**_TINY, "first_k_dense_replace": 1}),
    "v3_experts": model(
        "DeepseekV3ForCausalLM", rope_scaling=_SCALED,
        **{**_TINY, "topk_method": "noaux_tc", "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
           "q_lora_rank": 48, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
    ),
}  # fmt: skip
TOLERANCE = {DType.BF16: 0.15, DType.F16: 0.03}  # of log-probabilities near 1
AGREE = {DType.BF16: 0.8, DType.F16: 0.95}  # of them; near ties of a router may fall to the other side
ROUTED = ("mixtral", "qwen3_moe", "v2_experts", "v3_experts")


def asked(vocab: int, sampling: Sampling) -> list[tuple[list[int], Sampling]]:
    rng = np.random.default_rng(5)
    return [(rng.integers(0, vocab, n).tolist(), sampling) for n in (1, 5, 16, 33, 70, 300, 600)]


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16], ids=lambda d: d.value)
@pytest.mark.parametrize("name", MODELS)
def test_scores_agree_with_the_cpu(name: str, dtype: DType) -> None:
    config, found = MODELS[name], {}
    for device in ("cpu", "cuda"):
        core = core_of(backend(config, device, dtype), config)
        given = asked(config["vocab_size"], Sampling(max_tokens=6, logprobs=1, prompt_logprobs=1))
        found[device] = run(core, given)
        core.close()
    pairs = [
        (a.logprob, b.logprob)
        for cpu, gpu in zip(found["cpu"], found["cuda"], strict=True)
        for a, b in zip(cpu[0].prompt_logprobs or [], gpu[0].prompt_logprobs or [], strict=True)
    ]
    # The first tokens that were drawn; later ones follow other tokens where the first differ.
    pairs += [
        (a[0].logprobs[0].logprob, b[0].logprobs[0].logprob)
        for a, b in zip(found["cpu"], found["cuda"], strict=True)
        if a[0].logprobs and b[0].logprobs
    ]
    apart = np.abs(np.subtract(*np.array(pairs).T))
    assert len(apart) > 1000
    assert (apart < TOLERANCE[dtype]).mean() >= (AGREE[dtype] if name in ROUTED else 1), np.sort(apart)[-40:]
    assert np.median(apart) < TOLERANCE[dtype] / 4


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3_moe", "v2_queries_yarn_biased", "v2_real_heads", "v3_experts"]
)
def test_a_request_gives_the_same_bits_alone_in_company_and_in_chunks(name: str) -> None:
    config = MODELS[name]
    core = core_of(backend(config, "cuda", DType.BF16), config)
    requests = asked(config["vocab_size"], Sampling(max_tokens=30, logprobs=2))
    requests += asked(config["vocab_size"], Sampling(max_tokens=30, temperature=1.0, seed=11, logprobs=2))
    check_company(core, requests)
    core.close()
