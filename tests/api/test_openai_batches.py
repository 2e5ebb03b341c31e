"""`/v1/files` and `/v1/batches` with the official client, and what a kill in the middle leaves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from rvllm.api.batches.store import Batch, BatchStore
from rvllm.api.generate.job import BATCH_PRIORITY as PRIORITY
from rvllm.api.http.errors import ApiError
from rvllm.api.http.multipart import Form
from rvllm.errors import UsageError
from support.clients.batches import chat_line, completed, ended, jsonl, results, run, start
from support.doubles.server import LiveServer
from support.waiting import until


def test_files(client: openai.OpenAI) -> None:
    data = bytes(range(256)) * 5000 + b"\r\n--end"
    made = client.files.create(file=("über/../a b.bin", data), purpose="user_data",
                               expires_after={"anchor": "created_at", "seconds": 3600})  # fmt: skip
    assert (made.bytes, made.purpose, made.status) == (len(data), "user_data", "processed")
    assert made.filename == "a b.bin" and made.expires_at == made.created_at + 3600
    assert client.files.content(made.id).content == data
    assert client.files.retrieve(made.id) == made
    assert made.id in [entry.id for entry in client.files.list(purpose="user_data")]
    assert made.id not in [entry.id for entry in client.files.list(purpose="batch")]
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(made.id)
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.files.create(file=("a", b"b"), purpose="fine-tune")


def test_a_batch(client: openai.OpenAI, server: LiveServer) -> None:
    lines = [chat_line(f"line {i}") for i in range(30)]
    lines.insert(7, chat_line("wrong", temperature=-1))
    found = run(client, *lines[:20], "", *lines[20:])
    assert found.status == "completed" and found.metadata == {"who": "me"}
    counts = found.request_counts
    assert (counts.total, counts.completed, counts.failed) == (31, 30, 1)
    answers = results(client, found.output_file_id)
    assert [entry["custom_id"] for entry in answers] == [f"line {i}" for i in range(30)]
    for entry in answers:
        assert entry["response"]["status_code"] == 200 and entry["error"] is None
        message = entry["response"]["body"]["choices"][0]["message"]
        assert message["content"] == server.tokenizer.decode(server.engine.answer[:3])
    [wrong] = results(client, found.error_file_id)
    assert wrong["custom_id"] == "wrong" and wrong["response"]["status_code"] == 400
    assert wrong["response"]["body"]["error"]["param"] == "temperature"
    assert {request.priority for request in server.engine.requests[-30:]} == {PRIORITY}
    assert found.id in [batch.id for batch in client.batches.list(limit=1)]
    for limit in ("0", "101", "%2B5", "5_0", "1e1", "%D9%A3"):
        assert server.raw("GET", f"/v1/batches?limit={limit}")[0] == 400, limit
    assert client.files.retrieve(found.output_file_id).purpose == "batch_output"


def test_the_other_endpoints(client: openai.OpenAI, server: LiveServer) -> None:
    for url, body in (
        ("/v1/completions", {"prompt": "hello", "max_tokens": 2}),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 2}),
    ):
        found = run(client, {"custom_id": "a", "method": "POST", "url": url, "body": body}, url=url)
        [entry] = results(client, found.output_file_id)
        assert entry["response"]["status_code"] == 200, entry
    line = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"input": "hello"}}
    found = run(client, line, url="/v1/embeddings")
    [entry] = results(client, found.error_file_id)
    assert "gives no embeddings" in entry["response"]["body"]["error"]["message"]
    assert found.output_file_id is None


@pytest.mark.parametrize(
    ("lines", "code", "line"),
    [
        (["{"], "invalid_json_line", 1),
        ([chat_line("a"), {"custom_id": "b"}], "invalid_request", 2),
        ([chat_line("a"), chat_line("a")], "duplicate_custom_id", 2),
        ([{**chat_line("a"), "url": "/v1/completions"}], "invalid_url", 1),
        ([{**chat_line("a"), "method": "GET"}], "invalid_method", 1),
        ([chat_line("a", stream=True)], "invalid_request", 1),
        ([""], "empty_file", None),
    ],
)
def test_a_wrong_input_fails_before_anything_runs(
    client: openai.OpenAI, server: LiveServer, lines: list[Any], code: str, line: int | None
) -> None:
    before = len(server.engine.requests)
    found = run(client, *lines)
    assert found.status == "failed" and len(server.engine.requests) == before
    assert [(error.code, error.line) for error in found.errors.data] == [(code, line)]


def test_cancel_keeps_what_was_answered(client: openai.OpenAI, server: LiveServer) -> None:
    server.engine.pace = 0.01
    made = start(client, *(chat_line(f"{i}") for i in range(200)))
    until(lambda: completed(client, made) >= 3)
    assert client.batches.cancel(made).status == "cancelling"
    found = ended(client, made)
    assert found.status == "cancelled" and found.cancelled_at and found.cancelling_at
    kept = results(client, found.output_file_id)
    assert 3 <= len(kept) == found.request_counts.completed < 200
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        client.batches.cancel(made)
    assert not server.engine.open


def test_batches_leave_room_for_others(server: LiveServer, client: openai.OpenAI) -> None:
    server.engine.held = True
    made = start(client, *(chat_line(f"{i}") for i in range(50)))
    until(lambda: server.engine.open)
    time.sleep(0.05)
    assert len(server.engine.open) == 2  # half of the double's four sequences
    server.engine.held = False
    assert ended(client, made).request_counts.completed == 50


def test_mistakes_name_the_field(client: openai.OpenAI, server: LiveServer) -> None:
    file = client.files.create(file=jsonl(chat_line("a")), purpose="batch")
    right = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"}
    for name, value in (("input_file_id", "x"), ("endpoint", "/v1/x"), ("completion_window", "1h")):
        status, answer = server.post("/v1/batches", **{**right, name: value})
        assert (status, answer["error"]["param"]) == (400, name)
    assert server.raw("GET", "/v1/batches/none")[0] == 404


def test_uploads_are_bounded_and_pages_of_other_sites_cannot_send_them() -> None:
    def send(server: LiveServer, size: int, **headers: str) -> int:
        body = (b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\n'
                b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"a" * size
                + b"\r\n--x--\r\n")  # fmt: skip
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        return server.raw("POST", "/v1/files", body, kind | headers)[0]

    with LiveServer(max_file_mb=0.01, files_max_mb=0.015, drain_timeout=0.2) as server:
        assert send(server, 100, Origin="http://elsewhere.example") == 403
        assert send(server, 100, **{"Sec-Fetch-Site": "cross-site"}) == 403
        assert send(server, 20_000) == 413
        assert send(server, 9_000, Origin=server.url) == 200
        assert send(server, 9_000) == 400
        assert server.post("/v1/files", purpose="batch")[0] == 415


class Kept:
    """Keeps a form's file in memory."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data

    def discard(self) -> None:
        self.data = b""


