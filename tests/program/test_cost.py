"""The cost model against sums made by hand, and that every op type has a rule."""

import pytest

from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.cost import Cost, StepShape, kv_bytes_per_token, op_cost, particulars, program_cost
from rvllm.program.dtypes import DType
from rvllm.program.ops import dense as ops
from rvllm.program.ops.dense import Attention, Linear, Logits, Op
from rvllm.program.ops.mamba2 import CHUNK, StateScan
from support.models import tiny
from support.models.real_configs import CONFIGS

CONFIG = tiny.CASES["llama"] | {"num_attention_heads": 4, "num_key_value_heads": 2}
PROGRAM = tiny.program_of(CONFIG)


def cost_of(kind: type[Op], shape: StepShape, program: ops.Program = PROGRAM) -> Cost:
    op = next(op for op in program.ops if isinstance(op, kind))
    return op_cost(program, op, shape)


def test_linear() -> None:
    cost = cost_of(Linear, StepShape(sequences=3, query_len=1, context=10))
    width = (4 + 2 + 2) * 12
    assert cost.flops == 2 * 3 * 48 * width
    assert cost.weight_bytes == 4 * 48 * width
    assert cost.activation_bytes == 4 * 3 * (48 + width)


@pytest.mark.parametrize("window", [None, 13])
def test_attention_counts_each_query_and_key_once(window: int | None) -> None:
    config = CONFIG | {"architectures": ["MistralForCausalLM"], "sliding_window": window}
    shape = StepShape(sequences=2, query_len=20, context=50)
    cost = cost_of(Attention, shape, tiny.program_of(config))
    pairs = [(q, k) for q in range(30, 50) for k in range(q + 1) if window is None or k > q - window]
    assert cost.flops == 2 * len(pairs) * 4 * (4 * 12 + 5)
    assert cost.kv_bytes == 2 * len({k for _, k in pairs}) * 2 * 2 * 12 * 4


def test_logits_are_of_the_sampled_rows_only() -> None:
    assert cost_of(Logits, StepShape(2, 20, 50)).flops == 2 * 2 * 97 * 48


def test_totals_add_up_and_stored_bytes_replace_the_dtype() -> None:
    shape = StepShape(1, 1, 5)
    total = program_cost(PROGRAM, shape)
    weights = sum(w.elements for w in PROGRAM.weights if w.name != "embed") * 4
    assert total.weight_bytes == weights + 4 * 48  # one row of the table
    stored = program_cost(PROGRAM, shape, {"layers.0.qkv": 10})
    assert total.weight_bytes - stored.weight_bytes == 4 * 48 * 96 - 10
    assert kv_bytes_per_token(PROGRAM) == 3 * 2 * 2 * 12 * 4


def test_floor_is_the_slower_of_the_two() -> None:
    assert Cost(weight_bytes=100, flops=100).floor_seconds(10, 100) == 10
    assert Cost(weight_bytes=100, flops=1000).floor_seconds(100, 10) == 100


def test_every_op_type_has_a_rule() -> None:
    kinds = {v for v in vars(ops).values() if isinstance(v, type) and issubclass(v, Op) and v is not Op}
    missing = {k.__name__ for k in kinds if particulars.dispatch(k) is particulars.dispatch(object)}
    assert not missing


def test_a_scans_state_is_written_when_a_chunk_ends() -> None:
    """Its state, float32 [heads, dim, size], is read once a step; a chunk's rows lie beside it until then."""
    program = build_program(ModelConfig(CONFIGS["Nemotron-H-8B"], "m"), DType.BF16)
    op = next(op for op in program.ops if isinstance(op, StateScan))
    state, row = 4 * op.heads * op.dim * op.size, 4 * (op.heads * op.dim + 2 * op.groups * op.size + op.heads)
    for context, written in ((CHUNK - 1, False), (CHUNK, True), (CHUNK + 1, False), (3 * CHUNK, True)):
        kept = ((context - 1) % CHUNK + 1) * row
        found = op_cost(program, op, StepShape(5, 1, context)).kv_bytes
        assert found == 5 * (state * (1 + written) + kept), context
    moved = op_cost(program, op, StepShape(5, 1, 7)).activation_bytes
    assert moved == 5 * (2 * (op.xbc.width + op.heads) + op.out.dtype.size * op.out.width), (
        "steps of heads alone"
    )
