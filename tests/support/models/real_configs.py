"""Configurations of published models, as their config.json files have them: some for every architecture.

Facts for planning tests and for measurements with random weights; `CUT` says where layers were left out so
that a model fits one card.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def _of(architecture: str, **fields: Any) -> Config:
    return {"architectures": [architecture], "tie_word_embeddings": False, "hidden_act": "silu", **fields}


_YARN_40 = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
_MAMBA = {
    "conv_kernel": 4, "head_dim": 128, "layer_norm_epsilon": 1e-5, "mlp_hidden_act": "relu2", "n_groups": 8,
    "ssm_state_size": 128, "mamba_head_dim": 64, "num_attention_heads": 32, "vocab_size": 131072,
    "use_conv_bias": True, "time_step_min": 0.001,
}  # fmt: skip

CONFIGS: dict[str, Config] = {
    "Llama-3.1-8B": _of(
        "LlamaForCausalLM", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072,
        rms_norm_eps=1e-5, rope_theta=500000.0,
        rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 8192},
    ),
    "Mistral-7B-v0.3": _of(
        "MistralForCausalLM", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=32768, max_position_embeddings=32768,
        rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None,
    ),
    "Qwen2.5-7B": _of(
        "Qwen2ForCausalLM", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, vocab_size=152064, max_position_embeddings=32768,
        rms_norm_eps=1e-6, rope_theta=1e6,
    ),
    "Qwen3-8B": _of(
        "Qwen3ForCausalLM", hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936,
        max_position_embeddings=40960, rms_norm_eps=1e-6, rope_theta=1e6,
    ),
    "SmolLM3-3B": _of(
        "SmolLM3ForCausalLM", hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
        num_attention_heads=16, num_key_value_heads=4, vocab_size=128256, max_position_embeddings=65536,
        rms_norm_eps=1e-6, rope_theta=5e6, tie_word_embeddings=True,
    ),
    "Granite-3.1-8B": _of(
        "GraniteForCausalLM", hidden_size=4096, intermediate_size=12800, num_hidden_layers=40,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=49155, max_position_embeddings=131072,
        rms_norm_eps=1e-5, rope_theta=1e7, embedding_multiplier=12.0, attention_multiplier=0.0078125,
        residual_multiplier=0.22, logits_scaling=16.0, tie_word_embeddings=True,
    ),
    "Command-R-35B": _of(
        "CohereForCausalLM", hidden_size=8192, intermediate_size=22528, num_hidden_layers=40,
        num_attention_heads=64, num_key_value_heads=64, vocab_size=256000, max_position_embeddings=8192,
        layer_norm_eps=1e-5, rope_theta=8e6, logit_scale=0.0625, tie_word_embeddings=True,
    ),
    "Command-R7B": _of(
        "Cohere2ForCausalLM", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=256000, max_position_embeddings=132096,
        layer_norm_eps=1e-5, rope_theta=50000.0, logit_scale=0.25, sliding_window=4096,
        sliding_window_pattern=4, tie_word_embeddings=True,
    ),
    "Pythia-6.9b": _of(
        "GPTNeoXForCausalLM", hidden_size=4096, intermediate_size=16384, num_hidden_layers=32,
        num_attention_heads=32, vocab_size=50432, max_position_embeddings=2048, rotary_pct=0.25,
        use_parallel_residual=True, layer_norm_eps=1e-5, hidden_act="gelu",
    ),
    "Pythia-12b": _of(
        "GPTNeoXForCausalLM", hidden_size=5120, intermediate_size=20480, num_hidden_layers=36,
        num_attention_heads=40, vocab_size=50688, max_position_embeddings=2048, rotary_pct=0.25,
        use_parallel_residual=True, layer_norm_eps=1e-5, hidden_act="gelu",
    ),
    "StableLM-2-1.6B": _of(
        "StableLmForCausalLM", hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
        num_attention_heads=32, num_key_value_heads=32, vocab_size=100352, max_position_embeddings=4096,
        layer_norm_eps=1e-5, partial_rotary_factor=0.25, use_qkv_bias=True,
    ),
    "StableLM-2-12B": _of(
        "StableLmForCausalLM", hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=100352, max_position_embeddings=4096,
        layer_norm_eps=1e-5, partial_rotary_factor=0.25, qk_layernorm=True, use_parallel_residual=True,
    ),
    "Gemma-7B": _of(
        "GemmaForCausalLM", hidden_size=3072, intermediate_size=24576, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=16, head_dim=256, vocab_size=256000,
        max_position_embeddings=8192, rms_norm_eps=1e-6, hidden_act="gelu_pytorch_tanh",
        tie_word_embeddings=True,
    ),
    "Gemma-2-9B": _of(
        "Gemma2ForCausalLM", hidden_size=3584, intermediate_size=14336, num_hidden_layers=42,
        num_attention_heads=16, num_key_value_heads=8, head_dim=256, vocab_size=256000,
        max_position_embeddings=8192, rms_norm_eps=1e-6, hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=256, sliding_window=4096, attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0, tie_word_embeddings=True,
    ),
    "Gemma-3-4B": _of(
        "Gemma3ForCausalLM", hidden_size=2560, intermediate_size=10240, num_hidden_layers=34,
        num_attention_heads=8, num_key_value_heads=4, head_dim=256, vocab_size=262208,
        max_position_embeddings=131072, rms_norm_eps=1e-6, hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=256, sliding_window=1024, sliding_window_pattern=6, rope_theta=1e6,
        rope_local_base_freq=10000.0, rope_scaling={"rope_type": "linear", "factor": 8.0},
        tie_word_embeddings=True,
    ),
    "Gemma-3-12B": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {
            "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 262208,
            "query_pre_attn_scalar": 256, "sliding_window": 1024, "sliding_window_pattern": 6,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    },
    "Phi-3-mini": _of(
        "Phi3ForCausalLM", hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, vocab_size=32064, max_position_embeddings=4096,
        original_max_position_embeddings=4096, rms_norm_eps=1e-5, sliding_window=2047,
    ),
    "Phi-3-small": _of(
        "Phi3SmallForCausalLM", hidden_size=4096, ff_intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=100352, max_position_embeddings=8192,
        layer_norm_epsilon=1e-5, hidden_act="gegelu", gegelu_limit=20.0, dense_attention_every_n_layers=2,
        blocksparse_block_size=64, blocksparse_num_local_blocks=16, blocksparse_vert_stride=8,
        blocksparse_homo_head_pattern=False, mup_use_scaling=True, mup_attn_multiplier=1.0,
        mup_embedding_multiplier=10.0, mup_width_multiplier=8.0, rope_embedding_base=1000000,
        rope_position_scale=1.0, tie_word_embeddings=True,
        dummy_token_indices=[100256, 100258, 100259, 100260, 100264, 100265, *range(100267, 100352)],
    ),
    "Mixtral-8x7B": _of(
        "MixtralForCausalLM", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=32000, max_position_embeddings=32768,
        rms_norm_eps=1e-5, rope_theta=1e6, num_local_experts=8, num_experts_per_tok=2,
    ),
    "Qwen3-30B-A3B": _of(
        "Qwen3MoeForCausalLM", hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
        num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        vocab_size=151936, max_position_embeddings=40960, rms_norm_eps=1e-6, rope_theta=1e6,
        num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, decoder_sparse_step=1,
        mlp_only_layers=[],
    ),
    "DeepSeek-V2-Lite": _of(
        "DeepseekV2ForCausalLM", hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408,
        num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16, vocab_size=102400,
        max_position_embeddings=163840, rms_norm_eps=1e-6, rope_theta=10000.0, q_lora_rank=None,
        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64,
        n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1, topk_method="greedy",
        routed_scaling_factor=1.0, norm_topk_prob=False,
        rope_scaling={**_YARN_40, "mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "DeepSeek-V3": _of(
        "DeepseekV3ForCausalLM", hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
        num_hidden_layers=61, num_attention_heads=128, num_key_value_heads=128, vocab_size=129280,
        max_position_embeddings=163840, rms_norm_eps=1e-6, rope_theta=10000.0, q_lora_rank=1536,
        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=256,
        n_shared_experts=1, num_experts_per_tok=8, first_k_dense_replace=3, n_group=8, topk_group=4,
        routed_scaling_factor=2.5, norm_topk_prob=True,
        rope_scaling={**_YARN_40, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "Nemotron-H-8B": _of(
        "NemotronHForCausalLM", hidden_size=4096, intermediate_size=21504, num_key_value_heads=8,
        mamba_num_heads=128, max_position_embeddings=8192,
        hybrid_override_pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-", **_MAMBA,
    ),
    "Nemotron-3-Nano-30B-A3B": _of(
        "NemotronHForCausalLM", hidden_size=2688, intermediate_size=1856, num_key_value_heads=2,
        mamba_num_heads=64, max_position_embeddings=262144, n_routed_experts=128, num_experts_per_tok=6,
        n_group=1, topk_group=1, routed_scaling_factor=2.5, norm_topk_prob=True,
        moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712,
        hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", **_MAMBA,
    ),
    "BERT-large": _of(
        "BertModel", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
        num_attention_heads=16, vocab_size=30522, max_position_embeddings=512, layer_norm_eps=1e-12,
        hidden_act="gelu",
    ),
    "RoBERTa-large": _of(
        "RobertaModel", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
        num_attention_heads=16, vocab_size=50265, max_position_embeddings=514, layer_norm_eps=1e-5,
        hidden_act="gelu", type_vocab_size=1, pad_token_id=1,
    ),
    "multilingual-E5-large": _of(
        "XLMRobertaModel", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
        num_attention_heads=16, vocab_size=250002, max_position_embeddings=514, layer_norm_eps=1e-5,
        hidden_act="gelu", type_vocab_size=1, pad_token_id=1,
    ),
    "MiniLM-L6": _of(
        "BertModel", hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12,
        vocab_size=30522, max_position_embeddings=512, layer_norm_eps=1e-12, hidden_act="gelu",
    ),
}  # fmt: skip

CUT: dict[str, Config] = {
    "Mixtral-8x7B": {"num_hidden_layers": 24},  # of 32: fits a card with 80 GB
    "DeepSeek-V3": {"num_hidden_layers": 3, "first_k_dense_replace": 1},  # of 61
}


def on_one_card(name: str) -> tuple[str, Config]:
    """The model's name and config, with fewer layers where the whole does not fit one card."""
    config = CONFIGS[name]
    cut = CUT.get(name)
    if cut is None:
        return name, config
    label = f"{name} ({cut['num_hidden_layers']} of {config['num_hidden_layers']} layers)"
    return label, {**config, **cut}
