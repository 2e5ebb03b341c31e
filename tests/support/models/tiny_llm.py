"""A tiny random model behind `rvllm.LLM`: its config and the settings it is loaded with."""

from __future__ import annotations

from typing import Any

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "vocab_size": 512,
}  # fmt: skip
SETTINGS: dict[str, Any] = {"load_format": "dummy", "device": "cpu", "num_blocks": 64, "threads": 1}
