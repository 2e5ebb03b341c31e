"""A program as lists of compiled kernels with the ops between them that have none.

Buffers lie in one workspace of our own, shared by those whose lifetimes do not meet, so the kernels'
arguments are made once and only the step's few numbers change. It is as large as the largest step from the
start; the system gives memory to the pages that a step touches.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.cpu.compiled.library import Library
from rvllm.backends.cpu.compiled.lower import Call, Kernels, Places, lower
from rvllm.backends.cpu.compiled.slots import BLOCK_ROWS
from rvllm.backends.cpu.reference.interpreter import RESULTS
from rvllm.backends.cpu.step import Step
from rvllm.backends.cpu.threads import Workers
from rvllm.program.dtypes import DType
from rvllm.program.memory import plan_workspace
from rvllm.program.ops.dense import Buffer, Op, Program

Ints = NDArray[np.int64]
LINE = 8  # int64 of a cache line: what threads share of different kernels lies in different ones
STEP_SLOTS = 16


@dataclass(frozen=True)
class Compiled:
    """A run of ops as one list of kernels: its address is handed to every thread."""

    entries: Ints


@dataclass(frozen=True)
class _Results:
    """Stands after the last op and reads what the caller will."""

    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...] = ()


class NativeStep:
    """Runs a program's steps. Stages are `Compiled` lists and single ops left to the interpreter."""

    def __init__(
        self,
        program: Program,
        kernels: Kernels,
        library: Library,
        workers: Workers,
        max_len: int,
        tokens: int,
        samples: int,
    ) -> None:
        self._program, self._kernels, self._library, self._workers = program, kernels, library, workers
        self._max_len = max_len
        self._run = library.function("schedule")
        self._step = np.zeros(STEP_SLOTS, dtype=np.int64)
        self._capacity = (0, 0)
        self.buffers: dict[str, NDArray[Any]] = {}
        self._chunks: dict[str, Ints] = {}
        self.stages: list[Compiled | Op] = []
        self.reserve(tokens, samples)

    def reserve(self, tokens: int, samples: int) -> None:
        """Makes room for steps of so many rows, should there be more than were foreseen."""
        if tokens <= self._capacity[0] and samples <= self._capacity[1]:
            return
        tokens, samples = (max(new, old) for new, old in zip((tokens, samples), self._capacity, strict=True))
        self._capacity = (tokens, samples)
        rows = {"tokens": tokens, "samples": samples}
        compiled = [op for op in self._program.ops if op.name in self._kernels.supported]
        touched = {b.name: b for op in compiled for b in (*op.reads, *op.writes)}
        results = _Results(tuple(touched[name] for name in RESULTS if name in touched))
        workspace = plan_workspace([*self._program.ops, results], tokens, samples)
        self.memory = np.zeros(workspace.nbytes, np.uint8)  # nothing is taken before it is written
        self.buffers = {}
        for name, buffer in touched.items():
            place = workspace.placements[name]
            piece = self.memory[place.offset : place.offset + 4 * rows[buffer.rows] * buffer.width]
            kind = np.int32 if buffer.dtype is DType.I32 else np.float32
            self.buffers[name] = piece.view(kind).reshape(rows[buffer.rows], buffer.width)
        self._kinds = {n: b.rows for n, b in touched.items()}
        self._chunks = {kind: np.zeros(len(chunks_of(count)), dtype=np.int64) for kind, count in rows.items()}
        threads, longest = self._workers.count, self._max_len
        places = Places(self.buffers, self._step, self._chunks, threads, max(tokens, samples), longest)
        stages: list[list[Call] | Op] = []
        for op in self._program.ops:
            calls = lower(op, self._kernels, places)
            if calls is None:
                stages.append(op)
            elif stages and isinstance(stages[-1], list):
                stages[-1].extend(calls)
            else:
                stages.append(calls)
        self._places = places  # keeps the arrays behind the addresses
        flat = [call for stage in stages if isinstance(stage, list) for call in stage]
        self._lines = np.zeros((max(1, len(flat)), LINE), dtype=np.int64)
        self._arguments: list[Ints] = []
        self.stages = [self._compiled(s) if isinstance(s, list) else s for s in stages]

    def _compiled(self, calls: Sequence[Call]) -> Compiled:
        entries = [len(calls)]
        for call in calls:
            line = self._lines[len(self._arguments)].ctypes.data
            slots = np.array([_slot(a) for a in (*call.arguments, line)], dtype=np.int64)
            self._arguments.append(slots)
            entries += [self._library.address(call.kernel), slots.ctypes.data, line]
        return Compiled(np.array(entries, dtype=np.int64))

    def begin(self, step: Step) -> None:
        """Tells the kernels of the step."""
        self.reserve(len(step.tokens), len(step.rows))
        sequence = np.repeat(np.arange(len(step.query_lens), dtype=np.int64), step.query_lens)
        arrays: list[NDArray[Any]] = [
            np.ascontiguousarray(step.tokens, dtype=np.int32),
            np.ascontiguousarray(step.positions, dtype=np.int64),
            np.ascontiguousarray(step.places, dtype=np.int64),
            np.ascontiguousarray(step.tables, dtype=np.int32),
        ]
        wanted = np.ascontiguousarray(step.rows, dtype=np.int64)
        self._held = [*arrays, sequence, wanted]
        self._step[:9] = [
            len(step.tokens), len(step.rows), *(a.ctypes.data for a in arrays), step.tables.shape[1],
            sequence.ctypes.data, wanted.ctypes.data,
        ]  # fmt: skip
        for kind, count in (("tokens", len(step.tokens)), ("samples", len(step.rows))):
            chunks = chunks_of(count)
            self._chunks[kind][: len(chunks)] = chunks
        self._lines[:] = 0

    def views(self, step: Step) -> dict[str, NDArray[Any]]:
        """The buffers, as long as the step's rows."""
        rows = {"tokens": len(step.tokens), "samples": len(step.rows)}
        return {name: array[: rows[self._kinds[name]]] for name, array in self.buffers.items()}

    def run(self, stage: Compiled) -> None:
        """Runs a list of kernels on all threads."""
        address, threads = stage.entries.ctypes.data, self._workers.count
        self._workers.each(threads, lambda thread: self._run(address, thread, threads))


def chunks_of(rows: int) -> list[int]:
    """The rows of a product that have no experts as chunks, about equally long (see `slots`)."""
    count = -(-rows // BLOCK_ROWS)
    size = -(-rows // max(1, count))
    chunks = ([0, first, min(size, rows - first)] for first in range(0, rows, max(1, size)))
    return [count, rows, *(number for chunk in chunks for number in chunk)]


def _slot(argument: Any) -> int:
    """An argument as 8 bytes: an address, a number, or a float32 in the lower half."""
    if isinstance(argument, float):
        return int(struct.unpack("<q", struct.pack("<fi", argument, 0))[0])
    return int(argument)
