"""Configs of all architectures: real sizes, spellings, defaults, costs, what matters, what is refused."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from rvllm.backends.cuda.layout.fusion import fuse
from rvllm.errors import ModelError
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program, supported
from rvllm.program.cost import StepShape, kv_bytes_per_token, op_cost, program_cost
from rvllm.program.dtypes import DType
from rvllm.program.memory import plan_workspace
from rvllm.program.ops.dense import (
    Attention,
    BlockSparseAttention,
    Embed,
    Experts,
    HeadLinear,
    LatentAttention,
    LatentRopeKV,
    Logits,
    Norm,
    Op,
    Program,
    RopeKV,
    Route,
)
from rvllm.program.rope import Rope
from support.models import archs_moe_tiny as moe
from support.models import archs_tiny as tiny
from support.models import nemotron_tiny as nemotron
from support.models.real_configs import CONFIGS
from support.models.tiny import logits_of

CASES = tiny.CASES | moe.CASES | nemotron.CASES


def build(config: dict[str, Any], dtype: DType = DType.F32) -> Program:
    return build_program(ModelConfig(config, "config.json"), dtype)


def ropes(program: Program) -> list[Rope | None]:
    return [op.rope for op in program.ops if isinstance(op, RopeKV)]


def windows(program: Program) -> list[int | None]:
    return [op.window for op in program.ops if isinstance(op, Attention)]


def the(program: Program, kind: type[Op], which: int = 0) -> Any:
    return [op for op in program.ops if type(op) is kind][which]


COMMAND_R = CONFIGS["Command-R-35B"] | {"model_max_length": 131072}
GEMMA_2_27B = CONFIGS["Gemma-2-9B"] | {
    "hidden_size": 4608, "intermediate_size": 36864, "num_hidden_layers": 46, "num_attention_heads": 32,
    "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 144, "attn_logit_softcapping": 50.0,
}  # fmt: skip
GEMMA_3_1B = CONFIGS["Gemma-3-4B"] | {
    "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
    "num_key_value_heads": 1, "vocab_size": 262144, "max_position_embeddings": 32768,
    "sliding_window": 512, "rope_scaling": None,
}  # fmt: skip
GEMMA_3_4B = {  # its text half as the file has it, with all that the class sets by itself left out
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
}  # fmt: skip
DEEPSEEK_V2 = CONFIGS["DeepSeek-V2-Lite"] | {
    "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 60,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "n_routed_experts": 160,
    "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0,
}  # fmt: skip


# Published models, and the number of parameters their publishers give.
PUBLISHED: list[tuple[dict[str, Any], int]] = [
    (COMMAND_R, 34_980_831_232),
    (CONFIGS["Pythia-6.9b"], 6_857_302_016),
    (CONFIGS["StableLM-2-1.6B"], 1_644_515_328),
    (CONFIGS["Gemma-7B"], 8_537_680_896),
    (GEMMA_2_27B, 27_227_128_320),
    (GEMMA_3_1B, 999_885_952),
    (GEMMA_3_4B, 4_300_079_472 - 416_866_032 - 2_950_272),  # less the vision tower's and projector's
    (CONFIGS["SmolLM3-3B"], 3_075_098_624),
    (CONFIGS["Qwen3-8B"], 8_190_735_360),
    (CONFIGS["Phi-3-mini"], 3_821_079_552),
    (CONFIGS["Mixtral-8x7B"], 46_702_792_704),
    (CONFIGS["Qwen3-30B-A3B"], 30_532_122_624),
    (CONFIGS["DeepSeek-V2-Lite"], 15_706_484_224),
    (DEEPSEEK_V2, 235_741_434_880),
    (CONFIGS["Phi-3-small"], 7_392_272_384),
]


@pytest.mark.parametrize(("config", "parameters"), PUBLISHED, ids=lambda value: str(value)[:40])
def test_published_models_have_their_number_of_parameters(config: dict[str, Any], parameters: int) -> None:
    sizes = {part.source: math.prod(part.shape) for part in tiny.parts_of(config)}
    assert sum(sizes.values()) == parameters


def test_longest_sequences() -> None:
    assert build(COMMAND_R).max_position == 131072  # what it was trained on
    assert build(GEMMA_3_1B).max_position == 32768
    scaled = GEMMA_3_1B | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert build(scaled).max_position == 32768  # the config's length counts the scaling already


def test_layers_with_windows() -> None:
    gemma2, gemma3 = build(GEMMA_2_27B), build(GEMMA_3_1B)
    assert windows(gemma2)[:4] == [4096, None, 4096, None]
    assert windows(gemma3)[:6] == [512] * 5 + [None]
    assert [rope.theta for rope in ropes(gemma3)[:6] if rope] == [10000.0] * 5 + [1000000.0]
    command = build(CONFIGS["Command-R7B"])
    assert windows(command)[:4] == [4096] * 3 + [None]
    assert [rope is not None for rope in ropes(command)[:4]] == [True] * 3 + [False]
    assert all(rope.interleaved for rope in ropes(command) if rope)


def test_scales() -> None:
    attention = [op for op in build(GEMMA_2_27B).ops if isinstance(op, Attention)]
    assert {op.scale for op in attention} == {144**-0.5} and {op.soft_cap for op in attention} == {50.0}
    scale = {
        dtype: next(op.scale for op in build(CONFIGS["Gemma-7B"], dtype).ops if isinstance(op, Embed))
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


def test_deepseek_caches_one_latent_and_one_key() -> None:
    program = build(DEEPSEEK_V2, DType.BF16)
    assert kv_bytes_per_token(program) == 2 * 60 * (512 + 64)
    assert program.max_position == 163840
    attention, rope = the(program, LatentAttention), the(program, LatentRopeKV).rope
    assert attention.scale == pytest.approx(192**-0.5 * (0.1 * 0.707 * math.log(40) + 1) ** 2)
    assert rope.attention_factor == 1.0 and rope.interleaved and rope.dim == 64
    route = the(program, Route)
    assert (route.groups, route.kept_groups, route.top_k, route.scale) == (8, 3, 6, 16.0)
    assert route.name == "layers.1.moe.route"  # the first layer is dense


def test_shares_are_scaled_or_renormalised_never_both() -> None:
    route = the(build(DEEPSEEK_V2 | {"norm_topk_prob": True}), Route)
    assert route.renormalise and route.scale == 1.0


def test_phi_3_small_alternates() -> None:
    program = build(CONFIGS["Phi-3-small"])
    sparse = [op for op in program.ops if isinstance(op, BlockSparseAttention)]
    assert [op.name for op in sparse] == [f"layers.{i}.attn" for i in range(0, 32, 2)]
    assert {op.scale for op in sparse} == {1 / 128}
    part = sparse[0].sparsity
    assert (part.size, part.local, part.stride, part.head_step) == (64, 16, 8, 1)
    assert the(program, Logits).scale == 1 / 8


@pytest.mark.parametrize("name", moe.CASES)
def test_every_op_has_a_cost_and_every_buffer_a_place(name: str) -> None:
    program = build(CASES[name].config)
    decode = program_cost(program, StepShape(4, 1, 100))
    prefill = program_cost(program, StepShape(1, 100, 100))
    assert 0 < decode.flops < prefill.flops and decode.kv_bytes > 0
    assert len(plan_workspace(program.ops, 64, 4).placements) == len(program.buffers)
    assert len(fuse(program)) <= len(program.ops)


def test_experts_cost_what_they_stream() -> None:
    program = build(CONFIGS["Mixtral-8x7B"], DType.BF16)
    op = the(program, Experts)
    one = 3 * 4096 * 14336 * 2
    single = op_cost(program, op, StepShape(1, 1, 10))
    assert single.weight_bytes == pytest.approx(2 * one)
    assert single.flops == pytest.approx(2 * 2 * 3 * 4096 * 14336, rel=1e-3)
    assert op_cost(program, op, StepShape(512, 1, 10)).weight_bytes == pytest.approx(8 * one, rel=1e-6)
    two = op_cost(program, op, StepShape(2, 1, 10)).weight_bytes  # 2 experts, then 2 of which 1.5 are new
    assert two == pytest.approx(3.5 * one)


def test_shared_experts_are_experts_of_every_token() -> None:
    program = build(CONFIGS["DeepSeek-V2-Lite"], DType.BF16)
    assert not any("shared" in op.name for op in program.ops)
    assert [note for note in program.notes if "shared" in note and note.startswith("experts 64 and up")]
    assert len(program.notes) == len(set(program.notes))
    route, op = the(program, Route), the(program, Experts)
    assert (route.top_k, route.always, op.always, route.weight.shape) == (6, 2, 2, (64, 2048))
    assert op.up.shape == (66, 2816, 2048) and op.down.shape == (66, 2048, 1408)
    one = 3 * 2048 * 1408 * 2
    for tokens, hit in ((1, 6 + 2), (2, 6 + 6 * 58 / 64 + 2), (4096, 66)):
        cost = op_cost(program, op, StepShape(tokens, 1, 10))
        assert cost.weight_bytes == pytest.approx(hit * one)
        assert cost.flops == pytest.approx(tokens * 8 * one, rel=1e-3)


@pytest.mark.parametrize(
    "changed, always, apart",
    [
        ({"n_shared_experts": 1}, 1, False),
        ({"n_shared_experts": 8}, 8, False),
        ({"n_shared_experts": 9}, 0, True),  # wide enough for products of its own
        ({"n_shared_experts": 0}, 0, False),
        ({"mlp_bias": True}, 0, True),
    ],
)
def test_when_shared_experts_stay_apart(changed: dict[str, Any], always: int, apart: bool) -> None:
    program = build(CONFIGS["DeepSeek-V2-Lite"] | changed)
    assert the(program, Route).always == the(program, Experts).always == always
    assert any(op.name == "layers.1.shared.down" for op in program.ops) is apart


def test_absorbed_projections_cost_as_much_as_they_are_large() -> None:
    program = build(DEEPSEEK_V2, DType.BF16)
    cost = op_cost(program, the(program, HeadLinear), StepShape(3, 1, 10))
    assert cost.flops == 2 * 3 * 128 * 128 * 512 and cost.weight_bytes == 2 * 128 * 128 * 512
    attention = op_cost(program, the(program, LatentAttention), StepShape(2, 1, 1000))
    assert attention.kv_bytes == 2 * 1000 * 576 * 2
    assert attention.flops == 2 * 1000 * 128 * (2 * 576 + 2 * 512 + 5)


def test_block_sparse_attention_costs_less_than_dense() -> None:
    program = build(CONFIGS["Phi-3-small"], DType.BF16)
    cost = op_cost(program, the(program, BlockSparseAttention), StepShape(1, 1, 8192))
    assert cost.flops == int((1024 + 7168 / 8) * 32 * (4 * 128 + 5))
    assert cost.kv_bytes == int((1024 + 7168 / 2) * 8 * 256 * 2)  # four heads of a group see four stripes


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
    ("mixtral", {"num_experts_per_tok": 1}),
    ("mixtral_window", {"sliding_window": 20}),
    ("mixtral_window", {"hidden_act": "silu"}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("qwen3_moe", {"num_experts_per_tok": 3}),
    ("qwen3_moe_some", {"sliding_window": 18}),
    ("deepseek_v2", {"topk_method": "greedy"}),
    ("deepseek_v2", {"topk_group": 3}),
    ("deepseek_v2", {"n_group": 2, "topk_group": 1}),
    ("deepseek_v2", {"routed_scaling_factor": 2.4}),
    ("deepseek_v2", {"norm_topk_prob": True}),
    (
        "deepseek_v2",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    ("deepseek_v2_lite", {"rope_theta": 9000.0}),
    ("deepseek_v3", {"routed_scaling_factor": 2.4}),
    ("deepseek_v3", {"norm_topk_prob": False}),
    ("deepseek_v3", {"topk_group": 3}),
    ("deepseek_v3_halves", {"rope_interleave": True}),
    ("phi3small", {"gegelu_limit": 1.1}),
    ("phi3small", {"dense_attention_every_n_layers": 3}),
    ("phi3small", {"blocksparse_block_size": 17}),
    ("phi3small", {"blocksparse_num_local_blocks": 3}),
    ("phi3small", {"blocksparse_vert_stride": 5}),
    ("phi3small", {"blocksparse_homo_head_pattern": True}),
    ("phi3small", {"mup_use_scaling": False}),
    ("phi3small", {"mup_attn_multiplier": 1.4}),
    ("phi3small", {"mup_embedding_multiplier": 0.6}),
    ("phi3small", {"mup_width_multiplier": 0.9}),
    ("phi3small_plain", {"rope_position_scale": 1.0}),
    ("phi3small_long", {"rope_scaling": None}),
    ("nemotron_h_moe", {"time_step_min": 0.4}),
    ("nemotron_h_moe", {"layer_norm_epsilon": 0.4}),
    ("nemotron_h_moe", {"routed_scaling_factor": 0.4}),
]


def logits_with(name: str, change: dict[str, Any], silent: str = "nothing") -> np.ndarray:
    """Of a tiny model's prompt, with a changed config over the same weights; tensors named `silent` are 0."""
    case = CASES[name]
    tensors = tiny.random_tensors(name, case.config)
    tensors |= {k: v * 0 for k, v in tensors.items() if silent in k}
    with TemporaryDirectory() as folder:
        backend = tiny.load(tiny.save(Path(folder), case.config | change, tensors), case.max_model_len)
        prompt = tiny.prompt_of(name)
        logits = logits_of(backend, prompt)
        backend.close()
    return logits


