"""llama.cpp's architectures in Hugging Face's words: class, tensor names, and what else a config holds.

One entry of `ARCHITECTURES` per `general.architecture`. The names on the left are llama.cpp's, those on
the right Transformers'; `blk.N.` stands for `model.layers.N.` unless an entry says otherwise. What
llama.cpp does not store in the file but knows by the architecture is written out here too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from rvllm.errors import ModelError
from rvllm.weights.mapped import shown

GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
MAX_SIZE = 1 << 31  # of any dimension or count in a config


@dataclass(frozen=True)
class Architecture:
    """How one of llama.cpp's architectures is called and laid out.

    permuted: query and key rows stand in the order for interleaved rope.
    regrouped: fused attn_qkv rows stand as [q|k|v][head][dim], in Transformers as [head][q|k|v][dim].
    per_head: query and key norms are one tensor with a row a head, in Transformers a tensor a head.
    norm_add: added to norm weights as they are read (Gemma: -1).
    present: config fields that are true where the named tensor (in Transformers' words) is there.
    extra: further config fields, from the metadata.
    """

    hf_class: str
    model_type: str
    layer_names: Mapping[str, str] = field(default_factory=lambda: LAYER_NAMES)
    global_names: Mapping[str, str] = field(default_factory=lambda: GLOBAL_NAMES)
    layer_prefix: str = "model.layers."
    permuted: bool = False
    regrouped: bool = False
    per_head: bool = False
    norm_add: float = 0.0
    present: Mapping[str, str] = field(default_factory=dict)
    extra: Callable[[Metadata], dict[str, Any]] = lambda metadata: {"hidden_act": "silu"}

    def hf_name(self, name: str) -> str:
        """The name in Transformers; a tensor it does not know keeps its own."""
        stem, _, kind = name.rpartition(".")
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if layer and layer[2] in self.layer_names:
            return f"{self.layer_prefix}{layer[1]}.{self.layer_names[layer[2]]}.{kind}"
        known = self.global_names.get(stem)
        return f"{known}.{kind}" if known else name


class Metadata:
    """Typed reading of one architecture's metadata; every failure names the file and the key."""

    def __init__(self, values: Mapping[str, Any], path: Path, architecture: str) -> None:
        self.values = values
        self.path = path
        self.architecture = architecture

    def fail(self, key: str, problem: str) -> NoReturn:
        raise ModelError(f"{self.path}: metadata {key} {problem}")

    def key(self, name: str) -> str:
        """`block_count` → `llama.block_count`; dotted names starting with a known room stay."""
        return name if name.startswith(("general.", "tokenizer.")) else f"{self.architecture}.{name}"

    def count(self, name: str, low: int = 1) -> int:
        """A required whole number."""
        value = self.opt_count(name, low)
        if value is None:
            self.fail(self.key(name), "is missing")
        return value

    def opt_count(self, name: str, low: int = 0) -> int | None:
        """A whole number; one given per layer must be the same in all of them."""
        key = self.key(name)
        value = self.values.get(key)
        if isinstance(value, np.ndarray):
            distinct = set(value.tolist())
            if len(distinct) != 1:
                self.fail(key, "differs between layers, which is not supported")
            value = distinct.pop()
        if value is None:
            return None
        if type(value) is not int or not low <= value < MAX_SIZE:
            self.fail(key, f"is {shown(value)}, not a whole number from {low} to {MAX_SIZE - 1}")
        return value

    def opt_float(self, name: str) -> float | None:
        """A number; float32 as the shortest decimal that means it (1e-05, not 9.99999974e-06)."""
        key = self.key(name)
        value = self.values.get(key)
        if value is None:
            return None
        if type(value) not in (int, float) or not np.isfinite(value):
            self.fail(key, f"is {shown(value)}, not a finite number")
        return float(str(np.float32(value))) if np.float32(value) == value else float(value)

    def opt_str(self, name: str) -> str | None:
        """A text."""
        key = self.key(name)
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            self.fail(key, f"is {shown(value)}, not a text")
        return value

    def opt_bool(self, name: str) -> bool | None:
        """True or false."""
        key = self.key(name)
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            self.fail(key, f"is {shown(value)}, not true or false")
        return value


def _rms(metadata: Metadata) -> dict[str, Any]:
    return {"hidden_act": "silu", "rms_norm_eps": metadata.opt_float("attention.layer_norm_rms_epsilon")}


def _layer_norm(metadata: Metadata) -> dict[str, Any]:
    return {"hidden_act": "silu", "layer_norm_eps": metadata.opt_float("attention.layer_norm_epsilon")}


def _layer_kinds(metadata: Metadata) -> dict[str, Any]:
    """Which layers have a window, where the file says it: a period, or a flag for every layer."""
    key = metadata.key("attention.sliding_window_pattern")
    value = metadata.values.get(key)
    if not isinstance(value, np.ndarray):
        return {"sliding_window_pattern": metadata.opt_count("attention.sliding_window_pattern", low=1)}
    if len(value) != metadata.count("block_count"):
        metadata.fail(key, f"has {len(value)} entries, not one for every layer")
    return {"layer_types": ["sliding_attention" if flag else "full_attention" for flag in value.tolist()]}


def _granite(metadata: Metadata) -> dict[str, Any]:
    return {
        **_rms(metadata),
        "embedding_multiplier": metadata.opt_float("embedding_scale"),
        "attention_multiplier": metadata.opt_float("attention.scale"),
        "residual_multiplier": metadata.opt_float("residual_scale"),
        "logits_scaling": metadata.opt_float("logit_scale"),
    }


def _cohere(metadata: Metadata) -> dict[str, Any]:
    return {**_layer_norm(metadata), "logit_scale": metadata.opt_float("logit_scale")}


def _gpt_neox(metadata: Metadata) -> dict[str, Any]:
    head_dim = metadata.count("embedding_length") // metadata.count("attention.head_count")
    return {
        **_layer_norm(metadata),
        "hidden_act": "gelu",
        "rotary_pct": (metadata.opt_count("rope.dimension_count") or head_dim) / (head_dim or 1),
        "rotary_emb_base": metadata.opt_float("rope.freq_base"),
        "use_parallel_residual": metadata.opt_bool("use_parallel_residual"),
    }


def _stablelm(metadata: Metadata) -> dict[str, Any]:
    return {
        **_layer_norm(metadata),
        "use_parallel_residual": metadata.opt_bool("use_parallel_residual"),
    }


def _gemma(metadata: Metadata) -> dict[str, Any]:
    return {**_rms(metadata), "hidden_act": "gelu_pytorch_tanh"}


def _gemma_with_windows(largest: int) -> Callable[[Metadata], dict[str, Any]]:
    """Gemma 2 and 3. Queries are scaled by head_dim, in the family's largest model by hidden / heads.

    largest: its number of layers, by which llama.cpp tells it apart.
    """

    def extra(metadata: Metadata) -> dict[str, Any]:
        per_head = metadata.count("embedding_length") / metadata.count("attention.head_count")
        head_dim = metadata.opt_count("attention.key_length", low=1) or per_head
        return {
            **_gemma(metadata),
            **_layer_kinds(metadata),
            "query_pre_attn_scalar": per_head if metadata.count("block_count") == largest else head_dim,
            "attn_logit_softcapping": metadata.opt_float("attn_logit_softcapping"),
            "final_logit_softcapping": metadata.opt_float("final_logit_softcapping"),
            "rope_local_base_freq": metadata.opt_float("rope.freq_base_swa"),
        }

    return extra


_FIRST = "model.layers.0.self_attn"
_PHI3_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_NEOX_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_NEOX_GLOBALS = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
}
_STABLELM_NAMES = {
    **LAYER_NAMES,
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
}
_GEMMA2_NAMES = {
    **LAYER_NAMES,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", "llama", permuted=True, extra=_rms),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", extra=_rms),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", extra=_rms),
    "granite": Architecture("GraniteForCausalLM", "granite", permuted=True, extra=_granite),
    "smollm3": Architecture("SmolLM3ForCausalLM", "smollm3", permuted=True, extra=_rms),
    "command-r": Architecture(
        "CohereForCausalLM", "cohere", extra=_cohere, present={"use_qk_norm": f"{_FIRST}.q_norm.weight"}
    ),
    "cohere2": Architecture(
        "Cohere2ForCausalLM", "cohere2", extra=lambda m: {**_cohere(m), **_layer_kinds(m)}
    ),
    "gptneox": Architecture(
        "GPTNeoXForCausalLM", "gpt_neox", extra=_gpt_neox, regrouped=True, layer_names=_NEOX_NAMES,
        global_names=_NEOX_GLOBALS, layer_prefix="gpt_neox.layers.",
        present={"attention_bias": "gpt_neox.layers.0.attention.query_key_value.bias"},
    ),
    "stablelm": Architecture(
        "StableLmForCausalLM", "stablelm", extra=_stablelm, per_head=True, layer_names=_STABLELM_NAMES,
        present={
            "use_qkv_bias": f"{_FIRST}.q_proj.bias",
            "qk_layernorm": f"{_FIRST}.q_layernorm.norms.0.weight",
        },
    ),
    "gemma": Architecture("GemmaForCausalLM", "gemma", norm_add=-1.0, extra=_gemma),
    "gemma2": Architecture(
        "Gemma2ForCausalLM", "gemma2", norm_add=-1.0, layer_names=_GEMMA2_NAMES, extra=_gemma_with_windows(46)
    ),
    "gemma3": Architecture(
        "Gemma3ForCausalLM", "gemma3_text", norm_add=-1.0, layer_names=_GEMMA2_NAMES,
        extra=_gemma_with_windows(62),
    ),
    "phi3": Architecture("Phi3ForCausalLM", "phi3", layer_names=_PHI3_NAMES, extra=_rms),
}  # fmt: skip
