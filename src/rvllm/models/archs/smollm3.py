"""SmolLM3ForCausalLM: Llama's block in which every fourth layer goes without rope."""

from __future__ import annotations

from rvllm.models import blocks
from rvllm.models.archs import llama
from rvllm.models.config import ModelConfig
from rvllm.models.rope import read_rope
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program


def build(config: ModelConfig, dtype: DType) -> Program:
    layers = config.int("num_hidden_layers", high=4096)
    rotated = rope_layers(config, layers)
    windows = layer_windows(config, layers, rotated)
    dims = blocks.Dims.read(config)
    return llama.decoder(
        config, dtype, dims, rope=read_rope(config, dims.head_dim, default_theta=2_000_000.0), tied=True,
        mlp_bias=config.bool("mlp_bias", False), window=lambda layer: windows[layer],
        rotated=lambda layer: rotated[layer],
    )  # fmt: skip


def rope_layers(config: ModelConfig, layers: int) -> list[bool]:
    """Which layers rotate: `no_rope_layers` holds 1 for those that do, whatever its name says."""
    if not config.has("no_rope_layers"):
        every = config.int("no_rope_layer_interval", 4)
        return [(layer + 1) % every != 0 for layer in range(layers)]
    flags = config.list("no_rope_layers", length=layers)
    if any(flag not in (0, 1) for flag in flags):
        raise config.fail("no_rope_layers", "must hold 0 and 1 only")
    return [bool(flag) for flag in flags]


def layer_windows(config: ModelConfig, layers: int, rotated: list[bool]) -> list[int | None]:
    """Each layer's window; without `layer_types` the layers without rope have it."""
    window = config.opt_int("sliding_window") if config.bool("use_sliding_window", False) else None
    if window is None:
        return [None] * layers
    sliding = blocks.layer_types(config, layers) or [not flag for flag in rotated]
    return [window if flag else None for flag in sliding]
