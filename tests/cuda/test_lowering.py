"""Every op of a program resolves to kernels of the manifest, for every step size; no GPU needed."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rvllm.backends.cuda.device import graphs
from rvllm.backends.cuda.device.catalog import select
from rvllm.backends.cuda.device.driver import DeviceFacts
from rvllm.backends.cuda.device.launches import Counts, Planned
from rvllm.backends.cuda.layout.fusion import Stage, fuse
from rvllm.backends.cuda.layout.memory import MemoryPlan
from rvllm.backends.cuda.lowering import EMITTERS, FAMILIES, LOWERED, refuse_unknown
from rvllm.backends.cuda.step_planner import GraphBook
from rvllm.config import EngineConfig
from rvllm.errors import CapacityError, MissingKernelError
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.program.memory import lifetimes
from rvllm.program.ops.dense import Embed, Linear, Logits, Op, Program
from support.kernels.planned import A100, GB80, GEMMA_27B, H100, L40, declared, kinds, planner, program


@pytest.mark.parametrize("facts", [H100, A100, L40], ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
def test_a_7b_resolves_to_one_kernel_each(facts: DeviceFacts, dtype: DType) -> None:
    names = planner(program(dtype), facts, EngineConfig()).kernels()
    specs, missing = select(names, facts.capability)
    assert not missing
    assert {s.name for s in specs} == set(names)


def prompts(given: Program, facts: DeviceFacts) -> list[Planned]:
    """The launches of prefill attention in a step of 4,096 tokens."""
    planned = planner(given, facts, EngineConfig()).body(4096)
    return [p for p in planned if "attn_prefill" in p.kernel]


def test_hopper_computes_prompts_by_wgmma_where_it_can() -> None:
    planned = prompts(program(), H100)
    assert {p.kernel for p in planned} == {"sm90_bf16_attn_prefill_d128"} and len(planned) == 28
    assert kinds(planned[0]) == declared("attention/prefill_sm90.cu", "attn_prefill_sm90")
    assert planned[0].grid(Counts(4096, 256, 0)) == (132, 1, 1)
    for facts in (A100, L40):
        (one, *_) = prompts(program(), facts)
        assert one.kernel.startswith("sm80_bf16_attn_prefill_d128")
        assert kinds(one) == declared("attention/prefill.cu", "attn_prefill")


def test_capped_logits_keep_the_older_kernel_for_prompts() -> None:
    capped = build_program(ModelConfig(GEMMA_27B, "test config"), DType.BF16)
    assert {p.kernel for p in prompts(capped, H100)} == {"sm80_bf16_attn_prefill_d128"}


@pytest.mark.parametrize("seqs", [1, 4, 512])
def test_fusing_leaves_few_launches_a_layer(seqs: int) -> None:
    """Attention rotates too."""
    given = program()
    assert len(given.ops) == 28 * 11 + 5
    planned = planner(given, H100, EngineConfig(max_num_seqs=512)).decode(seqs)
    # begin, embed, layers, gather, norm, head, sampling
    assert len(planned) == 1 + 1 + 28 * 7 + 1 + 1 + 1 + 2


def test_merged_buffers_take_no_workspace() -> None:
    given = program()
    names = {life.buffer.name for life in lifetimes(fuse(given))}
    assert "layers.0.mlp.gate_up.out" not in names
    assert "layers.0.o.out" not in names
    assert "layers.0.qkv.out" in names


def test_ops_without_kernels_are_all_listed() -> None:
    odd = program(hidden_size=3584, num_attention_heads=28, head_dim=72, num_hidden_layers=2)
    with pytest.raises(MissingKernelError) as caught:
        planner(odd, H100, EngineConfig())
    assert "head size 72" in str(caught.value)


def test_all_that_is_missing_is_listed_with_what_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(to: object, stage: Stage) -> None:
        raise MissingKernelError(f"no kernel for {stage.ops[0].kind}")

    given = planner(program(), H100, EngineConfig())
    for kind in (Embed, Logits, Linear):
        monkeypatch.setitem(EMITTERS, kind, none)
    with pytest.raises(MissingKernelError) as caught:
        given.decode(1)
    text = str(caught.value)
    assert text.startswith(
        f"{2 + 28 * 4} ops have no CUDA kernel: embed (no kernel for embed); layers.0.qkv, "
    )
    assert "lm_head (no kernel for logits)" in text and "layers.27.mlp.down + layers.27.mlp.add (" in text


def lines(plan: MemoryPlan) -> int:
    return sum(plan.lines.values())


def test_the_ledger_fills_the_budget_and_no_more() -> None:
    plan = planner(program(), H100, EngineConfig()).memory
    assert lines(plan) <= GB80.ours
    assert GB80.ours - lines(plan) < plan.block_bytes
    fixed = planner(program(), H100, EngineConfig(num_gpu_blocks=1000)).memory
    assert fixed.shape.kv_blocks == 1000
    assert lines(fixed) < lines(plan)
    assert fixed.max_model_len == 16000


def test_too_little_memory_names_the_shortfall_and_the_flags() -> None:
    small = replace(GB80, ours=12 << 30)
    with pytest.raises(CapacityError) as caught:
        planner(program(), H100, EngineConfig(gpu_memory_utilization=0.15), small)
    assert "short by" in str(caught.value)
    assert "raise --gpu-memory-utilization to 0.21" in str(caught.value)
    with pytest.raises(CapacityError, match="--max-model-len 32768"):
        planner(program(), H100, EngineConfig(max_model_len=32768, num_gpu_blocks=100))


def test_cublas_takes_every_product_and_nothing_is_packed() -> None:
    given = planner(program(), H100, EngineConfig(gemm_strategy="cublas"))
    planned = given.decode(16)
    assert sum(p.kernel == "cublaslt" for p in planned) == 28 * 4 + 1
    assert not any("gemm" in name for name in given.kernels())
    assert given.memory.lines["cuBLAS workspace"] == 32 << 20


@dataclass(frozen=True, kw_only=True)
class Shuffle(Op):
    """An op that no backend knows."""

    READS = WRITES = ()


def test_unknown_ops_are_refused_with_their_list() -> None:
    given = program(num_hidden_layers=2)
    odd = replace(given, ops=(*given.ops, Shuffle(name="a"), Shuffle(name="b")))
    with pytest.raises(MissingKernelError, match=r"shuffle \(2x\).*--device cpu"):
        refuse_unknown(odd)
    refuse_unknown(given)


def test_no_op_is_lowered_by_two_families() -> None:
    assert sum(len(family.emitters) for family in FAMILIES) == len(LOWERED)


def test_every_graph_can_be_captured_ahead_of_need_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "capture", lambda *args: object())
    given = planner(program(DType.BF16), H100, EngineConfig(max_num_seqs=5, max_num_batched_tokens=100))
    book = GraphBook(given, cast(Any, SimpleNamespace(capability=90)), cast(Any, None))
    book.body(40)
    shown, captured = book.last_kernels(), 0
    while book.capture_next():
        captured += 1
        assert book.last_kernels() == shown
    sizes = [given.decode_sizes(), given.token_sizes(), given.sample_sizes()]
    assert len(book) == sum(map(len, sizes)) == captured + 1
