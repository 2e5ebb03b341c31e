# ruff: noqa: E402, E501
"""Fault drills in one command: breaks a server in every way that can be arranged and prints what clients see.

    python scripts/drills.py            # with a tiny random model on the CPU; some minutes
    python scripts/drills.py --only kill stop
    python scripts/drills.py --device cuda --only gpu kill_engine stop_engine broken_weights

The table in docs/operations.md is its output.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE / "tests"), str(HERE / "src")]

from support.clients import attacker
from support.clients.attacker import model, raw, statuses
from support.faults.weights import BROKEN_TOKEN, broken_model

STREAM = {"prompt": "hello", "max_tokens": 2000, "stream": True, "ignore_eos": True}
CASES: dict[str, Callable[[], str]] = {}
DEVICE = ["cpu"]  # --device


def case(function: Callable[[], str]) -> Callable[[], str]:
    """A drill; its docstring is what is done, what it returns is what clients see."""
    CASES[function.__name__] = function
    return function


class Server(attacker.Server):
    """A server on the device of the drills."""

    def __init__(self, *flags: str, **options: Any) -> None:
        super().__init__(*flags, device=DEVICE[0], **options)


class Reader(threading.Thread):
    """A client in the middle of a stream."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.server, self.answer = server, b""
        self.start()
        end = time.monotonic() + 10
        while b"data:" not in self.answer and time.monotonic() < end:
            time.sleep(0.01)

    def run(self) -> None:
        """Reads until the stream ends, however it ends."""
        body = json.dumps({**STREAM, "max_tokens": 2000 if DEVICE[0] == "cpu" else 7000}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.server.port)) as sock:
            sock.settimeout(30)
            sock.sendall(head + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            while chunk := sock.recv(65536):
                self.answer += chunk

    def end(self) -> str:
        """How the stream ended."""
        self.join(35)
        text = self.answer.decode(errors="replace")
        if self.is_alive():
            return "the stream hangs"
        if '"error"' in text:
            found = text[text.rindex('{"error"') :].partition("\n")[0]
            said = json.loads(found)["error"]["message"]
            return f"the stream ends with an error event: {said}"
        return "the stream ends whole" if "[DONE]" in text else "the connection breaks off"


def health(server: Server) -> str:
    """What /health says."""
    try:
        status, answer = server.get("/health", 5)
    except OSError as error:
        return type(error).__name__
    return f"{status} {json.loads(answer).get('status') or json.loads(answer)['error']['code']}"


def until(what: Callable[[], bool], seconds: float = 60) -> float:
    """Seconds until it holds."""
    began = time.monotonic()
    while not what():
        if time.monotonic() - began > seconds:
            return float("inf")
        time.sleep(0.05)
    return time.monotonic() - began


@case
def kill_engine() -> str:
    """kill -9 of the engine in the middle of a stream"""
    with Server("--dead-engine-timeout", "3") as server:
        reader = Reader(server)
        os.kill(server.engine, signal.SIGKILL)
        told, after = reader.end(), health(server)
        took = until(lambda: server.process.poll() is not None)
        return f"{told}; /health {after}; the server exits with {server.process.poll()} after {took:.1f} s"


@case
def kill_engine_restart() -> str:
    """kill -9 of the engine in the middle of a stream, --restart-engine"""
    with Server("--restart-engine") as server:
        reader = Reader(server)
        os.kill(server.engine, signal.SIGKILL)
        told, after = reader.end(), health(server)
        took = until(lambda: health(server) == "200 ready")
        return f"{told}; /health {after}, 200 again after {took:.1f} s; then {server.complete()[0]}"


@case
def kill_api() -> str:
    """kill -9 of the API process in the middle of a stream"""
    with Server() as server:
        reader, others = Reader(server), server.children()
        server.process.kill()
        server.process.wait()
        took = until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in others))
        return f"{reader.end()}; engine and workers are gone after {took:.1f} s"


