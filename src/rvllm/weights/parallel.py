"""Rows of a tensor shared out to threads: NumPy gives up the interpreter's lock while it works on a piece."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="weights")


def in_threads(work: Callable[[int, int], None], rows: int, step: int) -> None:
    """work(start, stop) over all rows, in pieces of `step`; the first error is raised.

    Not to be called by `work` itself: the threads would wait for each other.
    """
    if rows <= step:
        work(0, rows)
        return
    pool = _pool()
    tasks: list[Future[None]] = [pool.submit(work, s, min(s + step, rows)) for s in range(0, rows, step)]
    for task in tasks:
        task.result()
