"""Times candidates on the GPU: graphs of launches over weights that no cache holds, in turns."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from statistics import median

from rvllm.backends.cuda.device.arena import Arena, aligned
from rvllm.backends.cuda.device.catalog import Catalog
from rvllm.backends.cuda.device.driver import Event, Graph, Launch, Stream
from rvllm.backends.cuda.device.graphs import capture
from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.device.launches import Counts
from rvllm.backends.cuda.ops.gemm.cublas import WORKSPACE
from rvllm.backends.cuda.ops.gemm.plan import packed_nbytes, segments_of
from rvllm.backends.cuda.ops.gemm.sm80 import most_partial_bytes
from rvllm.backends.cuda.ops.gemm.strategy import ProductShape
from rvllm.backends.cuda.tuning.candidates import Candidate, Places, launch_of, tokens_of

PASSED_OVER = 128 << 20  # bytes of weights that a replay reads: more than the L2 of any GPU
MAX_LAUNCHES = 64  # of a replay
FILL_THREADS = 256


def fill_kernel(tag: str) -> str:
    """The kernel that random numbers come from: zeros draw less power, and are faster than any weights."""
    return f"sm80_{tag}_fill_random"


class GemmTimer:
    """Memory for the largest of some products, filled with random numbers; to be closed."""

    def __init__(
        self, catalog: Catalog, stream: Stream, chip: DeviceInfo, tag: str, shapes: Sequence[ProductShape]
    ) -> None:
        """Raises CapacityError where the GPU has not the memory."""
        self._catalog, self._stream, self._chip, self._tag = catalog, stream, chip, tag
        weights = max(PASSED_OVER + packed_nbytes(s.rows, s.width) for s in shapes)
        inputs = max(2 * tokens_of(s)[-1] * s.width for s in shapes)
        outputs = max(4 * tokens_of(s)[-1] * (s.rows + 8) for s in shapes)
        partials = max(most_partial_bytes(s.rows, segments_of(s.rows, s.width)) for s in shapes)
        sizes = {
            "weights": weights,
            "x": inputs,
            "out": outputs,
            "workspace": WORKSPACE,
            "partials": partials if chip.capability != 90 else 0,
        }
        self._arena = Arena(sum(aligned(nbytes) for nbytes in sizes.values()))
        self._at = {name: self._arena.take(name, nbytes).address for name, nbytes in sizes.items()}
        for seed, name in enumerate(("weights", "x"), start=1):
            self._fill(self._at[name], sizes[name], seed, 0.02 if name == "weights" else 1.0)
        if sizes["partials"]:  # counters that a split product finds zero, and leaves so
            stream.fill_bytes(self._at["partials"], 0, sizes["partials"])
        stream.sync()

    def __call__(
        self, shape: ProductShape, tokens: int, candidates: Sequence[Candidate], rounds: int
    ) -> Mapping[Candidate, float]:
        """Microseconds of one product by each candidate: medians of turns, so that all meet like clocks."""
        nbytes = packed_nbytes(shape.rows, shape.width)
        count = min(MAX_LAUNCHES, max(1, PASSED_OVER // nbytes)) + 1
        graphs = {c: self._graph(shape, tokens, c, count, nbytes) for c in candidates}
        times: dict[Candidate, list[float]] = {c: [] for c in candidates}
        began, ended = Event(), Event()
        try:
            for turn in range(rounds + 1):
                for candidate, graph in graphs.items():
                    began.record(self._stream)
                    graph.launch(self._stream)
                    ended.record(self._stream)
                    ended.wait()
                    if turn:  # the first warms up
                        times[candidate].append(ended.seconds_since(began) / count * 1e6)
        finally:
            for graph in graphs.values():
                graph.close()
            began.close()
            ended.close()
        return {candidate: median(found) for candidate, found in times.items()}

    def _graph(
        self, shape: ProductShape, tokens: int, candidate: Candidate, count: int, nbytes: int
    ) -> Graph:
        """Launches over `count` weights, one behind the other; no two in a row share theirs."""
        room = max(1, PASSED_OVER // nbytes + 1)
        at = self._at
        planned = [
            launch_of(
                shape, tokens, candidate, self._tag, self._chip,
                Places(
                    at["x"], at["weights"] + i % room * nbytes, at["out"], at["workspace"], at["partials"]
                ),
            )
            for i in range(count)
        ]  # fmt: skip
        pdl = self._chip.capability >= 90
        return capture(planned, self._catalog, self._stream, Counts(tokens, tokens, tokens), pdl)

    def _fill(self, address: int, nbytes: int, seed: int, deviation: float) -> None:
        arguments = [
            address, ctypes.c_uint64(nbytes // 16 * 8), ctypes.c_uint64(0), ctypes.c_uint(seed),
            ctypes.c_float(0.0), ctypes.c_float(deviation),
        ]  # fmt: skip
        function = self._catalog[fill_kernel(self._tag)]
        Launch(function, FILL_THREADS, 0, arguments, pdl=False).run(self._stream, (132 * 8, 1, 1))

    def close(self) -> None:
        """Gives the memory back."""
        self._stream.sync()
        self._arena.close()
