"""Memory-mapped model files, and what their readers share."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvllm.errors import ModelError

MAX_JSON_BYTES = 100 << 20  # of a config, an index or a safetensors header


@dataclass(frozen=True)
class MappedFile:
    """A file mapped read-only; `bytes` is a flat uint8 view of all of it. identity: its device and inode."""

    path: Path
    bytes: NDArray[np.uint8]
    identity: tuple[int, int]

    @property
    def size(self) -> int:
        """Length in bytes."""
        return len(self.bytes)


LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # what a clone without Git LFS has for large files


def map_file(path: Path) -> MappedFile:
    """Maps a file; ModelError names it when it cannot be read, is empty or only stands for the real one."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            found = os.fstat(file.fileno())
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        reason = error.strerror if isinstance(error, OSError) else "the file is empty"
        raise ModelError(f"{path}: cannot read the file: {reason}") from None
    if mapped[: len(LFS_POINTER)] == LFS_POINTER:
        raise ModelError(f"{path}: a Git LFS pointer, not the weights themselves; run `git lfs pull` there")
    return MappedFile(path, np.frombuffer(mapped, dtype=np.uint8), (found.st_dev, found.st_ino))


def check_layout(path: Path, spans: Iterable[tuple[int, int, str]], end: int) -> None:
    """Refuses tensors, given as (start, stop, name) in bytes, that leave the file or overlap."""
    reached, before = 0, ""
    for start, stop, name in sorted(spans):
        if start < 0 or stop > end:
            raise ModelError(
                f"{path}: tensor {shown(name)} lies at bytes {start} to {stop}, but the file ends at {end}; "
                "it is truncated or damaged, fetch it again"
            )
        if stop > start:
            if start < reached:
                raise ModelError(f"{path}: tensors {shown(before)} and {shown(name)} overlap")
            reached, before = stop, name


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; ModelError names the file and what is wrong."""
    return parse_json(read_file(path, MAX_JSON_BYTES, "such file"), str(path))


def read_file(path: Path, most: int, what: str) -> bytes:
    """A whole file; ModelError names it where it cannot be read or is larger than `most`, as no `what` is."""
    try:
        if path.stat().st_size > most:
            raise ModelError(f"{path}: larger than {most >> 20} MiB, which no {what} is")
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot read the file: {error.strerror}") from None


def parse_json(text: bytes, origin: str) -> dict[str, Any]:
    """A JSON object without repeated keys; ModelError names `origin` and what is wrong."""
    try:
        value = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_distinct)
    except UnicodeDecodeError:
        raise ModelError(f"{origin}: not UTF-8") from None
    except RecursionError:
        raise ModelError(f"{origin}: nested too deeply") from None
    except ValueError as error:
        raise ModelError(f"{origin}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{origin}: must hold a JSON object, holds {type(value).__name__}")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def shown(name: object) -> str:
    """A name from a file, quoted and cut, for one line of an error message."""
    text = repr(name)
    return text if len(text) <= 90 else text[:86] + "..." + text[0]
