"""KV blocks in pinned host memory: copies between them and the device's, beside the steps.

A block's keys and values lie in every layer's cache at the same place. Where the caches lie at equal
distances, as they do behind one another in the arena, a block is one strided copy, and neighbours are one
together: host memory is laid out as the caches are. Copies have a stream of their own, which keeps their
order, and run while the step before computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.base import MOVE_IN, MOVE_OUT
from rvllm.backends.cuda.device.driver import CudaError, Event, Stream
from rvllm.backends.cuda.device.host_memory import HostMemory
from rvllm.errors import CapacityError

MAX_PITCH = (1 << 31) - 1  # bytes from row to row of a strided copy
COPY_RATE = 40e9  # bytes a second of single blocks of 16 KB rows on an H200's PCIe; neighbours are quicker


@dataclass(frozen=True)
class Run:
    """Caches at equal distances: block b has rows of `width` bytes from base + b * width, `pitch` apart."""

    base: int
    pitch: int
    rows: int
    width: int


def runs_of(caches: Iterable[tuple[int, int]]) -> list[Run]:
    """The fewest runs, in order, of caches given as (address, bytes of a block)."""
    runs: list[Run] = []
    for address, width in caches:
        last = runs[-1] if runs else None
        if last is not None and last.width == width:
            step = address - (last.base + (last.rows - 1) * last.pitch)
            if width <= step <= MAX_PITCH and (last.rows == 1 or step == last.pitch):
                runs[-1] = Run(last.base, step, last.rows + 1, width)
                continue
        runs.append(Run(address, width, 1, width))
    return runs


def copy_block(runs: Iterable[Run], block: int, to: int, stream: Stream) -> None:
    """Queues a copy of one block of the device to another."""
    for run in runs:
        source, target = run.base + block * run.width, run.base + to * run.width
        stream.copy_rows((source, run.pitch), (target, run.pitch), run.width, run.rows)


def neighbours(moves: Sequence[tuple[int, int, int]], together: int) -> Iterator[tuple[int, int, int, int]]:
    """Moves in order as (kind, first block, first host block, count), neighbours on both sides as one.

    together: host blocks of a region, across whose end none reach.
    """
    at = 0
    while at < len(moves):
        kind, block, other = moves[at]
        count = 1
        while at + count < len(moves) and moves[at + count] == (kind, block + count, other + count):
            if (other + count) % together == 0:
                break
            count += 1
        yield kind, block, other, count
        at += count


class HostBlocks:
    """Pinned memory for `count` blocks of caches given as (address, bytes of a block).

    They lie in regions of as many blocks as a strided copy's pitch allows, and there row by row. Raises
    CapacityError when the system does not give it.
    """

    def __init__(self, caches: Sequence[tuple[int, int]], count: int) -> None:
        self._runs = runs_of(caches)
        self.block_bytes = sum(width for _, width in caches)
        self.nbytes, self._count = count * self.block_bytes, count
        self._region = min(count, MAX_PITCH // max(width for _, width in caches))
        try:
            self._memory = HostMemory(self.nbytes)
        except CudaError as error:
            raise CapacityError(
                f"--num-cpu-blocks {count}: {self.nbytes / 1e9:.2f} GB of pinned host memory are not to be "
                f"had ({error}); lower it"
            ) from None
        self._stream, self._done, self._behind = Stream(), Event(), False

    def move(self, moves: NDArray[np.int32], ahead: int, after: Event | None, stream: Stream) -> None:
        """Queues copies of StepBatch.moves between the tiers; what is queued on `stream` from here on finds
        them made.

        ahead: how many, the last ones, only what is queued from the next call on has to find made. after: the
        end of the last step under way that uses a block that they write; None: there is none.
        """
        if self._behind:
            stream.wait_for(self._done)
            self._behind = False
        listed = [(kind, block, other) for kind, block, other in moves.tolist()]
        now, later = listed[: len(listed) - ahead], listed[len(listed) - ahead :]
        if now:
            if after is not None:
                self._stream.wait_for(after)
            self._copy(now)
            stream.wait_for(self._done)
        if later:
            self._copy(later)
            self._behind = True

    def _copy(self, moves: Sequence[tuple[int, int, int]]) -> None:
        for kind, block, other, count in neighbours(moves, self._region):
            assert kind in (MOVE_OUT, MOVE_IN)
            region = other // self._region * self._region
            held = min(self._region, self._count - region)  # blocks of this region
            host = self._memory.address + region * self.block_bytes
            for run in self._runs:
                device = (run.base + block * run.width, run.pitch)
                here = (host + (other - region) * run.width, held * run.width)
                ends = (device, here) if kind == MOVE_OUT else (here, device)
                self._stream.copy_rows(*ends, count * run.width, run.rows)
                host += run.rows * held * run.width
        self._done.record(self._stream)

    def sync(self) -> None:
        self._stream.sync()

    def close(self) -> None:
        """Waits for the copies and frees the memory."""
        self.sync()
        self._stream.close()
        self._done.close()
        self._memory.close()


class KeptBlocks(HostBlocks):
    """What some KV blocks hold, in pinned host memory while the device's is given back.

    Raises CapacityError when the system does not give as much.
    """

    def __init__(self, caches: Sequence[tuple[int, int]], blocks: Sequence[int], stream: Stream) -> None:
        """Copies them out; nothing may be under way. caches: as of HostBlocks."""
        self._blocks = np.array(sorted(blocks), dtype=np.int32)
        super().__init__(caches, len(blocks))
        self._move_all(MOVE_OUT, stream)

    def bring_back(self, stream: Stream) -> None:
        """Copies them to where they were, and gives the host's memory back."""
        self._move_all(MOVE_IN, stream)
        self.close()

    def _move_all(self, kind: int, stream: Stream) -> None:
        count = len(self._blocks)
        moves = np.stack((np.full(count, kind), self._blocks, np.arange(count)), axis=1).astype(np.int32)
        self.move(moves, 0, None, stream)
        self.sync()
