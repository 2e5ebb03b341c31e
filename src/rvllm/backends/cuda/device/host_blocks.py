"""KV blocks in pinned host memory: copies between them and the device's, beside the steps.

A block's keys and values lie in every layer's cache at the same place. Where the caches lie at equal
distances, as they do behind one another in the arena, a block is one strided copy; in host memory it is one
piece. Copies have a stream of their own, which keeps their order, and run while the step before computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.base import MOVE_IN, MOVE_OUT
from rvllm.backends.cuda.device.driver import CudaError, Event, Pinned, Stream
from rvllm.errors import CapacityError

MAX_PITCH = (1 << 31) - 1  # bytes from row to row of a strided copy
COPY_RATE = 25e9  # bytes a second over PCIe, until it is measured


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


class HostBlocks:
    """Pinned memory for `count` blocks of caches given as (address, bytes of a block).

    Raises CapacityError when the system does not give it.
    """

    def __init__(self, caches: Sequence[tuple[int, int]], count: int) -> None:
        self._runs = runs_of(caches)
        self.block_bytes = sum(width for _, width in caches)
        self.nbytes = count * self.block_bytes
        try:
            self._memory = Pinned(self.nbytes, clear=False)
        except CudaError as error:
            raise CapacityError(
                f"--num-cpu-blocks {count}: {self.nbytes / 1e9:.2f} GB of pinned host memory are not to be "
                f"had ({error}); lower it"
            ) from None
        self._stream, self._done = Stream(), Event()

    def move(self, moves: NDArray[np.int32], after: Event | None, stream: Stream) -> None:
        """Queues the copies of StepBatch.moves; what is queued on `stream` from here on finds them made.

        after: the end of the last step under way that uses a block that they write; None: there is none.
        """
        if not len(moves):
            return
        if after is not None:
            self._stream.wait_for(after)
        for kind, block, other in moves.tolist():
            assert kind in (MOVE_OUT, MOVE_IN)  # Limits.block_copies is false
            host = self._memory.address + other * self.block_bytes
            for run in self._runs:
                device = (run.base + block * run.width, run.pitch)
                ends = (device, (host, run.width)) if kind == MOVE_OUT else ((host, run.width), device)
                self._stream.copy_rows(*ends, run.width, run.rows)
                host += run.rows * run.width
        self._done.record(self._stream)
        stream.wait_for(self._done)

    def close(self) -> None:
        """Waits for the copies and frees the memory."""
        self._stream.sync()
        self._stream.close()
        self._done.close()
        self._memory.close()
