"""Programmatic dependent launch: what a kernel may not count on before it waits for its predecessors.

A kernel starts when all blocks of the one before it have let it, which they may do before they wait for
their own predecessors. What all of these write is unsafe until griddepcontrol.wait.
"""

from __future__ import annotations

import ctypes

import numpy as np

from .compiler import Launch
from .memory import Memory

_LIBC = ctypes.CDLL(None)
_LIBC.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_PIECE = 1 << 16  # bytes compared at a time


class Range(ctypes.Structure):
    """Bytes that a block must not see at first; the same fields in state.hpp."""

    _fields_ = (("at", ctypes.c_void_p), ("bytes", ctypes.c_ulonglong))


class Chain:
    """Follows what kernels write, launch by launch."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._images: dict[int, np.ndarray] = {}  # of each region, as the last launch left it
        self._unsafe = np.zeros((0, 2), np.int64)  # begin, end

    def cut(self) -> None:
        """All work is done: nothing is unsafe."""
        self._unsafe = self._unsafe[:0]

    def forget(self) -> None:
        """All work is done and arrays are gone: others may come to lie where they were."""
        self.cut()
        self._images.clear()

    def host_wrote(self, address: int, nbytes: int) -> None:
        """The host has written there: no kernel's doing, and safe."""
        for region in self._memory.regions:
            image = self._images.get(region.address)
            if image is not None and region.address <= address < region.end:
                at, end = (address - region.address) // 4 * 4, address - region.address + nbytes
                now = _view(region.address, region.end)
                image[at // 4 : -(-end // 4)] = now[at // 4 : -(-end // 4)]
        begin, end = self._unsafe.T
        self._unsafe = self._unsafe[(end <= address) | (begin >= address + nbytes)]

    def begin(self, launch: Launch, pdl: bool) -> list[object]:
        """Names what is unsafe in a launch; returns what must outlive it."""
        if not pdl:
            self.cut()
        present = {region.address for region in self._memory.regions}
        self._images = {address: image for address, image in self._images.items() if address in present}
        for region in self._memory.regions:
            if region.address not in self._images:
                self._images[region.address] = _view(region.address, region.end).copy()
        ranges = (Range * max(1, len(self._unsafe)))(*((b, e - b) for b, e in self._unsafe.tolist()))
        saved = ctypes.create_string_buffer(int((self._unsafe[:, 1] - self._unsafe[:, 0]).sum()) + 1)
        launch.hidden, launch.hidden_count = ctypes.addressof(ranges), len(self._unsafe)
        launch.saved = ctypes.addressof(saved)
        return [ranges, saved]

    def end(self, launch: Launch) -> None:
        """Takes note of what the launch has written."""
        if not launch.launched:  # its successors start when it is done
            found: list[np.ndarray] = []
            self._written()
        elif launch.early:
            found = [self._unsafe, *self._written()]
        else:
            found = self._written()
        self._unsafe = _united(np.concatenate([*found, np.zeros((0, 2), np.int64)]))

    def _written(self) -> list[np.ndarray]:
        found = []
        for region in self._memory.regions:
            image = self._images[region.address]
            for start in range(0, region.end - region.address, _PIECE):
                old = image[start // 4 : (start + _PIECE) // 4]
                address = region.address + start
                if _LIBC.memcmp(address, old.ctypes.data, old.nbytes):
                    new = _view(address, address + old.nbytes)
                    changed = np.flatnonzero(np.diff(np.concatenate([[False], new != old, [False]])))
                    found.append(address + 4 * changed.reshape(-1, 2).astype(np.int64))
                    old[:] = new
        return found


def _view(begin: int, end: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_char * (end - begin)).from_address(begin), np.uint32)


def _united(ranges: np.ndarray) -> np.ndarray:
    """Ranges without overlaps, in order."""
    if not len(ranges):
        return ranges
    ranges = ranges[np.argsort(ranges[:, 0])]
    reach = np.maximum.accumulate(ranges[:, 1])
    first = np.concatenate([[True], ranges[1:, 0] > reach[:-1]])
    last = np.concatenate([first[1:], [True]])
    return np.stack([ranges[first, 0], reach[last]], axis=1)
