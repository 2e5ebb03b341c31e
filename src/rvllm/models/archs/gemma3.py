"""Gemma 3 (Gemma Team 2025): Gemma 2's block with QK norms; local and global ropes differ.

Gemma3ForCausalLM, and the text half of Gemma3ForConditionalGeneration, whose images are not supported.
"""

from __future__ import annotations

from rvllm.models.archs import gemma, gemma2
from rvllm.models.config import ModelConfig
from rvllm.models.rope import read_rope
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program
from rvllm.program.rope import Rope

GLOBAL_THETA, LOCAL_THETA = 1_000_000.0, 10_000.0


# What the text half's config leaves out, for the model with images writes only what differs from these.
DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": gemma.HEAD_DIM,
    "vocab_size": 262208,
}


def build(config: ModelConfig, dtype: DType) -> Program:
    text = config.section("text_config")
    if text is not None:
        given = {name: value for name, value in text.values.items() if value is not None}
        named = {"architectures": config.values.get("architectures")}
        config = ModelConfig({**DEFAULTS, **given, **named}, text.origin)
    return gemma2.decoder(
        config, dtype, pattern=6, ropes=read_ropes(config, gemma2.read_dims(config).head_dim), qk_norm=True,
        # this length already counts the global rope's scaling, in either form of the config
        positions=config.int("max_position_embeddings", 131072),
        final_cap=config.opt_float("final_logit_softcapping", low=1e-6),
        root="" if text is None else "language_model.",
    )  # fmt: skip


def read_ropes(config: ModelConfig, head_dim: int) -> tuple[Rope, Rope]:
    """The ropes of layers with a window and of those without.

    Transformers 5 writes both into `rope_parameters`; of old the local one had a theta of its own and
    `rope_scaling` was the global one's.
    """
    everywhere = read_rope(config, head_dim, layer_type="full_attention", default_theta=GLOBAL_THETA)
    if config.has("rope_parameters"):
        local = read_rope(config, head_dim, layer_type="sliding_attention", default_theta=LOCAL_THETA)
    else:
        local = Rope(dim=head_dim, theta=config.float("rope_local_base_freq", LOCAL_THETA, low=1e-6))
    return local, everywhere
