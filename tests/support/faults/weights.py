"""Checkpoints with a fault: one token's embedding is no number, everything else is sound."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

from support.clients.attacker import CONFIG, model
from support.weights.model_files import write_directory

HIDDEN, INNER, HEADS, KV_HEADS, HEAD, LAYERS, EXPERTS = 256, 512, 4, 2, 64, 2, 4
BROKEN_TOKEN = 7


def broken_model(experts: bool = False) -> Path:
    """A model directory, of Llama's architecture or Mixtral's, whose token BROKEN_TOKEN is NaN."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-weights-")) / "model"
    source, rng = model(), np.random.default_rng(3)
    known = json.loads((source / "config.json").read_text())
    vocab = known["vocab_size"]
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": HEADS,
             "num_key_value_heads": KV_HEADS, "head_dim": HEAD, "num_hidden_layers": LAYERS}  # fmt: skip
    config = {**CONFIG, **known, **sizes}
    if experts:
        config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
                   "num_local_experts": EXPERTS, "num_experts_per_tok": 2}  # fmt: skip

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.normal(size=(rows, columns)) / columns**0.5).astype(np.float16)

    tensors = {
        "model.embed_tokens.weight": matrix(vocab, HIDDEN) * np.float16(16),
        "lm_head.weight": matrix(vocab, HIDDEN),
        "model.norm.weight": np.ones(HIDDEN, np.float16),
    }
    tensors["model.embed_tokens.weight"][BROKEN_TOKEN] = np.nan
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}{norm}.weight"] = np.ones(HIDDEN, np.float16)
        for name, rows in (("q", HEADS * HEAD), ("k", KV_HEADS * HEAD), ("v", KV_HEADS * HEAD)):
            tensors[f"{layer}self_attn.{name}_proj.weight"] = matrix(rows, HIDDEN)
        tensors[f"{layer}self_attn.o_proj.weight"] = matrix(HIDDEN, HEADS * HEAD)
        if not experts:
            tensors[f"{layer}mlp.gate_proj.weight"] = matrix(INNER, HIDDEN)
            tensors[f"{layer}mlp.up_proj.weight"] = matrix(INNER, HIDDEN)
            tensors[f"{layer}mlp.down_proj.weight"] = matrix(HIDDEN, INNER)
            continue
        tensors[f"{layer}block_sparse_moe.gate.weight"] = matrix(EXPERTS, HIDDEN)
        for e in range(EXPERTS):
            expert = f"{layer}block_sparse_moe.experts.{e}."
            tensors[f"{expert}w1.weight"] = matrix(INNER, HIDDEN)
            tensors[f"{expert}w3.weight"] = matrix(INNER, HIDDEN)
            tensors[f"{expert}w2.weight"] = matrix(HIDDEN, INNER)
    write_directory(folder, tensors, config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    return folder
