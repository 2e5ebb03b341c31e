"""Load on servers that misbehave: each request ends, and one that was not answered whole has failed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rvllm.bench.load import Sent, Target, run
from rvllm.bench.race.server import end

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
PLAIN = HEAD + b"connection: close\r\n\r\n"
TEXT = b'data: {"choices": [{"text": "x", "finish_reason": null}], "usage": null}\n\n'
LAST = b'data: {"choices": [{"text": "y", "finish_reason": "length"}], "usage": null}\n\n'
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}\n\n'
DONE = b"data: [DONE]\n\n"


def chunks(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


def asked(answer: bytes, stall: float | None = 20.0, hang: bool = False) -> Sent:
    """What a client sees of a server that answers with these bytes, whatever it is asked."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        if hang:
            await reader.read()  # until the client has had enough
        writer.close()

    async def both() -> Sent:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            target = Target(f"http://127.0.0.1:{port}/v1/completions", stall=stall)
            (sent,) = await run(target, [{"prompt": "x"}], [1])
            return sent

    return asyncio.run(both())


@pytest.mark.parametrize(
    "answer",
    [
        CHUNKED + chunks(TEXT, LAST, USAGE, DONE, b""),
        CHUNKED + chunks(TEXT + LAST[:20], LAST[20:], USAGE, b""),
        PLAIN + TEXT + LAST + USAGE + DONE,
        PLAIN + TEXT + USAGE,
        PLAIN + TEXT + DONE,
    ],
    ids=["chunks", "cut lines", "to the end", "usage", "done"],
)
def test_whole_answers_are_whole(answer: bytes) -> None:
    sent = asked(answer)
    assert not sent.error and sent.text in ("x", "xy")
    assert USAGE not in answer or (sent.prompt_tokens, sent.output_tokens) == (3, 2)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (CHUNKED + chunks(TEXT), "the answer broke off"),
        (CHUNKED + chunks(TEXT, TEXT)[:-9], "the answer broke off"),
        (CHUNKED + chunks(TEXT, b""), "the answer broke off"),
        (PLAIN + TEXT, "the answer broke off"),
        (PLAIN + TEXT + LAST[:30], "Unterminated string"),
        (CHUNKED + b"zz\r\n", "invalid literal"),
        (PLAIN + b"data: 5\n\n", "not an event of the API: 5"),
        (PLAIN + b'data: {"choices": [3]}\n\n', "not an event of the API"),
        (PLAIN + b'data: {"choices": [{"text": 3}]}\n\n', "not an event of the API"),
        (PLAIN + TEXT + b'data: {"usage": {"tokens": 1}}\n\n', "not an event of the API"),
        (PLAIN + TEXT + b'data: {"error": "out of memory"}\n\n', "out of memory"),
        (PLAIN + b'data: {"error": {"message": "no such model"}}\n\n', "no such model"),
        (PLAIN + LAST.replace(b"y", b""), "no text came"),
        (b"HTTP/1.1 503 Busy\r\n\r\nlater", "503: later"),
        (b"", "no answer"),
    ],
)
def test_what_is_no_whole_answer_is_an_error(answer: bytes, error: str) -> None:
    assert error in asked(answer).error


@pytest.mark.parametrize("answer", [b"", CHUNKED, CHUNKED + chunks(TEXT)])
def test_a_server_that_stops_answering_does_not_stop_the_client(answer: bytes) -> None:
    assert asked(answer, stall=0.1, hang=True).error == "nothing came for 0.1 s"


def test_what_a_dead_server_has_started_is_ended_too() -> None:
    """Its engine, which would keep the GPU's memory from the next in turn."""
    code = "import subprocess; print(subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL).pid)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    left = Path(f"/proc/{process.communicate()[0].strip()}/stat")
    assert "sleep" in left.read_text()
    end(process)
    until = time.monotonic() + 20
    while left.exists() and left.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < until, "it still runs"
        time.sleep(0.01)