@case
def kill_worker() -> str:
    """kill -9 of the process that workers are forked from, with all workers"""
    with Server() as server:
        reader = Reader(server)
        server.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1, "guided_choice": ["x"]})
        for pid in server.children("text.worker"):
            os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        status = server.complete()[0]
        if status != 200:
            until(lambda: server.complete()[0] == 200)
        took = time.monotonic() - began
        server.get("/health")
        return (
            f"a stream beside it goes on; a new request is answered {status}, with 200 after {took:.1f} s"
            + ("" if reader.is_alive() else f" ({reader.end()})")
        )


@case
def stop_engine() -> str:
    """SIGSTOP of the engine, --engine-stall-seconds 3"""
    with Server("--engine-stall-seconds", "3") as server:
        reader = Reader(server)
        os.kill(server.engine, signal.SIGSTOP)
        took = until(lambda: health(server) == "503 stalled")
        began = time.monotonic()
        metrics = server.get("/metrics", 10)[0]
        waited = time.monotonic() - began
        os.kill(server.engine, signal.SIGCONT)
        again = until(lambda: health(server) == "200 ready")
        return (f"/health 503 stalled after {took:.1f} s, /metrics {metrics} after {waited:.1f} s; continued, "
                f"200 after {again:.1f} s; {reader.end()}")  # fmt: skip


@case
def stop_engine_restart() -> str:
    """SIGSTOP of the engine, --engine-stall-seconds 3 --restart-engine"""
    with Server("--engine-stall-seconds", "3", "--restart-engine") as server:
        reader, first = Reader(server), server.engine
        os.kill(first, signal.SIGSTOP)
        took = until(lambda: first not in server.children() and health(server) == "200 ready")
        return f"{reader.end()}; a new engine answers after {took:.1f} s"


def upload(server: Server, data: bytes) -> tuple[int, bytes]:
    """`POST /v1/files`."""
    parts = [b'name="purpose"\r\n\r\nbatch', b'name="file"; filename="a.jsonl"\r\n\r\n' + data]
    form = b"".join(b"--b\r\nContent-Disposition: form-data; " + p + b"\r\n" for p in parts) + b"--b--\r\n"
    kind = "multipart/form-data; boundary=b"
    return server.ask("POST", "/v1/files", form, Content_Type=kind)


@case
def full_disk() -> str:
    """no file may grow beyond 300 KB (as on a full disk): uploads and responses"""
    folder = tempfile.mkdtemp()
    flags = ("--files-dir", folder, "--responses-db", f"{folder}/responses.db")
    with Server(*flags, largest_file=300_000) as server:
        small, large = upload(server, b"x" * 1000)[0], upload(server, b"x" * 1_000_000)
        kept = len(list(Path(folder, "files").iterdir()))
        asked = {"input": "a " * 3000, "max_output_tokens": 1}
        stored = [json.loads(server.ask("POST", "/v1/responses", asked)[1]) for _ in range(60)]
        not_kept = sum(answer.get("store") is False for answer in stored)
        return (f"upload of 1 KB {small}, of 1 MB {large[0]}, {kept} file there; responses "
                f"{'all answered' if all('output' in a for a in stored) else stored[-1]}, {not_kept} of 60 with "
                f"store: false; then {server.complete()[0]}")  # fmt: skip


