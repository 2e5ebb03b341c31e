"""Tiny random Nemotron-H checkpoints under the names their published files use."""

from __future__ import annotations

from support.models.archs_tiny import case

_SHARED = {
    "hidden_size": 48, "intermediate_size": 72, "head_dim": 16, "layer_norm_epsilon": 1e-5,
    "conv_kernel": 4, "ssm_state_size": 12, "mamba_head_dim": 8, "tie_word_embeddings": False,
}  # fmt: skip

CASES = {
    c.name: c
    for c in [
        case(
            "nemotron_h", "NemotronHForCausalLM", "nemotron_h", **_SHARED, hybrid_override_pattern="M-M*-M",
            num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, mamba_num_heads=6, n_groups=2,
            chunk_size=32,
        ),
        case(
            "nemotron_h_moe", "NemotronHForCausalLM", "nemotron_h",
            **_SHARED | {"conv_kernel": 3, "ssm_state_size": 20, "mamba_head_dim": 12},
            hybrid_override_pattern="MEM*EM", num_hidden_layers=6, num_attention_heads=3,
            num_key_value_heads=1, mamba_num_heads=5, n_groups=1, chunk_size=64, use_bias=True,
            use_conv_bias=False, mlp_bias=True, n_routed_experts=8, num_experts_per_tok=3, n_group=2,
            topk_group=1, routed_scaling_factor=2.5, moe_intermediate_size=20, norm_topk_prob=True,
            moe_shared_expert_intermediate_size=28, time_step_min=0.01,
        ),
        case(
            "nemotron_h_latent", "NemotronHForCausalLM", "nemotron_h",
            **_SHARED | {"mamba_head_dim": 16, "ssm_state_size": 16},
            layers_block_type=["mamba", "moe", "attention", "mlp"], num_hidden_layers=4,
            num_attention_heads=2, num_key_value_heads=2, mamba_num_heads=4, n_groups=4, chunk_size=16,
            n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, moe_latent_size=20,
            moe_shared_expert_intermediate_size=16, norm_topk_prob=False,
        ),
        case(  # Nemotron-3-Nano's shape: the shared MLP is two experts wide
            "nemotron_h_shared", "NemotronHForCausalLM", "nemotron_h",
            **_SHARED | {"mamba_head_dim": 16, "ssm_state_size": 16},
            hybrid_override_pattern="ME*E", num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=1, mamba_num_heads=4, n_groups=2, chunk_size=16, n_routed_experts=6,
            num_experts_per_tok=2, moe_intermediate_size=20, moe_shared_expert_intermediate_size=40,
            norm_topk_prob=True, routed_scaling_factor=2.5,
        ),
    ]
}  # fmt: skip
