"""Where a program's buffers live: offsets in one workspace, shared by buffers whose lifetimes do not meet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rvllm.program.ops.dense import Buffer

ALIGNMENT = 256  # bytes; what vector loads and the copy engine want


class Stage(Protocol):
    """Anything that reads and writes buffers: an op, or several fused into one."""

    @property
    def reads(self) -> tuple[Buffer, ...]:
        """Buffers read."""

    @property
    def writes(self) -> tuple[Buffer, ...]:
        """Buffers written."""


@dataclass(frozen=True)
class Lifetime:
    """A buffer is live from the op that first touches it to the op that last does, both included."""

    buffer: Buffer
    first: int
    last: int


@dataclass(frozen=True)
class Placement:
    """A buffer's place in the workspace, in bytes."""

    buffer: Buffer
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Workspace:
    """All placements and the workspace's size in bytes."""

    placements: dict[str, Placement]
    nbytes: int


def lifetimes(stages: Iterable[Stage]) -> list[Lifetime]:
    """The lifetime of every buffer that some stage touches, in order of first use."""
    found: dict[str, Lifetime] = {}
    for index, stage in enumerate(stages):
        for buffer in (*stage.reads, *stage.writes):
            first = found[buffer.name].first if buffer.name in found else index
            found[buffer.name] = Lifetime(buffer, first, index)
    return list(found.values())


def plan_workspace(stages: Sequence[Stage], tokens: int, samples: int) -> Workspace:
    """Places every buffer the stages touch, for steps of up to `tokens` tokens and `samples` sampled rows.

    First fit by decreasing size: simple, deterministic, and within a few per cent of the peak of live
    bytes for the programs here.
    """
    placed: list[tuple[Lifetime, Placement]] = []

    def nbytes(buffer: Buffer) -> int:
        rows = tokens if buffer.rows == "tokens" else samples
        return -(-rows * buffer.width * buffer.dtype.size // ALIGNMENT) * ALIGNMENT

    for life in sorted(lifetimes(stages), key=lambda life: (-nbytes(life.buffer), life.first)):
        size, offset = nbytes(life.buffer), 0
        neighbours = sorted(
            (p for other, p in placed if other.first <= life.last and life.first <= other.last),
            key=lambda p: p.offset,
        )
        for neighbour in neighbours:
            if offset + size <= neighbour.offset:
                break
            offset = max(offset, neighbour.offset + neighbour.nbytes)
        placed.append((life, Placement(life.buffer, offset, size)))
    return Workspace(
        placements={p.buffer.name: p for _, p in placed},
        nbytes=max((p.offset + p.nbytes for _, p in placed), default=0),
    )
