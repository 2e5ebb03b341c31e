"""KV blocks that move to host memory and back on a real GPU give the same tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rvllm.engine.ipc.messages import Sampling
from rvllm.program.dtypes import DType
from support.kernels.gpu_engine import CONFIG, backend, core_of, model, needs_gpu, run, tokens_of

pytestmark = [pytest.mark.gpu, needs_gpu]


def asked(rng: np.random.Generator) -> list[tuple[list[int], Sampling]]:
    """Prompts that come again, by themselves and with others' beginnings, after many others."""
    prompts = [rng.integers(0, 515, int(n)).tolist() for n in rng.integers(40, 330, 14)]
    return [
        (
            prompts[int(i)] + prompts[int(j)][: 7 * (turn % 3)],
            Sampling(max_tokens=20, temperature=1.0, seed=turn),
        )
        for turn, (i, j) in enumerate(rng.integers(0, 14, (90, 2)))
    ]


def test_blocks_that_moved_to_the_host_and_back_give_the_same_tokens() -> None:
    config = model("Qwen2ForCausalLM", num_attention_heads=6, num_key_value_heads=2)
    roomy = replace(CONFIG, max_num_seqs=8, num_gpu_blocks=2000)
    tight = replace(CONFIG, max_num_seqs=8, num_gpu_blocks=80, num_cpu_blocks=400, preemption_mode="swap")
    requests = asked(np.random.default_rng(3))
    told = []
    for engine in (roomy, tight):
        core = core_of(backend(config, "cuda", DType.BF16, engine), config, engine)
        told.append([tokens_of(outputs) for outputs in run(core, requests)])
        stats = core.stats()
        core.scheduler.blocks.check()
        core.close()
    assert told[0] == told[1]
    assert stats.blocks_moved_out > 50 and stats.blocks_moved_in > 50 and stats.host_hits > 0
