"""Writes a tiny Nemotron-H as llama.cpp's converter would, with the gguf package's writer and name tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from rvllm.models.archs.nemotron_h import read_layers
from rvllm.models.config import ModelConfig
from support.models.archs_tiny import F32
from support.models.gguf_frame import stacked, write_file


def write(
    path: Path, config: dict[str, Any], tensors: dict[str, F32], instead: dict[str, F32] | None = None
) -> Path:
    """Writes `path`, float32 throughout; `instead` replaces tensors by llama.cpp's names."""
    mixture = "n_routed_experts" in config
    arch = gguf.MODEL_ARCH.NEMOTRON_H_MOE if mixture else gguf.MODEL_ARCH.NEMOTRON_H
    kinds = read_layers(ModelConfig(config, "tiny"))
    wide, width = (
        ("moe", config["moe_intermediate_size"]) if mixture else ("mlp", config["intermediate_size"])
    )
    sizes = config | {
        "max_position_embeddings": 1 << 20,
        "intermediate_size": [width if kind == wide else 0 for kind in kinds],
    }  # fmt: skip

    def metadata(writer: gguf.GGUFWriter) -> None:
        _metadata(writer, config, kinds)
        if mixture:
            _mixture(writer, config)

    return write_file(path, arch, sizes, metadata, _converted(config, tensors), instead=instead)


def _converted(config: dict[str, Any], tensors: dict[str, F32]) -> dict[str, F32]:
    """What the converter does to names and numbers before it writes them."""
    out: dict[str, F32] = {}
    for source, tensor in stacked(tensors).items():
        if source.endswith("A_log"):
            out[source] = -np.exp(tensor).reshape(-1, 1)
        elif source.endswith(".D"):
            out[source] = tensor.reshape(-1, 1)
        elif source.endswith("mixer.norm.weight"):
            out[source] = tensor.reshape(config["n_groups"], -1)
        elif source.endswith("conv1d.weight"):
            out[source] = tensor.squeeze()
        else:
            renamed = re.sub(r"(e_score_correction|\.dt)_bias", r"\1.bias", source)
            out[re.sub(r"backbone(.*)\.mixer\.experts", r"model\1.mlp.experts", renamed)] = tensor
    return out


def _metadata(writer: gguf.GGUFWriter, config: dict[str, Any], kinds: list[str]) -> None:
    heads = config["mamba_num_heads"]
    writer.add_head_count_kv([config["num_key_value_heads"] if kind == "attention" else 0 for kind in kinds])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
    writer.add_ssm_conv_kernel(config["conv_kernel"])
    writer.add_ssm_state_size(config["ssm_state_size"])
    writer.add_ssm_group_count(config["n_groups"])
    writer.add_ssm_inner_size(heads * config["mamba_head_dim"])
    writer.add_ssm_time_step_rank(heads)
    writer.add_rope_scaling_finetuned(False)


def _mixture(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(config["moe_shared_expert_intermediate_size"])
    writer.add_expert_shared_count(1)
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_weights_scale(config.get("routed_scaling_factor", 1.0))
    writer.add_expert_group_count(config.get("n_group", 1))
    if "moe_latent_size" in config:
        writer.add_moe_latent_size(config["moe_latent_size"])
