"""A real server of a tiny random model in processes of its own, and clients that do not behave."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

from support.clients.served import Served
from support.text.tiny_tokenizers import TEMPLATE, trained

POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
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


class Server(Served):
    """A server of the tiny model with random weights, with these flags."""

    def __init__(self, *flags: str, template: str = TEMPLATE, device: str = "cpu", **more: Any) -> None:
        """more: as `Served` has it."""
        own = () if "--model" in flags else ("--model", str(model(template, device)))
        of_device = {
            "cpu": ("--cpu-kernels", "numpy", "--threads", "1"),
            "cuda": ("--gpu-memory-utilization", "0.98"),
        }
        super().__init__(
            *own, "--load-format", "dummy", "--device", device, *of_device[device],
            "--served-model-name", "tiny", "--num-blocks", "1024", "--max-num-seqs", "8", *flags, **more,
        )  # fmt: skip


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
