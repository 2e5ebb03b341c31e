"""How the compiled kernels hold a matrix: 16 rows side by side, levels and scales of a group in one record.

A tile holds rows 16 t .. 16 t + 15. For a quantised format it is one record a group of elements:

    scale[16] | minimum[16] | levels [group][16], or [group / 2][16] bytes of two 4-bit levels

and for a plain one the elements [inner][16]. An element is level * scale + minimum. Nothing is rounded on
the way from the file: scales keep float16 where the file has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.cpu.compiled.slots import LANES
from rvllm.errors import ModelError
from rvllm.program.ops.dense import Weight
from rvllm.weights.checkpoint import Checkpoint, TensorType
from rvllm.weights.gguf.blocks import levels_into, scales_of
from rvllm.weights.packing import find_tensor, has_stored_form, in_float32, raw_parts
from rvllm.weights.parallel import in_threads

PLAIN_GROUP = 32  # elements of a plain format that are summed before they are added to the total
PIECE = 1 << 20  # elements a thread packs at a time

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Format:
    """A packed form. group 0 is a plain one; bits of a stored level; `offset` is subtracted from it."""

    name: str
    group: int = 0
    bits: int = 0
    scale_bytes: int = 0
    minimum: bool = False
    offset: int = 0

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of a plain format."""
        return 4 if self.name == "F32" else 2

    @property
    def scale(self) -> str:
        """The type of scales and minimums."""
        return "F32" if self.scale_bytes == 4 else "F16"

    @property
    def levels_at(self) -> int:
        """Where the levels of a record begin."""
        return LANES * self.scale_bytes * (2 if self.minimum else 1)

    @property
    def record(self) -> int:
        """Bytes of a record."""
        return self.levels_at + self.group * LANES * self.bits // 8

    def tile_bytes(self, inner: int) -> int:
        """Bytes of 16 rows."""
        return inner // self.group * self.record if self.group else inner * LANES * self.element_bytes


FORMATS = {
    TensorType.F32: Format("F32"),
    TensorType.F16: Format("F16"),
    TensorType.BF16: Format("BF16"),
    TensorType.Q4_0: Format("Q4_0", 32, 4, 2, offset=8),
    TensorType.Q4_1: Format("Q4_1", 32, 4, 2, minimum=True),
    TensorType.Q5_0: Format("I8", 32, 8, 2),
    TensorType.Q5_1: Format("I8M", 32, 8, 2, minimum=True),
    TensorType.Q8_0: Format("I8", 32, 8, 2),
    TensorType.Q4_K: Format("Q4_K", 32, 4, 4, minimum=True),
    TensorType.Q5_K: Format("I8K", 32, 8, 4, minimum=True),
    TensorType.Q6_K: Format("Q6_K", 16, 8, 4),
    TensorType.Q3_K: Format("Q6_K", 16, 8, 4),
    TensorType.IQ4_NL: Format("I8", 32, 8, 2),
}


