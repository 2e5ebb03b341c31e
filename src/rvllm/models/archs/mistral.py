"""MistralForCausalLM (Jiang et al. 2023): Llama's block with a sliding attention window in every layer."""

from __future__ import annotations

from rvllm.models.archs import llama
from rvllm.models.config import ModelConfig
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program

WINDOW = 4096  # when the config does not say


def build(config: ModelConfig, dtype: DType) -> Program:
    # null switches the window off; where nothing is said, it is that of the first release.
    window = config.opt_int("sliding_window", WINDOW)
    return llama.decoder(config, dtype, qkv_bias=False, window=lambda layer: window)
