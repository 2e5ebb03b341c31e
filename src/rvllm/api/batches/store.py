"""Where uploaded files and batches are kept: a folder with an SQLite index; a kill loses nothing."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import IO
from uuid import uuid4

import msgspec

from rvllm.api.disk import TemporaryFolder, open_database, private_folder, sync_folder, write_whole
from rvllm.api.http.errors import invalid
from rvllm.errors import UsageError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS batches (number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS results (
    batch TEXT NOT NULL, line INTEGER NOT NULL, failed INTEGER NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (batch, line)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tries (
    batch TEXT NOT NULL, line INTEGER NOT NULL, count INTEGER NOT NULL,
    PRIMARY KEY (batch, line)) WITHOUT ROWID
"""
OVERHEAD = 512  # bytes that an entry counts for, beside what it holds
MAX_FILES = 20_000
MAX_BATCHES = 10_000
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
    """Files and batches in `directory`; None: in one that `close` deletes. limit: bytes of all of them.

    Safe to use from several threads. Raises OSError or sqlite3.Error for a disk that is full (`is_full`);
    nothing has changed then.
    """

    def __init__(self, directory: str | None, limit: int) -> None:
        self._temporary = TemporaryFolder("rvllm-files-") if directory is None else None
        self._root = self._temporary.path if self._temporary else Path(directory or "").expanduser()
        try:
            private_folder(self._root)
            private_folder(self._root / "files")
        except OSError as error:
            raise UsageError(f"--files-dir: cannot use {self._root}: {error.strerror}") from None
        self._db = open_database(str(self._root / "index.db"), _SCHEMA, "--files-dir")
        self._lock = threading.RLock()
        self._limit = limit
        self._sweep()
        self._size = sum(map(_size_of, self.files()))
        rows = self._db.execute("SELECT coalesce(sum(length(body)), 0), count(*) FROM results").fetchone()
        self._size += rows[0] + OVERHEAD * rows[1]

    def _sweep(self) -> None:
        """Forgets files that are no longer there, and removes what a kill left half done."""
        known = {entry.id for entry in self.files()}
        there = {path.name for path in (self._root / "files").iterdir()}
        for name in known - there:
            self._db.execute("DELETE FROM files WHERE id = ?", (name,))
        for name in there - known:
            self.path(name).unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the index; a temporary folder is deleted."""
        self._db.close()
        if self._temporary is not None:
            self._temporary.close()

    def path(self, name: str) -> Path:
        """Where a known file's content is."""
        return self._root / "files" / name

    def reserve(self, count: int) -> None:
        """Counts bytes of a file that is being received. Raises a 400 when all is full."""
        with self._lock:
            if self._size + count > self._limit:
                raise invalid(
                    "there is no room for the file: delete others (--files-max-mb)", "file", "storage_full"
                )
            self._size += count

    def release(self, count: int) -> None:
        with self._lock:
            self._size -= count

    def add_file(self, part: Path, filename: str, purpose: str, expires_after: int | None) -> FileEntry:
        """Keeps a file that was received as `part`, whose bytes are reserved: it is whole before its entry
        is there. Raises a 400 when all is full."""
        self.expire()
        now = int(time.time())
        entry = FileEntry(
            id=f"file-{uuid4().hex}", bytes=part.stat().st_size, created_at=now, filename=filename,
            purpose=purpose, expires_at=None if expires_after is None else now + expires_after,
        )  # fmt: skip
        with self._lock:
            if self._db.execute("SELECT count(*) FROM files").fetchone()[0] >= MAX_FILES:
                raise invalid(f"there are {MAX_FILES} files already: delete others", "file", "storage_full")
        self.reserve(_size_of(entry) - entry.bytes)
        path = self.path(entry.id)
        try:
            part.rename(path)
            sync_folder(path.parent)
            with self._lock:
                self._insert(entry)
        except BaseException:
            self.release(_size_of(entry) - entry.bytes)
            path.unlink(missing_ok=True)
            raise
        return entry

    def files(self) -> list[FileEntry]:
        """All files, oldest first."""
        rows = self._db.execute("SELECT body FROM files ORDER BY number").fetchall()
        return [msgspec.json.decode(body, type=FileEntry) for (body,) in rows]

    def file(self, name: str) -> FileEntry | None:
        """The file of that id; None when there is none (any more)."""
        self.expire()
        row = self._db.execute("SELECT body FROM files WHERE id = ?", (name,)).fetchone()
        return None if row is None else msgspec.json.decode(row[0], type=FileEntry)

    def delete_file(self, name: str) -> bool:
        """Deletes a file; False when there was none."""
        with self._lock:
            row = self._db.execute("DELETE FROM files WHERE id = ? RETURNING body", (name,)).fetchone()
            if row is None:
                return False
            self._size -= _size_of(msgspec.json.decode(row[0], type=FileEntry))
        self.path(name).unlink(missing_ok=True)
        return True

    def add_batch(self, batch: Batch) -> None:
        """Keeps a new batch. Raises a 400 when there are too many."""
        with self._lock:
            count = self._db.execute("SELECT count(*) FROM batches").fetchone()[0]
            if count >= MAX_BATCHES:
                raise invalid(f"there are {MAX_BATCHES} batches already: delete others", None, "storage_full")
            self.put_batch(batch)

    def put_batch(self, batch: Batch) -> None:
        """Keeps a batch, new or changed."""
        with self._lock:
            self._db.execute(
                "INSERT INTO batches (id, body) VALUES (?, ?) "
                "ON CONFLICT (id) DO UPDATE SET body = excluded.body",
                (batch.id, _encode(batch)),
            )

    def delete_batch(self, name: str) -> None:
        """Forgets a batch that has ended; its files stay."""
        with self._lock:
            self._db.execute("DELETE FROM batches WHERE id = ?", (name,))
            self._db.execute("DELETE FROM tries WHERE batch = ?", (name,))

    def batches(self) -> list[Batch]:
        """All batches, oldest first."""
        rows = self._db.execute("SELECT body FROM batches ORDER BY number").fetchall()
        return [msgspec.json.decode(body, type=Batch) for (body,) in rows]

    def add_result(self, batch: str, line: int, failed: bool, body: bytes) -> None:
        """Keeps the answer to a line; it stays when this process is killed. A line is kept once."""
        with self._lock:
            added = self._db.execute(
                "INSERT OR IGNORE INTO results VALUES (?, ?, ?, ?)", (batch, line, failed, body)
            )
            self._size += (len(body) + OVERHEAD) * added.rowcount

    def has_room(self, more: int = 0) -> bool:
        """Whether so many bytes more may be kept."""
        return self._size + more <= self._limit

    def lines_done(self, batch: str) -> dict[int, bool]:
        """The lines that have been answered, and whether the answer is a failure."""
        with self._lock:
            rows = self._db.execute("SELECT line, failed FROM results WHERE batch = ?", (batch,)).fetchall()
        return {line: bool(failed) for line, failed in rows}

    def begin_line(self, batch: str, line: int) -> None:
        """Notes that a line is about to run: if it ends the server, the next one knows."""
        with self._lock:
            self._db.execute(
                "INSERT INTO tries VALUES (?, ?, 1) "
                "ON CONFLICT (batch, line) DO UPDATE SET count = count + 1",
                (batch, line),
            )

    def spare_line(self, batch: str, line: int) -> None:
        """The line did not end the server: it has been answered, or the server stopped in good order."""
        with self._lock:
            self._db.execute("DELETE FROM tries WHERE batch = ? AND line = ?", (batch, line))

    def tries(self, batch: str) -> dict[int, int]:
        """How often servers have ended while these lines ran."""
        with self._lock:
            rows = self._db.execute("SELECT line, count FROM tries WHERE batch = ?", (batch,)).fetchall()
        return dict(rows)

    def finish_batch(self, batch: Batch, status: str) -> None:
        """Writes the output and error files and ends the batch. Repeating it after a kill changes nothing."""
        made = []
        ended = msgspec.structs.replace(batch)
        for failed, kind in ((0, "output"), (1, "error")):
            entry = self._write_results(batch.id, failed, kind)
            if entry is not None:
                made.append(entry)
                setattr(ended, f"{kind}_file_id", entry.id)
        ended.enter(status)
        with self._lock:
            size, count = self._db.execute(
                "SELECT coalesce(sum(length(body)), 0), count(*) FROM results WHERE batch = ?", (batch.id,)
            ).fetchone()
            with self._db:
                self._db.execute("BEGIN")
                for entry in made:
                    self._insert(entry)
                self.put_batch(ended)
                self._db.execute("DELETE FROM results WHERE batch = ?", (batch.id,))
                self._db.execute("DELETE FROM tries WHERE batch = ?", (batch.id,))
            self._size += sum(map(_size_of, made)) - size - OVERHEAD * count
        for name in batch.__struct_fields__:
            setattr(batch, name, getattr(ended, name))

    def _write_results(self, batch: str, failed: int, kind: str) -> FileEntry | None:
        name = f"file-{batch}-{kind}"

        rows = self._db.execute(
            "SELECT body FROM results WHERE batch = ? AND failed = ? ORDER BY line", (batch, failed)
        )

        def write(file: IO[bytes]) -> int:
            return sum(file.write(body + b"\n") for (body,) in rows)

        written = write_whole(self.path(name), write)
        if not written:
            return None
        return FileEntry(
            id=name, bytes=written, created_at=int(time.time()), filename=f"{batch}_{kind}.jsonl",
            purpose="batch_output",
        )  # fmt: skip

    def _insert(self, entry: FileEntry) -> None:
        self._db.execute("INSERT OR REPLACE INTO files (id, body) VALUES (?, ?)", (entry.id, _encode(entry)))

    def expire(self) -> None:
        """Deletes the files whose time is over."""
        now = time.time()
        for entry in self.files():
            if entry.expires_at is not None and entry.expires_at < now:
                self.delete_file(entry.id)


def _size_of(entry: FileEntry) -> int:
    """Bytes that a file counts for."""
    return entry.bytes + len(entry.filename.encode()) + OVERHEAD
