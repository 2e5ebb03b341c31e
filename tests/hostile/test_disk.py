"""Full disks, other users, what kills leave, and batches that end servers."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import sqlite3
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from rvllm.api.batches.endpoints import MAX_TRIES
from rvllm.api.batches.files import Upload
from rvllm.api.batches.store import Batch, BatchStore, FileEntry
from rvllm.api.disk import TemporaryFolder, is_full, sweep, write_whole
from rvllm.api.http.errors import ApiError
from rvllm.api.responses.store import Conversation, ResponseStore
from support.doubles.server import LiveServer


def full(*_: object) -> None:
    raise sqlite3.OperationalError("database or disk is full")


def form(data: bytes, purpose: str = "batch") -> bytes:
    parts = [b'name="purpose"\r\n\r\n' + purpose.encode(), b'name="file"; filename="a.jsonl"\r\n\r\n' + data]
    body = b"".join(b"--b\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts)
    return body + b"--b--\r\n"


def upload(server: LiveServer, data: bytes) -> tuple[int, Any]:
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    status, _, answer = server.raw("POST", "/v1/files", form(data), kind)
    return status, json.loads(answer)


def line(i: int, **body: Any) -> bytes:
    full = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, **body}
    entry = {"custom_id": f"{i}", "method": "POST", "url": "/v1/chat/completions", "body": full}
    return json.dumps(entry).encode()


def batch_of(server: LiveServer, data: bytes) -> str:
    status, file = upload(server, data)
    assert status == 200
    asked = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    status, made = server.post("/v1/batches", **asked)
    assert status == 200
    return str(made["id"])


def kept(store: BatchStore, name: str, purpose: str, data: bytes) -> FileEntry:
    upload = Upload(store)
    try:
        upload.write(data)
        return upload.keep(name, purpose, None)
    finally:
        upload.discard()


def ended(server: LiveServer, name: str, seconds: float = 30) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = json.loads(server.raw("GET", f"/v1/batches/{name}")[2])
        if found["status"] in ("completed", "failed", "cancelled"):
            return found
        time.sleep(0.02)
    raise AssertionError(found)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (line(1, stop=[[0]] * 400_000), "invalid_request"),
        (b"\n" * 200_000 + line(1), "too_many_lines"),
    ],
    ids=["lists", "empty lines"],
)
def test_a_file_that_is_made_to_keep_the_loop_busy(data: bytes, code: str, tmp_path: Path) -> None:
    with LiveServer(files_dir=str(tmp_path), drain_timeout=0.2) as server:
        found = ended(server, batch_of(server, data))
        assert found["status"] == "failed"
        assert found["errors"]["data"][0]["code"] == code


@pytest.mark.parametrize("where", ["rvllm.api.disk.os.fsync", "rvllm.api.batches.files.Upload.write"])
def test_an_upload_to_a_full_disk_leaves_nothing(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LiveServer(files_dir=str(tmp_path), drain_timeout=0.2) as server:

        def no_space(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(where, no_space)
            status, answer = upload(server, b"x" * 100_000)
            assert status == 507 and answer["error"]["code"] == "storage_full"
            assert list((tmp_path / "files").iterdir()) == []
            assert json.loads(server.raw("GET", "/v1/files")[2])["data"] == []
        assert upload(server, b"x")[0] == 200


def test_a_batch_waits_for_room_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rvllm.api.batches.endpoints.ROOM_SECONDS", 0.05)
    keep, refused = BatchStore.add_result, [0]

    def sometimes(self: BatchStore, *args: Any) -> None:
        refused[0] += 1
        if refused[0] % 3:
            full()
        keep(self, *args)

    monkeypatch.setattr(BatchStore, "add_result", sometimes)
    with LiveServer(files_dir=str(tmp_path), drain_timeout=0.2) as server:
        found = ended(server, batch_of(server, b"\n".join(line(i) for i in range(9))))
        assert found["request_counts"] == {"total": 9, "completed": 9, "failed": 0} and refused[0] >= 27
        output = server.raw("GET", f"/v1/files/{found['output_file_id']}/content")[2]
        assert len(output.splitlines()) == 9


def test_a_batch_that_was_refused_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LiveServer(files_dir=str(tmp_path), drain_timeout=0.2) as server:
        file = upload(server, line(1))[1]
        with monkeypatch.context() as patch:
            patch.setattr(BatchStore, "put_batch", full)
            status, _ = server.post("/v1/batches", input_file_id=file["id"], completion_window="24h",
                                    endpoint="/v1/chat/completions")  # fmt: skip
        assert status == 507
        assert json.loads(server.raw("GET", "/v1/batches")[2])["data"] == [] and not server.engine.requests


def test_a_response_is_told_before_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ResponseStore, "put", full)
    with LiveServer(drain_timeout=0.2) as server:
        status, answer = server.post("/v1/responses", input="hello", max_output_tokens=3)
        assert status == 200 and answer["store"] is False
        body = json.dumps({"input": "hello", "max_output_tokens": 3, "stream": True}).encode()
        text = server.raw("POST", "/v1/responses", body)[2].decode()
        last = [x for x in text.splitlines() if x.startswith("event: ")][-1]
        assert last in ("event: response.completed", "event: response.incomplete")


def test_nobody_else_reads_what_is_kept(tmp_path: Path) -> None:
    os.umask(0o022)
    (tmp_path / "files-dir").mkdir(mode=0o755)
    database = tmp_path / "responses.db"
    with LiveServer(files_dir=str(tmp_path / "files-dir"), responses_db=str(database)) as server:
        assert upload(server, b"x")[0] == 200
        assert server.post("/v1/responses", input="hello", max_output_tokens=3)[0] == 200
        kept = [
            database,
            Path(f"{database}-wal"),
            *(tmp_path / "files-dir").rglob("*"),
            tmp_path / "files-dir",
        ]
        assert len(kept) >= 6
        for path in kept:
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode == (0o700 if path.is_dir() else 0o600), (path, oct(mode))


def test_everything_kept_is_counted(tmp_path: Path) -> None:
    store = BatchStore(str(tmp_path), 50_000)
    with pytest.raises(ApiError, match="no room"):  # empty files with long names
        for _ in range(200):
            kept(store, "n" * 255, "user_data", b"")
    store.close()
    responses = ResponseStore(":memory:", 0, 50_000)
    for i in range(400):  # conversations without items
        responses.put_conversation(Conversation(id=f"c{i}", created_at=i, metadata={"k": "v" * 500}))
    assert responses.size <= 50_000
    assert responses.conversation("c399") is not None and responses.conversation("c0") is None
    assert responses.delete_conversation("c399") and 0 <= responses.size <= 50_000


def test_what_a_kill_leaves_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BatchStore(str(tmp_path), 10**6)
    entry = kept(store, "a", "user_data", b"kept")
    lost = kept(store, "b", "user_data", b"lost")
    store.path(lost.id).unlink()
    (tmp_path / "files" / "file-half.part").write_bytes(b"half")
    (tmp_path / "files" / "file-orphan").write_bytes(b"orphan")
    store.close()
    again = BatchStore(str(tmp_path), 10**6)
    assert [e.id for e in again.files()] == [entry.id]
    assert [p.name for p in (tmp_path / "files").iterdir()] == [entry.id]
    again.close()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    living = TemporaryFolder("rvllm-x-")
    dead = tmp_path / "rvllm-x-dead"
    dead.mkdir()
    (dead / "owner.lock").touch()
    (dead / "file").touch()
    (tmp_path / "rvllm-x-not-ours").mkdir()
    sweep("rvllm-x-")
    assert living.path.exists() and not dead.exists() and (tmp_path / "rvllm-x-not-ours").exists()
    living.close()


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    def broken(file: Any) -> int:
        file.write(b"half")
        raise OSError(errno.EDQUOT, "quota")

    with pytest.raises(OSError) as raised:
        write_whole(tmp_path / "a", broken)
    assert is_full(raised.value) and list(tmp_path.iterdir()) == []
    assert write_whole(tmp_path / "a", lambda file: file.write(b"all")) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_line_that_ends_servers_is_given_up(tmp_path: Path) -> None:
    """What ran when a server ended runs alone then; after three ends it is failed, the rest is answered."""
    data = b"\n".join(line(i) for i in range(6))
    store = BatchStore(str(tmp_path), 10**9)
    file = kept(store, "a", "batch", data)
    now = int(time.time())
    batch = Batch(
        id="batch_1", endpoint="/v1/chat/completions", input_file_id=file.id, completion_window="24h",
        created_at=now, expires_at=now + 1000, status="in_progress",
    )  # fmt: skip
    store.put_batch(batch)
    for number in (2, 3, 3, 3):
        store.begin_line("batch_1", number)
    assert store.tries("batch_1") == {2: 1, 3: MAX_TRIES}
    store.close()
    with LiveServer(files_dir=str(tmp_path), drain_timeout=0.2) as server:
        found = ended(server, "batch_1")
        assert found["request_counts"]["completed"] == 5 and found["request_counts"]["failed"] == 1
        errors = server.raw("GET", f"/v1/files/{found['error_file_id']}/content")[2]
        assert json.loads(errors)["custom_id"] == "2" and b"servers have ended" in errors
        assert len(server.engine.requests) == 5


def test_batches_can_be_deleted(tmp_path: Path) -> None:
    with LiveServer(files_dir=str(tmp_path), drain_timeout=0.2) as server:
        name = batch_of(server, line(1))
        ended(server, name)
        assert server.raw("DELETE", f"/v1/batches/{name}")[0] == 200
        assert server.raw("GET", f"/v1/batches/{name}")[0] == 404
        assert json.loads(server.raw("GET", "/v1/batches")[2])["data"] == []


def test_refused_lines_leave_the_event_loop_to_others() -> None:
    with LiveServer(drain_timeout=0.2) as server:
        batch_of(server, b"\n".join(line(i, temperature=-1) for i in range(4000)))
        longest = [0.0]

        async def watch() -> None:
            last = time.monotonic()
            for _ in range(200):
                await asyncio.sleep(0.005)
                longest[0] = max(longest[0], time.monotonic() - last - 0.005)
                last = time.monotonic()

        asyncio.run_coroutine_threadsafe(watch(), server.loop).result(60)
        assert longest[0] < 0.5
