"""Bytes of mapped files read from the files instead: the system copies them out of its page cache.

Through a mapping each 64 KB of a first reading cost a page fault; and a file that gets shorter meanwhile
ends the process, where a read can say so.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvllm.errors import ModelError
from rvllm.weights.checkpoint import Checkpoint
from rvllm.weights.mapped import MappedFile


class FileReader:
    """Copies arrays; those that are views of these files without touching the mappings. Thread-safe.

    A file that is no longer the mapped one (it was replaced) is read through its mapping.
    """

    def __init__(self, files: Iterable[MappedFile] = ()) -> None:
        self._files = sorted(files, key=_start)
        self._starts = [_start(file) for file in self._files]
        self._handles = [_open_again(file) for file in self._files]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> FileReader:
        """A reader of the checkpoint's files."""
        return cls(checkpoint.files.values())

    def copy(self, values: NDArray[Any], to: NDArray[Any]) -> None:
        """Copies `values` to `to`, of the same shape and type and contiguous.

        Raises ModelError when the file cannot be read or ends too early.
        """
        place = self._place_of(values)
        if place is None:
            np.copyto(to, values)
            return
        number, offset = place
        path, left = self._files[number].path, to.reshape(-1).view(np.uint8).data
        while left.nbytes:
            try:
                count = os.preadv(self._handles[number], [left], offset)
            except OSError as error:
                raise ModelError(f"{path}: cannot read the file: {error.strerror}") from None
            if not count:
                raise ModelError(f"{path}: the file became shorter while it was read; fetch it again")
            left, offset = left[count:], offset + count

    def _place_of(self, values: NDArray[Any]) -> tuple[int, int] | None:
        """(which file, offset there) of an array that is a contiguous view of one that is open."""
        if not values.flags.c_contiguous or not values.nbytes:
            return None
        address = values.ctypes.data
        number = bisect_right(self._starts, address) - 1
        if number < 0 or self._handles[number] < 0:
            return None
        offset = address - self._starts[number]
        return (number, offset) if offset + values.nbytes <= self._files[number].size else None

    def close(self) -> None:
        """Closes the files; mappings stay."""
        for handle in self._handles:
            if handle >= 0:
                os.close(handle)
        self._handles = [-1] * len(self._handles)


def _start(file: MappedFile) -> int:
    return int(file.bytes.ctypes.data)


def _open_again(file: MappedFile) -> int:
    """A handle of the mapped file; -1 where another is there by now, or none."""
    try:
        handle = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1
    found = os.fstat(handle)
    if (found.st_dev, found.st_ino) == file.identity:
        return handle
    os.close(handle)
    return -1
