"""`rvllm trace` and the timing header, over a server with a double of the engine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from rvllm.cli.main import main
from support.doubles.server import LiveServer

PHASES = ["queue", "prefill", "decode", "detokenize", "stream", "total"]


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    with LiveServer(drain_timeout=0.2) as server:
        server.engine.pace = 0.02
        yield server


def ask(live: LiveServer, headers: dict[str, str], **body: object) -> tuple[dict[str, str], bytes]:
    asked = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, **body}
    status, answered, text = live.raw("POST", "/v1/chat/completions", json.dumps(asked).encode(), headers)
    assert status == 200
    return answered, text


def durations(line: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"(\w+);dur=([\d.]+)", line)}


def test_the_header_comes_when_asked_for(live: LiveServer) -> None:
    assert "x-rvllm-timing" not in ask(live, {})[0]
    found = durations(ask(live, {"x-rvllm-timing": "1"})[0]["x-rvllm-timing"])
    assert list(found) == PHASES
    assert 60 < found["decode"] < found["total"], "four gaps of 20 ms"
    assert found["queue"] + found["prefill"] + found["decode"] <= found["total"]


def test_a_stream_tells_at_its_end(live: LiveServer) -> None:
    headers, body = ask(live, {"x-rvllm-timing": "1"}, stream=True)
    assert set(durations(headers["x-rvllm-timing"])) >= {"queue", "prefill", "total"}
    comments = [line for line in body.decode().split("\n") if line.startswith(":")]
    assert len(comments) == 1 and list(durations(comments[0])) == PHASES
    assert body.endswith(b"data: [DONE]\n\n")
    assert not any(line.startswith(b":") for line in ask(live, {}, stream=True)[1].split(b"\n"))


def test_trace_by_each_id(live: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    _, body = ask(live, {"x-request-id": "mine"}, n=2)
    for id in ("mine", json.loads(body)["id"]):
        assert main(["trace", id, "--url", live.url]) == 0
        shown = capsys.readouterr().out
        assert "mine" in shown and "/v1/chat/completions" in shown and "5 generated, length" in shown
        assert shown.count("prefill") == 2 and shown.count("█") > 10


def test_the_chunks_of_a_long_prompt(live: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    live.engine.chunks = 3
    ask(live, {"x-request-id": "chunked"})
    live.engine.chunks = 0
    assert main(["trace", "chunked", "--url", live.url]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "prompt tokens in step" in line]
    assert [line.split()[-1] for line in lines] == ["0", "1", "2"]


def test_an_unknown_id_is_one_line(live: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "no/such", "--url", live.url]) == 1
    error = capsys.readouterr().err
    assert "404" in error and error.count("\n") == 1
