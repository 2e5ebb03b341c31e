"""`rvllm serve` in a process of its own, and what tests ask it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import openai

from support.waiting import until

SOURCE = Path(__file__).parents[3] / "src"


class Served:
    """`rvllm serve` with these flags on a free port; a `with` block ends it."""

    def __init__(self, *flags: str, wait: bool = True, largest_file: int = 0, **environment: str) -> None:
        """largest_file: bytes to which a file may grow, as if the disk were full then; 0: any."""
        self.log = Path(tempfile.mkstemp(prefix="served-log-")[1])
        self.port = 0
        limit = ["prlimit", f"--fsize={largest_file}:unlimited"] if largest_file else []
        command = [*limit, sys.executable, "-m", "rvllm", "serve", "--port", "0", *flags]
        first = environment.pop("PYTHONPATH", "")
        path = f"{first}:{SOURCE}:{os.environ.get('PYTHONPATH', '')}".strip(":")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path, **environment},
            )  # fmt: skip
        if wait:
            self.wait()

    def wait(self, seconds: float = 120.0) -> None:
        """Returns when it answers."""

        def listening() -> bool:
            assert self.process.poll() is None, f"no server:\n{self.text()}"
            if found := re.search(r"listening on http://127\.0\.0\.1:(\d+)", self.text()):
                self.port = int(found[1])
            return bool(self.port)

        until(listening, seconds)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self, number: int = signal.SIGTERM, seconds: float = 30.0) -> int:
        """Stops it; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise AssertionError(f"no end after {seconds} s:\n{self.text()}") from None
        return self.process.returncode

    def text(self) -> str:
        """What it has written."""
        return self.log.read_text(errors="replace")

    def children(self, name: str = "") -> list[int]:
        """Its processes whose command line names this."""
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(p) for p in found if name.encode() in Path(f"/proc/{p}/cmdline").read_bytes()]

    @property
    def engine(self) -> int:
        """The engine's process id."""
        return self.children("engine.ipc.process")[0]

    def rss(self, *pids: int) -> float:
        """Megabytes that these processes hold; the API process where none is named."""
        statuses = [Path(f"/proc/{pid}/status").read_text() for pid in pids or (self.process.pid,)]
        return sum(int(size) for text in statuses for size in re.findall(r"VmRSS:\s+(\d+)", text)) / 1024

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def openai(self, timeout: float = 200.0) -> openai.OpenAI:
        """The official client of it."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=timeout)

    def ask(
        self, method: str, path: str, body: Any = None, timeout: float = 30.0, **headers: str
    ) -> tuple[int, bytes]:
        """One request; (status, body). `Some_Header` names Some-Header."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            given = {"Content-Type": "application/json"} if data is not None else {}
            given |= {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, data, given)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def get(self, path: str, timeout: float = 30.0, **headers: str) -> tuple[int, bytes]:
        """A GET."""
        return self.ask("GET", path, None, timeout, **headers)

    def complete(self, timeout: float = 30.0, **body: Any) -> tuple[int, Any]:
        """A completion of a few tokens, unless the body says otherwise."""
        full = {"prompt": "hello", "max_tokens": 3, "temperature": 0, "ignore_eos": True, **body}
        status, answer = self.ask("POST", "/v1/completions", full, timeout)
        return status, json.loads(answer)

    def metric(self, name: str) -> float:
        """The first value of a metric."""
        found = re.search(rf"^{name}\{{.*\}} (\S+)$", self.get("/metrics")[1].decode(), re.MULTILINE)
        assert found, name
        return float(found[1])
