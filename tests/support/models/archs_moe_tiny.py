"""Tiny checkpoints of the architectures with experts, latent attention or block-sparse attention."""

from __future__ import annotations

from support.models.archs_tiny import case

_DEEPSEEK = {
    "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 4,
    "num_hidden_layers": 3, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
}  # fmt: skip

_THREE_HEADS = {"num_attention_heads": 3, "num_key_value_heads": 3}

CASES = {
    c.name: c
    for c in [
        case(
            "mixtral", "MixtralForCausalLM", "mixtral", hidden_size=48, intermediate_size=56,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
            rms_norm_eps=1e-5, tie_word_embeddings=False, rope_theta=8000.0,
        ),
        case(
            "mixtral_window", "MixtralForCausalLM", "mixtral", hidden_size=36, intermediate_size=50,
            num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=3, num_local_experts=5,
            num_experts_per_tok=3, sliding_window=19, tie_word_embeddings=True, head_dim=16,
            hidden_act="gelu_pytorch_tanh",
            rope_parameters={"rope_type": "default", "rope_theta": 600.0},
        ),
        case(
            "qwen3_moe", "Qwen3MoeForCausalLM", "qwen3_moe", hidden_size=40, intermediate_size=56,
            moe_intermediate_size=24, num_attention_heads=3, num_key_value_heads=1, head_dim=24,
            num_experts=16, num_experts_per_tok=4, norm_topk_prob=True, rope_theta=1000000.0,
            tie_word_embeddings=False, decoder_sparse_step=1, mlp_only_layers=[],
        ),
        case(
            "qwen3_moe_some", "Qwen3MoeForCausalLM", "qwen3_moe", hidden_size=48, intermediate_size=50,
            moe_intermediate_size=33, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
            num_hidden_layers=5, num_experts=6, num_experts_per_tok=2, norm_topk_prob=False,
            decoder_sparse_step=2, mlp_only_layers=[3], attention_bias=True, use_sliding_window=True,
            sliding_window=17, tie_word_embeddings=True,
        ),
        case(  # DeepSeek-V2-Lite's shape: queries without a latent, greedy routing
            "deepseek_v2_lite", "DeepseekV2ForCausalLM", "deepseek_v2", **_DEEPSEEK, q_lora_rank=None,
            kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=8,
            n_shared_experts=2, num_experts_per_tok=3, moe_intermediate_size=20, first_k_dense_replace=1,
            topk_method="greedy", routed_scaling_factor=1.0, norm_topk_prob=False, rope_theta=10000.0,
        ),
        case(  # DeepSeek-V2's shape: everything on
            "deepseek_v2", "DeepseekV2ForCausalLM", "deepseek_v2", **_DEEPSEEK | _THREE_HEADS,
            q_lora_rank=20, kv_lora_rank=28, qk_nope_head_dim=10, qk_rope_head_dim=12, v_head_dim=18,
            n_routed_experts=12, n_shared_experts=1, num_experts_per_tok=4, moe_intermediate_size=22,
            first_k_dense_replace=1, topk_method="group_limited_greedy", n_group=4, topk_group=2,
            routed_scaling_factor=2.5, norm_topk_prob=False, attention_bias=True, mlp_bias=True,
            max_position_embeddings=256,
            rope_scaling={
                "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32,
                "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.4,
            },
        ),
        case(
            "deepseek_v2_yarn", "DeepseekV2ForCausalLM", "deepseek_v2", **_DEEPSEEK, q_lora_rank=16,
            kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=6,
            n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=22, first_k_dense_replace=0,
            topk_method="group_limited_greedy", n_group=3, topk_group=1, routed_scaling_factor=1.5,
            max_position_embeddings=64,
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0,
                "original_max_position_embeddings": 64, "mscale": 0.8, "mscale_all_dim": 0.8,
            },
        ),
        case(
            "deepseek_v3", "DeepseekV3ForCausalLM", "deepseek_v3", **_DEEPSEEK, q_lora_rank=24,
            kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=12,
            n_shared_experts=1, num_experts_per_tok=3, moe_intermediate_size=20, first_k_dense_replace=1,
            n_group=4, topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=True,
            rope_scaling={
                "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32,
                "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
            },
        ),
        case(
            "deepseek_v3_halves", "DeepseekV3ForCausalLM", "deepseek_v3", **_DEEPSEEK, q_lora_rank=None,
            kv_lora_rank=20, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=8,
            n_shared_experts=2, num_experts_per_tok=2, moe_intermediate_size=24, first_k_dense_replace=2,
            n_group=1, topk_group=1, routed_scaling_factor=1.5, norm_topk_prob=False, rope_interleave=False,
            attention_bias=True,
        ),
        case(
            "phi3small", "Phi3SmallForCausalLM", "phi3small", hidden_size=64, ff_intermediate_size=48,
            num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4, layer_norm_epsilon=1e-5,
            hidden_act="gegelu", gegelu_limit=1.2, dense_attention_every_n_layers=2,
            blocksparse_block_size=16, blocksparse_num_local_blocks=2, blocksparse_vert_stride=4,
            blocksparse_homo_head_pattern=False, mup_use_scaling=True, mup_attn_multiplier=1.5,
            mup_embedding_multiplier=0.5, mup_width_multiplier=0.8, rope_embedding_base=5000,
            rope_position_scale=1.0, tie_word_embeddings=False, dummy_token_indices=[5, 17, 126],
        ),
        case(
            "phi3small_plain", "Phi3SmallForCausalLM", "phi3small", hidden_size=54, ff_dim_multiplier=2,
            gegelu_pad_to_256=False, num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=3,
            hidden_act="gegelu", gegelu_limit=None, dense_attention_every_n_layers=0,
            blocksparse_block_size=8, blocksparse_num_local_blocks=3, blocksparse_vert_stride=9,
            blocksparse_homo_head_pattern=True, mup_use_scaling=False, mup_embedding_multiplier=None,
            mup_width_multiplier=None, rope_embedding_base=1000, rope_position_scale=2.0,
            tie_word_embeddings=False,
        ),
        case(
            "phi3small_long", "Phi3SmallForCausalLM", "phi3small", hidden_size=48, ff_intermediate_size=40,
            num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2, hidden_act="gegelu",
            gegelu_limit=20.0, dense_attention_every_n_layers=2, blocksparse_block_size=16,
            blocksparse_num_local_blocks=1, blocksparse_vert_stride=5, mup_attn_multiplier=2.0,
            mup_embedding_multiplier=1.0, mup_width_multiplier=1.0, rope_embedding_base=2000,
            tie_word_embeddings=True,
            rope_scaling={
                "type": "su", "short_factor": [1.0 + 0.1 * i for i in range(12)],
                "long_factor": [1.0 + 0.5 * i for i in range(12)], "short_mscale": 1.0, "long_mscale": 1.2,
                "original_max_position_embeddings": 64,
            },
        ),
    ]
}  # fmt: skip
