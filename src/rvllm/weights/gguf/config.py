"""What a GGUF file says of its model, in Hugging Face's words: config, generation config, tensor names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rvllm.errors import ModelError
from rvllm.weights.checkpoint import Checkpoint, TensorInfo
from rvllm.weights.gguf.archs import ARCHITECTURES, Architecture, Metadata, sentence
from rvllm.weights.gguf.blocks import dequantise
from rvllm.weights.gguf.container import GGUFFile, GGUFTensor, as_list, read_gguf
from rvllm.weights.gguf.end_tokens import end_tokens
from rvllm.weights.gguf.hybrids import HYBRIDS
from rvllm.weights.mapped import shown

KNOWN = ARCHITECTURES | HYBRIDS
MAX_EXPERTS = 1 << 14  # a tensor is made of each
SAMPLING_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def open_gguf(path: Path) -> Checkpoint:
    """Opens a .gguf file (all parts of a split one); ModelError names file and field of what is wrong."""
    files = _with_parts(read_gguf(path))
    first = files[0]
    name = first.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise ModelError(f"{path}: metadata general.architecture is missing")
    architecture = KNOWN.get(name)
    if architecture is None:
        raise ModelError(
            f"{path}: general.architecture {shown(name)} is not supported; "
            f"GGUF files of {', '.join(sorted(KNOWN))} are"
        )
    metadata = Metadata(first.metadata, path, name, architecture.by_layer)
    if metadata.opt_count("expert_count"):
        architecture = architecture.mixture or architecture
        if not architecture.experts:
            metadata.fail("expert_count", f"is not 0: {name} with experts cannot be read from GGUF")
    tensors, unreadable = _tensors(files, architecture, metadata)
    config = _config(metadata, architecture, tensors)
    if "rope_freqs.weight" in tensors:
        config["rope_scaling"] = _rope_factors(files, tensors.pop("rope_freqs.weight"), config)
    if "rope_factors_long.weight" in tensors and "rope_factors_short.weight" in tensors:
        config["rope_scaling"] = _longrope(files, tensors, config, metadata)
    return Checkpoint(
        path=path,
        config={k: v for k, v in config.items() if v is not None},
        config_origin=f"{path} metadata",
        generation_config=_generation_config(metadata),
        tensors=tensors,
        files={f.file.path: f.file for f in files},
        metadata=first.metadata,
        unreadable=unreadable,
    )


def _with_parts(first: GGUFFile) -> list[GGUFFile]:
    """The file and, where `split.count` says so, the parts beside it (x-00001-of-00003.gguf)."""
    path, count = first.file.path, first.metadata.get("split.count", 0)
    if count in (0, 1):
        return [first]
    named = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if not isinstance(count, int) or not named or int(named[3]) != count:
        raise ModelError(
            f"{path}: split.count is {shown(count)}, but the name is not like x-00001-of-00003.gguf"
        )
    if int(named[2]) != 1:
        raise ModelError(f"{path}: part {int(named[2])} of a split model; name its first part, -00001-of-")
    others = [path.with_name(f"{named[1]}-{n:05d}-of-{count:05d}.gguf") for n in range(2, count + 1)]
    missing = [p.name for p in others if not p.is_file()]
    if missing:
        raise ModelError(
            f"{path}: {len(missing)} of its {count} parts are missing, the first is {missing[0]}"
        )
    return [first, *(read_gguf(p) for p in others)]


def _tensors(
    files: list[GGUFFile], architecture: Architecture, metadata: Metadata
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    heads = metadata.count("attention.head_count")
    kv_heads = metadata.opt_count("attention.head_count_kv", low=1) or heads
    found: dict[str, TensorInfo] = {}
    unreadable: dict[str, str] = {}
    for file in files:
        for tensor in file.tensors.values():
            stack = architecture.stacked(tensor.name)
            if stack is not None:
                name_of = partial(architecture.expert_name, *stack)
                _add_experts(file, tensor, metadata.count("expert_count"), name_of, found, unreadable)
                continue
            name = architecture.hf_name(tensor.name)
            if name in found or name in unreadable:
                raise ModelError(f"{file.file.path}: tensor {shown(tensor.name)} is there twice")
            if tensor.type is None:
                unreadable[name] = tensor.type_name
                continue
            info = TensorInfo(name, tensor.shape, tensor.type, file.file.path, tensor.offset, tensor.nbytes)
            kind = tensor.name.split(".")[-2] if "." in tensor.name else ""
            if architecture.permuted and kind in ("attn_q", "attn_k"):
                count = heads if kind == "attn_q" else kv_heads
                _check_rows(file, tensor, 2 * count, f"{count} heads of an even size")
                info = replace(info, unpermute_heads=count)
            if architecture.regrouped and kind == "attn_qkv":
                _check_rows(file, tensor, 3 * heads, f"queries, keys and values of {heads} heads")
                info = replace(info, regroup_heads=heads)
            if architecture.norm_add and kind.endswith("norm"):
                info = replace(info, add=architecture.norm_add)
            info = architecture.adjust(tensor.name, info)
            if architecture.per_head and kind in ("attn_q_norm", "attn_k_norm"):
                found |= _one_a_head(info)
            else:
                found[name] = info
    return found, unreadable


def _check_rows(file: GGUFFile, tensor: GGUFTensor, count: int, what: str) -> None:
    if not tensor.shape or tensor.shape[0] % count:
        raise ModelError(
            f"{file.file.path}: tensor {shown(tensor.name)} has shape {list(tensor.shape)}, "
            f"whose rows are not {what}"
        )


def _add_experts(
    file: GGUFFile,
    tensor: GGUFTensor,
    experts: int,
    name_of: Callable[[int], str],
    found: dict[str, TensorInfo],
    unreadable: dict[str, str],
) -> None:
    """The matrices of a stack [experts, rows, columns] as tensors of their own, each under its name."""
    path = file.file.path
    if len(tensor.shape) != 3 or tensor.shape[0] != experts or experts > MAX_EXPERTS:
        raise ModelError(
            f"{path}: tensor {shown(tensor.name)} has shape {list(tensor.shape)}, "
            f"wanted a matrix for each of {experts} experts"
        )
    names = [name_of(expert) for expert in range(experts)]
    if any(name in found or name in unreadable for name in names):
        raise ModelError(f"{path}: tensor {shown(tensor.name)} is there twice")
    if tensor.type is None:
        unreadable |= dict.fromkeys(names, tensor.type_name)
        return
    nbytes = tensor.nbytes // len(names)
    for expert, name in enumerate(names):
        offset = tensor.offset + expert * nbytes
        found[name] = TensorInfo(name, tensor.shape[1:], tensor.type, path, offset, nbytes)


def _one_a_head(info: TensorInfo) -> dict[str, TensorInfo]:
    """The rows of a norm as tensors of their own: x.weight [heads, dim] as x.norms.0.weight, ..."""
    if len(info.shape) != 2:
        raise ModelError(
            f"{info.file}: tensor {shown(info.name)} has shape {list(info.shape)}, wanted a row a head"
        )
    stem, _, kind = info.name.rpartition(".")
    heads, width = info.shape
    nbytes = info.nbytes // heads if heads else 0
    rows = [
        replace(
            info, name=f"{stem}.norms.{head}.{kind}", shape=(width,), offset=info.offset + head * nbytes,
            nbytes=nbytes,
        )
        for head in range(heads)
    ]  # fmt: skip
    return {row.name: row for row in rows}


def _config(
    metadata: Metadata, architecture: Architecture, tensors: Mapping[str, TensorInfo]
) -> dict[str, Any]:
    heads = metadata.count("attention.head_count")
    hidden = metadata.count("embedding_length")
    key_length, value_length = (
        metadata.opt_count("attention.key_length"),
        metadata.opt_count("attention.value_length"),
    )
    uneven = key_length is not None and value_length is not None and key_length != value_length
    if uneven and not architecture.latent:
        metadata.fail("attention.key_length", "differs from value_length, which is not supported")
    embedding = tensors.get(architecture.hf_name("token_embd.weight"))
    vocabulary = metadata.values.get("tokenizer.ggml.tokens")
    vocab_size = (
        embedding.shape[0]
        if embedding and embedding.shape
        else metadata.opt_count("vocab_size")
        or (len(as_list(vocabulary)) if vocabulary is not None else None)
    )
    head_dim = key_length or hidden // heads
    rotated = metadata.opt_count("rope.dimension_count") or head_dim
    return {
        "architectures": [architecture.hf_class],
        "model_type": architecture.model_type,
        "hidden_size": hidden,
        "intermediate_size": metadata.count("feed_forward_length"),
        "num_hidden_layers": metadata.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.opt_count("attention.head_count_kv", low=1) or heads,
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": metadata.count("context_length"),
        "rope_theta": metadata.opt_float("rope.freq_base") or 10000.0,
        "rope_scaling": _rope_scaling(metadata, architecture.latent),
        "partial_rotary_factor": rotated / (head_dim or 1),
        "sliding_window": metadata.opt_count("attention.sliding_window") or None,
        "tie_word_embeddings": architecture.hf_name("output.weight") not in tensors,
        "attention_bias": architecture.hf_name("blk.0.attn_q.bias") in tensors,
        "mlp_bias": architecture.hf_name("blk.0.ffn_gate.bias") in tensors,
        # GGUF does not keep it; nearly all models it is made from are published in bfloat16.
        "torch_dtype": "bfloat16",
        "bos_token_id": metadata.opt_count("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.opt_count("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.opt_count("tokenizer.ggml.padding_token_id"),
        "sentence_transformers": sentence(metadata),
        **{name: tensor in tensors for name, tensor in architecture.present.items()},
        "hidden_act": architecture.hidden_act,
        **{name: metadata.opt_float(key) for name, key in architecture.numbers.items()},
        **architecture.extra(metadata),
        **architecture.observed(tensors),
    }


def _rope_scaling(metadata: Metadata, latent: bool) -> dict[str, Any] | None:
    kind = metadata.opt_str("rope.scaling.type")
    factor = metadata.opt_float("rope.scaling.factor") or metadata.opt_float("rope.scale_linear")
    if kind == "longrope":
        return None  # its factors are tensors
    if kind in (None, "none") and (factor is None or factor == 1.0):
        return None
    if kind in (None, "linear"):
        return {"rope_type": "linear", "factor": factor or 1.0}
    if kind != "yarn":
        metadata.fail(
            "rope.scaling.type",
            f"is {shown(kind)}, not none, linear, yarn or longrope",
        )
    scaling = {
        "rope_type": "yarn",
        "factor": factor or 1.0,
        "original_max_position_embeddings": metadata.opt_count("rope.scaling.original_context_length", low=1),
        "attention_factor": metadata.opt_float("rope.scaling.attn_factor"),
        "beta_fast": metadata.opt_float("rope.scaling.yarn_beta_fast"),
        "beta_slow": metadata.opt_float("rope.scaling.yarn_beta_slow"),
    }
    log_multiplier = metadata.opt_float("rope.scaling.yarn_log_multiplier")
    if latent and log_multiplier:  # a tenth of mscale_all_dim, which all of DeepSeek's models have as mscale
        scaling["mscale"] = scaling["mscale_all_dim"] = round(10 * log_multiplier, 6)
    return {k: v for k, v in scaling.items() if v is not None}


def _rope_factors(files: list[GGUFFile], info: TensorInfo, config: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3.1's frequency bands, which the file gives as one divisor per rotated pair.

    That is LongRoPE's form with the same factors at every length and no change to cos and sin.
    """
    factors = _factors(files, info, config)
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
        "factor": 1.0,
        "original_max_position_embeddings": config["max_position_embeddings"],
    }


