"""A tiny model of every architecture for comparisons of two devices: particulars on and off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rvllm.backends.base import StepBatch
from rvllm.engine.ipc.messages import Output, Sampling
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program
from support.kernels.gpu_engine import ROUND
from support.models import archs_tiny
from support.models.tiny import ArrayCheckpoint

VOCAB = 259
DTYPES = [DType.BF16, DType.F16]
LENGTHS = (1, 5, 17, 64, 139)
TOLERANCE = {DType.BF16: 0.12, DType.F16: 0.02}  # of log-probabilities; float32 sums, 16-bit activations
ROUTED = {DType.BF16: 0.75, DType.F16: 0.9}  # of tokens within it where a near tie may choose other experts
COSINE = {DType.BF16: 2e-3, DType.F16: 1e-4}


@dataclass(frozen=True)
class Case:
    """A config; routed: whether tokens choose experts."""

    config: dict[str, Any]
    routed: bool = False


def case(architecture: str, routed: bool = False, **fields: Any) -> Case:
    """A case with the fields all of them share."""
    base = {
        "architectures": [architecture], "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 200,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "tie_word_embeddings": False, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "layer_norm_eps": 1e-5,
    }  # fmt: skip
    return Case({**base, **fields}, routed)


def factors(count: int, step: float) -> list[float]:
    return [1.0 + step * i for i in range(count)]


PHI3_LONG = {
    "num_attention_heads": 2, "num_key_value_heads": 1, "partial_rotary_factor": 0.75, "rope_theta": 5000.0,
    "tie_word_embeddings": True,
    "rope_scaling": {"type": "longrope", "short_factor": factors(24, 0.1), "long_factor": factors(24, 0.7)},
}  # fmt: skip
DEEPSEEK = {
    "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 32, "moe_intermediate_size": 48, "n_shared_experts": 1, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1,
}  # fmt: skip
YARN = {
    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
PHI3_SMALL = {
    "hidden_size": 256, "ff_intermediate_size": 96, "layer_norm_epsilon": 1e-5, "hidden_act": "gegelu",
    "dense_attention_every_n_layers": 2, "rope_embedding_base": 5000, "rope_position_scale": 1.0,
}  # fmt: skip
NEMOTRON = {
    "head_dim": 32, "layer_norm_epsilon": 1e-5, "conv_kernel": 4, "ssm_state_size": 64, "mamba_head_dim": 16,
    "mamba_num_heads": 8, "n_groups": 2, "use_conv_bias": True, "mlp_hidden_act": "relu2", "chunk_size": 32,
}  # fmt: skip

MODELS: dict[str, Case] = {
    "llama": case("LlamaForCausalLM", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral_window": case("MistralForCausalLM", sliding_window=37, head_dim=128),
    "qwen2": case("Qwen2ForCausalLM", num_attention_heads=2, num_key_value_heads=1, rope_theta=1e6),
    "cohere": case("CohereForCausalLM", logit_scale=1.75, rope_theta=8000.0, tie_word_embeddings=True),
    "cohere_qk_norm": case(
        "CohereForCausalLM", hidden_size=160, num_attention_heads=5, num_key_value_heads=1, logit_scale=1.5,
        use_qk_norm=True, attention_bias=True, layer_norm_eps=1e-3,
    ),
    "cohere2": case(
        "Cohere2ForCausalLM", num_hidden_layers=4, logit_scale=1.5, sliding_window=20,
        sliding_window_pattern=4, rope_theta=8000.0, tie_word_embeddings=True,
    ),
    "cohere2_layer_types": case(
        "Cohere2ForCausalLM", logit_scale=1.0, sliding_window=7, attention_bias=True,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "gpt_neox": case(
        "GPTNeoXForCausalLM", hidden_size=256, rotary_pct=0.25, rotary_emb_base=5000,
        use_parallel_residual=True, hidden_act="gelu", num_key_value_heads=4,
    ),
    "gpt_neox_sequential": case(
        "GPTNeoXForCausalLM", hidden_size=192, num_attention_heads=3, num_key_value_heads=3,
        use_parallel_residual=False, attention_bias=False, hidden_act="gelu_new", tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 1.0},
    ),
    "stablelm": case("StableLmForCausalLM", hidden_size=256, partial_rotary_factor=0.25, use_qkv_bias=True),
    "stablelm_parallel_d160": case(
        "StableLmForCausalLM", hidden_size=320, num_attention_heads=2, num_key_value_heads=1,
        partial_rotary_factor=0.25, qk_layernorm=True, use_parallel_residual=True,
    ),
    "stablelm_qk_norm": case(
        "StableLmForCausalLM", hidden_size=192, num_attention_heads=6, qk_layernorm=True,
        partial_rotary_factor=0.5, tie_word_embeddings=True,
    ),
    "gemma": case(
        "GemmaForCausalLM", num_attention_heads=2, num_key_value_heads=1, hidden_act="gelu",
        tie_word_embeddings=True,
    ),
    "gemma_bias": case(
        "GemmaForCausalLM", num_attention_heads=3, num_key_value_heads=3, head_dim=96, attention_bias=True,
        hidden_act="gelu_pytorch_tanh",
    ),
    "gemma2": case(
        "Gemma2ForCausalLM", head_dim=64, query_pre_attn_scalar=40, sliding_window=24,
        attn_logit_softcapping=2.0, final_logit_softcapping=4.0, hidden_activation="gelu_pytorch_tanh",
        tie_word_embeddings=True,
    ),
    "gemma2_no_caps": case(
        "Gemma2ForCausalLM", num_hidden_layers=2, head_dim=32, query_pre_attn_scalar=32, sliding_window=9,
        attn_logit_softcapping=None, final_logit_softcapping=None, attention_bias=True,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "gemma3": case(
        "Gemma3ForCausalLM", head_dim=256, num_attention_heads=2, num_key_value_heads=1,
        query_pre_attn_scalar=200, sliding_window=24, final_logit_softcapping=5.0, tie_word_embeddings=True,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 20000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        },
    ),
    "gemma3_old": case(
        "Gemma3ForCausalLM", head_dim=64, query_pre_attn_scalar=64, num_hidden_layers=4, sliding_window=11,
        sliding_window_pattern=3, attention_bias=True, rope_theta=50000.0, rope_local_base_freq=200.0,
        rope_scaling={"rope_type": "linear", "factor": 4.0},
    ),
    "gemma3_with_images": Case(
        {
            "architectures": ["Gemma3ForConditionalGeneration"], "vocab_size": VOCAB,
            "text_config": {
                "hidden_size": 128, "intermediate_size": 200, "num_hidden_layers": 2, "vocab_size": VOCAB,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
                "query_pre_attn_scalar": 32, "sliding_window": 40, "max_position_embeddings": 512,
            },
        }
    ),
    "qwen3": case("Qwen3ForCausalLM", head_dim=128, rope_theta=1e6, rms_norm_eps=1e-6),
    "qwen3_window": case(
        "Qwen3ForCausalLM", head_dim=32, attention_bias=True, use_sliding_window=True, sliding_window=13,
        max_window_layers=1, tie_word_embeddings=True, max_position_embeddings=64,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "phi3": case(
        "Phi3ForCausalLM", num_key_value_heads=4, sliding_window=21, original_max_position_embeddings=512
    ),
    "phi3_long": case("Phi3ForCausalLM", **PHI3_LONG, original_max_position_embeddings=64),
    "phi3_short": case(
        "Phi3ForCausalLM", **PHI3_LONG, original_max_position_embeddings=512,
    ),
    "granite": case(
        "GraniteForCausalLM", embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.7,
        logits_scaling=0.4, tie_word_embeddings=True, rope_theta=7000.0,
    ),
    "granite_plain": case(
        "GraniteForCausalLM", attention_bias=True, mlp_bias=True, attention_multiplier=0.2,
    ),
    "smollm3": case("SmolLM3ForCausalLM", num_hidden_layers=4, rope_theta=5000.0, tie_word_embeddings=True),
    "smollm3_window": case(
        "SmolLM3ForCausalLM", attention_bias=True, mlp_bias=True, no_rope_layers=[0, 1, 1],
        use_sliding_window=True, sliding_window=15,
    ),
    "mixtral": case("MixtralForCausalLM", True, num_local_experts=4, num_experts_per_tok=2),
    "mixtral_window": case(
        "MixtralForCausalLM", True, num_local_experts=5, num_experts_per_tok=3, sliding_window=19,
        tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh",
    ),
    "qwen3_moe": case(
        "Qwen3MoeForCausalLM", True, head_dim=64, moe_intermediate_size=48, num_experts=16,
        num_experts_per_tok=4, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
    ),
    "qwen3_moe_some": case(
        "Qwen3MoeForCausalLM", True, head_dim=32, moe_intermediate_size=40, num_hidden_layers=5,
        num_experts=6, num_experts_per_tok=2, norm_topk_prob=False, decoder_sparse_step=2,
        mlp_only_layers=[3], attention_bias=True, use_sliding_window=True, sliding_window=17,
        tie_word_embeddings=True,
    ),
    "deepseek_v2_lite": case(
        "DeepseekV2ForCausalLM", True, **DEEPSEEK | {"n_shared_experts": 2}, q_lora_rank=None,
        topk_method="greedy", routed_scaling_factor=1.0, norm_topk_prob=False,
    ),
    "deepseek_v2": case(
        "DeepseekV2ForCausalLM", True, **DEEPSEEK, q_lora_rank=48, topk_method="group_limited_greedy",
        n_group=4, topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=False, attention_bias=True,
        mlp_bias=True, rope_scaling={**YARN, "mscale": 0.707, "mscale_all_dim": 0.4},
    ),
    "deepseek_v3": case(
        "DeepseekV3ForCausalLM", True, **DEEPSEEK, q_lora_rank=32, n_group=4, topk_group=2,
        routed_scaling_factor=2.5, norm_topk_prob=True,
        rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "deepseek_v3_halves": case(
        "DeepseekV3ForCausalLM", True, **DEEPSEEK | {"first_k_dense_replace": 2}, q_lora_rank=None,
        n_group=1, topk_group=1, routed_scaling_factor=1.5, norm_topk_prob=False, rope_interleave=False,
        attention_bias=True,
    ),
    "phi3small": case(
        "Phi3SmallForCausalLM", **PHI3_SMALL, num_hidden_layers=4, gegelu_limit=1.2,
        blocksparse_block_size=16, blocksparse_num_local_blocks=2, blocksparse_vert_stride=4,
        blocksparse_homo_head_pattern=False, mup_use_scaling=True, mup_attn_multiplier=1.5,
        mup_embedding_multiplier=0.5, mup_width_multiplier=0.8, dummy_token_indices=[5, 17, 126],
    ),
    "phi3small_plain": case(
        "Phi3SmallForCausalLM", **PHI3_SMALL | {"dense_attention_every_n_layers": 0}, gegelu_limit=None,
        blocksparse_block_size=64, blocksparse_num_local_blocks=1, blocksparse_vert_stride=3,
        blocksparse_homo_head_pattern=True, mup_use_scaling=False, mup_embedding_multiplier=None,
        mup_width_multiplier=None, tie_word_embeddings=True,
    ),
    "nemotron_h": case(
        "NemotronHForCausalLM", **NEMOTRON, hybrid_override_pattern="M-M*-M", num_hidden_layers=6
    ),
    "nemotron_h_moe": case(
        "NemotronHForCausalLM", True, **NEMOTRON | {"n_groups": 1, "use_conv_bias": False},
        hybrid_override_pattern="MEM*EM", num_hidden_layers=6, use_bias=True, mlp_bias=True,
        n_routed_experts=8, num_experts_per_tok=3, n_group=2, topk_group=1, routed_scaling_factor=2.5,
        moe_intermediate_size=40, norm_topk_prob=True, moe_shared_expert_intermediate_size=56,
        time_step_min=0.01,
    ),
    "nemotron_h_latent": case(
        "NemotronHForCausalLM", True, **NEMOTRON | {"n_groups": 4},
        layers_block_type=["mamba", "moe", "attention", "mlp"], num_hidden_layers=4, n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=48, moe_latent_size=40,
        moe_shared_expert_intermediate_size=32, norm_topk_prob=False,
    ),
    "nemotron_h_shared": case(  # the shared MLP is two experts wide
        "NemotronHForCausalLM", True, **NEMOTRON, hybrid_override_pattern="ME*E", num_hidden_layers=4,
        n_routed_experts=8, num_experts_per_tok=3, routed_scaling_factor=2.5, moe_intermediate_size=40,
        norm_topk_prob=True, moe_shared_expert_intermediate_size=80,
    ),
}  # fmt: skip


def encoder(architecture: str, how: str, normalise: bool, **fields: Any) -> dict[str, Any]:
    """An encoder's config."""
    base = {
        "architectures": [architecture], "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 200,
        "num_attention_heads": 4, "num_hidden_layers": 3, "max_position_embeddings": 160,
        "type_vocab_size": 2, "pad_token_id": 0, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
        "sentence_transformers": {"pooling": how, "normalise": normalise},
    }  # fmt: skip
    return base | fields


