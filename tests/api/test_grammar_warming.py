"""The vocabulary for grammars goes to the engine in an idle moment, or with the first grammar."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from support.doubles.server import LiveServer
from support.waiting import until


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveServer]:
    monkeypatch.setattr("rvllm.api.generate.generation.LOOK_SECONDS", 0.02)
    with LiveServer(drain_timeout=0.2) as live:
        yield live


def warming(server: LiveServer) -> Future[None]:
    return asyncio.run_coroutine_threadsafe(server.service.warm_grammars(), server.loop)


def test_it_waits_until_nothing_runs(server: LiveServer) -> None:
    server.engine.held = True
    asking = threading.Thread(target=server.chat, kwargs={"max_tokens": 2})
    asking.start()
    until(lambda: server.engine.open)
    done = warming(server)
    time.sleep(0.3)
    assert not done.done() and not server.engine.vocabularies
    server.engine.held = False
    done.result(10)
    asking.join(10)
    assert len(server.engine.vocabularies) == 1
    server.chat(max_tokens=2, guided_choice=["a"])
    assert len(server.engine.vocabularies) == 1


def test_the_first_grammar_does_not_wait_for_it(server: LiveServer) -> None:
    server.chat(max_tokens=2, guided_choice=["a"])
    assert len(server.engine.vocabularies) == 1
    warming(server).result(10)
    assert len(server.engine.vocabularies) == 1


def test_a_server_without_a_tokenizer_has_nothing_to_hand_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rvllm.api.generate.generation.LOOK_SECONDS", 0.02)
    with LiveServer(drain_timeout=0.2, texts=False) as server:
        warming(server).result(10)
        assert not server.engine.vocabularies
