"""A tiny random model behind `rvllm.LLM`: its files and the settings they are loaded with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.text import tiny_tokenizers

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "vocab_size": 512,
}  # fmt: skip
SETTINGS: dict[str, Any] = {"load_format": "dummy", "device": "cpu", "num_blocks": 64, "threads": 1}


def directory(path: Path, **fields: Any) -> Path:
    """Its tokenizer and its config with these fields; the weights are left to `load_format`."""
    tiny_tokenizers.write_directory(path)
    (path / "config.json").write_text(json.dumps(CONFIG | fields))
    return path
