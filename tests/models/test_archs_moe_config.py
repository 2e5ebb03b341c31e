"""Configs of mixtures and latent attention: real sizes, costs, what matters and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from rvllm.backends.cuda.layout.fusion import fuse
from rvllm.errors import ModelError
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.cost import StepShape, kv_bytes_per_token, op_cost, program_cost
from rvllm.program.dtypes import DType
from rvllm.program.memory import plan_workspace
from rvllm.program.ops.dense import (
    BlockSparseAttention,
    Experts,
    HeadLinear,
    LatentAttention,
    LatentRopeKV,
    Logits,
    Op,
    Program,
    Route,
)
from support.models import archs_moe_tiny as moe
from support.models import archs_tiny as tiny

YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
    "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip

# Published configs, and the number of parameters their publishers give.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "mixtral-8x7b": (
        {
            "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "vocab_size": 32000, "max_position_embeddings": 32768, "rope_theta": 1e6,
            "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None,
        },
        46_702_792_704,
    ),
    "qwen3-30b-a3b": (
        {
            "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144,
            "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
            "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128,
            "num_experts_per_tok": 8, "norm_topk_prob": True, "max_position_embeddings": 40960,
            "mlp_only_layers": [], "decoder_sparse_step": 1, "use_sliding_window": False,
        },
        30_532_122_624,
    ),
    "deepseek-v2-lite": (
        {
            "architectures": ["DeepseekV2ForCausalLM"], "hidden_size": 2048, "intermediate_size": 10944,
            "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16,
            "num_key_value_heads": 16, "vocab_size": 102400, "q_lora_rank": None, "kv_lora_rank": 512,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
            "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
            "moe_layer_freq": 1, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
            "max_position_embeddings": 163840, "rope_theta": 10000, "rope_scaling": YARN,
        },
        15_706_484_224,
    ),
    "deepseek-v2": (
        {
            "architectures": ["DeepseekV2ForCausalLM"], "hidden_size": 5120, "intermediate_size": 12288,
            "moe_intermediate_size": 1536, "num_hidden_layers": 60, "num_attention_heads": 128,
            "num_key_value_heads": 128, "vocab_size": 102400, "q_lora_rank": 1536, "kv_lora_rank": 512,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 160,
            "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
            "moe_layer_freq": 1, "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3,
            "routed_scaling_factor": 16.0, "norm_topk_prob": False, "max_position_embeddings": 163840,
            "rope_scaling": YARN,
        },
        235_741_434_880,
    ),
    "phi-3-small-8k": (
        {
            "architectures": ["Phi3SmallForCausalLM"], "hidden_size": 4096, "ff_intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "vocab_size": 100352, "max_position_embeddings": 8192, "gegelu_limit": 20.0,
            "dense_attention_every_n_layers": 2, "blocksparse_block_size": 64,
            "blocksparse_num_local_blocks": 16, "blocksparse_vert_stride": 8, "mup_width_multiplier": 8.0,
            "rope_embedding_base": 1000000, "mup_embedding_multiplier": 10.0, "mup_attn_multiplier": 1.0,
        },
        7_392_272_384,
    ),
}  # fmt: skip


def build(config: dict[str, Any], dtype: DType = DType.F32) -> Program:
    return build_program(ModelConfig(config, "config.json"), dtype)


def the(program: Program, kind: type[Op], which: int = 0) -> Any:
    return [op for op in program.ops if type(op) is kind][which]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_number_of_parameters(name: str) -> None:
    config, parameters = PUBLISHED[name]
    sizes = {part.source: math.prod(part.shape) for part in tiny.parts_of(config)}
    assert sum(sizes.values()) == parameters


def test_deepseek_caches_one_latent_and_one_key() -> None:
    program = build(PUBLISHED["deepseek-v2"][0], DType.BF16)
    assert kv_bytes_per_token(program) == 2 * 60 * (512 + 64)
    assert program.max_position == 163840
    attention, rope = the(program, LatentAttention), the(program, LatentRopeKV).rope
    assert attention.scale == pytest.approx(192**-0.5 * (0.1 * 0.707 * math.log(40) + 1) ** 2)
    assert rope.attention_factor == 1.0 and rope.interleaved and rope.dim == 64
    route = the(program, Route)
    assert (route.groups, route.kept_groups, route.top_k, route.scale) == (8, 3, 6, 16.0)
    assert route.name == "layers.1.moe.route"  # the first layer is dense


def test_shares_are_scaled_or_renormalised_never_both() -> None:
    route = the(build(PUBLISHED["deepseek-v2"][0] | {"norm_topk_prob": True}), Route)
    assert route.renormalise and route.scale == 1.0


def test_phi_3_small_alternates() -> None:
    program = build(PUBLISHED["phi-3-small-8k"][0])
    sparse = [op for op in program.ops if isinstance(op, BlockSparseAttention)]
    assert [op.name for op in sparse] == [f"layers.{i}.attn" for i in range(0, 32, 2)]
    assert {op.scale for op in sparse} == {1 / 128}
    part = sparse[0].sparsity
    assert (part.size, part.local, part.stride, part.head_step) == (64, 16, 8, 1)
    assert the(program, Logits).scale == 1 / 8


@pytest.mark.parametrize("name", moe.CASES)
def test_every_op_has_a_cost_and_every_buffer_a_place(name: str) -> None:
    program = build(moe.CASES[name].config)
    decode = program_cost(program, StepShape(4, 1, 100))
    prefill = program_cost(program, StepShape(1, 100, 100))
    assert 0 < decode.flops < prefill.flops and decode.kv_bytes > 0
    assert len(plan_workspace(program.ops, 64, 4).placements) == len(program.buffers)
    assert len(fuse(program)) <= len(program.ops)


def test_experts_cost_what_they_stream() -> None:
    program = build(PUBLISHED["mixtral-8x7b"][0], DType.BF16)
    op = the(program, Experts)
    one = 3 * 4096 * 14336 * 2
    single = op_cost(program, op, StepShape(1, 1, 10))
    assert single.weight_bytes == pytest.approx(2 * one)
    assert single.flops == pytest.approx(2 * 2 * 3 * 4096 * 14336, rel=1e-3)
    assert op_cost(program, op, StepShape(512, 1, 10)).weight_bytes == pytest.approx(8 * one, rel=1e-6)
    two = op_cost(program, op, StepShape(2, 1, 10)).weight_bytes  # 2 experts, then 2 of which 1.5 are new
    assert two == pytest.approx(3.5 * one)


def test_shared_experts_are_experts_of_every_token() -> None:
    program = build(PUBLISHED["deepseek-v2-lite"][0], DType.BF16)
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
    program = build(PUBLISHED["deepseek-v2-lite"][0] | changed)
    assert the(program, Route).always == the(program, Experts).always == always
    assert any(op.name == "layers.1.shared.down" for op in program.ops) is apart


def test_absorbed_projections_cost_as_much_as_they_are_large() -> None:
    program = build(PUBLISHED["deepseek-v2"][0], DType.BF16)
    cost = op_cost(program, the(program, HeadLinear), StepShape(3, 1, 10))
    assert cost.flops == 2 * 3 * 128 * 128 * 512 and cost.weight_bytes == 2 * 128 * 128 * 512
    attention = op_cost(program, the(program, LatentAttention), StepShape(2, 1, 1000))
    assert attention.kv_bytes == 2 * 1000 * 576 * 2
    assert attention.flops == 2 * 1000 * 128 * (2 * 576 + 2 * 512 + 5)


def test_block_sparse_attention_costs_less_than_dense() -> None:
    program = build(PUBLISHED["phi-3-small-8k"][0], DType.BF16)
    cost = op_cost(program, the(program, BlockSparseAttention), StepShape(1, 1, 8192))
    assert cost.flops == int((1024 + 7168 / 8) * 32 * (4 * 128 + 5))
    assert cost.kv_bytes == int((1024 + 7168 / 2) * 8 * 256 * 2)  # four heads of a group see four stripes


# Case, change that keeps the tensors: each must move the logits, or the case would not exercise it.
MATTERS: list[tuple[str, dict[str, Any]]] = [
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
]


@pytest.mark.parametrize(("name", "change"), MATTERS, ids=str)
def test_particulars_matter(name: str, change: dict[str, Any], tmp_path: Any) -> None:
    case = moe.CASES[name]
    tensors = tiny.random_tensors(name, case.config)
    logits = []
    for config in (case.config, case.config | change):
        backend = tiny.load(tiny.save(tmp_path, config, tensors), case.max_model_len)
        prompt = tiny.prompt_of(name)
        logits.append(tiny.all_logits(backend, prompt, (len(prompt),)))
        backend.close()
    drawable = np.isfinite(logits[0])
    assert np.abs(logits[0][drawable] - logits[1][drawable]).max() > 3e-4


def test_the_correction_bias_matters(tmp_path: Any) -> None:
    case = moe.CASES["deepseek_v3"]
    tensors = tiny.random_tensors(case.name, case.config)
    prompt, logits = tiny.prompt_of(case.name), []
    for scale in (1, 0):
        changed = {k: v * scale if "correction" in k else v for k, v in tensors.items()}
        backend = tiny.load(tiny.save(tmp_path, case.config, changed))
        logits.append(tiny.all_logits(backend, prompt, (len(prompt),)))
        backend.close()
    assert np.abs(logits[0] - logits[1]).max() > 3e-4


REFUSED: list[tuple[str, dict[str, Any], str]] = [
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
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_wrong_configs_are_refused_in_one_line(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        build(moe.CASES[name].config | change)
    text = str(caught.value)
    assert message in text and text.startswith("config.json") and "\n" not in text
