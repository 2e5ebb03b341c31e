"""One live server for the tests of the protocol, and fresh ones where a test changes it."""

from collections.abc import Iterator

import pytest

from support.doubles.server import LiveServer


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer(drain_timeout=0.2) as live:
        yield live
