"""A step as a list of planned launches: pure data until it is bound to loaded kernels.

Planning needs no GPU, so every (op, dtype, architecture, decode path) can be resolved, printed and tested
on any machine. Binding makes launch records whose parameters stay in place.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rvllm.backends.cuda.device.catalog import Catalog
from rvllm.backends.cuda.device.driver import Grid, Launch, Stream, TensorMap
from rvllm.backends.cuda.ops.gemm.cublas import KERNEL as CUBLAS
from rvllm.backends.cuda.ops.gemm.cublas import MatmulLaunch


@dataclass(frozen=True)
class Counts:
    """How large a step is: rows of the flat batch, sequences, and rows whose logits are wanted."""

    tokens: int
    seqs: int
    samples: int


@dataclass(frozen=True)
class Count:
    """An int32 parameter that follows the step: `tokens`, `seqs` or `samples`."""

    name: str


@dataclass(frozen=True)
class MatrixMap:
    """A tensor map over a row-major 16-bit matrix [rows, width]; boxes of [box_rows, box_width]."""

    address: int
    rows: int
    width: int
    box_rows: int
    box_width: int
    bf16: bool


GridOf = Callable[[Counts], Grid]


@dataclass(frozen=True)
class Planned:
    """One launch: which kernel, for which ops, over what.

    grid: a function of the step's size. parameters: device addresses as int, scalars as ctypes objects,
    Count and MatrixMap. why: how the kernel was chosen, for `rvllm plan`. does: what it computes,
    where it may be joined with its neighbours (see `ops/decode/chains.py`).
    """

    op: str
    kernel: str
    grid: GridOf
    block: int
    parameters: Sequence[Any]
    smem: int = 0
    cluster: int = 1
    why: str = ""
    does: object = None


@dataclass
class Bound:
    """Planned launches bound to a GPU: run eagerly or captured into a graph."""

    planned: Sequence[Planned]
    launches: list[Launch | MatmulLaunch]
    cells: dict[str, ctypes.c_int] = field(default_factory=dict)

    def run(self, stream: Stream, counts: Counts) -> None:
        """Queues every launch of the step."""
        self.set_counts(counts)
        for planned, launch in zip(self.planned, self.launches, strict=True):
            launch.run(stream, planned.grid(counts))

    def set_counts(self, counts: Counts) -> None:
        """What the launches from here on take for the step's size."""
        self.cells["tokens"].value = counts.tokens
        self.cells["seqs"].value = counts.seqs
        self.cells["samples"].value = counts.samples


def ints(*values: int) -> tuple[ctypes.c_int, ...]:
    """Parameters of a kernel's type int."""
    return tuple(map(ctypes.c_int, values))


def fixed(*grid: int) -> GridOf:
    """A grid that does not depend on the step."""
    full: Grid = (grid[0], grid[1] if len(grid) > 1 else 1, grid[2] if len(grid) > 2 else 1)
    return lambda counts: full


def kernel_names(planned: Iterable[Planned]) -> list[str]:
    """The catalog's kernels a plan uses, each once."""
    return list(dict.fromkeys(p.kernel for p in planned if p.kernel != CUBLAS))


def bind(planned: Sequence[Planned], catalog: Catalog, pdl: bool) -> Bound:
    """Launch records for a plan; scalars that follow the step share one cell each."""
    cells = {name: ctypes.c_int(0) for name in ("tokens", "seqs", "samples")}
    launches: list[Launch | MatmulLaunch] = []
    for p in planned:
        if p.kernel == CUBLAS:
            launches.append(MatmulLaunch(p.parameters[0]))
            continue
        arguments: list[Any] = []
        for parameter in p.parameters:
            match parameter:
                case Count(name):
                    arguments.append(cells[name])
                case MatrixMap(address, rows, width, box_rows, box_width, bf16):
                    arguments.append(
                        TensorMap.matrix(address, rows, width, 2 * width, box_rows, box_width, bf16)
                    )
                case _:
                    arguments.append(parameter)
        launches.append(Launch(catalog[p.kernel], p.block, p.smem, arguments, pdl=pdl, cluster=p.cluster))
    return Bound(planned, launches, cells)
