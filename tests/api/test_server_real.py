"""`rvllm serve` as a user runs it: a process, a real model, the official client, signals, and a soak."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from support.clients.served import Served
from support.models.fetched import model_path
from support.waiting import until

pytestmark = pytest.mark.models
HELLO = [{"role": "user", "content": "What is the capital of France?"}]


def serve(*flags: str) -> Served:
    model = ("--model", str(model_path("smollm2-135m")), "--served-model-name", "smol")
    return Served(*model, "--max-model-len", "1024", "--kv-cache-memory-gb", "0.08", *flags)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve() as made:
        yield made


def test_chat_completions_streams_and_errors(served: Served) -> None:
    with served.openai() as client:
        answer = client.chat.completions.create(model="smol", messages=HELLO, temperature=0, max_tokens=12)
        assert "Paris" in (answer.choices[0].message.content or "")
        stream = client.chat.completions.create(
            model="smol", messages=HELLO, temperature=0, max_tokens=12, stream=True
        )
        assert "".join(c.choices[0].delta.content or "" for c in stream) == answer.choices[0].message.content
        plain = client.completions.create(
            model="smol",
            prompt="The capital of France is",
            temperature=0,
            max_tokens=2,
            logprobs=3,
            echo=True,
        )
        assert plain.choices[0].text.startswith("The capital of France is Paris")
        with pytest.raises(openai.BadRequestError, match="1024"):
            client.completions.create(model="smol", prompt=[5] * 2000)


def test_the_same_seed_gives_the_same_tokens_whatever_runs_beside(served: Served) -> None:
    def ask(seed: int) -> str:
        with served.openai() as client:
            answer = client.chat.completions.create(
                model="smol", messages=HELLO, temperature=1.0, seed=seed, max_tokens=16
            )
        return answer.choices[0].message.content or ""

    alone = ask(7)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        together = list(pool.map(ask, [1, 7, 2, 7, 3, 4]))
    assert together[1] == together[3] == alone
    assert len(set(together)) > 1


def soak_request(port: int, seed: int) -> None:
    """One client: a good request, a malformed one, or one that goes away at some moment."""
    source = random.Random(seed)
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": f"{source.random()} " * source.randint(1, 10)}],
            "max_tokens": source.randint(1, 6),
            "stream": source.random() < 0.5,
            "n": source.choice([1, 1, 1, 3]),
            "ignore_eos": True,
            "temperature": source.choice([0, 1]),
        }
    ).encode()
    kind = source.choice(["whole", "leave", "leave", "leave", "broken", "broken", "cut"])
    if kind == "broken":
        place = source.randrange(len(body))
        body = body[:place] + source.randbytes(3) + body[place + 1 :]
    path = source.choice(["/v1/chat/completions"] * 3 + ["/v1/completions", "/tokenize"])
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    message = head.encode() + body
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        if kind == "cut":
            sock.sendall(message[: source.randrange(len(message))])
            return
        sock.sendall(message)
        if kind == "leave":
            sock.settimeout(source.random() * 0.3)
            with contextlib.suppress(TimeoutError):
                sock.recv(source.choice([1, 65536]))
            return
        if kind == "broken":  # what is broken may be the name of max_tokens, and the answer long
            sock.settimeout(2)
        try:
            answer = b"".join(iter(lambda: sock.recv(65536), b""))
        except TimeoutError:
            assert kind == "broken"
            return
    status = int(answer.split()[1])
    if kind == "whole" and path == "/v1/chat/completions":
        assert status == 200, answer[:300]
    assert status in (200, 400, 404), answer[:300]


def test_soak(served: Served) -> None:
    """200 requests with random disconnects and malformed bodies leave nothing behind."""
    with served.openai() as client:
        before = client.chat.completions.create(model="smol", messages=HELLO, temperature=0, max_tokens=8)
    used = []
    for part in range(5):
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            list(pool.map(soak_request, [served.port] * 40, range(part * 40, part * 40 + 40)))
        used.append(served.rss(served.process.pid, served.engine))
    until(lambda: served.metric("rvllm:kv_blocks_used") == 0)
    assert served.metric("vllm:num_requests_running") == 0
    assert served.metric("vllm:num_requests_waiting") == 0
    # The first parts touch the pages of the KV cache and of scratch arrays; after that memory must stay.
    assert used[4] < used[3] + 15, used
    with served.openai() as client:
        after = client.chat.completions.create(model="smol", messages=HELLO, temperature=0, max_tokens=8)
    assert after.choices[0].message.content == before.choices[0].message.content


def test_sigterm_drains(served: Served) -> None:
    """Runs last on the shared server, which it ends."""
    with served.openai() as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(
            client.chat.completions.create, model="smol", messages=HELLO, max_tokens=30,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        until(lambda: served.metric("vllm:num_requests_running"))
        engine = served.engine
        served.process.send_signal(signal.SIGTERM)
        answer = waiting.result(30)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 30
    assert served.process.wait(30) == 0, served.text()
    assert not Path(f"/proc/{engine}").exists()


def test_the_engines_death_turns_health_and_ends_the_server() -> None:
    with serve("--dead-engine-timeout", "1") as served:
        with served.openai() as client:
            stream = client.chat.completions.create(
                model="smol", messages=HELLO, max_tokens=500, stream=True, extra_body={"ignore_eos": True}
            )
            events = iter(stream)
            next(events)
            os.kill(served.engine, signal.SIGKILL)
            with pytest.raises(openai.APIError, match="SIGKILL"):
                list(events)
            with pytest.raises(openai.InternalServerError, match="SIGKILL"):
                client.chat.completions.create(model="smol", messages=HELLO)
        assert served.get("/health")[0] == 503
        assert served.process.wait(30) == 1


def test_a_taken_port_is_one_line(served: Served) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        found = subprocess.run(
            [sys.executable, "-m", "rvllm", "serve", "--port", str(port)],
            check=False,
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert found.returncode == 2
    assert found.stderr.strip() == (
        f"rvllm: cannot listen on 127.0.0.1 port {port}: address already in use; choose another with --port"
    )
