"""What a config leaves out has the default of the model's class, as Transformers has it."""

from __future__ import annotations

import pytest

from rvllm.models.blocks import KV_HEADS, Dims
from rvllm.models.config import ModelConfig

BASE = {
    "hidden_size": 512, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 100,
    "rms_norm_eps": 1e-6, "head_dim": 4,
}  # fmt: skip
CLASSES = {
    "llama": "LlamaConfig", "mistral": "MistralConfig", "mixtral": "MixtralConfig", "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config", "qwen3_moe": "Qwen3MoeConfig", "gemma": "GemmaConfig", "gemma2": "Gemma2Config",
    "gemma3_text": "Gemma3TextConfig", "smollm3": "SmolLM3Config", "stablelm": "StableLmConfig",
    "cohere": "CohereConfig", "granite": "GraniteConfig", "phi3": "Phi3Config",
    "deepseek_v3": "DeepseekV3Config",
}  # fmt: skip


@pytest.mark.oracle
@pytest.mark.parametrize("kind", CLASSES)
def test_an_absent_number_of_key_heads(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    heads = 128
    expected = getattr(transformers, CLASSES[kind])(num_attention_heads=heads).num_key_value_heads
    values = {**BASE, "model_type": kind, "num_attention_heads": heads}
    assert Dims.read(ModelConfig(values, "config.json")).kv_heads == expected
    null = ModelConfig({**values, "num_key_value_heads": None}, "config.json")
    assert Dims.read(null).kv_heads == heads
    assert Dims.read(ModelConfig({**values, "num_key_value_heads": 2}, "config.json")).kv_heads == 2


def test_every_default_belongs_to_a_class_that_is_compared() -> None:
    assert set(KV_HEADS) <= set(CLASSES)
