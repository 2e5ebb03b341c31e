"""CPU threads: a small fork-join pool, and BLAS kept to the thread that calls it.

Work is split by us, not by BLAS, so that `--threads` means the same with every BLAS and no split ever
depends on the batch.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from queue import SimpleQueue

Task = Callable[[], None]

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


class Workers:
    """Runs the tasks of one parallel region; the caller takes the first share itself."""

    def __init__(self, count: int) -> None:
        self.count = max(1, count)
        self._inboxes: list[SimpleQueue[Task | None]] = [SimpleQueue() for _ in range(self.count - 1)]
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        for inbox in self._inboxes:
            threading.Thread(target=self._serve, args=(inbox,), daemon=True, name="rvllm-cpu").start()

    def _serve(self, inbox: SimpleQueue[Task | None]) -> None:
        while (task := inbox.get()) is not None:
            try:
                task()
            except BaseException as error:
                self._done.put(error)
            else:
                self._done.put(None)
            del task  # do not keep the arrays it holds alive while waiting

    def run(self, tasks: Sequence[Task]) -> None:
        """Runs up to `count` tasks side by side and returns when all are done; re-raises a failure."""
        for inbox, task in zip(self._inboxes, tasks[1:], strict=False):
            inbox.put(task)
        failure: BaseException | None = None
        try:
            for task in (*tasks[:1], *tasks[self.count :]):
                task()
        except BaseException as error:
            failure = error
        for _ in range(min(len(tasks), self.count) - 1):
            failure = self._done.get() or failure
        if failure is not None:
            raise failure

    def split(self, total: int, work: Callable[[int, int], None]) -> None:
        """work(low, high) over `count` nearly equal ranges of 0 .. total - 1."""
        shares = min(self.count, total)
        bounds = [total * i // shares for i in range(shares + 1)] if shares else []
        self.run([lambda a=a, b=b: work(a, b) for a, b in pairwise(bounds)])  # type: ignore[misc]

    def close(self) -> None:
        """Ends the threads."""
        for inbox in self._inboxes:
            inbox.put(None)
