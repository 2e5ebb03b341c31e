"""The cache folder: room on its disk, and a lock for those who write to it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from rvllm.config import SourceConfig
from rvllm.errors import CapacityError, ModelError
from rvllm.weights.fetch.progress import Report

MARGIN = 32 << 20  # bytes left free on the disk


class FetchError(ModelError):
    """A model could not be fetched because its source cannot be reached; trying again may help."""


def cache_folder(source: SourceConfig) -> Path:
    """The cache folder, absolute; it may not exist yet."""
    return Path(source.cache_dir).expanduser().absolute()


def check_space(folder: Path, needed: int, what: str, setting: str = "RVLLM_CACHE_DIR") -> None:
    """Raises CapacityError when the disk of `folder` has less than `needed` bytes (and a margin) free."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed + MARGIN:
        raise CapacityError(
            f"{what} needs {(needed + MARGIN) / 1e6:.0f} MB on the disk of {folder}, {free / 1e6:.0f} MB are "
            f"free; make room or set {setting} to a folder on another disk"
        )


@contextlib.contextmanager
def disk_errors(folder: Path, what: str) -> Iterator[None]:
    """Turns a full, read-only or forbidden disk into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(
                f"{what}: no space left on the disk of {folder}; make room or set RVLLM_CACHE_DIR"
            ) from None
        raise ModelError(
            f"{what}: cannot write to {folder}: {error.strerror or error}; "
            "set RVLLM_CACHE_DIR to another folder"
        ) from None


@contextlib.contextmanager
def locked(path: Path, report: Report, what: str) -> Iterator[None]:
    """Holds a lock that other processes respect; it is given up when the process dies, however it does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"waiting for another process that fetches {what}", 0, 0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