def read_form(body: bytes, kind: bytes, step: int) -> Form:
    form = Form(kind, Kept)
    for at in range(0, len(body), step):
        form.feed(body[at : at + step])
    form.finish()
    return form


FORM, BOUNDARY = b'Content-Disposition: form-data; name="', b"multipart/form-data; boundary=b"


@pytest.mark.parametrize("step", [1, 7, 1 << 16])
def test_forms(step: int) -> None:
    """As browsers and Python's httpx write them, in chunks of any size."""
    fields = {"purpose": "batch", "": "nameless", "two": "one\r\ntwo\r\n--c"}
    content = bytes(range(256)) * 40 + b"\r\n--bb"
    sent = httpx.Request("POST", "http://a/", data=fields, files={"file": ('a"\\/b.jsonl', content)})
    form = read_form(sent.read(), sent.headers["content-type"].encode(), step)
    assert {k: v.decode() for k, v in form.fields.items()} == fields
    assert isinstance(form.file, Kept) and form.file.data == content
    assert (form.file_field, form.filename) == ("file", "b.jsonl")


@pytest.mark.parametrize("step", [1, 1 << 16])
@pytest.mark.parametrize(
    ("body", "kind", "what"),
    [
        (b"--b\r\n" + FORM + b'a"\r\n\r\none\r\n--b--', b"multipart/form-data", "boundary"),
        (b"--b\r\n" + FORM + b'a"\r\n\r\none', BOUNDARY, "cut off"),
        (b"", BOUNDARY, "cut off"),
        (b"", BOUNDARY + b"b" * 69, "cut off"),  # RFC 2046: no more than 70 characters
        (b"", BOUNDARY + b"b" * 70, "names no boundary"),
        (b"--b\r\nX: y\r\n\r\none\r\n--b--", BOUNDARY, "no name"),
        (b"--b\r\n" * 100 + b"--b--", BOUNDARY, "cannot be read"),
        ((b"--b\r\n" + FORM + b'a"\r\n\r\none\r\n') * 33 + b"--b--\r\n", BOUNDARY, "more than 32"),
        (b"--b\r\n" + FORM + b"a" * 9000 + b'"\r\n\r\none\r\n--b--\r\n', BOUNDARY, "header"),
        (b"--b\r\n" + FORM + b'a"\r\n\r\n' + b"x" * 70_000, BOUNDARY, "field"),
        ((b"--b\r\n" + FORM + b'a"; filename="f"\r\n\r\none\r\n') * 2, BOUNDARY, "more than one file"),
    ],
)
def test_what_is_no_form(body: bytes, kind: bytes, what: str, step: int) -> None:
    with pytest.raises(ApiError, match=what):
        read_form(body, kind, step)


