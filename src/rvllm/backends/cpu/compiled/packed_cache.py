"""Packed weights kept between starts: a file a model, mapped as it lies (docs/decisions/0034).

A file is found by a key over everything that goes into it: the checkpoint's files (device, inode, size,
times), the tensors and weights, and the code that packs. It begins with a line of the SHA-256 of the next
line, which is JSON: the key, and of each matrix its segments with place and SHA-256. What does not agree with
that counts as absent, so that a damaged file costs a start and no more.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from rvllm.backends.cpu.compiled import formats
from rvllm.backends.cpu.compiled.formats import FORMATS, Bytes, Matrix, Segment
from rvllm.backends.cpu.compiled.slots import LANES
from rvllm.config import SourceConfig
from rvllm.program.ops.dense import Weight
from rvllm.settings import build
from rvllm.weights import packing
from rvllm.weights.checkpoint import Checkpoint
from rvllm.weights.gguf import blocks

MIN_BYTES = 32 << 20  # smaller models are packed faster than they are looked up
ALIGN = 4096
SPARE = 256 << 20  # bytes left free on the disk
STALE = 86400.0  # seconds after which an unfinished file is nobody's
_BY_NAME = {each.name: each for each in FORMATS.values()}


def key_of(weights: Sequence[Weight], checkpoint: Checkpoint) -> str | None:
    """The name of these packed weights; None when their bytes do not follow from files alone."""
    infos = [checkpoint.tensors[name] for name in sorted(checkpoint.tensors)]
    if not infos or any(info.quantised is not None for info in infos):
        return None
    digest = hashlib.sha256(sys.byteorder.encode())
    try:
        for module in (formats, blocks, packing):
            digest.update(Path(str(module.__file__)).read_bytes())
        for path in sorted({info.file for info in infos}):
            stat = path.stat()
            digest.update(
                repr((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)).encode()
            )
    except OSError:
        return None
    for info in infos:
        place = (info.name, info.shape, info.type.value, info.offset, info.nbytes)
        rows = (info.unpermute_heads, info.regroup_heads, info.add, info.logarithm)
        digest.update(repr((place, rows)).encode())
    for weight in weights:
        digest.update(repr(weight).encode())
    return digest.hexdigest()


def load(key: str, names: Sequence[str], folder: Path) -> dict[str, Matrix] | None:
    """The packed matrices of these names, views of the mapped file; None: not there, or damaged."""
    path = folder / f"{key}.packed"
    try:
        with path.open("rb") as file:
            said, header = file.readline(80).strip(), file.readline()
            if hashlib.sha256(header).hexdigest().encode() != said:
                return None
            told = json.loads(header)
            if told["key"] != key or set(told["matrices"]) != set(names):
                return None
            room: Bytes = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
        found = {
            name: Matrix(tuple(_segment(each, room) for each in told["matrices"][name])) for name in names
        }
        pieces = [
            (segment.data, each["sha256"])
            for name in names
            for segment, each in zip(found[name].segments, told["matrices"][name], strict=True)
        ]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            if not all(pool.map(_whole, pieces)):
                return None
        os.utime(path)  # the least lately used goes first
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


def _segment(told: Mapping[str, Any], room: Bytes) -> Segment:
    form = _BY_NAME[told["format"]]
    first, rows, inner, at = (int(told[name]) for name in ("first", "rows", "inner", "at"))
    tiles = -(-rows // LANES)
    data = room[at : at + tiles * form.tile_bytes(inner)].reshape(tiles, -1)  # ValueError when cut short
    return Segment(form, first, rows, inner, data)


def _whole(piece: tuple[Bytes, str]) -> bool:
    data, digest = piece
    return hashlib.sha256(data.reshape(-1).data).hexdigest() == digest


def store(key: str, matrices: Mapping[str, Matrix], folder: Path, most: int) -> None:
    """Keeps packed matrices, and as few others as fit in `most` bytes with them.

    What is too large, and a disk that is full or not ours to write to, leaves everything as it was.
    """
    size = sum(matrix.nbytes for matrix in matrices.values())
    if not MIN_BYTES <= size <= most:
        return
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _make_room(folder, most - size)
        stat = os.statvfs(folder)
        if stat.f_bavail * stat.f_frsize < size + SPARE:
            return
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as file:
            temporary = file.name
            _write(file, key, matrices)
        os.replace(temporary, folder / f"{key}.packed")
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _write(file: Any, key: str, matrices: Mapping[str, Matrix]) -> None:
    """The header, whose length does not depend on the places in it, then every segment at a page's start."""

    def header(start: int) -> bytes:
        at, told = start, {}
        for name, matrix in matrices.items():
            rows = []
            for segment, digest in zip(matrix.segments, digests[name], strict=True):
                rows.append({"format": segment.format.name, "first": segment.first, "rows": segment.rows,
                             "inner": segment.inner, "at": f"{at:020}", "sha256": digest})  # fmt: skip
                at += -(-segment.data.nbytes // ALIGN) * ALIGN
            told[name] = rows
        line = json.dumps({"key": key, "matrices": told}).encode() + b"\n"
        return hashlib.sha256(line).hexdigest().encode() + b"\n" + line

    digests = {
        name: [hashlib.sha256(s.data.reshape(-1).data).hexdigest() for s in matrix.segments]
        for name, matrix in matrices.items()
    }
    start = -(-len(header(0)) // ALIGN) * ALIGN
    file.write(header(start).ljust(start, b"\0"))
    for matrix in matrices.values():
        for segment in matrix.segments:
            file.write(segment.data.reshape(-1).data)
            file.write(b"\0" * (-segment.data.nbytes % ALIGN))


def _make_room(folder: Path, most: int) -> None:
    """Removes the least lately used files until the others take `most` bytes at most, and unfinished ones."""
    now = time.time()
    for path in folder.glob("*.part"):
        if now - path.stat().st_mtime > STALE:
            path.unlink(missing_ok=True)
    kept = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in folder.glob("*.packed"))
    total = sum(size for _, size, _ in kept)
    for _, size, path in kept:
        if total <= most:
            return
        path.unlink(missing_ok=True)
        total -= size


def settings() -> tuple[Path, int]:
    """(folder, the most bytes in it), as the environment says."""
    source = build(SourceConfig, {})
    return Path(source.cache_dir).expanduser() / "packed", int(source.packed_cache_gb * 1e9)
