"""A thousand requests through a small KV pool: every output as if alone, no block and no byte lost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rvllm.backends.cuda.device.driver import Device
from rvllm.engine.ipc.messages import Generate, Sampling
from rvllm.program.dtypes import DType
from support.kernels.gpu_engine import CONFIG, backend, core_of, model, needs_gpu, run, tokens_of

pytestmark = [pytest.mark.gpu, needs_gpu]
REQUESTS = 1000


def requests(rng: np.random.Generator) -> list[tuple[list[int], Sampling]]:
    """Mixed lengths, greedy and sampled, some sharing a long prefix, some with penalties."""
    shared = rng.integers(0, 515, 90).tolist()
    made = []
    for i in range(REQUESTS):
        prompt = rng.integers(0, 515, int(rng.choice([1, 3, 17, 40, 120]))).tolist()
        if i % 5 == 0:
            prompt = shared + prompt
        sampling = Sampling(max_tokens=int(rng.choice([1, 30, 90, 160, 200])))
        if i % 2:
            sampling = Sampling(max_tokens=sampling.max_tokens, temperature=1.0, top_p=0.95, top_k=50, seed=i)
        if i % 7 == 0:
            sampling = Sampling(max_tokens=20, repetition_penalty=1.2, frequency_penalty=0.4)
        made.append((prompt, sampling))
    return made


@pytest.mark.alone
@pytest.mark.parametrize("host_blocks", [0, 300], ids=["recompute", "swap"])
def test_a_thousand_requests_leave_nothing_behind(host_blocks: int) -> None:
    config = model("Qwen2ForCausalLM", num_attention_heads=6, num_key_value_heads=2)
    engine = replace(
        CONFIG, max_num_seqs=48, num_gpu_blocks=60, capture_graphs="eager", check_device_memory=True,
        num_cpu_blocks=host_blocks, preemption_mode="swap" if host_blocks else "recompute",
    )  # fmt: skip
    core = core_of(backend(config, "cuda", DType.BF16, engine), config, engine)
    rng = np.random.default_rng(2)
    asked = requests(rng)
    run(core, asked[:8])
    before = Device.free_memory()[0]

    found: dict[str, list[int]] = {str(i): [] for i in range(REQUESTS)}
    ended: dict[str, list[str]] = {str(i): [] for i in range(REQUESTS)}
    waiting = list(range(REQUESTS))
    while waiting or core.has_work():
        for _ in range(min(len(waiting), int(rng.integers(0, 12)))):
            i = waiting.pop(0)
            core.add_request(Generate(str(i), *asked[i]))
        if rng.random() < 0.005:
            alive = [i for i in found if found[i] and not ended[i]]
            core.abort([str(i) for i in rng.permutation(alive)[:2]])
        for output in core.step():
            found[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                ended[output.request_id].append(output.finish_reason)
        assert Device.free_memory()[0] == before

    stats = core.stats()
    assert stats.preemptions > 150, "the pool is always too small"
    assert stats.swaps == (stats.preemptions if host_blocks else 0)
    assert (stats.blocks_moved_out > 200 and stats.blocks_moved_in > 50) == bool(host_blocks)
    assert stats.blocks_used == 0
    assert all(len(reasons) == 1 for reasons in ended.values())
    assert sum(reasons == ["abort"] for reasons in ended.values()) > 5
    for i, request in enumerate(asked):
        alone = tokens_of(run(core, [request])[0])
        got = found[str(i)]
        assert got == (alone[: len(got)] if ended[str(i)] == ["abort"] else alone), i
    assert Device.free_memory()[0] == before
    core.close()
