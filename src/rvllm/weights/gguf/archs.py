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
from rvllm.weights.checkpoint import TensorInfo
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
RMS_NORM = {"rms_norm_eps": "attention.layer_norm_rms_epsilon"}
LAYER_NORM = {"layer_norm_eps": "attention.layer_norm_epsilon"}
MAX_SIZE = 1 << 31  # of any dimension or count in a config


@dataclass(frozen=True)
class Architecture:
    """How one of llama.cpp's architectures is called and laid out.

    permuted: query and key rows stand in the order for interleaved rope.
    regrouped: fused attn_qkv rows stand as [q|k|v][head][dim], in Transformers as [head][q|k|v][dim].
    per_head: query and key norms are one tensor with a row a head, in Transformers a tensor a head.
    norm_add: added to norm weights as they are read (Gemma: -1).
    experts: tensors that stack a matrix of every expert, by the name of one expert's in Transformers.
    mixture: how it is laid out instead where it has experts.
    latent: key_length and value_length are those of a cache of latents (MLA).
    present: config fields that are true where the named tensor (in Transformers' words) is there.
    numbers: further config fields that are numbers, by their keys in the metadata.
    extra: further config fields, from the metadata.
    whole_names: tensors of a layer whose names in Transformers do not end as llama.cpp's do.
    by_layer: numbers given per layer are 0 in layers of another kind.
    adjust: what else the file's tensor (by llama.cpp's name) needs, to be what Transformers has.
    observed: further config fields, from the tensors (in Transformers' words).
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
    experts: Mapping[str, str] = field(default_factory=dict)
    mixture: Architecture | None = None
    latent: bool = False
    present: Mapping[str, str] = field(default_factory=dict)
    hidden_act: str | None = "silu"
    numbers: Mapping[str, str] = field(default_factory=lambda: RMS_NORM)
    extra: Callable[[Metadata], dict[str, Any]] = lambda metadata: {}
    whole_names: Mapping[str, str] = field(default_factory=dict)
    by_layer: bool = False
    adjust: Callable[[str, TensorInfo], TensorInfo] = lambda name, info: info
    observed: Callable[[Mapping[str, TensorInfo]], dict[str, Any]] = lambda tensors: {}

    def hf_name(self, name: str) -> str:
        """The name in Transformers; a tensor it does not know keeps its own."""
        whole = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        if whole and whole[2] in self.whole_names:
            return f"{self.layer_prefix}{whole[1]}.{self.whole_names[whole[2]]}"
        stem, _, kind = name.rpartition(".")
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if layer and layer[2] in self.layer_names:
            return f"{self.layer_prefix}{layer[1]}.{self.layer_names[layer[2]]}.{kind}"
        one = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(\d+)", stem)  # an expert's own tensor, in early files
        if one and f"{one[2]}_exps" in self.experts:
            return self.expert_name(int(one[1]), f"{one[2]}_exps", int(one[3]))
        known = self.global_names.get(stem)
        return f"{known}.{kind}" if known else name

    def expert_name(self, layer: int, stack: str, expert: int) -> str:
        """The name in Transformers of one expert's matrix of a stack."""
        return f"{self.layer_prefix}{layer}.{self.experts[stack].format(expert)}.weight"

    def stacked(self, name: str) -> tuple[int, str] | None:
        """(layer, stack) of a tensor that stacks experts; None for any other."""
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        return (int(found[1]), found[2]) if found and found[2] in self.experts else None


