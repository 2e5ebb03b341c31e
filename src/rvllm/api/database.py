"""SQLite files that belong to one server: opened with a lock, written so that a kill loses nothing."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from rvllm.api.disk import private_file
from rvllm.errors import UsageError


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
