"""What the plan of the device's memory promises the rest of the backend and the operator; no GPU needed."""

import json
from pathlib import Path

import pytest

from rvllm.backends.base import MAX_BIASES, MAX_STOPS
from rvllm.backends.cuda.buckets import bucket_of, decode_buckets, token_buckets
from rvllm.backends.cuda.device import arena
from rvllm.backends.cuda.device.driver import CudaError
from rvllm.backends.cuda.layout.allocations import Placed
from rvllm.backends.cuda.layout.memory import GB, HEADROOM, budget_of
from rvllm.backends.cuda.layout.preview import preview
from rvllm.backends.cuda.ops.gemm import cublas
from rvllm.backends.cuda.ops.sampling.slots import START_WORDS
from rvllm.backends.cuda.supported import check_supported
from rvllm.backends.load import choose_device
from rvllm.backends.opening import gpu_present
from rvllm.cli.main import main
from rvllm.config import EngineConfig
from rvllm.engine.scheduler import PROMPT_LOGPROB_ROWS
from rvllm.errors import CapacityError, RvllmError
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.ray.config import ModelSpec
from support.kernels.gpu_engine import needs_gpu
from support.kernels.planned import H100, QWEN_7B, planner, program

TOTAL, FREE = 80 * GB, 78 * GB
BERT = {
    "architectures": ["BertModel"], "vocab_size": 515, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 512, "hidden_act": "gelu",
    "layer_norm_eps": 1e-12, "type_vocab_size": 2,
}  # fmt: skip

MAMBA_ONLY = {
    "architectures": ["NemotronHForCausalLM"], "vocab_size": 512, "hidden_size": 256,
    "num_attention_heads": 4, "hybrid_override_pattern": "M-", "head_dim": 64, "intermediate_size": 512,
    "num_key_value_heads": 2, "mamba_num_heads": 8, "mamba_head_dim": 64, "n_groups": 2,
    "ssm_state_size": 128, "conv_kernel": 4,
}  # fmt: skip


