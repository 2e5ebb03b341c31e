"""What the GPU's backends of whole texts share: metadata in, a graph, vectors out, and their books."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.base import LedgerLine, Limits
from rvllm.backends.cuda.device.driver import Event, Graph, Pinned
from rvllm.backends.cuda.loaded_model import Gpu
from rvllm.backends.heads import Head


class PoolingRunner:
    """A model on a GPU whose steps take texts as they are and leave a vector of each in one buffer."""

    def __init__(
        self, gpu: Gpu, limits: Limits, metadata: tuple[int, int], vectors: tuple[int, int], head: Head | None
    ) -> None:
        """metadata: address and bytes of a step's; vectors: address of the buffer, and float32 of a vector.
        head: computed on the host, from the vectors.
        """
        self._gpu, self._stream, self._ledger = gpu, gpu.stream, gpu.ledger()
        self._limits, self._head = limits, head
        self._metadata_at, nbytes = metadata
        self._vectors, self._width = vectors
        self._metadata, self._out = Pinned(nbytes), Pinned(4 * limits.max_num_seqs * self._width)
        self._began, self._ended = Event(), Event()
        self._steps, self._texts, self._busy = 0, 0, 0.0

    @property
    def name(self) -> str:
        """The GPU's name."""
        return self._gpu.facts.name

    @property
    def limits(self) -> Limits:
        """Capacities, fixed for the backend's life."""
        return self._limits

    def ledger(self) -> list[LedgerLine]:
        """Device memory line by line, and what the driver says is left."""
        return [*self._ledger, LedgerLine("free", self._gpu.device.free_memory()[0])]

    def _run(self, graph: Graph, used: int, count: int) -> NDArray[np.float32]:
        """Sends `used` bytes of metadata, launches, and waits for the vectors of `count` texts."""
        self._stream.copy_to_device(self._metadata_at, self._metadata.address, used)
        self._began.record(self._stream)
        graph.launch(self._stream)
        self._ended.record(self._stream)
        nbytes = 4 * count * self._width
        self._stream.copy_to_host(self._out.address, self._vectors, nbytes)
        self._stream.sync()
        self._steps += 1
        self._texts += count
        self._busy += self._ended.seconds_since(self._began)
        vectors = self._out.array[:nbytes].view(np.float32).reshape(count, self._width).copy()
        return vectors if self._head is None else self._head(vectors)

    def _counters(self) -> dict[str, float]:
        return {
            "rvllm:backend_steps_total": self._steps,
            "rvllm:backend_texts_total": self._texts,
            "rvllm:backend_busy_seconds_total": self._busy,
        }

    def _give_back(self) -> None:
        """Frees everything but the graphs, which go first."""
        for held in (self._metadata, self._out, self._began, self._ended):
            held.close()
        self._gpu.close()
