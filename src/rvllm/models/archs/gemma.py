"""GemmaForCausalLM (Gemma Team 2024): norms with 1 + w, GeGLU, scaled embeddings, heads of 256."""

from __future__ import annotations

import math

import numpy as np

from rvllm.models import blocks
from rvllm.models.archs import llama
from rvllm.models.config import ModelConfig
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Activation, Program

HEAD_DIM = 256  # when the config does not say


def build(config: ModelConfig, dtype: DType) -> Program:
    refuse_bidirectional(config)
    dims = blocks.Dims.read(config, head_dim=HEAD_DIM)
    return llama.decoder(
        config, dtype, dims, activation=read_activation(config), tied=True, norm_add=1.0,
        scales=llama.Scales(embedding=embedding_scale(dims.hidden, dtype)),
    )  # fmt: skip


def embedding_scale(hidden: int, dtype: DType) -> float:
    """sqrt(hidden), rounded to the model's dtype as the published code does before it multiplies."""
    return float(np.asarray(math.sqrt(hidden), dtype=dtype.numpy))


def read_activation(config: ModelConfig) -> Activation:
    """The gate's activation; `gelu` in the first releases' configs always meant the tanh form."""
    field = "hidden_activation" if config.has("hidden_activation") else "hidden_act"
    activation = blocks.read_activation(config, field, "gelu_pytorch_tanh")
    return "gelu_tanh" if activation == "gelu" else activation


def refuse_bidirectional(config: ModelConfig) -> None:
    """Raises ModelError for Gemma's embedding models, whose tokens see what follows them."""
    if config.bool("use_bidirectional_attention", False):
        raise config.fail("use_bidirectional_attention", "is true; only causal models generate text")
