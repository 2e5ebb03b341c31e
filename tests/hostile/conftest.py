"""One real server for all attacks that leave it as it was: every test ends by asking whether it is."""

from collections.abc import Iterator

import pytest

from support.clients.attacker import Server


@pytest.fixture(scope="session")
def shared_server() -> Iterator[Server]:
    with Server("--worker-timeout", "2", "--max-body-mb", "4") as server:
        yield server
        assert "Traceback" not in server.text()
        assert server.end() == 0


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """After an attack the same processes answer as before, and hold no more memory."""
    pids = (shared_server.process.pid, shared_server.engine)
    yield shared_server
    status, answer = shared_server.complete()
    assert status == 200 and answer["usage"]["completion_tokens"] == 3
    assert (shared_server.process.pid, shared_server.engine) == pids and shared_server.process.poll() is None
    assert shared_server.rss() < 400
