"""Writes a tiny checkpoint as llama.cpp's converter would, with the gguf package's writer and name tables."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from support.models.archs_tiny import F32
from support.models.gguf_frame import write_file

ARCHS = {
    "CohereForCausalLM": gguf.MODEL_ARCH.COMMAND_R,
    "Cohere2ForCausalLM": gguf.MODEL_ARCH.COHERE2,
    "GPTNeoXForCausalLM": gguf.MODEL_ARCH.GPTNEOX,
    "StableLmForCausalLM": gguf.MODEL_ARCH.STABLELM,
    "GemmaForCausalLM": gguf.MODEL_ARCH.GEMMA,
    "Gemma2ForCausalLM": gguf.MODEL_ARCH.GEMMA2,
    "Gemma3ForCausalLM": gguf.MODEL_ARCH.GEMMA3,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
    "Phi3ForCausalLM": gguf.MODEL_ARCH.PHI3,
    "GraniteForCausalLM": gguf.MODEL_ARCH.GRANITE,
    "SmolLM3ForCausalLM": gguf.MODEL_ARCH.SMOLLM3,
}
PERMUTED = ("GraniteForCausalLM", "SmolLM3ForCausalLM")


def write(
    path: Path, config: dict[str, Any], tensors: dict[str, F32], instead: dict[str, F32] | None = None
) -> Path:
    """Writes `path`, float32 throughout; `instead` replaces tensors by llama.cpp's names."""
    name = config["architectures"][0]
    converted = _converted(name, config, tensors)
    for length in ("long", "short"):
        if factors := (config.get("rope_scaling") or {}).get(f"{length}_factor"):
            converted[f"rope_factors_{length}.weight"] = np.array(factors, np.float32)
    return write_file(path, ARCHS[name], config, partial(metadata, config=config), converted, instead=instead)


def _converted(name: str, config: dict[str, Any], tensors: dict[str, F32]) -> dict[str, F32]:
    """What the converter does to the numbers before it writes them."""
    out: dict[str, F32] = {}
    heads = config["num_attention_heads"]
    for source, tensor in sorted(tensors.items(), key=lambda item: _number(item[0])):
        if "Gemma" in name and source.endswith("norm.weight"):
            out[source] = tensor + np.float32(1)
        elif name in PERMUTED and (".q_proj." in source or ".k_proj." in source):
            count = heads if ".q_proj." in source else config["num_key_value_heads"]
            out[source] = tensor.reshape(count, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        elif "query_key_value" in source:
            grouped = tensor.reshape(heads, 3, -1, *tensor.shape[1:])
            out[source] = np.concatenate([grouped[:, i].reshape(-1, *tensor.shape[1:]) for i in range(3)])
        elif ".norms." in source:
            stem = source.split(".norms.")[0] + ".weight"
            out[stem] = np.concatenate([out[stem], tensor[None]]) if stem in out else tensor[None]
        else:
            out[source] = tensor
    return out


def _number(source: str) -> tuple[str, int]:
    stem, _, rest = source.partition(".norms.")
    return stem, int(rest.split(".")[0]) if rest else 0


def metadata(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Attention, norms, rotation and scales."""
    heads, hidden, name = config["num_attention_heads"], config["hidden_size"], config["architectures"][0]
    rope = config.get("rope_parameters") or {}
    own = rope.get("full_attention", rope)
    scaling = config.get("rope_scaling") or (own if "factor" in own else {})
    head_dim = config.get("head_dim", 256 if name == "GemmaForCausalLM" else hidden // heads)
    share = own.get("partial_rotary_factor", config.get("partial_rotary_factor", config.get("rotary_pct")))
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(int(head_dim * (1.0 if share is None else share)))
    theta = own.get("rope_theta", config.get("rope_theta", config.get("rotary_emb_base")))
    if theta is not None:
        writer.add_rope_freq_base(theta)
    if name.startswith(("Gemma", "Qwen3", "Phi3", "Mixtral", *PERMUTED)):
        default_eps = 1e-5 if name.startswith(("Phi3", "Mixtral")) else 1e-6
        writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", default_eps))
    else:
        writer.add_layer_norm_eps(config.get("layer_norm_eps", 1e-5))
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        writer.add_sliding_window(config["sliding_window"])
    if "layer_types" in config:
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    elif "sliding_window_pattern" in config:
        writer.add_uint32(f"{writer.arch}.attention.sliding_window_pattern", config["sliding_window_pattern"])
    if "use_parallel_residual" in config:
        writer.add_parallel_residual(config["use_parallel_residual"])
    if "logit_scale" in config:
        writer.add_logit_scale(config["logit_scale"])
    for field, add in (
        ("logits_scaling", writer.add_logit_scale),
        ("embedding_multiplier", writer.add_embedding_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("attention_multiplier", writer.add_attention_scale),
    ):
        if field in config:
            add(config[field])
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    local = rope.get("sliding_attention", {}).get("rope_theta", config.get("rope_local_base_freq"))
    if local is not None:
        writer.add_rope_freq_base_swa(local)
    if "factor" in scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
    original = config.get("original_max_position_embeddings", scaling.get("original_max_position_embeddings"))
    if original is not None:
        writer.add_rope_scaling_orig_ctx_len(original)