@pytest.mark.parametrize(("seqs", "longest"), [(8, 4096), (512, 131072), (256, 262144), (1024, 262144)])
def test_the_longest_request_with_every_list_full_fits_the_buffer_of_starting_slots(
    seqs: int, longest: int
) -> None:
    config = EngineConfig(max_num_seqs=seqs, num_gpu_blocks=longest // 16)
    plan = planner(program(num_hidden_layers=1, max_position_embeddings=longest), H100, config).memory
    assert plan.longest == longest and plan.shape.seqs == seqs
    assert plan.shape.samples == seqs + PROMPT_LOGPROB_ROWS, "a step's sampled rows, and those of prompts"
    assert plan.start_words - seqs * START_WORDS >= longest + 2 * MAX_BIASES + MAX_STOPS


@pytest.mark.parametrize(
    ("flags", "most"),
    [
        ({}, int(0.9 * TOTAL)),
        ({"gpu_memory_utilization": 1.0}, TOTAL),
        ({"gpu_memory_utilization": 1.0, "gpu_memory_reserve_gb": 8.0}, TOTAL - 8 * GB),
        ({"gpu_memory_utilization": 0.5, "gpu_memory_reserve_gb": 8.0}, TOTAL // 2),
        ({"gpu_memory_utilization": 0.01}, 2 * GB),
        ({"gpu_memory_reserve_gb": 500.0}, 2 * GB),
    ],
)
def test_both_memory_flags_hold_for_all_that_is_taken(flags: dict[str, float], most: int) -> None:
    budget = budget_of(EngineConfig(**flags), FREE, TOTAL)  # type: ignore[arg-type]
    assert budget.used == TOTAL - FREE
    taken = budget.used + budget.ours
    assert taken == (most - HEADROOM if most > budget.used else budget.used)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_engines_that_share_a_card_get_equal_parts_whoever_comes_first(count: int) -> None:
    """As Ray's replicas on a part of a GPU: each takes its share, all together what one would take alone."""
    context = 400 << 20  # of the driver, for each process
    config = ModelSpec("m", gpus=1 / count).engine_config()
    free, parts = TOTAL, []
    for _ in range(count):
        free -= context
        parts.append(budget_of(config, free, TOTAL).ours)
        free -= parts[-1] + HEADROOM
    assert max(parts) - min(parts) <= (context if count == 1 else 0)
    assert abs(sum(parts) + count * HEADROOM - int(0.9 * TOTAL)) <= 500 << 20 and free > 0
    last = budget_of(EngineConfig(gpu_memory_share=0.5, gpu_memory_reserve_gb=8.0), 10 * GB, TOTAL)
    assert last.ours == 2 * GB - HEADROOM, "what others have, and what stays free, is not there to take"


def test_a_share_that_is_too_small_says_so() -> None:
    config = EngineConfig(gpu_memory_share=0.02)
    with pytest.raises(CapacityError, match=r"raise --gpu-memory-share to 0\.\d\d"):
        planner(program(), H100, config, budget_of(config, FREE // 2, TOTAL))


@pytest.mark.parametrize("blocks", [None, 2000])
def test_info_shows_every_byte_of_the_device(blocks: int | None) -> None:
    config = EngineConfig(num_gpu_blocks=blocks)
    given, budget = program(), budget_of(config, FREE, TOTAL)
    seen, plan = preview(given, config, H100, budget), planner(given, H100, config, budget).memory
    assert sum(seen.lines.values()) == seen.total == TOTAL and min(seen.lines.values()) >= 0
    assert {name: seen.lines[name] for name in plan.lines} == plan.lines
    assert seen.limits["kv blocks"] == plan.shape.kv_blocks == (blocks or plan.shape.kv_blocks)
    assert seen.limits["max_model_len"] == plan.max_model_len


@pytest.mark.parametrize("strategy", ["native", "cublas", "cutlass", "hybrid"])
def test_the_arena_is_filled_by_the_plan_to_the_byte(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "call", lambda name, *_: 1 << 40)
    plan = planner(program(num_hidden_layers=3), H100, EngineConfig(gemm_strategy=strategy)).memory
    taken = arena.Arena(plan.nbytes)
    placed = Placed.take(taken, plan.allocations)
    assert {line.name: line.nbytes for line in taken.ledger()} == plan.lines  # nothing is left over
    at = placed.addresses(plan.workspace)
    starts = [*at.weights.values(), *(a for pair in at.caches.values() for a in pair), at.metadata, at.scores]
    assert len(set(starts)) == len(starts) and min(starts) >= 1 << 40
    assert placed.line("kv cache").nbytes == plan.lines["kv cache"]
    assert len(at.caches) == 3 and all(values > keys for keys, values in at.caches.values())


def test_info_shows_an_encoder_too() -> None:
    config = EngineConfig()
    seen = preview(
        build_program(ModelConfig(BERT, "t"), DType.F16), config, H100, budget_of(config, FREE, TOTAL)
    )
    assert sum(seen.lines.values()) == TOTAL and seen.lines["weights"] > 0
    assert seen.limits["max_model_len"] == 512 and "kv blocks" not in seen.limits


def test_memory_that_is_gone_meanwhile_is_one_line_with_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *_: object) -> int:
        raise CudaError(f"{name}: CUDA_ERROR_OUT_OF_MEMORY")

    monkeypatch.setattr(arena, "call", refuse)
    with pytest.raises(CapacityError, match=r"9\.00 GB .*OUT_OF_MEMORY.*--gpu-memory-utilization"):
        arena.Arena(9 * GB)


def test_padded_sizes_of_decode_graphs() -> None:
    wanted = [1, 2, 4, 8, 16, 24, 32, *range(40, 257, 8), *range(272, 513, 16)]
    assert decode_buckets(512) == wanted and decode_buckets(256) == [n for n in wanted if n <= 256]
    assert decode_buckets(1) == [1] and decode_buckets(300)[-2:] == [288, 300]
    assert [bucket_of(wanted, n) for n in (1, 3, 9, 257, 512)] == [1, 4, 16, 272, 512]
    tokens = token_buckets(8192)
    assert all(bucket_of(tokens, n) * 8 <= n * 9 for n in range(128, 8193)) and tokens[-1] == 8192
    assert all(bucket_of(tokens, n) - n < 128 for n in range(2048, 8193))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"gemm_strategy": "cublas"}, "cuBLAS is not installed: pip install "),
        ({"gemm_strategy": "hybrid"}, "cuBLAS is not installed: pip install "),
    ],
)
def test_what_is_absent_is_refused_by_name(
    flags: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cublas, "_candidates", lambda: iter(["no-such-library.so"]))
    cublas.library.cache_clear()
    with pytest.raises(RvllmError, match=message):
        check_supported(program(num_hidden_layers=1), EngineConfig(**flags))  # type: ignore[arg-type]
    cublas.library.cache_clear()
    with pytest.raises(RvllmError, match="--dtype float32: a GPU runs bfloat16 and float16"):
        check_supported(program(DType.F32, num_hidden_layers=1), EngineConfig())


def test_a_decoder_without_attention_is_refused_before_its_cache_is_planned() -> None:
    with pytest.raises(RvllmError, match="NemotronHForCausalLM without any layer that attends"):
        check_supported(build_program(ModelConfig(MAMBA_ONLY, "t"), DType.BF16), EngineConfig())
    attends = MAMBA_ONLY | {"hybrid_override_pattern": "M*"}
    check_supported(build_program(ModelConfig(attends, "t"), DType.BF16), EngineConfig())
    check_supported(build_program(ModelConfig(BERT, "t"), DType.BF16), EngineConfig())


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpus_that_are_hidden_are_not_there(hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([Path("/dev/nvidia0")]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_present()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert not gpu_present() and choose_device(EngineConfig()) == "cpu"
    with pytest.raises(RvllmError, match="no NVIDIA GPU is visible"):
        choose_device(EngineConfig(device="cuda"))


@pytest.mark.gpu
@needs_gpu
def test_info_plans_on_the_gpu_that_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B | {"num_hidden_layers": 2}))
    assert (
        main(["info", "--model", str(tmp_path), "--device", "cuda", "--num-gpu-blocks", "64", "--json"]) == 0
    )
    lines = json.loads(capsys.readouterr().out)["memory plan (cuda)"]
    assert lines["kv blocks"] == "64" and int(lines["sum"].split()[0]) > 1 << 30
