"""Servers of a race: started, waited for, asked, weighed while they run, and ended."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rvllm.bench.race.engines import Engine, filled
from rvllm.errors import RvllmError

POLL = 0.05  # seconds between two looks at a starting server
END = 30.0  # seconds a server has to end


@dataclass
class Server:
    """One that answers. started: seconds from its start until it listed its model; nan: it ran."""

    url: str
    model: str
    started: float
    process: subprocess.Popen[bytes] | None = None

    def memory(self) -> int:
        """Bytes its processes hold, shared pages by their share; 0 when they are not ours to see."""
        return 0 if self.process is None else sum(_held(pid) for pid in _family(self.process.pid))


@contextmanager
def running(engine: Engine, values: Mapping[str, object], timeout: float) -> Iterator[Server]:
    """A server of `engine`: started and ended, or one that runs.

    values: for its command. timeout: seconds until it must list its model. Raises RvllmError else.
    """
    if engine.url:
        yield Server(engine.url, first_model(engine.url), float("nan"))
        return
    port = _free_port()
    command = filled(engine.serve, {**values, "port": port, "at": engine.at})
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, **engine.env},
            )  # fmt: skip
        except OSError as error:
            raise RvllmError(f"{engine.name}: cannot run {command[0]}: {error.strerror}") from None
        try:
            url = f"http://127.0.0.1:{port}"
            model = _wait(engine, process, url, began + timeout, log)
            yield Server(url, model, time.perf_counter() - began, process)
        finally:
            end(process)


def get(url: str, path: str, timeout: float = 10.0) -> Any:
    """What a server answers to a GET, as JSON. Raises OSError, ValueError or HTTPException."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeout)
    try:
        key = api_key()
        connection.request(
            "GET", parts.path.rstrip("/") + path, headers={"Authorization": f"Bearer {key}"} if key else {}
        )
        response = connection.getresponse()
        body = response.read(1 << 20)
        if response.status != 200:
            raise ValueError(f"{response.status}: {body[:200].decode(errors='replace')}")
        return json.loads(body)
    finally:
        connection.close()


def api_key() -> str | None:
    """What servers are asked with."""
    return os.environ.get("OPENAI_API_KEY") or os.environ.get("RVLLM_API_KEY")


def first_model(url: str) -> str:
    """The first model a server lists. Raises RvllmError."""
    try:
        return str(get(url, "/v1/models")["data"][0]["id"])
    except (OSError, ValueError, KeyError, IndexError, TypeError, http.client.HTTPException) as error:
        raise RvllmError(f"{url} lists no model: {error}") from None


def _wait(engine: Engine, process: subprocess.Popen[bytes], url: str, until: float, log: Any) -> str:
    while time.perf_counter() < until:
        if process.poll() is not None:
            raise RvllmError(
                f"{engine.name} ended with {process.returncode} instead of serving: {_tail(log)}"
            )
        try:
            health = get(url, "/health", 2.0) if engine.name == "llama.cpp" else None
            if health is None or health.get("status") == "ok":
                return first_model(url)
        except (OSError, ValueError, RvllmError, http.client.HTTPException):
            pass
        time.sleep(POLL)
    raise RvllmError(f"{engine.name} was not ready in time (--start-timeout): {_tail(log)}")


def _tail(log: Any) -> str:
    size = os.fstat(log.fileno()).st_size
    text = os.pread(log.fileno(), 600, max(0, size - 600)).decode(errors="replace").strip()
    return text.splitlines()[-1][-300:] if text else "it said nothing"


def end(process: subprocess.Popen[Any]) -> None:
    """Asks a process with a session of its own to end, and ends what is left of the session.

    What it started stays in the session when it is gone itself: an engine whose server has died, say.
    """
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pid in _pids():
        try:
            if os.getsid(pid) == process.pid:
                os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _family(root: int) -> list[int]:
    """A process and all below it."""
    parents: dict[int, list[int]] = {}
    for pid in _pids():
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            continue
        parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(pid)
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo.extend(parents.get(pid, ()))
    return found


def _held(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