def test_an_upload_is_never_held_whole(tmp_path: Path) -> None:
    """It lies on the disk as it comes, counted there, and is gone when the client is."""
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    with LiveServer(files_dir=str(tmp_path), max_inflight_mb=1, drain_timeout=0.2) as server:
        with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as client:
            client.sendall(b"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9000000\r\n"
                           b"Content-Type: multipart/form-data; boundary=x\r\n\r\n" + head)  # fmt: skip
            for _ in range(40):
                client.sendall(b"a" * 100_000)
            (part,) = until(
                lambda: [p for p in (tmp_path / "files").iterdir() if p.stat().st_size > 3_000_000]
            )
            assert part.name.endswith(".part")
        assert until(lambda: not list((tmp_path / "files").iterdir()))


def test_a_folder_belongs_to_one_server(tmp_path: Path) -> None:
    with LiveServer(files_dir=str(tmp_path), drain_timeout=0.2), pytest.raises(UsageError, match="another"):
        BatchStore(str(tmp_path), 10**9)


def test_the_end_of_a_batch_can_be_repeated(tmp_path: Path) -> None:
    store = BatchStore(str(tmp_path), 10**9)
    batch = Batch(id="batch_1", endpoint="/v1/x", input_file_id="f", completion_window="24h", created_at=0,
                  expires_at=0)  # fmt: skip
    store.put_batch(batch)
    for _ in range(2):
        store.add_result("batch_1", 2, False, b"second")
        store.add_result("batch_1", 1, False, b"first")
    store.add_result("batch_1", 1, True, b"again")
    (tmp_path / "files" / "file-batch_1-output").write_text("what a killed server left")
    store.finish_batch(batch, "completed")
    assert store.path(str(batch.output_file_id)).read_text() == "first\nsecond\n"
    assert batch.error_file_id is None and store.lines_done("batch_1") == {}
    store.close()
    assert [b.status for b in BatchStore(str(tmp_path), 10**9).batches()] == ["completed"]


TESTS = Path(__file__).parent.parent
SERVER = """
import sys, time
sys.path.insert(0, sys.argv[2])
from support.doubles.server import LiveServer
with LiveServer(files_dir=sys.argv[1], drain_timeout=0.1) as server:
    server.engine.pace = 0.004
    print(server.port, flush=True)
    sys.stdin.read()
"""


def test_killed_and_started_again_each_line_is_there_once(tmp_path: Path) -> None:
    def serve() -> tuple[subprocess.Popen[str], openai.OpenAI]:
        process = subprocess.Popen([sys.executable, "-c", SERVER, str(tmp_path), str(TESTS)], text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
        assert process.stdout is not None
        url = f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
        return process, openai.OpenAI(base_url=url, api_key="none", max_retries=0)

    lines = [chat_line(f"{i}") for i in range(150)]
    process, client = serve()
    made = start(client, *lines)
    for wanted in (30, 80):
        until(lambda: completed(client, made) >= wanted)  # noqa: B023
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process, client = serve()
        counts = client.batches.retrieve(made).request_counts
        assert counts is not None and counts.total == 150
    found = ended(client, made)
    assert found.status == "completed"
    assert (found.request_counts.completed, found.request_counts.failed) == (150, 0)
    assert [entry["custom_id"] for entry in results(client, found.output_file_id)] == [
        f"{i}" for i in range(150)
    ]
    process.communicate("", timeout=20)


def test_a_batch_whose_window_has_ended(
    client: openai.OpenAI, server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As OpenAI's guide has it: each line that is not done by then is an error `batch_expired`."""
    monkeypatch.setattr("rvllm.api.batches.endpoints.WINDOW_SECONDS", -10)
    asked = len(server.engine.requests)
    done = run(client, chat_line("a"), chat_line("b"))
    assert done.status == "expired" and done.expired_at and not done.completed_at
    assert (done.request_counts.completed, done.request_counts.failed) == (0, 2)
    assert [line["error"]["code"] for line in results(client, done.error_file_id)] == ["batch_expired"] * 2
    assert len(server.engine.requests) == asked
