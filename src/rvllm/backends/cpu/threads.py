"""CPU threads: a small pool, and BLAS kept to the thread that calls it.

Work is split by us, not by BLAS, so that `--threads` means the same with every BLAS and no split ever
depends on the batch.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from itertools import count
from queue import SimpleQueue

import numpy as np

# The names under which OpenBLAS builds export their thread count, NumPy's own build first.
_SETTERS = ("scipy_openblas_set_num_threads64_", "openblas_set_num_threads64_", "openblas_set_num_threads")


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def single_threaded_blas() -> bool:
    """Keeps each OpenBLAS in the process to the calling thread; False where none was found."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split()[-1] for line in maps if "openblas" in line}
    except OSError:
        return False
    found = False
    for path in sorted(paths):
        library = ctypes.CDLL(path)
        setter = next((getattr(library, name) for name in _SETTERS if hasattr(library, name)), None)
        if setter is not None:
            setter(1)
            found = True
    return found


class Job:
    """Items 0 .. total - 1 of one parallel region, taken one at a time by whoever is free."""

    def __init__(self, total: int, work: Callable[[int], None]) -> None:
        self.total = total
        self.work = work
        self.next = count()
        self.done: SimpleQueue[int] = SimpleQueue()  # items that another thread finished
        self.failure: BaseException | None = None

    def take(self) -> int:
        """Works until no item is left; returns how many it took. After a failure items are only counted."""
        taken = 0
        while (item := next(self.next)) < self.total:
            taken += 1
            try:
                if self.failure is None:
                    self.work(item)
            except BaseException as error:
                self.failure = error
        return taken


class Workers:
    """Threads that help the calling one. A thread that the system lets wait holds up nobody but its item."""

    def __init__(self, threads: int) -> None:
        self.count = max(1, threads)
        self._inboxes: list[SimpleQueue[Job | None]] = [SimpleQueue() for _ in range(self.count - 1)]
        for inbox in self._inboxes:
            threading.Thread(target=self._serve, args=(inbox,), daemon=True, name="rvllm-cpu").start()

    @staticmethod
    def _serve(inbox: SimpleQueue[Job | None]) -> None:
        np.seterr(all="ignore")  # as `execute` has it in the calling thread; the setting is per thread
        while (job := inbox.get()) is not None:
            taken = job.take()
            if taken:
                job.done.put(taken)
            del job  # do not keep the arrays it holds alive while waiting

    def each(self, total: int, work: Callable[[int], None]) -> None:
        """work(i) for every i in 0 .. total - 1, side by side; waits for all and re-raises a failure."""
        if self.count == 1 or total < 2:
            for item in range(total):
                work(item)
            return
        job = Job(total, work)
        for inbox in self._inboxes[: total - 1]:
            inbox.put(job)
        left = total - job.take()
        while left:
            left -= job.done.get()
        if job.failure is not None:
            raise job.failure

    def close(self) -> None:
        for inbox in self._inboxes:
            inbox.put(None)
