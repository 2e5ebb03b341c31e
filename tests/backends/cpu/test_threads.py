"""The thread pool: every item exactly once, failures reach the caller, and it stays usable."""

import threading
import time
import warnings

import numpy as np
import pytest

from rvllm.backends.cpu.threads import Workers, available_cores, single_threaded_blas


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_item_is_done_exactly_once(threads: int) -> None:
    workers = Workers(threads)
    for total in (0, 1, 2, 3, 100):
        for _ in range(20):
            counts = np.zeros(total, dtype=int)

            def work(item: int, counts: np.ndarray = counts) -> None:
                counts[item] += 1

            workers.each(total, work)
            assert (counts == 1).all()
    workers.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_failure_is_raised_and_the_pool_goes_on(threads: int) -> None:
    workers = Workers(threads)

    def fail(item: int) -> None:
        if item == 7:
            raise ZeroDivisionError("item seven")

    for _ in range(10):
        with pytest.raises(ZeroDivisionError, match="item seven"):
            workers.each(20, fail)
    done: list[int] = []
    workers.each(20, done.append)
    assert sorted(done) == list(range(20))
    workers.close()


def test_items_run_side_by_side() -> None:
    workers = Workers(2)
    threads: set[int] = set()

    def work(item: int) -> None:
        threads.add(threading.get_ident())
        time.sleep(0.02)

    workers.each(6, work)
    assert len(threads) == 2
    workers.close()


def test_helpers_do_not_warn_of_overflow() -> None:
    """exp(-x) overflows in silu by design; the steps run with such warnings off in every thread."""
    workers = Workers(2)
    big = np.full(100, 1000, dtype=np.float32)
    caller = threading.get_ident()

    def work(item: int) -> None:
        time.sleep(0.005)
        if threading.get_ident() != caller:
            np.exp(big)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        workers.each(20, work)
    workers.close()


def test_blas_is_held_to_the_calling_thread() -> None:
    assert available_cores() >= 1
    assert single_threaded_blas()  # NumPy's own build brings OpenBLAS
