"""Where uploaded files and batches are kept: a folder with an SQLite index; a kill loses nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import msgspec

from rvllm.api.database import open_database
from rvllm.api.http.errors import invalid
from rvllm.errors import UsageError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS batches (number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS results (
    batch TEXT NOT NULL, line INTEGER NOT NULL, failed INTEGER NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (batch, line)) WITHOUT ROWID
"""
_encode = msgspec.json.Encoder().encode


class FileEntry(msgspec.Struct, kw_only=True):
    """A file as clients see it; times are seconds since the epoch."""

    id: str
    object: str = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: str = "processed"


class RequestCounts(msgspec.Struct):
    """Lines of a batch."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchError(msgspec.Struct, kw_only=True):
    """What is wrong with a line (counted from 1) of a batch's input."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(msgspec.Struct):
    """Why a batch was not begun."""

    data: list[BatchError]
    object: str = "list"


class Batch(msgspec.Struct, kw_only=True):
    """A batch as clients see it.

    status: validating, failed, in_progress, finalizing, completed, expired, cancelling or cancelled.
    """

    id: str
    object: str = "batch"
    endpoint: str
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str
    status: str = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = msgspec.field(default_factory=RequestCounts)
    metadata: dict[str, str] | None = None

    def enter(self, status: str) -> None:
        """Takes on a status and notes the time."""
        self.status = status
        setattr(self, f"{status}_at", int(time.time()))


class BatchStore:
    """Files and batches in `directory`; None: in one that `close` deletes. limit: bytes of all files."""

    def __init__(self, directory: str | None, limit: int) -> None:
        self._temporary = directory is None
        self._root = Path(tempfile.mkdtemp(prefix="rvllm-files-") if directory is None else directory)
        self._root = self._root.expanduser()
        try:
            (self._root / "files").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--files-dir: cannot use {self._root}: {error.strerror}") from None
        self._db = open_database(str(self._root / "index.db"), _SCHEMA, "--files-dir")
        self._limit = limit
        self._size = sum(entry.bytes for entry in self.files())

    def close(self) -> None:
        """Closes the index; a temporary folder is deleted."""
        self._db.close()
        if self._temporary:
            shutil.rmtree(self._root, ignore_errors=True)

    def path(self, name: str) -> Path:
        """Where a known file's content is."""
        return self._root / "files" / name

    def add_file(self, filename: str, purpose: str, data: bytes, expires_after: int | None) -> FileEntry:
        """Keeps an uploaded file; it is whole before its entry is there. Raises a 400 when all is full."""
        self._expire()
        if self._size + len(data) > self._limit:
            raise invalid(
                "there is no room for the file: delete others (--files-max-mb)", "file", "storage_full"
            )
        now = int(time.time())
        entry = FileEntry(
            id=f"file-{uuid4().hex}", bytes=len(data), created_at=now, filename=filename, purpose=purpose,
            expires_at=None if expires_after is None else now + expires_after,
        )  # fmt: skip
        with self.path(entry.id).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._put_file(entry)
        return entry

    def files(self) -> list[FileEntry]:
        """All files, oldest first."""
        rows = self._db.execute("SELECT body FROM files ORDER BY number").fetchall()
        return [msgspec.json.decode(body, type=FileEntry) for (body,) in rows]

    def file(self, name: str) -> FileEntry | None:
        """The file of that id; None when there is none (any more)."""
        self._expire()
        row = self._db.execute("SELECT body FROM files WHERE id = ?", (name,)).fetchone()
        return None if row is None else msgspec.json.decode(row[0], type=FileEntry)

    def delete_file(self, name: str) -> bool:
        """Deletes a file; False when there was none."""
        row = self._db.execute("DELETE FROM files WHERE id = ? RETURNING body", (name,)).fetchone()
        if row is None:
            return False
        self._size -= msgspec.json.decode(row[0], type=FileEntry).bytes
        self.path(name).unlink(missing_ok=True)
        return True

    def put_batch(self, batch: Batch) -> None:
        """Keeps a batch, new or changed."""
        self._db.execute(
            "INSERT INTO batches (id, body) VALUES (?, ?) "
            "ON CONFLICT (id) DO UPDATE SET body = excluded.body",
            (batch.id, _encode(batch)),
        )

    def batches(self) -> list[Batch]:
        """All batches, oldest first."""
        rows = self._db.execute("SELECT body FROM batches ORDER BY number").fetchall()
        return [msgspec.json.decode(body, type=Batch) for (body,) in rows]

    def add_result(self, batch: str, line: int, failed: bool, body: bytes) -> None:
        """Keeps the answer to a line; it stays when this process is killed. A line is kept once."""
        self._db.execute("INSERT OR IGNORE INTO results VALUES (?, ?, ?, ?)", (batch, line, failed, body))

    def lines_done(self, batch: str) -> dict[int, bool]:
        """The lines that have been answered, and whether the answer is a failure."""
        rows = self._db.execute("SELECT line, failed FROM results WHERE batch = ?", (batch,))
        return {line: bool(failed) for line, failed in rows}

    def finish_batch(self, batch: Batch, status: str) -> None:
        """Writes the output and error files and ends the batch. Repeating it after a kill changes nothing."""
        made = []
        for failed, kind in ((0, "output"), (1, "error")):
            entry = self._write_results(batch.id, failed, kind)
            if entry is not None:
                made.append(entry)
                setattr(batch, f"{kind}_file_id", entry.id)
        batch.enter(status)
        self._db.execute("BEGIN")
        for entry in made:
            self._put_file(entry)
        self.put_batch(batch)
        self._db.execute("DELETE FROM results WHERE batch = ?", (batch.id,))
        self._db.execute("COMMIT")

    def _write_results(self, batch: str, failed: int, kind: str) -> FileEntry | None:
        name = f"file-{batch}-{kind}"
        written = 0
        part = self.path(f"{name}.part")
        with part.open("wb") as file:
            for body in self._results(batch, failed):
                written += file.write(body + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if not written:
            part.unlink()
            return None
        part.rename(self.path(name))
        return FileEntry(
            id=name, bytes=written, created_at=int(time.time()), filename=f"{batch}_{kind}.jsonl",
            purpose="batch_output",
        )  # fmt: skip

    def _results(self, batch: str, failed: int) -> Iterator[bytes]:
        rows = self._db.execute(
            "SELECT body FROM results WHERE batch = ? AND failed = ? ORDER BY line", (batch, failed)
        )
        for (body,) in rows:
            yield body

    def _put_file(self, entry: FileEntry) -> None:
        self._db.execute("INSERT OR REPLACE INTO files (id, body) VALUES (?, ?)", (entry.id, _encode(entry)))
        self._size += entry.bytes

    def _expire(self) -> None:
        now = time.time()
        for entry in self.files():
            if entry.expires_at is not None and entry.expires_at < now:
                self.delete_file(entry.id)
