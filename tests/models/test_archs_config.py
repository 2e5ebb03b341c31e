"""Configs of the dense architectures: real sizes, both spellings, defaults, and what is refused."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from rvllm.errors import ModelError
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program, supported
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Attention, Embed, Norm, Program, RopeKV
from rvllm.program.rope import Rope
from support.models import archs_tiny as tiny


def build(config: dict[str, Any], dtype: DType = DType.F32) -> Program:
    return build_program(ModelConfig(config, "config.json"), dtype)


def ropes(program: Program) -> list[Rope | None]:
    return [op.rope for op in program.ops if isinstance(op, RopeKV)]


def windows(program: Program) -> list[int | None]:
    return [op.window for op in program.ops if isinstance(op, Attention)]


# Published configs, and the number of parameters their publishers give.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "command-r": (
        {
            "architectures": ["CohereForCausalLM"], "hidden_size": 8192, "intermediate_size": 22528,
            "num_hidden_layers": 40, "num_attention_heads": 64, "num_key_value_heads": 64,
            "vocab_size": 256000, "max_position_embeddings": 8192, "model_max_length": 131072,
            "rope_theta": 8000000.0, "logit_scale": 0.0625, "layer_norm_eps": 1e-05,
        },
        34_980_831_232,
    ),
    "pythia-6.9b": (
        {
            "architectures": ["GPTNeoXForCausalLM"], "hidden_size": 4096, "intermediate_size": 16384,
            "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 50432, "rotary_pct": 0.25,
            "rotary_emb_base": 10000, "max_position_embeddings": 2048, "use_parallel_residual": True,
            "hidden_act": "gelu",
        },
        6_857_302_016,
    ),
    "stablelm-2-1.6b": (
        {
            "architectures": ["StableLmForCausalLM"], "hidden_size": 2048, "intermediate_size": 5632,
            "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 32,
            "vocab_size": 100352, "max_position_embeddings": 4096, "partial_rotary_factor": 0.25,
            "use_qkv_bias": True,
        },
        1_644_515_328,
    ),
    "gemma-7b": (
        {
            "architectures": ["GemmaForCausalLM"], "hidden_size": 3072, "intermediate_size": 24576,
            "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256,
            "vocab_size": 256000, "max_position_embeddings": 8192, "hidden_act": "gelu",
            "rope_theta": 10000.0, "hidden_activation": None,
        },
        8_537_680_896,
    ),
    "gemma-2-27b": (
        {
            "architectures": ["Gemma2ForCausalLM"], "hidden_size": 4608, "intermediate_size": 36864,
            "num_hidden_layers": 46, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128,
            "vocab_size": 256000, "max_position_embeddings": 8192, "query_pre_attn_scalar": 144,
            "sliding_window": 4096, "hidden_activation": "gelu_pytorch_tanh",
        },
        27_227_128_320,
    ),
    "gemma-3-1b": (
        {
            "architectures": ["Gemma3ForCausalLM"], "hidden_size": 1152, "intermediate_size": 6912,
            "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
            "vocab_size": 262144, "max_position_embeddings": 32768, "query_pre_attn_scalar": 256,
            "sliding_window": 512, "sliding_window_pattern": 6, "rope_theta": 1000000,
            "rope_local_base_freq": 10000, "rope_scaling": None,
        },
        999_885_952,
    ),
    "gemma-3-4b": (  # its text half: 4,300,079,472 parameters less the vision tower's and projector's
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
                "sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            },
        },
        4_300_079_472 - 416_866_032 - 2_950_272,
    ),
    "smollm3-3b": (
        {
            "architectures": ["SmolLM3ForCausalLM"], "hidden_size": 2048, "intermediate_size": 11008,
            "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4,
            "vocab_size": 128256, "max_position_embeddings": 65536, "rope_theta": 5000000.0,
        },
        3_075_098_624,
    ),
    "qwen3-8b": (
        {
            "architectures": ["Qwen3ForCausalLM"], "hidden_size": 4096, "intermediate_size": 12288,
            "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1000000,
            "sliding_window": None, "use_sliding_window": False, "max_window_layers": 36,
        },
        8_190_735_360,
    ),
    "phi-3-mini": (
        {
            "architectures": ["Phi3ForCausalLM"], "hidden_size": 3072, "intermediate_size": 8192,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
            "vocab_size": 32064, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
            "sliding_window": 2047, "rope_scaling": None,
        },
        3_821_079_552,
    ),
}  # fmt: skip


COMMAND_R7B = {
    "architectures": ["Cohere2ForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 256000, "max_position_embeddings": 8192, "sliding_window": 4096,
    "sliding_window_pattern": 4, "rope_theta": 50000, "logit_scale": 0.25,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_number_of_parameters(name: str) -> None:
    config, parameters = PUBLISHED[name]
    sizes = {part.source: math.prod(part.shape) for part in tiny.parts_of(config)}
    assert sum(sizes.values()) == parameters


def test_longest_sequences() -> None:
    assert build(PUBLISHED["command-r"][0]).max_position == 131072  # what it was trained on
    assert build(PUBLISHED["gemma-3-1b"][0]).max_position == 32768
    scaled = PUBLISHED["gemma-3-1b"][0] | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert build(scaled).max_position == 32768  # the config's length counts the scaling already


def test_layers_with_windows() -> None:
    gemma2, gemma3 = build(PUBLISHED["gemma-2-27b"][0]), build(PUBLISHED["gemma-3-1b"][0])
    assert windows(gemma2)[:4] == [4096, None, 4096, None]
    assert windows(gemma3)[:6] == [512] * 5 + [None]
    assert [rope.theta for rope in ropes(gemma3)[:6] if rope] == [10000.0] * 5 + [1000000.0]
    command = build(COMMAND_R7B)
    assert windows(command)[:4] == [4096] * 3 + [None]
    assert [rope is not None for rope in ropes(command)[:4]] == [True] * 3 + [False]
    assert all(rope.interleaved for rope in ropes(command) if rope)


def test_scales() -> None:
    attention = [op for op in build(PUBLISHED["gemma-2-27b"][0]).ops if isinstance(op, Attention)]
    assert {op.scale for op in attention} == {144**-0.5} and {op.soft_cap for op in attention} == {50.0}
    scale = {
        dtype: next(op.scale for op in build(PUBLISHED["gemma-7b"][0], dtype).ops if isinstance(op, Embed))
        for dtype in (DType.F32, DType.BF16, DType.F16)
    }
    # sqrt(3072) = 55.4256 in eight bits is 55.5, in eleven 55.4375
    assert scale == {DType.F32: float(np.float32(3072**0.5)), DType.BF16: 55.5, DType.F16: 55.4375}


def test_both_spellings_of_rope_agree() -> None:
    old = tiny.CASES["gemma3_old"].config
    new = {k: v for k, v in old.items() if not k.startswith("rope_")} | {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 200.0},
        }
    }
    assert build(new).ops == build(old).ops
    neox = tiny.CASES["gpt_neox"].config
    bare = {k: v for k, v in neox.items() if k not in ("rotary_pct", "rotary_emb_base")}
    parameters = {"rope_type": "default", "rope_theta": 5000, "partial_rotary_factor": 0.5}
    assert build(bare | {"rope_parameters": parameters}).ops == build(neox).ops
    phi = tiny.CASES["phi3_long"].config
    for kind in ("su", "longrope"):
        assert build(phi | {"rope_scaling": phi["rope_scaling"] | {"type": kind}}).ops == build(phi).ops


def test_layer_types_agree_with_the_pattern() -> None:
    old = tiny.CASES["gemma3_old"].config
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    new = {k: v for k, v in old.items() if k != "sliding_window_pattern"} | {"layer_types": kinds}
    assert build(new).ops == build(old).ops


def test_norms_of_heads_lie_within_the_fused_row() -> None:
    program = build(tiny.CASES["stablelm_parallel"].config)  # 6 query and 2 key heads of 16
    norms = [op for op in program.ops if isinstance(op, Norm) and op.group == 16][:2]
    assert [(op.start, op.width, op.weight and op.weight.shape) for op in norms] == [
        (0, 96, (96,)),
        (96, 32, (32,)),
    ]
    assert all(op.x == op.out for op in norms)


# Case, change that keeps the tensors: each must move the logits, or the case would not exercise it.
MATTERS: list[tuple[str, dict[str, Any]]] = [
    ("cohere", {"logit_scale": 1.76}),
    ("cohere", {"rope_theta": 7000.0}),
    ("cohere2", {"sliding_window": 21}),
    ("cohere2", {"sliding_window_pattern": 3}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt_neox", {"rotary_pct": 1.0}),
    ("gpt_neox", {"hidden_act": "gelu_new"}),
    ("stablelm", {"partial_rotary_factor": 0.5}),
    ("stablelm_qk_norm", {"layer_norm_eps": 1e-2}),
    ("gemma_bias", {"hidden_act": "silu"}),
    ("gemma2", {"sliding_window": 25}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"query_pre_attn_scalar": 10}),
    ("gemma3_old", {"rope_local_base_freq": 250.0}),
    ("gemma3_old", {"rope_scaling": None}),
    ("gemma3_old", {"sliding_window_pattern": 2}),
    ("qwen3_window", {"max_window_layers": 2}),
    ("granite", {"embedding_multiplier": 3.1}),
    ("granite", {"attention_multiplier": 0.21}),
    ("granite", {"residual_multiplier": 0.71}),
    ("granite", {"logits_scaling": 0.41}),
    ("smollm3", {"no_rope_layer_interval": 2}),
    ("smollm3_window", {"sliding_window": 16}),
    ("smollm3_window", {"no_rope_layers": [1, 0, 1]}),
    ("phi3", {"sliding_window": 22}),
    ("phi3_long", {"original_max_position_embeddings": 256}),
]


def logits_with(name: str, change: dict[str, Any]) -> np.ndarray:
    """Of a tiny model's prompt, with a changed config over the same weights."""
    case = tiny.CASES[name]
    with TemporaryDirectory() as folder:
        saved = tiny.save(Path(folder), case.config | change, tiny.random_tensors(name, case.config))
        backend = tiny.load(saved, case.max_model_len)
        prompt = tiny.prompt_of(name)
        logits = tiny.all_logits(backend, prompt, (len(prompt),)).copy()
        backend.close()
    return logits


