"""What the GPU's backends of whole texts share: metadata in, a graph, numbers out, and their books."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.base import LedgerLine, Limits, StepBatch
from rvllm.backends.cuda.device.driver import Event, Graph, Pinned
from rvllm.backends.cuda.device.graphs import GraphCache
from rvllm.backends.cuda.layout.addresses import Addresses
from rvllm.backends.cuda.loaded_model import Gpu
from rvllm.backends.heads import Head
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program
from rvllm.program.ops.encoder import Pool

F32 = NDArray[np.float32]
Sent = tuple[Graph, int]  # the graph of a step, and bytes of its metadata


@dataclass(frozen=True)
class PooledRows:
    """Where a step leaves its results: float32 vectors [S, width], and the rows [T, width] behind them."""

    vectors: int
    rows: int
    width: int
    dtype: DType  # of the rows


def pooled_rows(program: Program, at: Addresses) -> PooledRows:
    """The results of a program whose last op pools."""
    pool = next(op for op in reversed(program.ops) if isinstance(op, Pool))
    return PooledRows(at.buffers[pool.out.name], at.buffers[pool.x.name], pool.x.width, program.dtype)


class PoolingRunner(ABC):
    """A model on a GPU whose steps take texts as they are and leave a vector of each in one buffer."""

    _graphs: GraphCache

    def __init__(
        self, gpu: Gpu, limits: Limits, metadata: tuple[int, int], pooled: PooledRows, head: Head | None
    ) -> None:
        """metadata: address and bytes of a step's. head: computed on the host, from vectors or rows."""
        self._gpu, self._stream, self._ledger = gpu, gpu.stream, gpu.ledger()
        self.name, self.limits, self._head = gpu.facts.name, limits, head
        self._metadata_at, nbytes = metadata
        self._pooled = pooled
        self._metadata, self._out = Pinned(nbytes), Pinned(4 * limits.max_num_seqs * pooled.width)
        self._began, self._ended = Event(), Event()
        self._steps, self._texts, self._busy = 0, 0, 0.0

    def ledger(self) -> list[LedgerLine]:
        """Device memory line by line, and what the driver says is left."""
        return [*self._ledger, LedgerLine("free", self._gpu.device.free_memory()[0])]

    def embed(self, batch: StepBatch) -> F32:
        """See `Encoder.embed`. A classification head is computed on the host, from the pooled vectors."""
        vectors = self._read(batch, self._pooled.vectors, np.dtype(np.float32), len(batch.slots))
        return vectors if self._head is None else self._head(vectors)

    def embed_tokens(self, batch: StepBatch) -> list[F32]:
        pooled = self._pooled
        rows = self._read(batch, pooled.rows, pooled.dtype.numpy, batch.num_tokens)
        if self._head is not None:
            rows = self._head.of_tokens(rows)
        return np.split(rows, np.cumsum(batch.query_lens)[:-1])

    @abstractmethod
    def _send(self, batch: StepBatch) -> Sent:
        """Writes the step's metadata."""

    def _read(self, batch: StepBatch, address: int, dtype: np.dtype[Any], count: int) -> F32:
        """Runs the step and reads `count` rows at `address`, as many at a time as pinned memory holds."""
        graph, used = self._send(batch)
        self._stream.copy_to_device(self._metadata_at, self._metadata.address, used)
        self._began.record(self._stream)
        graph.launch(self._stream)
        self._ended.record(self._stream)
        width = self._pooled.width
        found, pitch = np.empty((count, width), np.float32), width * dtype.itemsize
        portion = len(self._out.array) // pitch
        for first in range(0, count, portion):
            part = found[first : first + portion]
            nbytes = len(part) * pitch
            self._stream.copy_to_host(self._out.address, address + first * pitch, nbytes)
            self._stream.sync()
            part[:] = self._out.array[:nbytes].view(dtype).reshape(len(part), width)
        self._steps += 1
        self._texts += len(batch.slots)
        self._busy += self._ended.seconds_since(self._began)
        return found

    def stats(self) -> dict[str, float]:
        """Steps, texts, device seconds and graphs."""
        return {
            "rvllm:backend_steps_total": self._steps,
            "rvllm:backend_texts_total": self._texts,
            "rvllm:backend_busy_seconds_total": self._busy,
            "rvllm:cuda_graphs": len(self._graphs),
            "rvllm:cuda_graph_capture_seconds_total": self._graphs.seconds,
        }

    def close(self) -> None:
        """Gives everything back."""
        self._stream.sync()
        self._graphs.close()
        for held in (self._metadata, self._out, self._began, self._ended):
            held.close()
        self._gpu.close()