@dataclass(frozen=True)
class Metadata:
    """Typed reading of one architecture's metadata; every failure names the file and the key."""

    values: Mapping[str, Any]
    path: Path
    architecture: str
    by_layer: bool = False  # see Architecture

    def fail(self, name: str, problem: str) -> NoReturn:
        """Raises the error for a field."""
        raise ModelError(f"{self.path}: metadata {self.key(name)} {problem}")

    def key(self, name: str) -> str:
        """`block_count` → `llama.block_count`; dotted names starting with a known room stay."""
        return name if name.startswith(("general.", "tokenizer.")) else f"{self.architecture}.{name}"

    def get(self, name: str) -> Any:
        """What the file holds, None where it holds nothing."""
        return self.values.get(self.key(name))

    def count(self, name: str, low: int = 1) -> int:
        """A required whole number."""
        value = self.opt_count(name, low)
        if value is None:
            self.fail(name, "is missing")
        return value

    def opt_count(self, name: str, low: int = 0) -> int | None:
        """A whole number; one given per layer must be the same in all of them."""
        value = self.get(name)
        if isinstance(value, np.ndarray):
            distinct = set(value.tolist())
            if self.by_layer and len(distinct) > 1:
                distinct.discard(0)
            if len(distinct) != 1:
                self.fail(name, "differs between layers, which is not supported")
            value = distinct.pop()
        if value is not None and (type(value) is not int or not low <= value < MAX_SIZE):
            self.fail(name, f"is {shown(value)}, not a whole number from {low} to {MAX_SIZE - 1}")
        return value

    def opt_float(self, name: str) -> float | None:
        """A number; float32 as the shortest decimal that means it (1e-05, not 9.99999974e-06)."""
        value = self.get(name)
        if value is None:
            return None
        if type(value) not in (int, float) or not np.isfinite(value):
            self.fail(name, f"is {shown(value)}, not a finite number")
        return float(str(np.float32(value))) if np.float32(value) == value else float(value)

    def opt_str(self, name: str) -> str | None:
        """A text."""
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            self.fail(name, f"is {shown(value)}, not a text")
        return value

    def opt_bool(self, name: str) -> bool | None:
        """True or false."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            self.fail(name, f"is {shown(value)}, not true or false")
        return value


def _layer_kinds(metadata: Metadata) -> dict[str, Any]:
    """Which layers have a window, where the file says it: a period, or a flag for every layer."""
    name = "attention.sliding_window_pattern"
    value = metadata.get(name)
    if not isinstance(value, np.ndarray):
        return {"sliding_window_pattern": metadata.opt_count(name, low=1)}
    if len(value) != metadata.count("block_count"):
        metadata.fail(name, f"has {len(value)} entries, not one for every layer")
    return {"layer_types": ["sliding_attention" if flag else "full_attention" for flag in value.tolist()]}


_BERT_LAYERS = {
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}
_BERT_GLOBALS = {
    "token_embd": "embeddings.word_embeddings",
    "position_embd": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
}
_POOLINGS = {1: "mean", 2: "cls", 3: "last"}


def sentence(metadata: Metadata) -> dict[str, Any] | None:
    """How a file says tokens are pooled, encoders' and decoders' (Qwen3-Embedding); None where it does not.

    That vectors are normalised is llama.cpp's rule for all of them.
    """
    pooling = metadata.opt_count("pooling_type") or 0
    if pooling not in (0, *_POOLINGS):
        metadata.fail("pooling_type", f"is {pooling}, not 1 (mean), 2 (cls) or 3 (last)")
    return {"pooling": _POOLINGS[pooling], "normalise": True} if pooling else None


def _bert(metadata: Metadata) -> dict[str, Any]:
    """RoBERTa's files are BERT's too: their positions are stored from the first that is used."""
    return {"type_vocab_size": metadata.opt_count("tokenizer.ggml.token_type_count", low=1)}


def _parallel(metadata: Metadata) -> dict[str, Any]:
    return {"use_parallel_residual": metadata.opt_bool("use_parallel_residual")}


def _gpt_neox(metadata: Metadata) -> dict[str, Any]:
    head_dim = metadata.count("embedding_length") // metadata.count("attention.head_count")
    rotated = metadata.opt_count("rope.dimension_count") or head_dim
    return {**_parallel(metadata), "rotary_pct": rotated / (head_dim or 1)}


def _gemma_with_windows(largest: int) -> Callable[[Metadata], dict[str, Any]]:
    """Gemma 2 and 3. Queries are scaled by head_dim, in the family's largest model by hidden / heads.

    largest: its number of layers, by which llama.cpp tells it apart.
    """

    def extra(metadata: Metadata) -> dict[str, Any]:
        per_head = metadata.count("embedding_length") / metadata.count("attention.head_count")
        head_dim = metadata.opt_count("attention.key_length", low=1) or per_head
        return {
            **_layer_kinds(metadata),
            "query_pre_attn_scalar": per_head if metadata.count("block_count") == largest else head_dim,
        }

    return extra


def _mixtral(metadata: Metadata) -> dict[str, Any]:
    return {
        "num_local_experts": metadata.count("expert_count"),
        "num_experts_per_tok": metadata.count("expert_used_count"),
    }


def _qwen3_moe(metadata: Metadata) -> dict[str, Any]:
    return {
        "num_experts": metadata.count("expert_count"),
        "num_experts_per_tok": metadata.count("expert_used_count"),
        "moe_intermediate_size": metadata.count("expert_feed_forward_length"),
        "norm_topk_prob": True,
    }


def _deepseek2(metadata: Metadata) -> dict[str, Any]:
    """DeepSeek-V2 and V3, which llama.cpp tells apart by how experts are scored: 1 softmax, 2 sigmoid."""
    rotated = metadata.count("rope.dimension_count")
    key = metadata.opt_count("attention.key_length_mla", low=1) or metadata.count("attention.key_length")
    if key <= rotated:
        metadata.fail("rope.dimension_count", f"is {rotated} of {key}, the whole key")
    sigmoid = metadata.opt_count("expert_gating_func") == 2
    groups = metadata.opt_count("expert_group_count") or 1
    method = "noaux_tc" if sigmoid else "group_limited_greedy" if groups > 1 else "greedy"
    return {
        "architectures": ["DeepseekV3ForCausalLM" if sigmoid else "DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key - rotated,
        "v_head_dim": metadata.opt_count("attention.value_length_mla", low=1)
        or metadata.count("attention.value_length"),
        "kv_lora_rank": metadata.count("attention.kv_lora_rank"),
        "q_lora_rank": metadata.opt_count("attention.q_lora_rank") or None,
        "n_routed_experts": metadata.opt_count("expert_count") or None,
        "n_shared_experts": metadata.opt_count("expert_shared_count"),
        "num_experts_per_tok": metadata.opt_count("expert_used_count"),
        "moe_intermediate_size": metadata.opt_count("expert_feed_forward_length"),
        "first_k_dense_replace": metadata.opt_count("leading_dense_block_count"),
        "norm_topk_prob": metadata.opt_bool("expert_weights_norm") or False,
        "topk_method": method,
        "n_group": groups,
        "topk_group": metadata.opt_count("expert_group_used_count") or groups,
    }


_EXPERTS = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_MIXTRAL_EXPERTS = {
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_DEEPSEEK2_NAMES = {
    **LAYER_NAMES,
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.k_b_proj",
    "attn_v_b": "self_attn.v_b_proj",
    "ffn_gate_inp": "mlp.gate",
    "exp_probs_b": "mlp.gate.e_score_correction",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}

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
_COHERE = {**LAYER_NORM, "logit_scale": "logit_scale"}
_GRANITE = {
    **RMS_NORM,
    "embedding_multiplier": "embedding_scale",
    "attention_multiplier": "attention.scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
_GELU = "gelu_pytorch_tanh"
_GEMMA2 = {
    **RMS_NORM,
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope_local_base_freq": "rope.freq_base_swa",
}

ARCHITECTURES = {
    "bert": Architecture(
        "BertModel", "bert", layer_names=_BERT_LAYERS, global_names=_BERT_GLOBALS,
        layer_prefix="encoder.layer.", hidden_act="gelu", numbers=LAYER_NORM, extra=_bert,
    ),
    "llama": Architecture(
        "LlamaForCausalLM", "llama", permuted=True,
        mixture=Architecture(
            "MixtralForCausalLM", "mixtral", permuted=True, extra=_mixtral, experts=_MIXTRAL_EXPERTS,
            layer_names={**LAYER_NAMES, "ffn_gate_inp": "block_sparse_moe.gate"},
        ),
    ),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2"),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3"),
    "qwen3moe": Architecture(
        "Qwen3MoeForCausalLM", "qwen3_moe", extra=_qwen3_moe, experts=_EXPERTS,
        layer_names={**LAYER_NAMES, "ffn_gate_inp": "mlp.gate"},
    ),
    "deepseek2": Architecture(
        "DeepseekV2ForCausalLM", "deepseek_v2", extra=_deepseek2, experts=_EXPERTS, latent=True,
        layer_names=_DEEPSEEK2_NAMES, numbers={**RMS_NORM, "routed_scaling_factor": "expert_weights_scale"},
    ),
    "granite": Architecture("GraniteForCausalLM", "granite", permuted=True, numbers=_GRANITE),
    "smollm3": Architecture("SmolLM3ForCausalLM", "smollm3", permuted=True),
    "command-r": Architecture(
        "CohereForCausalLM", "cohere", numbers=_COHERE, present={"use_qk_norm": f"{_FIRST}.q_norm.weight"}
    ),
    "cohere2": Architecture(
        "Cohere2ForCausalLM", "cohere2", numbers=_COHERE, extra=_layer_kinds
    ),
    "gptneox": Architecture(
        "GPTNeoXForCausalLM", "gpt_neox", extra=_gpt_neox, regrouped=True, layer_names=_NEOX_NAMES,
        global_names=_NEOX_GLOBALS, layer_prefix="gpt_neox.layers.", hidden_act="gelu",
        numbers={**LAYER_NORM, "rotary_emb_base": "rope.freq_base"},
        present={"attention_bias": "gpt_neox.layers.0.attention.query_key_value.bias"},
    ),
    "stablelm": Architecture(
        "StableLmForCausalLM", "stablelm", extra=_parallel, per_head=True, layer_names=_STABLELM_NAMES,
        numbers=LAYER_NORM,
        present={
            "use_qkv_bias": f"{_FIRST}.q_proj.bias",
            "qk_layernorm": f"{_FIRST}.q_layernorm.norms.0.weight",
        },
    ),
    "gemma": Architecture("GemmaForCausalLM", "gemma", norm_add=-1.0, hidden_act=_GELU),
    "gemma2": Architecture(
        "Gemma2ForCausalLM", "gemma2", norm_add=-1.0, layer_names=_GEMMA2_NAMES, hidden_act=_GELU,
        numbers=_GEMMA2, extra=_gemma_with_windows(46),
    ),
    "gemma3": Architecture(
        "Gemma3ForCausalLM", "gemma3_text", norm_add=-1.0, layer_names=_GEMMA2_NAMES, hidden_act=_GELU,
        numbers=_GEMMA2, extra=_gemma_with_windows(62),
    ),
    "phi3": Architecture("Phi3ForCausalLM", "phi3", layer_names=_PHI3_NAMES),
}  # fmt: skip
