"""A file on its way into the store."""

from __future__ import annotations

import contextlib
import os
import threading
from uuid import uuid4

from rvllm.api.batches.store import BatchStore, FileEntry
from rvllm.api.disk import PART, PRIVATE_FILE


class Upload:
    """A file that is being received: in the store's room from its first byte, gone unless it is kept.

    `discard` may come from another thread than `write`.
    """

    def __init__(self, store: BatchStore) -> None:
        """Raises OSError for a disk that is full."""
        self._store, self._lock, self._open = store, threading.Lock(), True
        self._path = store.path(f"file-{uuid4().hex}{PART}")
        self._reserved = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._file = os.fdopen(os.open(self._path, flags, PRIVATE_FILE), "wb")

    def write(self, data: bytes) -> None:
        """Takes more of it. Raises ApiError 400 when the store is full, OSError when the disk is."""
        with self._lock:
            if not self._open:
                raise ValueError("the upload was given up")
            self._store.reserve(len(data))
            self._reserved += len(data)
            self._file.write(data)

    def keep(self, filename: str, purpose: str, expires_after: int | None) -> FileEntry:
        """It is whole: gives it its entry. Raises as `write` does."""
        with self._lock:
            self._file.flush()
            os.fsync(self._file.fileno())
            entry = self._store.add_file(self._path, filename, purpose, expires_after)
            self._reserved = 0  # the entry counts them now
            return entry

    def discard(self) -> None:
        """Forgets what was not kept."""
        with self._lock:
            if not self._open:
                return
            self._open = False
            with contextlib.suppress(OSError):  # what is still buffered may find no room on the disk
                self._file.close()
            self._path.unlink(missing_ok=True)
            self._store.release(self._reserved)
