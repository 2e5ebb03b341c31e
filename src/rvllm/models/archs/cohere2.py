"""Cohere2ForCausalLM (Command-R7B, Command-A): Cohere's block, windows with rope, full layers without."""

from __future__ import annotations

from rvllm.models import blocks
from rvllm.models.archs import cohere
from rvllm.models.config import ModelConfig
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program


def build(config: ModelConfig, dtype: DType) -> Program:
    sliding = blocks.sliding_layers(config, config.int("num_hidden_layers", high=4096), pattern=4)
    size = config.int("sliding_window", 4096)
    windows = [size if slides else None for slides in sliding]
    return cohere.decoder(config, dtype, window=lambda at: windows[at], rotated=lambda at: sliding[at])