@cache
def unchanged_logits(name: str) -> np.ndarray:
    return logits_with(name, {})


@pytest.mark.parametrize(("name", "change"), MATTERS, ids=str)
def test_particulars_matter(name: str, change: dict[str, Any]) -> None:
    apart = np.abs(unchanged_logits(name) - logits_with(name, change)).max()
    assert apart > 3e-4  # three times what a comparison lets pass


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("cohere", {"architectures": ["CoForCausalLM"]}, "'CoForCausalLM' is not supported; supported: "),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
    ("gemma2", {"layer_types": ["sliding_attention", "mamba", "mamba"]}, "layer_types holds 'mamba'"),
    ("gemma2", {"layer_types": ["full_attention"]}, "layer_types must have 3 entries, got 1"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be in"),
    ("gemma3_old", {"sliding_window_pattern": 0}, "sliding_window_pattern must be in"),
    ("gpt_neox", {"rotary_pct": 0.25}, "rotary_pct 0.25 of 12 leaves 3 rotated elements"),
    ("gpt_neox", {"rotary_pct": 0}, "rotary_pct 0 of 12 leaves 0 rotated elements"),
    ("stablelm", {"partial_rotary_factor": "half"}, "partial_rotary_factor must be a number"),
    ("stablelm", {"num_attention_heads": 7}, "num_key_value_heads must divide num_attention_heads 7"),
    ("phi3_long", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "short_factor must have 6"),
    ("smollm3", {"no_rope_layers": [0, 1, 2, 1]}, "no_rope_layers must hold 0 and 1 only"),
    ("granite", {"logits_scaling": 0}, "logits_scaling must be in"),
    ("phi3", {"hidden_act": "mish"}, "hidden_act is 'mish', supported: silu"),
    ("qwen3", {"num_key_value_heads": 2}, "num_key_value_heads must divide num_attention_heads 3"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_wrong_configs_are_refused_in_one_line(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        build(tiny.CASES[name].config | change)
    text = str(caught.value)
    assert message in text and text.startswith("config.json") and "\n" not in text


def test_unknown_architectures_are_told_what_there_is() -> None:
    with pytest.raises(ModelError) as caught:
        build({"architectures": ["FooForCausalLM"]})
    assert all(name in str(caught.value) for name in supported())
    assert {case.config["architectures"][0] for case in tiny.CASES.values()} <= set(supported())
