"""KV blocks in pinned host memory, on the emulator's driver."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rvllm.backends.base import COPY, MOVE_IN, MOVE_OUT, StepBatch
from rvllm.backends.cuda.backend import CudaBackend
from rvllm.backends.cuda.device.driver import Event, Pinned, Stream
from rvllm.backends.cuda.device.host_blocks import MAX_PITCH, HostBlocks, Run, neighbours, runs_of
from rvllm.backends.cuda.in_flight import InFlightStep
from rvllm.engine.blocks import BlockManager
from rvllm.engine.ipc.messages import Generate, Sampling
from rvllm.program.dtypes import DType
from support.emulator import needs_emulator
from support.emulator.driver import emulated_driver
from support.kernels.gpu_engine import CONFIG, core_of, run, tokens_of
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
        host.move(np.array([(MOVE_OUT, 7, 2), (MOVE_OUT, 3, 0)], np.int32), 0, None, stream)
        for memory, _ in caches:
            memory.array[:] = 255
        moves = [(MOVE_IN, 1, 2), (MOVE_OUT, 1, 3), (MOVE_IN, 9, 3), (MOVE_IN, 4, 0)]
        host.move(np.array(moves, np.int32), 0, None, stream)
        stream.sync()
        for (memory, width), was in zip(caches, before, strict=True):
            now = memory.array.reshape(10, width)
            assert (now[[1, 9, 4]] == was[[7, 7, 3]]).all() and (now[[0, 2, 3, 5, 6, 7, 8]] == 255).all()
        host.close()
        stream.close()


def test_neighbours_are_one_copy() -> None:
    moves = [(MOVE_OUT, 4, 8), (MOVE_OUT, 5, 9), (MOVE_OUT, 6, 10), (MOVE_IN, 7, 11), (MOVE_IN, 9, 12)]
    assert list(neighbours(moves, 100)) == [(MOVE_OUT, 4, 8, 3), (MOVE_IN, 7, 11, 1), (MOVE_IN, 9, 12, 1)]
    assert list(neighbours(moves[:3], 10)) == [(MOVE_OUT, 4, 8, 2), (MOVE_OUT, 6, 10, 1)]
    assert list(neighbours([], 10)) == []


@pytest.mark.parametrize("pitch", [MAX_PITCH, 3 * 48 + 5])
def test_neighbours_go_and_come_back_bit_for_bit(pitch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where host memory is several regions, for want of a longer pitch."""
    with emulated_driver():
        stream, arena = Stream(), Pinned(4 * 20 * 48)
        host_blocks = "rvllm.backends.cuda.device.host_blocks"
        caches = [(arena.address + i * 20 * 48, 48) for i in range(3)] + [(arena.address + 3 * 20 * 48, 32)]
        if pitch != MAX_PITCH:
            monkeypatch.setattr(f"{host_blocks}.MAX_PITCH", pitch)
        host = HostBlocks(caches, 8)
        arena.array[:] = np.random.default_rng(2).integers(0, 256, arena.nbytes)
        images = [arena.array[a - arena.address :][: 20 * w].reshape(20, w) for a, w in caches]
        was = [image.copy() for image in images]
        host.move(np.array([(MOVE_OUT, 4 + i, i) for i in range(8)], np.int32), 3, None, stream)
        stream.sync()
        for image in images:
            image[:12] = 7
        host.move(np.array([(MOVE_IN, 12 + i, i) for i in range(8)], np.int32), 0, None, stream)
        for image, before in zip(images, was, strict=True):
            assert (image[12:] == before[4:12]).all() and (image[:12] == 7).all()
        host.close()


def test_what_moves_ahead_is_waited_for_a_step_later() -> None:
    with emulated_driver(streams="late"):
        steps, cache, read = Stream(), Pinned(4 * 32), Pinned(32)
        host = HostBlocks([(cache.address, 32)], 2)
        cache.array[:] = np.arange(4 * 32) % 251
        was = cache.array.reshape(4, 32).copy()
        host.move(np.array([(MOVE_OUT, 0, 0)], np.int32), 1, None, steps)
        steps.copy_to_host(read.address, cache.address + 32, 32)  # a step that does not use block 0
        steps.sync()
        assert (read.array == was[1]).all()
        none = np.zeros((0, 3), np.int32)
        host.move(none, 0, None, steps)
        steps.fill_bytes(cache.address, 9, 32)  # one that does
        host.move(np.array([(MOVE_IN, 3, 0)], np.int32), 0, None, steps)
        steps.sync()
        assert (cache.array.reshape(4, 32)[3] == was[0]).all()
        host.close()


