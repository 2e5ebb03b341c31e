"""Rotary embedding parameters from a config: `rope_scaling` of old, `rope_parameters` of Transformers 5.

The formulas of the derived factors are the published ones: YaRN's attention temperature 0.1 ln(s) + 1
(Peng et al. 2023, with DeepSeek's mscale), LongRoPE's sqrt(1 + ln(s) / ln(L)) (Ding et al. 2024).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

from rvllm.models.config import REQUIRED, ModelConfig
from rvllm.program.rope import Rope, RopeKind

KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
ALIASES = {"su": "longrope"}


def rope_section(config: ModelConfig, layer_type: str | None = None) -> ModelConfig | None:
    """The object with the rope parameters; `layer_type` picks one where they differ by layer."""
    section = config.section("rope_parameters")
    if section is not None and layer_type is not None and section.has(layer_type):
        section = section.section(layer_type)
    return section or config.section("rope_scaling")


def rope_kind(section: ModelConfig | None) -> str:
    """The kind of scaling, `default` when nothing is said."""
    if section is None:
        return "default"
    name = "rope_type" if section.has("rope_type") else "type"
    kind = section.str(name, "default")
    kind = ALIASES.get(kind, kind)
    if kind not in KINDS:
        raise section.fail(name, f"is {kind!r}, supported: {', '.join(KINDS)}")
    return kind


def max_positions(config: ModelConfig, default: int | None = None) -> int:
    """The longest sequence the positions are defined for.

    max_position_embeddings, stretched by the factor of linear, dynamic and yarn scaling; for the other
    kinds the config already gives the stretched length (vLLM derives its limit the same way).
    """
    name = "n_positions" if config.has("n_positions") else "max_position_embeddings"
    positions = config.int(name, REQUIRED if default is None else default)
    section = rope_section(config)
    kind = rope_kind(section)
    if section is None or kind not in ("linear", "dynamic", "yarn"):
        return positions
    if kind == "yarn":
        positions = section.int("original_max_position_embeddings", positions)
    return int(positions * section.float("factor", 1.0, low=1.0, high=1e6))


def rotated_dim(
    config: ModelConfig, head_dim: int, default: float = 1.0, name: str = "partial_rotary_factor"
) -> int:
    """How many elements of a head are rotated: head_dim times the partial rotary factor, rounded down.

    The factor stands in `rope_parameters`, or of old in the config as `name`.
    """
    section = config.section("rope_parameters")
    inside = section.opt_float("partial_rotary_factor", low=0.0, high=1.0) if section else None
    factor = config.float(name, default, low=0.0, high=1.0) if inside is None else inside
    dim = int(head_dim * factor)
    if dim % 2:  # a factor that is a rounded quotient may fall just short of the number it stands for
        dim = int(head_dim * factor + 1e-6)
    if dim < 2 or dim % 2:
        raise config.fail(
            name, f"{factor:g} of {head_dim} leaves {dim} rotated elements, wanted an even number"
        )
    return dim


def read_rope(
    config: ModelConfig,
    dim: int,
    *,
    layer_type: str | None = None,
    interleaved: bool = False,
    theta_name: str = "rope_theta",
    default_theta: float = 10000.0,
) -> Rope:
    """The rope of a head whose first `dim` elements are rotated. Raises ModelError naming the field.

    theta_name, default_theta: the base's name outside `rope_parameters`, and its value when absent.
    """
    if dim % 2:
        raise config.fail("head_dim", f"must leave an even number of rotated elements, got {dim}")
    section = rope_section(config, layer_type)
    kind = rope_kind(section)
    theta = config.float(theta_name, default_theta, low=1e-6)
    if section is not None:
        theta = section.float("rope_theta", theta, low=1e-6)
    plain = Rope(dim=dim, theta=theta, interleaved=interleaved)
    if section is None or kind == "default":
        return plain
    if kind == "longrope":
        return _longrope(config, section, plain)
    factor = section.float("factor", low=1.0, high=1e6)
    trained = section.int(
        "original_max_position_embeddings",
        config.int("max_position_embeddings", 1 if kind == "linear" else REQUIRED),
    )
    scaled = replace(plain, factor=factor, original_max_position=trained)
    if kind == "dynamic" and dim == 2:
        raise section.fail("rope_type", "dynamic has no formula for 2 rotated elements")
    if kind in ("linear", "dynamic"):
        return replace(scaled, kind=cast(RopeKind, kind))
    if kind == "llama3":
        low = section.float("low_freq_factor", low=1e-6)
        high = section.float("high_freq_factor", low=1e-6)
        if low >= high:
            raise section.fail("high_freq_factor", f"must be above low_freq_factor {low:g}, got {high:g}")
        return replace(scaled, kind="llama3", low_freq_factor=low, high_freq_factor=high)
    if theta <= 1:
        raise config.fail(theta_name, f"must be above 1 for yarn, got {theta:g}")
    return replace(
        scaled,
        kind="yarn",
        beta_fast=section.float("beta_fast", 32.0, low=1e-6),
        beta_slow=section.float("beta_slow", 1.0, low=1e-6),
        truncate=section.bool("truncate", True),
        attention_factor=_yarn_attention_factor(section, factor),
    )


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 * mscale * ln(factor) + 1: the temperature YaRN puts on attention."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_attention_factor(section: ModelConfig, factor: float) -> float:
    given = section.opt_float("attention_factor", low=0.0)
    if given is not None:
        return given
    mscale = section.opt_float("mscale")
    overall = section.opt_float("mscale_all_dim")
    if mscale and overall:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, overall)
    return yarn_mscale(factor)


def _longrope(config: ModelConfig, section: ModelConfig, plain: Rope) -> Rope:
    stretched = config.int("max_position_embeddings")
    trained = section.int(
        "original_max_position_embeddings", config.int("original_max_position_embeddings", stretched), low=2
    )
    factor = section.float("factor", stretched / trained)
    derived = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    half = plain.dim // 2
    return replace(
        plain,
        kind="longrope",
        factor=factor,
        original_max_position=trained,
        attention_factor=section.float("attention_factor", derived, low=0.0),
        short_factor=_factors(section, "short_factor", half),
        long_factor=_factors(section, "long_factor", half),
    )


def _factors(section: ModelConfig, name: str, length: int) -> tuple[float, ...]:
    values = section.list(name, length=length)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise section.fail(name, "must hold positive numbers only")
    return tuple(float(v) for v in values)
