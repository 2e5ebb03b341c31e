"""llama.cpp's architectures of recurrent and attention layers in Hugging Face's words: Nemotron-H.

Which layer is which follows from two numbers given per layer, as llama.cpp itself tells them apart: heads of
keys and values for attention, the width of a plain MLP or of an expert, neither for Mamba-2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from rvllm.weights.checkpoint import TensorInfo
from rvllm.weights.gguf.archs import Architecture, Metadata

_GLOBALS = {"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f", "output": "lm_head"}
_LAYERS = {
    "attn_norm": "norm",
    "attn_q": "mixer.q_proj",
    "attn_k": "mixer.k_proj",
    "attn_v": "mixer.v_proj",
    "attn_output": "mixer.o_proj",
    "ssm_in": "mixer.in_proj",
    "ssm_conv1d": "mixer.conv1d",
    "ssm_norm": "mixer.norm",
    "ssm_out": "mixer.out_proj",
    "ffn_up": "mixer.up_proj",
    "ffn_down": "mixer.down_proj",
    "ffn_gate_inp": "mixer.gate",
    "exp_probs_b": "mixer.gate.e_score_correction",
    "ffn_up_shexp": "mixer.shared_experts.up_proj",
    "ffn_down_shexp": "mixer.shared_experts.down_proj",
    "ffn_latent_down": "mixer.fc1_latent_proj",
    "ffn_latent_up": "mixer.fc2_latent_proj",
}
_WHOLE = {"ssm_a": "mixer.A_log", "ssm_d": "mixer.D", "ssm_dt.bias": "mixer.dt_bias"}
_EXPERTS = {"ffn_up_exps": "mixer.experts.{}.up_proj", "ffn_down_exps": "mixer.experts.{}.down_proj"}
_FLAT = ("ssm_a", "ssm_d", "ssm_norm")  # vectors that the file holds as matrices


def _adjust(name: str, info: TensorInfo) -> TensorInfo:
    """Decays are -exp of what Transformers has; some vectors have two dimensions."""
    kind = name.split(".")[2] if name.startswith("blk.") and name.count(".") >= 2 else ""
    shape = (prod(info.shape),) if kind in _FLAT else info.shape
    return replace(info, shape=shape, logarithm=kind == "ssm_a")


def _per_layer(metadata: Metadata, name: str, layers: int) -> list[int]:
    given = metadata.get(name)
    if type(given) is int:
        return [given] * layers
    if not isinstance(given, np.ndarray) or given.dtype.kind not in "iu" or len(given) < layers:
        metadata.fail(name, f"must hold a number for each of {layers} layers")
    return [int(n) for n in given[:layers]]


def _nemotron_h(metadata: Metadata) -> dict[str, Any]:
    """The config of a Nemotron-H file; blocks behind the layers predict further tokens and are left out."""
    blocks, more = metadata.count("block_count"), metadata.opt_count("nextn_predict_layers") or 0
    if more >= blocks:
        metadata.fail("nextn_predict_layers", f"is {more} of {blocks} blocks")
    experts = metadata.opt_count("expert_count") or 0
    heads, inner = metadata.count("ssm.time_step_rank"), metadata.count("ssm.inner_size")
    if inner % heads:
        metadata.fail("ssm.inner_size", f"is {inner}, not a multiple of {heads} heads")
    attention = _per_layer(metadata, "attention.head_count_kv", blocks - more)
    widths = _per_layer(metadata, "feed_forward_length", blocks - more)
    wide = "moe" if experts else "mlp"
    kinds = ["attention" if a else wide if w else "mamba" for a, w in zip(attention, widths, strict=True)]
    config: dict[str, Any] = {
        "num_hidden_layers": len(kinds),
        "layers_block_type": kinds,
        "mlp_hidden_act": "relu2",
        "mamba_num_heads": heads,
        "mamba_head_dim": inner // heads,
        "n_groups": metadata.count("ssm.group_count"),
        "ssm_state_size": metadata.count("ssm.state_size"),
        "conv_kernel": metadata.count("ssm.conv_kernel"),
    }
    if not experts:
        return config
    return config | {
        "n_routed_experts": experts,
        "num_experts_per_tok": metadata.count("expert_used_count"),
        "moe_intermediate_size": metadata.count("expert_feed_forward_length"),
        "moe_shared_expert_intermediate_size": metadata.count("expert_shared_feed_forward_length"),
        "moe_latent_size": metadata.opt_count("moe_latent_size") or None,
        "norm_topk_prob": metadata.opt_bool("expert_weights_norm") or False,
        "routed_scaling_factor": metadata.opt_float("expert_weights_scale") or 1.0,
        "n_group": metadata.opt_count("expert_group_count") or 1,
        "topk_group": metadata.opt_count("expert_group_used_count") or 1,
    }


def _observed(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:

    def some(ending: str) -> bool:
        return any(name.endswith(ending) for name in tensors)

    return {
        "use_bias": some(".in_proj.bias"),
        "use_conv_bias": some(".conv1d.bias"),
        "attention_bias": some(".q_proj.bias"),
        "mlp_bias": some(".up_proj.bias"),
    }


def _architecture(experts: Mapping[str, str]) -> Architecture:
    return Architecture(
        "NemotronHForCausalLM", "nemotron_h", layer_names=_LAYERS, global_names=_GLOBALS,
        layer_prefix="backbone.layers.", whole_names=_WHOLE, experts=experts, by_layer=True,
        adjust=_adjust, observed=_observed, extra=_nemotron_h, hidden_act=None,
        numbers={"layer_norm_epsilon": "attention.layer_norm_rms_epsilon"},
    )  # fmt: skip


HYBRIDS = {"nemotron_h": _architecture({}), "nemotron_h_moe": _architecture(_EXPERTS)}