def test_blocks_are_kept_empty_ahead() -> None:
    blocks = BlockManager(64, 4, num_cpu_blocks=100)
    held = blocks.take(64)
    for i, block in enumerate(held):
        blocks.publish(block, bytes([i]))
    assert blocks.evict_ahead() == []
    blocks.release(held)
    moves = blocks.evict_ahead()
    assert len(moves) == 4 and {kind for kind, _, _ in moves} == {MOVE_OUT}
    assert blocks.evict_ahead() == [] and blocks.moving == 0
    blocks.take(4)
    assert blocks.take_moves() == ([], -1)
    blocks.check()


def test_copies_run_beside_steps_but_never_under_one_that_uses_the_block() -> None:
    with emulated_driver(streams="first late"):  # steps happen when they must, copies as soon as they can
        steps, ended, again = Stream(), Event(), Event()
        cache, read = Pinned(4 * 32), Pinned(32)
        host = HostBlocks([(cache.address, 32)], 2)
        cache.array[:] = np.arange(4 * 32) % 251
        was = cache.array.reshape(4, 32).copy()
        host.move(np.array([(MOVE_OUT, 0, 0)], np.int32), 0, None, steps)
        steps.copy_to_host(read.address, cache.address + 32, 32)  # a step that reads block 1
        ended.record(steps)
        host.move(np.array([(MOVE_OUT, 2, 1), (MOVE_IN, 3, 0)], np.int32), 0, None, steps)
        assert (cache.array.reshape(4, 32)[3] == was[0]).all() and not ended.done()
        host.move(np.array([(MOVE_IN, 1, 1)], np.int32), 0, ended, steps)
        assert ended.done() and (read.array == was[1]).all()
        again.record(steps)
        again.wait()
        assert (cache.array.reshape(4, 32) == was[[0, 2, 2, 0]]).all()
        host.close()
        steps.close()


def test_a_block_that_comes_back_waits_for_the_steps_that_used_its_place() -> None:
    blocks = BlockManager(3, 4, num_cpu_blocks=4)
    held = blocks.take(3)
    for block, digest in zip(held, (b"a", b"b", b"c"), strict=True):
        blocks.publish(block, digest)
    blocks.steps = 5  # 0 to 4 are launched, the last of them uses block held[1]
    blocks.release(held[:1])
    blocks.steps = 6
    blocks.release(held[1:2])
    blocks.take(1)
    assert blocks.take_moves() == ([(MOVE_OUT, held[0], 0)], -1)
    assert blocks.share(blocks.find([b"a"]), [b"a"]) == [held[1]]
    moves, after = blocks.take_moves()
    assert [kind for kind, _, _ in moves] == [MOVE_OUT, MOVE_IN] and after == 5
    assert blocks.take_moves() == ([], -1)


@needs_emulator
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
    with emulated_driver(streams="late"):  # a step that did not wait for its copies would read too early
        core = core_of(CudaBackend.load(program_of(config, DType.F16), checkpoint, engine), config, engine)
        first, _, again = (run(core, [one])[0] for one in asked)
        stats = core.stats()
        core.close()
    assert [o.token_ids for o in first] == [o.token_ids for o in again]
    assert again[0].cached_tokens == 64 and stats.host_hits > 0
    assert stats.blocks_moved_out and stats.blocks_moved_in


@needs_emulator
@pytest.mark.parametrize(("prefixes", "host"), [(False, 0), (True, 9)])
def test_choices_copy_the_block_that_they_go_on_in(prefixes: bool, host: int) -> None:
    config = {**MODELS["qwen3"].config, "num_hidden_layers": 2}
    checkpoint = tensors_of("qwen3", config, DType.F16)
    prompt = np.random.default_rng(3).integers(0, VOCAB, 21).tolist()
    engine = replace(
        CONFIG,
        max_model_len=96,
        max_num_seqs=3,
        max_num_batched_tokens=80,
        num_gpu_blocks=9,
        num_cpu_blocks=host,
        enable_prefix_caching=prefixes,
    )
    computed, copied = [0], [0]

    def counted(batch: StepBatch) -> InFlightStep:
        computed[0] += batch.num_tokens
        copied[0] += int((batch.moves[:, 0] == COPY).sum())
        return launch(batch)

    with emulated_driver(streams="late"):
        core = core_of(CudaBackend.load(program_of(config, DType.F16), checkpoint, engine), config, engine)
        sampling = [Sampling(max_tokens=3, temperature=1.0, seed=seed) for seed in (5, 6, 7)]
        alone = [tokens_of(run(core, [(prompt, one)])[0]) for one in sampling]
        core.reset_prefix_cache()
        launch, core.backend.launch = core.backend.launch, counted
        found: dict[str, list[int]] = {}
        for one in sampling:
            core.add_request(Generate(f"{one.seed}", prompt, one, group="g"))
        while core.has_work():
            for output in core.step():
                found.setdefault(output.request_id, []).extend(output.token_ids)
        core.close()
    assert list(found.values()) == alone
    assert copied == [2] and computed == [21 + 2 + 3 * 2]
