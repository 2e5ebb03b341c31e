"""Memory plans, their refusals, and the refusals of loading."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from rvllm.backends.base import Encoder, Generator, StepBatch
from rvllm.backends.cpu.backend import CpuBackend
from rvllm.backends.cpu.compiled.model import weight_lines
from rvllm.backends.cpu.memory import GB, MemoryPlan, plan_memory
from rvllm.backends.cpu.reference.interpreter import resolve
from rvllm.backends.load import choose_device, choose_dtype, load_backend
from rvllm.backends.opening import gpu_present
from rvllm.config import EngineConfig
from rvllm.errors import CapacityError, MissingKernelError, UsageError
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Op, Program
from support.models import tiny

BERT = {
    "architectures": ["BertModel"], "vocab_size": 515, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64, "hidden_act": "gelu",
    "layer_norm_eps": 1e-12, "type_vocab_size": 2,
}  # fmt: skip

PROGRAM = tiny.program_of(tiny.CASES["llama"])
PER_TOKEN = 3 * 2 * 16 * 4


def planned(config: EngineConfig, free: int = 2 * GB) -> MemoryPlan:
    return plan_memory(PROGRAM, config, weight_lines(PROGRAM, None, config), free)


def test_the_kv_cache_takes_a_quarter_of_what_is_free() -> None:
    plan = planned(EngineConfig(max_num_seqs=100_000))
    (cache,) = [line.nbytes for line in plan.lines if line.name == "kv cache"]
    assert 0.20 * GB < cache <= 0.25 * 2 * GB
    assert cache == plan.limits.num_blocks * 16 * PER_TOKEN
    assert plan.limits.max_model_len == 128
    few = planned(EngineConfig(max_num_seqs=2))
    assert few.limits.num_blocks == 2 * 128 // 16  # more could never be used


def test_flags_decide_the_number_of_blocks() -> None:
    plan = planned(EngineConfig(kv_cache_memory_gb=0.001))
    assert plan.limits.num_blocks == int(1e6) // (16 * PER_TOKEN)
    plan = planned(EngineConfig(num_blocks=3))
    assert (plan.limits.num_blocks, plan.limits.max_model_len) == (3, 48)


@pytest.mark.parametrize(
    ("settings", "free", "message"),
    [
        ({}, 10**8, "the weights take"),
        ({"max_model_len": 129}, 2 * GB, "--max-model-len 129 is more than the model's 128"),
        ({"max_model_len": 100, "num_blocks": 2}, 2 * GB, "lower --max-model-len to 32"),
        ({"kv_cache_memory_gb": 3.0}, 2 * GB, "--kv-cache-memory-gb 3: the KV cache would take"),
        ({"kv_cache_memory_gb": 0.0}, 2 * GB, "holds no KV block"),
    ],
)
def test_refusals_name_the_flags(settings: dict[str, object], free: int, message: str) -> None:
    with pytest.raises((CapacityError, UsageError)) as caught:
        planned(EngineConfig(**settings), free)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@dataclass(frozen=True, kw_only=True)
class Strange(Op):
    """An op no backend knows."""

    READS = WRITES = ()


def test_missing_kernels_are_all_listed() -> None:
    program = Program(
        "Odd", DType.F32, 10, 10, (Strange(name="a"), *PROGRAM.ops, Strange(name="b")), (), (), ()
    )
    with pytest.raises(MissingKernelError, match="no kernel for strange;"):
        resolve(program)


def test_the_cpu_computes_in_float32_only() -> None:
    program = build_program(ModelConfig(tiny.CASES["llama"], "c"), DType.BF16)
    with pytest.raises(UsageError, match="--dtype bfloat16"):
        CpuBackend.load(program, None, EngineConfig(device="cpu"))


def test_dummy_weights_need_no_checkpoint() -> None:
    config = EngineConfig(device="cpu", load_format="dummy", num_blocks=16, seed=4)
    prompt = tiny.prompt_of(tiny.CASES["llama"])
    one, other = (load_backend(PROGRAM, None, config) for _ in range(2))
    assert isinstance(one, CpuBackend) and isinstance(other, CpuBackend)
    assert np.array_equal(tiny.logits_of(one, prompt), tiny.logits_of(other, prompt))
    assert {line.name for line in one.ledger()} - {
        "packed weights, compiled kernels", "workspace of a step, at most",
    } == {
        "weights", "kv cache", "rope tables"
    }  # fmt: skip


def test_device_and_dtype() -> None:
    assert choose_device(EngineConfig(device="cpu")) == "cpu"
    assert choose_dtype(EngineConfig(device="cpu"), None) is DType.F32
    assert choose_dtype(EngineConfig(device="cpu", dtype="float16"), None) is DType.F16
    if not gpu_present():
        assert choose_device(EngineConfig()) == "cpu"
        with pytest.raises(UsageError, match="--device cuda: no NVIDIA GPU"):
            choose_device(EngineConfig(device="cuda"))


@pytest.mark.parametrize(("config", "kind"), [(tiny.CASES["llama"], Generator), (BERT, Encoder)])
def test_a_backend_generates_or_encodes(config: dict[str, Any], kind: type) -> None:
    """What a model cannot do it has no method for."""
    program = build_program(ModelConfig(config, "tiny"), DType.F32)
    backend = load_backend(program, None, EngineConfig(device="cpu", threads=1, cpu_kernels="numpy"))
    assert isinstance(backend, kind)
    assert isinstance(backend, Generator) != isinstance(backend, Encoder)
    backend.close()


def test_prompt_logprobs_in_chunks() -> None:
    backend = tiny.load(tiny.CASES["llama"])
    prompt = tiny.prompt_of(tiny.CASES["llama"], 20)
    logits = tiny.logits_of(backend, prompt)
    logp = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    found = []
    for at, n in ((0, 7), (7, 13)):
        batch = StepBatch(
            0, tiny.i32([2]), tiny.i32([n]), tiny.i32([at]), prompt[at : at + n], np.array([at > 0]),
            [tiny.started(2, prompt)] if at == 0 else [],
            tiny.table_rows(2, [5, 6]) if at == 0 else tiny.table_rows(2, []),
            prompt_logprobs={0: 3},
        )  # fmt: skip
        result = backend.collect(backend.launch(batch))
        found += result.prompt_logprobs[0]
    assert len(found) == 19  # the last row predicts what is drawn, not the prompt
    for i, entry in enumerate(found):
        assert entry.logprob == pytest.approx(logp[i, prompt[i + 1]], abs=1e-5)
        assert len(entry.top_ids) == 3
    assert result.tokens[0] == logits[-1].argmax()