ENCODERS: dict[str, dict[str, Any]] = {
    "bert_mean": encoder("BertModel", "mean", True),
    "bert_cls": encoder(
        "BertModel", "cls", False, num_attention_heads=2, hidden_act="gelu_new", type_vocab_size=1
    ),
    "roberta_last": encoder(
        "RobertaModel", "last", True, pad_token_id=1, type_vocab_size=1, hidden_act="relu"
    ),
    "xlm_roberta_mean": encoder(
        "XLMRobertaModel", "mean", False, pad_token_id=3, hidden_size=384, num_attention_heads=3
    ),
}


def program_of(config: Mapping[str, Any], dtype: DType) -> Program:
    return build_program(ModelConfig(config, "tiny"), dtype)


def tensors_of(name: str, config: dict[str, Any], dtype: DType) -> ArrayCheckpoint:
    """The model's random weights, exact in `dtype`."""
    found = archs_tiny.random_tensors(name, config)
    return ArrayCheckpoint(config, {k: v.astype(ROUND[dtype]).astype(np.float32) for k, v in found.items()})


def asked(seed: int = 5) -> list[tuple[list[int], Sampling]]:
    rng = np.random.default_rng(seed)
    sampling = Sampling(max_tokens=6, logprobs=2, prompt_logprobs=1)
    return [(rng.integers(0, VOCAB, n).tolist(), sampling) for n in LENGTHS]


def scores(outputs: list[list[Output]]) -> np.ndarray:
    """Log-probabilities of all prompts' tokens."""
    return np.array([entry.logprob for out in outputs for entry in out[0].prompt_logprobs or []])


def text_batch(texts: list[list[int]]) -> StepBatch:
    nothing = np.zeros(len(texts), np.int32)
    lengths = np.array([len(t) for t in texts], np.int32)
    tokens = np.concatenate([np.array(t, np.int32) for t in texts])
    return StepBatch(
        0, np.arange(len(texts), dtype=np.int32), lengths, nothing, tokens, nothing.astype(np.bool_)
    )
