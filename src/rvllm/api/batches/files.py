"""OpenAI's `/v1/files`: what batches read and write."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from uuid import uuid4

from rvllm.api.batches.store import BatchStore, FileEntry
from rvllm.api.disk import PART, PRIVATE_FILE
from rvllm.api.http.errors import invalid, unknown
from rvllm.api.http.exchange import Exchange
from rvllm.api.http.multipart import Form
from rvllm.api.http.pagination import Query, page

_PURPOSES = ("batch", "user_data")
MIN_SECONDS, MAX_SECONDS = 3600, 30 * 24 * 3600  # OpenAI's limits of expires_after


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


class Files:
    def __init__(self, store: BatchStore, max_file_bytes: int) -> None:
        self._store, self._max_file_bytes = store, max_file_bytes

    async def receive(self, exchange: Exchange) -> None:
        """Reads the form of an upload; its file goes to the disk as it comes."""
        form = Form(exchange.header(b"content-type") or b"", lambda: Upload(self._store))
        await exchange.receive_form(form, self._max_file_bytes, "--max-file-mb")

    async def create(self, exchange: Exchange, request: None) -> None:
        """`POST /v1/files`: a form with `file`, `purpose` and perhaps `expires_after[seconds]`."""
        form = exchange.form
        if form is None or form.file_field != "file" or not isinstance(form.file, Upload):
            raise invalid("file is required, as a part with a filename", "file")
        purpose = form.fields.get("purpose", b"").decode("utf-8", "replace")
        if purpose not in _PURPOSES:
            raise invalid(f"purpose must be one of {', '.join(_PURPOSES)}, got {purpose[:40]!r}", "purpose")
        expiry = form.fields.get("expires_after[seconds]")
        seconds = None if expiry is None else _seconds(expiry)
        await exchange.json(await asyncio.to_thread(form.file.keep, form.filename, purpose, seconds))

    async def list_all(self, exchange: Exchange, request: None) -> None:
        """`GET /v1/files`, newest first, perhaps of one `purpose`."""
        query = Query(exchange)
        purpose = query.text("purpose")
        found = [entry for entry in self._store.files() if purpose in (None, entry.purpose)]
        await exchange.json(page(found, lambda entry: entry.id, query, limit=10_000, most=10_000))

    async def retrieve(self, exchange: Exchange, request: None) -> None:
        await exchange.json(self._found(exchange))

    async def content(self, exchange: Exchange, request: None) -> None:
        await exchange.send_file(self._store.path(self._found(exchange).id), b"application/octet-stream")

    async def delete(self, exchange: Exchange, request: None) -> None:
        name = self._found(exchange).id
        self._store.delete_file(name)
        await exchange.json({"id": name, "object": "file", "deleted": True})

    def _found(self, exchange: Exchange) -> FileEntry:
        name = exchange.scope["path_params"]["id"]
        entry = self._store.file(name)
        if entry is None:
            raise unknown("file", name)
        return entry


def _seconds(text: bytes) -> int:
    if not (text.isdigit() and len(text) < 10 and MIN_SECONDS <= int(text) <= MAX_SECONDS):
        raise invalid(f"expires_after[seconds] must be in [{MIN_SECONDS}, {MAX_SECONDS}]", "expires_after")
    return int(text)
