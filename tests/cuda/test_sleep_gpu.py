"""Sleep on a real GPU: the memory really goes, and comes back with the same tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rvllm.backends.cuda.backend import CudaBackend
from rvllm.backends.cuda.device.driver import Device
from rvllm.engine.ipc.messages import Generate, Sampling
from rvllm.program.dtypes import DType
from support.kernels.gpu_engine import CONFIG, backend, core_of, model, needs_gpu, run, tokens_of

pytestmark = [pytest.mark.gpu, needs_gpu]


@pytest.mark.alone
def test_sleep_gives_memory_back_and_changes_no_token() -> None:
    config = model()
    engine = replace(CONFIG, num_gpu_blocks=20_000, enable_sleep_mode=True, capture_graphs="eager")
    core = core_of(backend(config, "cuda", DType.BF16, engine), config, engine)
    loaded = core.backend
    assert isinstance(loaded, CudaBackend)
    rng = np.random.default_rng(4)
    requests = [
        (rng.integers(0, 515, 50).tolist(), Sampling(max_tokens=20, temperature=1.0, seed=i))
        for i in range(20)
    ]
    expected = [tokens_of(outputs) for outputs in run(core, requests)]
    free = Device.free_memory()[0]
    for _ in range(3):
        core.sleep(1)
        assert Device.free_memory()[0] > free + 200_000_000
        core.wake_up()
        assert core.backend is loaded and abs(Device.free_memory()[0] - free) < 8 << 20
        assert [tokens_of(outputs) for outputs in run(core, requests)] == expected
    for i, (prompt, sampling) in enumerate(requests):
        core.add_request(Generate(f"kept {i}", prompt, sampling))
    got: dict[str, list[int]] = {f"kept {i}": [] for i in range(len(requests))}
    preemptions = core.stats().preemptions
    while core.has_work():
        for output in core.step():
            got[output.request_id] += output.token_ids
        core.sleep(1, keep_kv=True)
        core.wake_up()
    assert list(got.values()) == expected and core.stats().preemptions == preemptions
    assert abs(Device.free_memory()[0] - free) < 8 << 20
    core.sleep(1)
    core.close()
