"""A real server of a tiny random model in processes of its own, and clients that do not behave."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

from support.text.tiny_tokenizers import TEMPLATE, trained

POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SOURCE = Path(__file__).parents[3] / "src"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}  # fmt: skip


# On a GPU the tiny model would answer faster than clients in Python can ask: about a billion parameters.
LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 20, "num_attention_heads": 16,
         "num_key_value_heads": 8}  # fmt: skip


@cache
def model(template: str = TEMPLATE, device: str = "cpu") -> Path:
    """A directory with a config, a tokenizer and a chat template; weights are left to --load-format dummy."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-model-"))
    backend = trained()
    vocab = backend.get_vocab(with_added_tokens=True)
    sizes = CONFIG if device == "cpu" else CONFIG | LARGE
    config = {**sizes, "vocab_size": len(vocab), "eos_token_id": vocab["<|im_end|>"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(backend.to_str())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": template, "eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"})
    )
    return folder


class Server:
    """`rvllm serve` with these flags."""

    def __init__(
        self,
        *flags: str,
        template: str = TEMPLATE,
        wait: bool = True,
        largest_file: int = 0,
        device: str = "cpu",
        **environment: str,
    ) -> None:
        """largest_file: bytes to which a file may grow, as if the disk were full then; 0: any."""
        self.log = Path(tempfile.mkstemp(prefix="hostile-log-")[1])
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        limit = ["prlimit", f"--fsize={largest_file}:unlimited"] if largest_file else []
        more = {
            "cpu": ("--cpu-kernels", "numpy", "--threads", "1"),
            "cuda": ("--gpu-memory-utilization", "0.98"),
        }
        own = () if "--model" in flags else ("--model", str(model(template, device)))
        command = [
            *limit,
            sys.executable, "-m", "rvllm", "serve", *own,
            "--load-format", "dummy", "--device", device, *more[device], "--port", str(self.port),
            "--served-model-name", "tiny", "--num-blocks", "1024", "--max-num-seqs", "8", *flags,
        ]  # fmt: skip
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
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if self.get("/health", 2.0)[0] == 200:
                    return
            except OSError:
                time.sleep(0.05)
        raise AssertionError(f"no server:\n{self.text()}")

    def __enter__(self) -> Server:
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

    def rss(self) -> float:
        """Megabytes that the API process holds."""
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())
        assert found
        return int(found[1]) / 1024

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


def raw(port: int, *pieces: bytes, pause: float = 0.0, timeout: float = 10.0, most: int = 1 << 20) -> bytes:
    """Sends the pieces on a connection and returns what comes until it is closed, or silent for `timeout`."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as sock:
        with contextlib.suppress(OSError):
            for piece in pieces:
                sock.sendall(piece)
                time.sleep(pause)
        return rest(sock, most)


def rest(sock: socket.socket, most: int = 1 << 20) -> bytes:
    """What comes until the connection is closed, or silent for its timeout."""
    answer = b""
    with contextlib.suppress(OSError):
        while len(answer) < most and (chunk := sock.recv(65536)):
            answer += chunk
    return answer


def statuses(answer: bytes) -> list[int]:
    """The statuses of all answers on a connection."""
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3})", answer)]
