"""KV blocks in pinned host memory, on the emulator's driver."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from rvllm.backends.base import MOVE_IN, MOVE_OUT
from rvllm.backends.cuda.backend import CudaBackend
from rvllm.backends.cuda.device.driver import Pinned, Stream
from rvllm.backends.cuda.device.host_blocks import MAX_PITCH, HostBlocks, Run, runs_of
from rvllm.engine.ipc.messages import Sampling
from rvllm.program.dtypes import DType
from support.emulator.driver import emulated_driver
from support.kernels.gpu_engine import CONFIG, core_of, run
from support.models.arch_cases import MODELS, VOCAB, program_of, tensors_of


def test_caches_at_equal_distances_are_one_copy() -> None:
    assert runs_of([(1000 * i, 64) for i in range(8)]) == [Run(0, 1000, 8, 64)]
    assert runs_of([(0, 64), (1000, 64), (1900, 64), (2800, 64)]) == [
        Run(0, 1000, 2, 64),
        Run(1900, 900, 2, 64),
    ]
    assert runs_of([(0, 64), (1000, 32), (2000, 32)]) == [Run(0, 64, 1, 64), Run(1000, 1000, 2, 32)]
    far = MAX_PITCH + 1
    assert runs_of([(0, 64), (far, 64), (far - 500, 64)]) == [Run(0, 64, 1, 64), Run(far, 64, 1, 64),
                                                             Run(far - 500, 64, 1, 64)]  # fmt: skip


def test_blocks_go_and_come_back_bit_for_bit() -> None:
    with emulated_driver():
        stream = Stream()
        caches = [(Pinned(10 * 32), 32) for _ in range(3)] + [(Pinned(10 * 48), 48) for _ in range(2)]
        host = HostBlocks([(memory.address, width) for memory, width in caches], 4)
        assert host.block_bytes == 3 * 32 + 2 * 48
        rng = np.random.default_rng(1)
        for memory, _ in caches:
            memory.array[:] = rng.integers(0, 256, memory.nbytes)
        before = [memory.array.reshape(10, width).copy() for memory, width in caches]
        host.move(np.array([(MOVE_OUT, 7, 2), (MOVE_OUT, 3, 0)], np.int32), stream)
        for memory, _ in caches:
            memory.array[:] = 255
        host.move(
            np.array([(MOVE_IN, 1, 2), (MOVE_OUT, 1, 3), (MOVE_IN, 9, 3), (MOVE_IN, 4, 0)], np.int32), stream
        )
        stream.sync()
        for (memory, width), was in zip(caches, before, strict=True):
            now = memory.array.reshape(10, width)
            assert (now[[1, 9, 4]] == was[[7, 7, 3]]).all() and (now[[0, 2, 3, 5, 6, 7, 8]] == 255).all()
        host.close()
        stream.close()


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++, which is not here")
def test_an_evicted_prefix_comes_back_on_the_device() -> None:
    config = {**MODELS["qwen3"].config, "num_hidden_layers": 2}
    checkpoint, rng = tensors_of("qwen3", config, DType.F16), np.random.default_rng(3)
    prompts = [rng.integers(0, VOCAB, 70).tolist() for _ in range(2)]
    asked = [(prompt, Sampling(max_tokens=2, temperature=1.0, seed=5)) for prompt in (*prompts, prompts[0])]
    engine = replace(
        CONFIG,
        max_model_len=96,
        max_num_seqs=1,
        max_num_batched_tokens=80,
        num_gpu_blocks=6,
        num_cpu_blocks=9,
    )
    with emulated_driver():
        core = core_of(CudaBackend.load(program_of(config, DType.F16), checkpoint, engine), config, engine)
        first, _, again = (run(core, [one])[0] for one in asked)
        stats = core.stats()
        core.close()
    assert [o.token_ids for o in first] == [o.token_ids for o in again]
    assert again[0].cached_tokens == 64 and stats.host_hits > 0
    assert stats.blocks_moved_out and stats.blocks_moved_in
