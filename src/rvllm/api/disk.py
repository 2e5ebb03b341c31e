"""Files that are ours alone: whole or not there, readable by nobody else, and swept when their owner died."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from rvllm.errors import UsageError

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
PART = ".part"  # the name's end while a file is being written
_LOCK = "owner.lock"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def is_full(error: BaseException) -> bool:
    """Whether something failed because the disk, or our share of it, is full."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL or (
            "disk I/O error" in str(error) or "disk is full" in str(error)
        )
    return False


def private_folder(path: Path) -> None:
    """Makes a folder that only this user can enter, or shuts others out of one that is there."""
    path.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
    path.chmod(PRIVATE_FOLDER)


def private_file(path: Path) -> None:
    """Makes an empty file that only this user can read, or shuts others out of one that is there."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE))
    path.chmod(PRIVATE_FILE)


def write_whole(path: Path, write: Callable[[IO[bytes]], int]) -> int:
    """Writes a file under another name, syncs it and gives it its name: after a kill or a full disk it is
    whole or not there. write: returns the bytes written; with 0 there is no file. Raises OSError.
    """
    part = path.with_name(path.name + PART)
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, PRIVATE_FILE)
        with os.fdopen(descriptor, "wb") as file:
            written = write(file)
            file.flush()
            os.fsync(file.fileno())
        if not written:
            part.unlink()
            return 0
        part.rename(path)
        sync_folder(path.parent)
        return written
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """What was renamed or removed in a folder stays so after a loss of power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class TemporaryFolder:
    """A folder that is deleted by `close`; if the process is killed before, by the next one that starts."""

    def __init__(self, prefix: str) -> None:
        """prefix: of the name; folders with it whose owner has died are deleted first."""
        sweep(prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def sweep(prefix: str) -> None:
    """Deletes temporary folders of this user whose owner has died: nobody holds their lock any more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            pass  # its owner lives
        finally:
            os.close(descriptor)


def open_database(path: str, schema: str, flag: str) -> sqlite3.Connection:
    """A connection to the database at `path` (":memory:" for none on disk) with the tables of `schema`.

    What is committed survives a kill of the process. A second server cannot open the same file.
    Raises UsageError naming `flag` when it cannot be opened.
    """
    try:
        if path != ":memory:":
            private_file(Path(path).expanduser())  # its write-ahead log takes the same permissions
        connection = sqlite3.connect(
            os.path.expanduser(path), timeout=0.5, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("BEGIN IMMEDIATE")
        for statement in filter(str.strip, schema.split(";")):
            connection.execute(statement)
        connection.execute("COMMIT")
        return connection
    except OSError as error:
        raise UsageError(f"{flag}: cannot open {path}: {error.strerror}") from None
    except sqlite3.Error as error:
        reason = "another server uses it" if "locked" in str(error) else str(error)
        raise UsageError(f"{flag}: cannot open {path}: {reason}") from None