@cache
def unchanged_logits(name: str) -> np.ndarray:
    return logits_with(name, {})


@pytest.mark.parametrize(("name", "change"), MATTERS, ids=str)
def test_particulars_matter(name: str, change: dict[str, Any]) -> None:
    logits = unchanged_logits(name)
    drawable = np.isfinite(logits)
    apart = np.abs(logits[drawable] - logits_with(name, change)[drawable]).max()
    assert apart > (1e-2 if name in nemotron.CASES else 3e-4)  # three times what a comparison lets pass


def test_the_correction_bias_matters() -> None:
    assert np.abs(unchanged_logits("deepseek_v3") - logits_with("deepseek_v3", {}, "correction")).max() > 3e-4


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
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok must be in [1, 8], got 9"),
    ("mixtral", {"num_local_experts": 0}, "num_local_experts must be in"),
    ("mixtral", {"num_local_experts": 70000}, "num_local_experts is 70000, in 2 layers that is more than"),
    ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers must be a list"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be in"),
    ("deepseek_v2", {"n_group": 5}, "n_group must divide the number of experts 12, got 5"),
    ("deepseek_v2", {"topk_group": 1}, "topk_group 1 leaves 3 experts, fewer than the 4 chosen"),
    ("deepseek_v2", {"topk_group": 5}, "topk_group must be in [1, 4], got 5"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc', supported: greedy"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid', supported: softmax"),
    ("deepseek_v2", {"kv_lora_rank": None}, "kv_lora_rank is missing"),
    ("deepseek_v2", {"qk_rope_head_dim": 7}, "qk_rope_head_dim must be even, got 7"),
    ("deepseek_v2", {"num_experts_per_tok": None}, "num_experts_per_tok is missing"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax', supported: sigmoid"),
    ("deepseek_v3", {"n_group": 12}, "topk_group 2 leaves 2 experts, fewer than the 3 chosen"),
    ("deepseek_v3", {"n_group": 12, "topk_group": 3}, "n_group 12 leaves fewer than two of 12 experts"),
    ("phi3small", {"hidden_act": "gelu"}, "hidden_act is 'gelu', supported: gegelu"),
    ("phi3small", {"dummy_token_indices": [128]}, "dummy_token_indices holds 128, the vocabulary has 128"),
    ("phi3small", {"blocksparse_vert_stride": 0}, "blocksparse_vert_stride must be in"),
    ("phi3small_plain", {"ff_dim_multiplier": None}, "ff_dim_multiplier is missing"),
    ("phi3small_long", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "type is 'linear', supported"),
    ("nemotron_h", {"hybrid_override_pattern": "M-X"}, "hybrid_override_pattern holds 'X'"),
    ("nemotron_h", {"hybrid_override_pattern": ""}, "hybrid_override_pattern must name"),
    ("nemotron_h", {"hybrid_override_pattern": None}, "hybrid_override_pattern is missing"),
    ("nemotron_h", {"layers_block_type": ["mamba", "rnn"]}, "layers_block_type holds 'rnn'"),
    ("nemotron_h", {"n_groups": 4}, "n_groups must divide"),
    ("nemotron_h", {"mlp_hidden_act": "mish"}, "mlp_hidden_act"),
    ("nemotron_h", {"conv_kernel": 1}, "conv_kernel"),
    ("nemotron_h_moe", {"n_group": 8, "topk_group": 8}, "fewer than two"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_wrong_configs_are_refused_in_one_line(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        build(CASES[name].config | change)
    text = str(caught.value)
    assert message in text and text.startswith("config.json") and "\n" not in text


def test_unknown_architectures_are_told_what_there_is() -> None:
    with pytest.raises(ModelError) as caught:
        build({"architectures": ["FooForCausalLM"]})
    assert all(name in str(caught.value) for name in supported())
    assert {case.config["architectures"][0] for case in CASES.values()} <= set(supported())
