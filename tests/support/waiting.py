"""Waiting for what happens elsewhere, for as long as a busy machine may take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

FoundT = TypeVar("FoundT")


def until(what: Callable[[], FoundT], seconds: float = 60.0, pause: float = 0.01) -> FoundT:
    """The first true value of `what`; an AssertionError when there is none in time."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, f"did not become true in {seconds:g} s"
        time.sleep(pause)
    return found
