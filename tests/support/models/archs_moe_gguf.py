"""Writes a tiny mixture as llama.cpp's converter would, with the gguf package's writer and name tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf

from support.models import archs_gguf
from support.models.archs_tiny import F32
from support.models.gguf_frame import stacked, write_file

ARCHS = {
    "MixtralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen3MoeForCausalLM": gguf.MODEL_ARCH.QWEN3MOE,
    "DeepseekV2ForCausalLM": gguf.MODEL_ARCH.DEEPSEEK2,
    "DeepseekV3ForCausalLM": gguf.MODEL_ARCH.DEEPSEEK2,
}


def write(
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, F32],
    *,
    apart: bool = True,
    quantised: gguf.GGMLQuantizationType | None = None,
    instead: dict[str, F32] | None = None,
) -> Path:
    """Writes `path`.

    apart: kv_b_proj is split into keys, transposed, and values, as since 2025. quantised: the type of stacked
    experts, float32 otherwise. instead: replaces tensors by llama.cpp's names.
    """
    name = config["architectures"][0]

    def metadata(writer: gguf.GGUFWriter) -> None:
        if ARCHS[name] is gguf.MODEL_ARCH.DEEPSEEK2:
            _deepseek(writer, config, apart)
        else:
            archs_gguf.metadata(writer, config)
        _mixture(writer, config)

    converted = _converted(name, config, tensors, apart)
    return write_file(path, ARCHS[name], config, metadata, converted, quantised=quantised, instead=instead)


def _converted(name: str, config: dict[str, Any], tensors: dict[str, F32], apart: bool) -> dict[str, F32]:
    out: dict[str, F32] = {}
    for source, tensor in stacked(tensors).items():
        if name == "MixtralForCausalLM" and re.search(r"\.[qk]_proj\.", source):
            heads = config["num_attention_heads" if ".q_proj." in source else "num_key_value_heads"]
            out[source] = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        elif "kv_b_proj" in source and apart:
            plain = config["qk_nope_head_dim"]
            each = tensor.reshape(config["num_attention_heads"], -1, tensor.shape[1])
            out[source.replace("kv_b_proj", "k_b_proj")] = each[:, :plain].swapaxes(1, 2)
            out[source.replace("kv_b_proj", "v_b_proj")] = each[:, plain:]
        else:
            out[source.replace("e_score_correction_bias", "e_score_correction.bias")] = tensor
    return out


def _deepseek(writer: gguf.GGUFWriter, config: dict[str, Any], apart: bool) -> None:
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or (rope if "factor" in rope else {})
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    key = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    if apart:
        writer.add_head_count_kv(1)
        writer.add_key_length(config["kv_lora_rank"] + config["qk_rope_head_dim"])
        writer.add_value_length(config["kv_lora_rank"])
        writer.add_key_length_mla(key)
        writer.add_value_length_mla(config["v_head_dim"])
    else:
        writer.add_head_count_kv(config["num_attention_heads"])
        writer.add_key_length(key)
        writer.add_value_length(config["v_head_dim"])
    writer.add_rope_dimension_count(config["qk_rope_head_dim"])
    writer.add_kv_lora_rank(config["kv_lora_rank"])
    if config["q_lora_rank"]:
        writer.add_q_lora_rank(config["q_lora_rank"])
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_log_mul(0.1 * scaling["mscale_all_dim"])


def _mixture(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    count = next(config[k] for k in ("num_local_experts", "num_experts", "n_routed_experts") if k in config)
    writer.add_expert_count(count)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "n_shared_experts" not in config:
        return
    sigmoid = config["architectures"] == ["DeepseekV3ForCausalLM"]
    kinds = gguf.ExpertGatingFuncType
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_gating_func(kinds.SIGMOID if sigmoid else kinds.SOFTMAX)
    if config.get("norm_topk_prob"):
        writer.add_expert_weights_norm(True)
    if config.get("n_group"):
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
