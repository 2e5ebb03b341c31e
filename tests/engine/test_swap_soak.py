"""Preemption by swap on the CPU's kernels: a pool that is always too small, every output as alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from rvllm.backends.cpu.backend import CpuBackend
from rvllm.config import EngineConfig
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import Generate, ModelFacts, Sampling
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from support.models.tiny_llm import CONFIG

REQUESTS = 40
SETTINGS = EngineConfig(
    device="cpu", load_format="dummy", threads=1, max_num_seqs=8, max_model_len=128, num_blocks=400,
    max_num_batched_tokens=128,
)  # fmt: skip


def core_of(settings: EngineConfig) -> EngineCore:
    program = build_program(ModelConfig(CONFIG, "tiny"), DType.F32)
    facts = ModelFacts(architecture="tiny", model_path="", vocab_size=512, max_model_len=128)
    return EngineCore(CpuBackend.load(program, None, settings), facts, settings)


def requests() -> list[Generate]:
    """Prompts of which some begin alike, greedy and sampled."""
    random = Random(11)
    shared = random.choices(range(512), k=32)
    made = []
    for i in range(REQUESTS):
        prompt = random.choices(range(512), k=random.randint(3, 12))
        prompt = prompt if i % 4 else shared + prompt
        sampling = Sampling(max_tokens=random.randint(30, 60), temperature=float(i % 2), seed=i)
        made.append(Generate(f"{i}", prompt, sampling))
    return made


def answers(core: EngineCore, wanted: list[Generate], at_once: int) -> dict[str, list[int]]:
    """What all are answered, so many of them alive at a time; the books are looked at after each step."""
    found: dict[str, list[int]] = {request.request_id: [] for request in wanted}
    waiting, alive = list(wanted), 0
    while waiting or core.has_work():
        while waiting and alive < at_once:
            core.add_request(waiting.pop(0))
            alive += 1
        for output in core.step():
            found[output.request_id] += output.token_ids
            alive -= output.finish_reason is not None
        core.scheduler.blocks.check()
    return found


def resident() -> int:
    """Bytes of this process in memory."""
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_a_pool_that_is_always_too_small(mode: str) -> None:
    roomy = core_of(replace(SETTINGS, enable_prefix_caching=False))
    wanted = requests()
    alone = answers(roomy, wanted, 8)
    assert roomy.stats().preemptions == 0
    roomy.close()
    core = core_of(replace(SETTINGS, num_blocks=14, num_cpu_blocks=80, preemption_mode=mode))
    assert answers(core, wanted, 8) == alone
    before = resident()
    assert answers(core, wanted[:20], 8) == {name: alone[name] for name in list(alone)[:20]}
    stats = core.stats()
    assert resident() - before < 2 << 20, "memory is flat"
    assert stats.preemptions > 10 and stats.swaps == (stats.preemptions if mode == "swap" else 0)
    assert stats.blocks_moved_out > 30 and stats.blocks_moved_in > (10 if mode == "swap" else 0)
    core.close()
