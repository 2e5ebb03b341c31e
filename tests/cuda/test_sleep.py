"""A GPU's sleep, on the emulator's driver: memory goes, addresses, graphs and weights stay."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rvllm.backends.cuda.backend import CudaBackend
from rvllm.backends.cuda.device import mapped
from rvllm.backends.cuda.device.arena import Arena
from rvllm.backends.cuda.device.driver import Stream
from rvllm.engine.ipc.messages import Generate, Sampling
from rvllm.errors import CapacityError
from rvllm.program.dtypes import DType
from support.emulator import needs_emulator
from support.emulator.driver import INVALID_VALUE, OK, EmulatedDriver, emulated_driver
from support.kernels.gpu_engine import CONFIG, core_of, run, tokens_of
from support.models.arch_cases import MODELS, VOCAB, program_of, tensors_of

pytestmark = needs_emulator


def test_requests_go_on_after_a_sleep() -> None:
    config = {**MODELS["qwen3"].config, "num_hidden_layers": 2}
    checkpoint, rng = tensors_of("qwen3", config, DType.F16), np.random.default_rng(4)
    asked = [(rng.integers(0, VOCAB, 20).tolist(), Sampling(max_tokens=3, temperature=1.0, seed=5))]
    engine = replace(
        CONFIG,
        max_model_len=96,
        max_num_seqs=1,
        max_num_batched_tokens=80,
        num_gpu_blocks=6,
        enable_sleep_mode=True,
    )
    with emulated_driver():
        core = core_of(CudaBackend.load(program_of(config, DType.F16), checkpoint, engine), config, engine)
        backend = core.backend
        assert isinstance(backend, CudaBackend)
        before = tokens_of(run(core, asked)[0])
        graphs = backend.stats()["rvllm:cuda_graphs"]
        core.sleep(1)
        assert core.sleep_level == 1 and core.backend is backend
        core.wake_up()
        preempted = core.stats().preemptions
        assert tokens_of(run(core, asked)[0]) == before
        assert core.backend is backend and backend.stats()["rvllm:cuda_graphs"] == graphs
        prompt, sampling = asked[0]
        core.add_request(Generate("kept", prompt[:17], sampling))
        got = [output for _ in range(2) for output in core.step()]
        core.sleep(1, keep_kv=True)
        computed = core.stats().prompt_tokens
        core.wake_up()
        while core.has_work():
            got += core.step()
        assert core.stats().prompt_tokens == computed and core.stats().preemptions == preempted
        assert tokens_of(got) == tokens_of(run(core, [(prompt[:17], sampling)])[0])
        core.add_request(Generate("again", prompt, sampling))
        core.step()
        core.sleep(1, keep_kv=True)
        core.sleep(2)  # closes what sleeps already
        core.close()


def test_without_host_memory_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with emulated_driver():
        arena, stream = Arena(1 << 16, sleeps=True), Stream()
        stream.fill_bytes(arena.base, 7, 64)
        monkeypatch.setattr(EmulatedDriver, "cuMemHostRegister", lambda *_: (INVALID_VALUE,))
        assert not arena.sleep(64, 0, stream)
        monkeypatch.undo()
        monkeypatch.setattr("rvllm.backends.cuda.device.host_memory.free_bytes", lambda: 63)
        assert not arena.sleep(64, 0, stream)
        assert ctypes.string_at(arena.base, 64) == b"\7" * 64
        arena.close()


def test_a_waking_without_room_takes_nothing_and_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "PIECE", 1 << 16)
    with emulated_driver() as driver:
        arena, stream = Arena(3 << 16, sleeps=True), Stream()
        stream.fill_bytes(arena.base, 7, 64)
        assert arena.sleep(64, 0, stream)
        create, left = driver.cuMemCreate, [2]  # pieces that the driver still has
        released: list[int] = []

        def pieces(*what: Any) -> tuple[Any, ...]:
            left[0] -= 1
            return create(*what) if left[0] >= 0 else (INVALID_VALUE,)

        monkeypatch.setattr(driver, "cuMemCreate", pieces)
        monkeypatch.setattr(driver, "cuMemRelease", lambda pages: released.append(pages) or (OK,))
        with pytest.raises(CapacityError, match="waking up: the driver refuses"):
            arena.wake(stream)
        assert released == [1 << 16] * 2
        left[0] = 3
        arena.wake(stream)
        assert ctypes.string_at(arena.base, 64) == b"\7" * 64
        arena.close()
