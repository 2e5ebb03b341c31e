"""What was measured of matrix kernels, kept between starts: one line an entry, each trusted by itself alone.

A line holds its key, microseconds and a digest of both, so a line that was cut, edited or written by another
version counts as absent and is measured again; the others stay. The key names all that a time depends on:
GPU, driver, type, quantisation, shape, tokens, kernel and the hash of its code. A time that no GPU could
reach, or a second and more, counts as absent too. Whether the others are right is seen on the GPU (check.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rvllm.backends.cuda.ops.gemm.strategy import ProductShape
from rvllm.errors import UsageError

MAX_ENTRIES = 100_000  # of the file: the newest stay
FILE = "gemm.jsonl"
FASTEST = 0.5  # of the time that a product's weights take at the memory's rate: less is no measurement
SLOWEST = 1e6  # microseconds


@dataclass(frozen=True)
class Conditions:
    """What all times of one GPU and model type have in common. quantisation: `none` for 16-bit weights."""

    gpu: str
    driver: int
    dtype: str
    quantisation: str = "none"


@dataclass(frozen=True)
class Key:
    """What one time is of. kernel: `native split:128`; code: the hash of what runs."""

    conditions: Conditions
    shape: ProductShape
    tokens: int
    kernel: str
    code: str

    def __str__(self) -> str:
        c, s = self.conditions, self.shape
        return "|".join(
            str(part).replace("|", "/")
            for part in (
                c.gpu, c.driver, c.dtype, c.quantisation, s.rows, s.width, s.epilogue, self.tokens,
                self.kernel, self.code,
            )
        )  # fmt: skip


@dataclass
class TuningCache:
    """Entries by the text of their key. damaged: lines of the file that were not what had been written."""

    path: Path
    entries: dict[str, float] = field(default_factory=dict)
    damaged: int = 0

    @staticmethod
    def open(folder: Path) -> TuningCache:
        """What can be read in `folder`; a file that is absent or unreadable is empty."""
        cache = TuningCache(folder / FILE)
        try:
            lines = cache.path.read_bytes().splitlines()
        except OSError:
            return cache
        for line in lines[-MAX_ENTRIES:]:
            entry = _parsed(line)
            if entry is None:
                cache.damaged += 1
            else:
                cache.entries[entry[0]] = entry[1]
        return cache

    def get(self, key: Key, floor: float) -> float | None:
        """Microseconds of this key. floor: what its weights' bytes take at the memory's rate."""
        found = self.entries.get(str(key))
        return found if found is not None and FASTEST * floor <= found <= SLOWEST else None

    def put(self, key: Key, microseconds: float) -> None:
        """Keeps a time until `save`."""
        self.entries.pop(str(key), None)  # the newest are last
        self.entries[str(key)] = microseconds

    def drop(self, key: Key) -> None:
        """Forgets a time that is there."""
        del self.entries[str(key)]

    def save(self) -> None:
        """Writes the file anew, in one step. Raises UsageError where it cannot be written."""
        lines = [_line(*entry) for entry in list(self.entries.items())[-MAX_ENTRIES:]]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
                file.write("".join(line + "\n" for line in lines))
            os.replace(file.name, self.path)
        except OSError as error:
            raise UsageError(
                f"times cannot be kept in {self.path.parent}: {error.strerror}; set RVLLM_CACHE_DIR"
            ) from None

    def rows(self) -> Iterator[tuple[list[str], float]]:
        """The parts of each key, and its microseconds."""
        for key, microseconds in self.entries.items():
            yield key.split("|"), microseconds


def _digest(key: str, microseconds: float) -> str:
    return hashlib.sha256(f"{key} {microseconds!r}".encode()).hexdigest()[:16]


def _line(key: str, microseconds: float) -> str:
    return json.dumps({"key": key, "us": microseconds, "sum": _digest(key, microseconds)})


def _parsed(line: bytes) -> tuple[str, float] | None:
    try:
        said = json.loads(line)
        key, microseconds = said["key"], said["us"]
        whole = isinstance(key, str) and isinstance(microseconds, float) and math.isfinite(microseconds)
        right = whole and said["sum"] == _digest(key, microseconds)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (key, microseconds) if right else None