@dataclass(frozen=True)
class Segment:
    """Rows of a matrix in one format, from row `first` on; data uint8 [tiles, bytes of a tile]."""

    format: Format
    first: int
    rows: int
    inner: int
    data: Bytes

    @property
    def tiles(self) -> int:
        """Tiles of 16 rows, the last one perhaps padded with zeros."""
        return -(-self.rows // LANES)


@dataclass(frozen=True)
class Matrix:
    """A packed weight: its segments, in order of their rows."""

    segments: tuple[Segment, ...]

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return sum(s.data.nbytes for s in self.segments)


def pack_matrix(weight: Weight, checkpoint: Checkpoint | None, seed: int) -> Matrix:
    """A weight in its stored form where it can be had that way, else as float32; None: random ones.

    Neighbouring parts of one type become one segment.
    """
    inner = weight.shape[-1]
    try:
        parts = [] if checkpoint is None else raw_parts(weight, checkpoint)
    except ModelError:  # transposed, or with a constant to add: there is no stored form of these rows
        parts = []
    if not parts or any(part.type not in FORMATS for part in parts):
        numbers = np.ascontiguousarray(in_float32(weight, checkpoint, seed))
        return Matrix((segment(TensorType.F32, 0, inner, numbers.reshape(-1).view(np.uint8)),))
    segments: list[Segment] = []
    first = 0
    for kind, run in groupby(parts, key=lambda part: part.type):
        segments.append(segment(kind, first, inner, *(part.data for part in run)))
        first += segments[-1].rows
    return Matrix(tuple(segments))


def packed_nbytes(weight: Weight, checkpoint: Checkpoint | None) -> int:
    """What `pack_matrix` will take, by the types in the checkpoint; nothing is read."""
    inner = weight.shape[-1]
    found = [] if checkpoint is None else [(part, find_tensor(part, checkpoint)) for part in weight.parts]
    stored = [
        (info.type, part.elements // inner) for part, info in found if info and has_stored_form(part, info)
    ]
    if len(stored) != len(weight.parts) or any(kind not in FORMATS for kind, _ in stored):
        stored = [(TensorType.F32, weight.elements // inner)]
    return sum(
        -(-sum(rows for _, rows in run) // LANES) * FORMATS[kind].tile_bytes(inner)
        for kind, run in groupby(stored, key=lambda each: each[0])
    )


def segment(kind: TensorType, first: int, inner: int, *raw: Bytes) -> Segment:
    """Packs rows of a stored type (`raw`: their bytes, one part below the other); `first` is where they stand
    in their matrix. Parts of whole tiles, as experts are, are packed one by one where they lie."""
    elements, nbytes = kind.block
    parts = [part.reshape(-1, inner // elements * nbytes) for part in raw]
    if any(len(part) % LANES for part in parts[:-1]):
        parts = [np.concatenate(parts)]
    form, count = FORMATS[kind], sum(len(part) for part in parts)
    tiles = -(-count // LANES)
    out = aligned(tiles * form.tile_bytes(inner)).reshape(tiles, -1)
    tile = 0
    for rows in parts:
        _pack_rows(kind, inner, rows, out[tile : tile + -(-len(rows) // LANES)])
        tile += len(rows) // LANES
    return Segment(form, first, count, inner, out)


def _pack_rows(kind: TensorType, inner: int, rows: Bytes, out: Bytes) -> None:
    """rows [n, bytes of a row] into out [tiles, bytes of a tile], the last tile padded with zeros."""

    def work(begin: int, end: int) -> None:
        piece = rows[begin * LANES : end * LANES]
        if len(piece) % LANES:
            piece = np.concatenate([piece, np.zeros((-len(piece) % LANES, rows.shape[1]), np.uint8)])
        _pack_tiles(kind, FORMATS[kind], inner, piece, out[begin:end])

    in_threads(work, len(out), max(1, PIECE // (inner * LANES)))


def aligned(nbytes: int) -> Bytes:
    """Uninitialised bytes at a multiple of 64."""
    room = np.empty(nbytes + 64, dtype=np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + nbytes]


def _pack_tiles(kind: TensorType, form: Format, inner: int, rows: Bytes, out: Bytes) -> None:
    """rows [tiles * 16, bytes of a row] into out [tiles, bytes of a tile]."""
    tiles = len(out)
    if not form.group:
        element = {4: np.uint32, 2: np.uint16}[form.element_bytes]
        wanted = out.view(element).reshape(tiles, inner, LANES)
        wanted[...] = rows.view(element).reshape(tiles, LANES, inner).swapaxes(1, 2)
        return
    groups = inner // form.group
    stored = rows.reshape(-1, kind.block[1])
    levels = np.empty((len(stored), kind.block[0]), dtype=np.uint8)
    levels_into(kind, stored, levels)
    if form.offset:
        levels += np.uint8(form.offset)
    records = out.reshape(tiles, groups, form.record)
    scales = scales_of(kind, stored)
    for which, values in enumerate(s for s in scales if s is not None):
        by_tile = values.reshape(tiles, LANES, groups).swapaxes(1, 2)
        scale = np.ascontiguousarray(by_tile, dtype=np.float16 if form.scale_bytes == 2 else np.float32)
        size = LANES * form.scale_bytes
        records[:, :, which * size : (which + 1) * size] = scale.view(np.uint8)
    place = records[:, :, form.levels_at :]
    if form.bits == 4:
        pairs = levels.reshape(-1, 2)
        levels = np.bitwise_or(pairs[:, 0], pairs[:, 1] << np.uint8(4), dtype=np.uint8)
    length = form.group * form.bits // 8
    by_row = levels.reshape(tiles, LANES, groups, length)
    place.reshape(tiles, groups, length, LANES)[...] = by_row.transpose(0, 2, 3, 1)