@case
def full_disk_batch() -> str:
    """no file may grow beyond 150 KB while a batch of 200 lines is answered; then there is room again"""
    with Server("--files-dir", tempfile.mkdtemp(), largest_file=150_000) as server:
        body = {"prompt": "hello " * 20, "max_tokens": 8, "logprobs": 5, "ignore_eos": True}
        lines = [json.dumps({"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body})
                 for i in range(200)]  # fmt: skip
        file = json.loads(upload(server, "\n".join(lines).encode())[1])
        asked = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        made = json.loads(server.ask("POST", "/v1/batches", asked)[1])

        def now() -> Any:
            return json.loads(server.get(f"/v1/batches/{made['id']}")[1])

        until(lambda: bool(now()["request_counts"]["completed"]), 30)
        until(lambda: "waits for room" in server.text(), 30)
        time.sleep(2)
        before, beside = now(), server.complete()[0]
        subprocess.run(["prlimit", f"--pid={server.process.pid}", "--fsize=unlimited:unlimited"], check=True)
        took = until(lambda: now()["status"] == "completed", 60)
        result = server.get(f"/v1/files/{now()['output_file_id']}/content")[1]
        names = {json.loads(line)["custom_id"] for line in result.splitlines()}
        return (f"{before['status']} with {before['request_counts']['completed']} of 200 answered, completions "
                f"{beside}; with room {now()['status']} after {took:.1f} s: {len(result.splitlines())} results of "
                f"{len(names)} lines")  # fmt: skip


@case
def corrupted_files() -> str:
    """a database and a folder of files that were overwritten with noise"""
    folder = Path(tempfile.mkdtemp())
    with Server("--files-dir", str(folder)) as server:
        upload(server, b"x" * 1000)
    (folder / "index.db").write_bytes(os.urandom(20_000))
    broken = Server("--files-dir", str(folder), wait=False)
    broken.process.wait(60)
    line = broken.text().strip().splitlines()[-1]
    return f"the start ends with {broken.process.returncode}: {line}".replace(str(folder), "DIR")


CLOCK = """import time
_real, _file = time.time, {path!r}
def shifted():
    try:
        return _real() + float(open(_file).read() or 0)
    except (OSError, ValueError):
        return _real()
time.time = shifted
"""


@case
def clock_jump() -> str:
    """the clock jumps a day ahead in the middle of a stream, then two days back"""
    folder = Path(tempfile.mkdtemp())
    (folder / "sitecustomize.py").write_text(CLOCK.format(path=str(folder / "offset")))
    with Server("--max-queue-seconds", "60", PYTHONPATH=str(folder)) as server:
        reader = Reader(server)
        (folder / "offset").write_text("86400")
        ahead = [server.complete()[0] for _ in range(3)]
        (folder / "offset").write_text("-86400")
        back = [server.complete()[0] for _ in range(3)]
        return f"{reader.end()}; completions {ahead} ahead, {back} behind; /health {health(server)}"


@case
def deleted_model() -> str:
    """the model's folder is deleted while it is served"""
    copy = Path(tempfile.mkdtemp()) / "model"
    shutil.copytree(model(), copy)
    with Server("--model", str(copy)) as server:
        shutil.rmtree(copy)
        chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
        return (
            f"completions {server.complete()[0]}, chat {server.ask('POST', '/v1/chat/completions', chat)[0]}"
        )


@case
def port_race() -> str:
    """two servers are started on one port at once"""
    with Server() as server:
        second = Server("--port", str(server.port), wait=False)
        second.process.wait(60)
        text = second.text()
        lines = [line for line in text.splitlines() if "cannot listen" in line]
        return (f"the second exits with {second.process.returncode}: {lines[0] if lines else text[-200:]}; "
                f"the first: {server.complete()[0]}").replace(str(server.port), "PORT")  # fmt: skip


@case
def idle_connections() -> str:
    """1,000 idle and 200 dribbling connections beside working clients"""
    with Server("--header-timeout", "4") as server, contextlib.ExitStack() as stack:
        for i in range(1200):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            if i >= 1000:
                sock.sendall(b"POST /v1/completions HTTP/1.1\r\nX-")
        times = []
        for _ in range(10):
            began = time.monotonic()
            assert server.complete()[0] == 200
            times.append(time.monotonic() - began)
        rss = server.rss()
        time.sleep(5)
        answer = raw(server.port, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return (f"requests take {max(times) * 1000:.0f} ms at most, {rss:.0f} MB; after --header-timeout all are "
                f"hung up on; /health {statuses(answer)[0]}")  # fmt: skip


@case
def stalled_reader() -> str:
    """one client reads nothing of ten long streams, others work; --write-timeout 3"""
    with Server("--write-timeout", "3", "--max-queue", "2") as server:
        body = {
            "prompt": "x",
            "max_tokens": 2000,
            "n": 10,
            "stream": True,
            "logprobs": 20,
            "ignore_eos": True,
        }
        data = json.dumps(body).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            sock.connect(("127.0.0.1", server.port))
            sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(data) + data)
            time.sleep(1)
            first = server.complete()[0]
            took = until(lambda: server.complete()[0] == 200)
            return f"others are answered {first}, with 200 after {took:.1f} s; {server.rss():.0f} MB"


@case
def broken_weights() -> str:
    """a token whose embedding is NaN, in prompts beside others; few KV blocks, so that its blocks are used again"""
    return broken(experts=False)


@case
def broken_weights_experts() -> str:
    """a token whose embedding is NaN in a model with experts"""
    return broken(experts=True)


def broken(experts: bool) -> str:
    """A model with one broken token: what its users see, and everybody else."""
    folder = str(broken_model(experts))
    with Server("--model", folder, "--load-format", "auto", "--num-blocks", "40") as server:
        honest = [[10 + (i * j) % 200 for j in range(30 + 9 * i)] for i in range(6)]
        ask = {"max_tokens": 20, "return_token_ids": True, "logprobs": 2}

        def answers() -> list[Any]:
            return [server.complete(prompt=ids, **ask)[1]["choices"][0] for ids in honest]

        before, seen = answers(), []

        def harm(i: int) -> None:
            for at in range(6):
                ids = [*honest[i][:at], BROKEN_TOKEN, *honest[i][at:]]
                seen.append(server.complete(prompt=ids, **ask))

        threads = [threading.Thread(target=harm, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        beside = answers()
        for thread in threads:
            thread.join()
        same = beside == before and answers() == before
        kinds = sorted(
            {f"{status} {body.get('error', {}).get('message', 'answered')}" for status, body in seen}
        )
        count = [line.split()[-1] for line in server.get("/metrics")[1].decode().splitlines()
                 if line.startswith("rvllm:broken_logits_total")]  # fmt: skip
    refused = Server("--model", folder, "--load-format", "auto", "--check-weights", wait=False)
    refused.process.wait(60)
    said = refused.text().strip().splitlines()[-1]
    return (f"{len(seen)} requests with it: {'; '.join(kinds)}; rvllm:broken_logits_total {count[0]}; all others are "
            f"answered {'as before' if same else 'DIFFERENTLY'}; --check-weights: {said}")  # fmt: skip


def gpu_fault(kind: str) -> str:
    """A stream, a fault of the GPU in the midst of it, a new engine."""
    from support.faults.gpu import GpuFaults

    faults = GpuFaults()
    with Server("--restart-engine", "--engine-stall-seconds", "3", **faults.environment) as server:
        first = server.complete(max_tokens=20)
        reader, engine = Reader(server), server.engine
        faults.strike(kind)
        struck = time.monotonic()
        told = reader.end()
        heard = time.monotonic() - struck
        after = health(server)
        until(lambda: health(server) == "200 ready")
        took = time.monotonic() - struck
        again = server.complete(max_tokens=20)
        same = again[0] == 200 and again[1]["choices"] == first[1]["choices"]
        new = server.engine != engine
        assert "fault:" in server.text()
        return (f"{told}, {heard:.1f} s after the fault; /health {after}, 200 after {took:.1f} s with "
                f"{'a new' if new else 'THE SAME'} engine; the same request is answered "
                f"{'as before' if same else f'DIFFERENTLY: {again}'}")  # fmt: skip


def gpu_trap() -> str:
    """a kernel that traps in the engine's context in the middle of a stream, --restart-engine"""
    return gpu_fault("trapped")


def gpu_astray() -> str:
    """a kernel that writes where there is no memory (an XID in the driver's log), --restart-engine"""
    return gpu_fault("astray")


def gpu_hung() -> str:
    """a kernel that holds every multiprocessor, --restart-engine --engine-stall-seconds 3"""
    return gpu_fault("hung")


def main() -> None:
    """Runs the drills and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="only drills whose names hold one of these")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args()
    DEVICE[0] = given.device
    if given.device == "cuda":
        for drill in (gpu_trap, gpu_astray, gpu_hung):
            case(drill)
    print("| what is done | what clients see |\n| --- | --- |")
    for wanted in given.only:
        for name, drill in CASES.items():
            if wanted in name:
                show(drill)


def show(drill: Callable[[], str]) -> None:
    """Runs one drill and prints its row."""
    try:
        seen = drill()
    except Exception as error:
        seen = f"THE DRILL FAILED: {type(error).__name__}: {error}"
    print(f"| {(drill.__doc__ or '').strip()} | {' '.join(seen.split())} |", flush=True)


if __name__ == "__main__":
    main()
