"""Schemas, grammars and patterns that crash, hang or fill native compilers: a 400 for their sender alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import select
import socket
import threading
import time
from typing import Any

import pytest

from rvllm.errors import LimitError
from rvllm.text.worker import tasks
from rvllm.text.worker.pool import WorkerPool
from support.clients.attacker import POST, Server
from support.clients.grammar_attacks import ATTACKS, gbnf


@pytest.mark.parametrize("name", ATTACKS)
def test_a_grammar_hurts_nobody_else(server: Server, name: str) -> None:
    path, body = ATTACKS[name]
    others: list[int] = []

    def neighbour() -> None:
        others.append(server.complete(max_tokens=20)[0])

    thread = threading.Thread(target=neighbour)
    thread.start()
    status, answer = server.ask("POST", path, body, 60)
    thread.join()
    assert others == [200]
    assert status in (200, 400), answer[:300]
    if status == 400:
        assert len(json.loads(answer)["error"]["message"]) < 2000


def ask_slowly(server: Server, number: int, address: str = "127.0.0.1") -> socket.socket:
    """A request with a slow grammar of its own, from this address; nothing of the answer is read."""
    body = {"prompt": "x", "max_tokens": 1, "guided_grammar": gbnf(1900, f'"{number}"')}
    data = json.dumps(body).encode()
    sock = socket.create_connection(("127.0.0.1", server.port), source_address=(address, 0))
    sock.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(data) + data)
    return sock


def test_clients_that_leave_take_their_work_along(server: Server) -> None:
    """Six slow grammars whose clients hang up leave the workers to everybody else."""

    def others() -> float:
        before = time.monotonic()
        assert server.complete(60, prompt="word " * 1500)[0] == 200
        assert server.complete(60, guided_choice=["yes", "no"])[0] == 200
        return time.monotonic() - before

    usual = others()
    socks = [ask_slowly(server, i) for i in range(6)]
    time.sleep(0.3)
    for sock in socks:
        sock.close()
    assert others() < 4 + 3 * usual


@pytest.mark.parametrize(("error", "asked"), [(TimeoutError(), 1), (EOFError(), 2)])
def test_a_task_gets_its_time_once(error: Exception, asked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not again in a fresh worker, as a task whose idle worker had died before."""
    pool = WorkerPool("nothing", count=2, seconds=1.0, memory=1 << 20)
    calls: list[object] = []

    async def ask(worker: object, *_: object) -> object:
        calls.append(worker)
        raise error

    async def take(*_: object) -> tuple[str, bool]:
        return "worker", True

    async def fork() -> str:
        return "fresh"

    for name, double in (("_ask", ask), ("_take", take), ("_fork", fork), ("_kill", lambda worker: None)):
        monkeypatch.setattr(pool, name, double)
    with pytest.raises(LimitError):
        asyncio.run(pool.run(tasks.encode, "prompt", 1, "a", True, None))
    assert len(calls) == asked


def test_clients_that_stay_leave_workers_to_others(server: Server) -> None:
    """Slow grammars of one client: another's long prompt does not wait, its own grammar for one of them."""
    with contextlib.ExitStack() as stack:
        socks = [ask_slowly(server, i, "127.0.0.2") for i in range(8)]
        for sock in socks:
            stack.enter_context(sock)
        time.sleep(0.5)
        assert server.complete(60, prompt="word " * 1500)[0] == 200
        assert len(select.select(socks, [], [], 0)[0]) < 4
        assert server.complete(60, guided_choice=["yes", "no"])[0] == 200
        assert len(select.select(socks, [], [], 0)[0]) < 7


def test_bad_words_are_tokenised_beside_the_event_loop(server: Server) -> None:
    """A prompt each for the same 256 long words: the loop would stand still for seconds."""
    words = ["".join(random.Random(i).choices("abcdefghijkl", k=1000)) for i in range(256)]
    status, answer = server.complete(prompt=["x"] * 8, bad_words=words)
    assert status == 400 and "bad_words have more than 8192 tokens" in answer["error"]["message"]
    for wrong in ([""], [" "], ["x", 5], "x", ["x"] * 300):
        assert server.complete(bad_words=wrong)[0] == 400
    assert server.complete(bad_words=["hello", "the world", "\ufffd"])[0] == 200


@pytest.mark.parametrize("name", ["self", "messages", "range", "loop", "namespace", "class", "\0", "a b", ""])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_no_variable_of_a_template_breaks_it(server: Server, name: str, path: str) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}
    if "chat" in path:
        body["max_tokens"] = 2
    body["chat_template_kwargs"] = {name: {"x": [1]}}
    assert server.ask("POST", path, body)[0] in (200, 400)


ODD = [
    {"role": "user", "content": "a", "type": ["message"]}, {"role": ["user"], "content": "a"}, {"type": 5},
    {"type": "function_call", "call_id": ["a"], "name": ["f"], "arguments": "{}"}, {"type": {"a": 1}},
    {"type": "function_call_output", "call_id": {"a": 1}, "output": "x"}, {"id": ["x"], "role": "user"},
]  # fmt: skip


@pytest.mark.parametrize("item", ODD, ids=str)
def test_items_of_odd_types_are_refused(server: Server, item: dict[str, Any]) -> None:
    assert server.ask("POST", "/v1/responses", {"input": [item]})[0] == 400
    assert server.ask("POST", "/v1/conversations", {"items": [item]})[0] == 400
