"""Planned launches as CUDA graphs: captured on first use, kept by what they are for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from rvllm.backends.cuda.device.catalog import Catalog
from rvllm.backends.cuda.device.driver import Graph, Stream
from rvllm.backends.cuda.device.launches import Counts, Planned, bind
from rvllm.telemetry.stats import StepKernel, grouped

Key = tuple[str, int]  # kind of step, padded size


def capture(planned: Sequence[Planned], catalog: Catalog, stream: Stream, counts: Counts, pdl: bool) -> Graph:
    """A graph of these launches. pdl: each may begin before the one before it has ended."""
    bound = bind(planned, catalog, pdl=pdl)
    stream.begin_capture()
    bound.run(stream, counts)
    return stream.end_capture()


class GraphCache:
    """Graphs by kind and padded size, each with its kernels; `seconds` is what capturing them took."""

    def __init__(self, catalog: Catalog, stream: Stream) -> None:
        self._catalog, self._stream = catalog, stream
        self._graphs: dict[Key, Graph] = {}
        self._kernels: dict[Key, list[StepKernel]] = {}
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self._graphs)

    def __contains__(self, key: Key) -> bool:
        return key in self._graphs

    def __iter__(self) -> Iterator[Key]:
        return iter(self._graphs)

    def get(self, kind: str, size: int, plan: Callable[[int], list[Planned]], counts: Counts) -> Graph:
        """The graph of such a step; where there is none yet, of what `plan(size)` lists for `counts` rows."""
        graph = self._graphs.get((kind, size))
        if graph is None:
            started = time.perf_counter()
            planned = plan(size)
            self._kernels[kind, size] = grouped((p.op, p.kernel, p.why) for p in planned)
            pdl = self._catalog.capability >= 90
            graph = capture(planned, self._catalog, self._stream, counts, pdl)
            self._graphs[kind, size] = graph
            self.seconds += time.perf_counter() - started
        return graph

    def kernels(self, key: Key) -> list[StepKernel]:
        """The kernels of a graph, in the order of first use; none where there is no such graph."""
        return self._kernels.get(key, [])

    def close(self) -> None:
        for graph in self._graphs.values():
            graph.close()