def _longrope(
    files: list[GGUFFile], tensors: dict[str, TensorInfo], config: Mapping[str, Any], metadata: Metadata
) -> dict[str, Any]:
    """LongRoPE's two sets of factors, tensors in the file (Phi-3)."""
    scaling = {
        "rope_type": "longrope",
        "short_factor": _factors(files, tensors.pop("rope_factors_short.weight"), config),
        "long_factor": _factors(files, tensors.pop("rope_factors_long.weight"), config),
        "attention_factor": metadata.opt_float("rope.scaling.attn_factor"),
        "original_max_position_embeddings": metadata.opt_count("rope.scaling.original_context_length", low=2),
    }
    return {k: v for k, v in scaling.items() if v is not None}


def _factors(files: list[GGUFFile], info: TensorInfo, config: Mapping[str, Any]) -> list[float]:
    """One divisor for each rotated pair."""
    if len(info.shape) != 1 or info.shape[0] * 2 > config["head_dim"]:
        raise ModelError(
            f"{info.file}: tensor {shown(info.name)} has shape {list(info.shape)}, "
            f"wanted at most {config['head_dim'] // 2} numbers"
        )
    bytes_of = {f.file.path: f.file.bytes for f in files}[info.file]
    factors = dequantise(info.type, bytes_of[info.offset : info.offset + info.nbytes], info.shape)
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise ModelError(f"{info.file}: tensor {shown(info.name)} must hold positive numbers")
    numbers: list[float] = factors.tolist()
    return numbers


def _generation_config(metadata: Metadata) -> dict[str, Any]:
    """Tokens that end an answer, and sampling the publisher recommends."""
    ends = end_tokens(metadata)
    found: dict[str, Any] = {"eos_token_id": ends} if ends else {}
    bos = metadata.opt_count("tokenizer.ggml.bos_token_id")
    if bos is not None:
        found["bos_token_id"] = bos
    for key, name in SAMPLING_KEYS.items():
        value = metadata.opt_count(key) if name == "top_k" else metadata.opt_float(key)
        if value is not None:
            found[name] = value
    return found
