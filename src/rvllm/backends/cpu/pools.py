"""KV blocks in two pools: those that steps work on, and those that wait in the second tier."""

from __future__ import annotations

import ctypes
import gc
import mmap
import time
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.base import COPY, MOVE_IN, MOVE_OUT, RESTORE, SAVE

F32 = NDArray[np.float32]


DONTNEED = 4  # madvise(2): the pages go
_libc = ctypes.CDLL(None)
_madvise = _libc.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def drop_pages(array: F32) -> None:
    """Gives an array's memory back to the system, in whole pages, which read as zero from then on."""
    page = mmap.PAGESIZE
    first = -(-array.ctypes.data // page) * page
    end = (array.ctypes.data + array.nbytes) // page * page
    if end > first:
        _madvise(first, end - first, DONTNEED)


def trim_heap() -> None:
    """Gives memory that was freed back to the system: C libraries keep it for later, some without end."""
    gc.collect()
    trim = getattr(_libc, "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


class Pools:
    """Copies blocks between a model's caches and a second pool of the same layout.

    caches: name → (keys, values), arrays with a block along their first axis. states: name → array with a
    slot along its first axis and, from `slots` on, snapshots. seconds: spent copying.
    """

    def __init__(
        self,
        caches: Mapping[str, tuple[F32, F32]],
        num_cpu_blocks: int,
        states: Mapping[str, F32] | None = None,
        slots: int = 0,
    ) -> None:
        self._states, self._slots = list((states or {}).values()), slots
        self._device = [array for pair in caches.values() for array in pair]
        # Memory is taken as it is first written.
        self._host = [np.zeros((num_cpu_blocks, *a.shape[1:]), dtype=a.dtype) for a in self._device]
        self.seconds = 0.0

    def move(self, moves: NDArray[np.int32]) -> None:
        """Makes the copies of StepBatch.moves, in their order."""
        if not len(moves):
            return
        began = time.perf_counter()
        for kind, block, other in moves.tolist():
            if kind in (SAVE, RESTORE):
                pair = (self._slots + other, block) if kind == SAVE else (block, self._slots + other)
                for state in self._states:
                    state[pair[0]] = state[pair[1]]
                continue
            for device, host in zip(self._device, self._host, strict=True):
                if kind == MOVE_OUT:
                    host[other] = device[block]
                elif kind == MOVE_IN:
                    device[block] = host[other]
                else:
                    assert kind == COPY
                    device[other] = device[block]
        self.seconds += time.perf_counter() - began

    def drop(self) -> None:
        """Gives the memory of both pools back until it is written again."""
        for array in (*self._device, *self._host):
            drop_pages(array)

    def clear(self) -> None:
        self._device, self._host, self._states = [], [], []
