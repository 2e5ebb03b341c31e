"""Writes a tiny mixture as llama.cpp's converter would, with the gguf package's writer and name tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from support.models.archs_tiny import F32

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
    writer = gguf.GGUFWriter(str(path), gguf.MODEL_ARCH_NAMES[ARCHS[name]])
    if ARCHS[name] is gguf.MODEL_ARCH.DEEPSEEK2:
        _deepseek(writer, config, apart)
    else:
        _attention(writer, config)
    _mixture(writer, config)
    table = gguf.get_tensor_name_map(ARCHS[name], config["num_hidden_layers"])
    for source, tensor in _converted(name, config, tensors, apart).items():
        known = table.get_name(source, try_suffixes=(".weight", ".bias"))
        assert known is not None, source
        array = np.ascontiguousarray((instead or {}).get(known, tensor))
        if quantised is not None and "_exps" in known:
            writer.add_tensor(known, gguf.quantize(array, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(known, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _converted(name: str, config: dict[str, Any], tensors: dict[str, F32], apart: bool) -> dict[str, F32]:
    out: dict[str, F32] = {}
    experts: dict[str, dict[int, F32]] = {}
    for source, tensor in tensors.items():
        of_expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)", source)
        if of_expert:
            experts.setdefault(f"{of_expert[1]}.{of_expert[3]}", {})[int(of_expert[2])] = tensor
        elif name == "MixtralForCausalLM" and re.search(r"\.[qk]_proj\.", source):
            heads = config["num_attention_heads" if ".q_proj." in source else "num_key_value_heads"]
            out[source] = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        elif "kv_b_proj" in source and apart:
            plain = config["qk_nope_head_dim"]
            each = tensor.reshape(config["num_attention_heads"], -1, tensor.shape[1])
            out[source.replace("kv_b_proj", "k_b_proj")] = each[:, :plain].swapaxes(1, 2)
            out[source.replace("kv_b_proj", "v_b_proj")] = each[:, plain:]
        else:
            out[source.replace("e_score_correction_bias", "e_score_correction.bias")] = tensor
    for source, found in experts.items():
        out[source] = np.stack([found[e] for e in range(len(found))])
    return out


def _shared(writer: gguf.GGUFWriter, config: dict[str, Any]) -> dict[str, Any]:
    """What all have; returns the rope parameters."""
    rope = config.get("rope_parameters") or {}
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    default_eps = 1e-5 if "Mixtral" in config["architectures"][0] else 1e-6
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", default_eps))
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    return config.get("rope_scaling") or (rope if "factor" in rope else {})


def _attention(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    _shared(writer, config)
    heads = config["num_attention_heads"]
    dim = config.get("head_dim", config["hidden_size"] // heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])


def _deepseek(writer: gguf.GGUFWriter, config: dict[str, Any], apart: bool) -> None:
    scaling = _shared(writer, config)
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
