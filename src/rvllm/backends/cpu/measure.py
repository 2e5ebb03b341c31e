"""How fast this machine is: the two rates a floor time is made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rvllm.backends.cpu.reference.gemm import product
from rvllm.backends.cpu.threads import Workers, available_cores, single_threaded_blas

STREAMED = 1 << 24  # float32 elements: 64 MB, beyond the caches


@dataclass(frozen=True)
class Rates:
    """Bytes a second from memory and floating-point operations a second."""

    bandwidth: float
    flops: float


def measure(threads: int | None = None) -> Rates:
    """Times a stream through memory and a product in cache, each the best of a few runs (about 0.1 s)."""
    single_threaded_blas()
    workers = Workers(threads or available_cores())
    stream = np.ones(STREAMED, dtype=np.float32)
    pieces = np.array_split(stream, 16)

    weight = np.ones((1024, 512), dtype=np.float32)
    x = np.ones((128, 512), dtype=np.float32)
    try:
        slow = min(
            _seconds(lambda: workers.each(len(pieces), lambda i: np.dot(pieces[i], pieces[i])))
            for _ in range(5)
        )
        fast = min(_seconds(lambda: product(x, weight, workers)) for _ in range(5))
    finally:
        workers.close()
    return Rates(bandwidth=stream.nbytes / slow, flops=2 * weight.size * len(x) / fast)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
