"""What a driver would refuse is not planned: no launch of any published configuration, on any generation.

Limits are those of the CUDA programming guide's table of compute capabilities.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rvllm.backends.cuda.device.catalog import select
from rvllm.backends.cuda.device.driver import DeviceFacts
from rvllm.backends.cuda.device.launches import Counts, Planned
from rvllm.backends.cuda.encoder_plan import EncoderPlan
from rvllm.backends.cuda.layout.memory import Budget
from rvllm.backends.cuda.ops.gemm.cublas import KERNEL as CUBLAS
from rvllm.backends.cuda.step_planner import StepPlanner
from rvllm.config import EngineConfig
from rvllm.errors import MissingKernelError
from rvllm.kernels.manifest import MANIFEST
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.program.ops.encoder import embedding_size
from support.models.real_configs import CONFIGS

CARDS = [
    DeviceFacts("A100", 80, 108, 80 << 30, 166912),
    DeviceFacts("RTX 3090", 86, 82, 24 << 30, 101376),
    DeviceFacts("RTX 4090", 89, 128, 24 << 30, 101376),
    DeviceFacts("H200", 90, 132, 141 << 30, 232448),
    DeviceFacts("B200", 100, 148, 180 << 30, 232448),
    DeviceFacts("RTX 5090", 120, 170, 32 << 30, 101376),
]
PLAIN_SMEM = 48 << 10  # of a block that asked for no more
MAX_GRID = (2**31 - 1, 65535, 65535)
ROOM = Budget(800 << 30, 1 << 30, 600 << 30)  # launches are asked about here, not memory
SHORT = EngineConfig(max_num_seqs=256, max_num_batched_tokens=8192, max_model_len=500, num_gpu_blocks=8192)
LAYERS = {  # few, with each of their kinds among them
    "Nemotron-H-8B": None, "Nemotron-3-Nano-30B-A3B": None, "Gemma-3-12B": 6, "DeepSeek-V3": 5,
}  # fmt: skip
# Heads of 256 need 120 KB in prefill: https://docs.nvidia.com/cuda/cuda-c-programming-guide, table of limits.
WITHOUT = {(name, 101376) for name in ("Gemma-7B", "Gemma-2-9B", "Gemma-3-4B", "Gemma-3-12B")}


def launches(name: str, dtype: DType, facts: DeviceFacts) -> Iterator[Planned]:
    config = dict(CONFIGS[name])
    layers = LAYERS.get(name, 2)
    if layers is not None:
        few = {"num_hidden_layers": layers}
        config |= {"text_config": config["text_config"] | few} if "text_config" in config else few
    program = build_program(ModelConfig(config, name), dtype)
    if embedding_size(program) is not None:
        plan = EncoderPlan.make(program, EngineConfig(), facts, ROOM)
        for tokens in plan.sizes():
            yield from plan.launches(tokens)
        return
    planner, _ = StepPlanner.plan(program, SHORT, facts, ROOM)
    for seqs in planner.decode_sizes():
        yield from planner.decode(seqs)
    for tokens in planner.token_sizes():
        yield from planner.body(tokens)
    for samples in planner.sample_sizes():
        yield from planner.head(samples)


def refusal(planned: Planned, facts: DeviceFacts) -> str:
    """Why a driver would refuse the launch; empty when it would not."""
    if planned.kernel == CUBLAS:
        return ""
    (spec,), _ = select([planned.kernel], facts.capability)
    most = max(min(spec.smem, facts.smem_per_block - spec.static_smem), PLAIN_SMEM - spec.static_smem)
    if planned.smem > most:
        return f"asks for {planned.smem} bytes of shared memory of {most}"
    if not 0 < planned.block <= 1024:
        return f"has {planned.block} threads"
    if planned.cluster > 8 or (planned.cluster > 1 and facts.capability < 90):
        return f"is launched in clusters of {planned.cluster}"
    grid = planned.grid(Counts(8192, 256, 256))
    if grid[0] % planned.cluster or any(n > most for n, most in zip(grid, MAX_GRID, strict=True)):
        return f"has a grid of {grid}"
    return ""


@pytest.mark.parametrize("facts", CARDS, ids=lambda f: f"sm_{f.capability}")
@pytest.mark.parametrize("name", CONFIGS)
def test_no_launch_is_refused(name: str, facts: DeviceFacts) -> None:
    dtype = DType.F16 if facts.capability == 86 else DType.BF16
    if (name, facts.smem_per_block) in WITHOUT:
        with pytest.raises(MissingKernelError, match="head size 256"):
            list(launches(name, dtype, facts))
        return
    found = {p.kernel: why for p in launches(name, dtype, facts) if (why := refusal(p, facts))}
    assert not found


def test_a_launch_beyond_a_limit_is_found() -> None:
    planned = next(launches("Mixtral-8x7B", DType.BF16, CARDS[0]))
    assert not refusal(planned, CARDS[0])
    for field, value in {"smem": 1 << 20, "block": 1056, "cluster": 2}.items():
        changed = Planned(**{**vars(planned), field: value})
        assert refusal(changed, CARDS[0]), field
    assert MANIFEST[planned.kernel].runs_on(80)
