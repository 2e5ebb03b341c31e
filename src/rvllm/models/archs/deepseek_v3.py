"""DeepseekV3ForCausalLM (DeepSeek-AI 2024b): V2's layers; experts are chosen by biased sigmoid scores."""

from __future__ import annotations

from rvllm.models import blocks
from rvllm.models.archs import deepseek_v2
from rvllm.models.config import ModelConfig
from rvllm.models.moe import Mixture, read_experts, read_groups
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program


def build(config: ModelConfig, dtype: DType) -> Program:
    """The program of a DeepSeek-V3 config; its multi-token prediction layers are not used."""
    config.str("scoring_func", "sigmoid", choices=("sigmoid",))
    config.str("topk_method", "noaux_tc", choices=("noaux_tc",))
    experts = read_experts(config, "n_routed_experts", 256)
    top_k = config.int("num_experts_per_tok", 8, high=experts)
    groups, kept = read_groups(config, experts, top_k)
    if experts // groups < 2:
        raise config.fail("n_group", f"{groups} leaves fewer than two of {experts} experts a group")
    spec = Mixture(
        experts=experts,
        top_k=top_k,
        width=config.int("moe_intermediate_size", 2048),
        activation=blocks.read_activation(config, "hidden_act"),
        correction="e_score_correction_bias",
        scores="sigmoid",
        groups=groups,
        kept_groups=kept,
        group_score="top2",
        renormalise=config.bool("norm_topk_prob", True),
        scale=config.float("routed_scaling_factor", 2.5),
    )
    return deepseek_v2.decoder(config, dtype, spec)
