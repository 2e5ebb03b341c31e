"""Writes model files byte by byte, so that tests can also write wrong ones."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

from rvllm.errors import ModelError
from rvllm.weights.checkpoint import TensorType
from rvllm.weights.open import open_checkpoint

TYPE_NUMBERS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q4_K": 12,
                "Q5_K": 13, "Q6_K": 14, "BF16": 30, "Q2_K": 10, "Q3_K": 11, "IQ4_NL": 20, "IQ4_XS": 23,
                "MXFP4": 39}  # fmt: skip


def gguf_string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def gguf_value(value: Any) -> bytes:
    """Type number and value."""
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<Iq", 11, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_string(value)
    if isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(gguf_string, value))
    return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)


def gguf_entry(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return gguf_string(name) + dims + struct.pack("<IQ", kind, offset)


def gguf_bytes(metadata: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """A whole file; tensors by name: (type, row-major shape, data)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(gguf_string(k) + gguf_value(v) for k, v in metadata.items())
    body = b""
    for name, (kind, shape, data) in tensors.items():
        body += b"\0" * (-len(body) % 32)
        head += gguf_entry(name, shape, TYPE_NUMBERS[kind], len(body))
        body += data
    return head + b"\0" * (-len(head) % 32) + body


LLAMA = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 5000.0,
    "tokenizer.ggml.tokens": ["a", "b", "ü", "<s>"],
    "tokenizer.ggml.eos_token_id": 3,
    "tokenizer.ggml.eot_token_id": 2,
}


def float_tensor(shape: tuple[int, ...], seed: int = 0) -> tuple[str, tuple[int, ...], bytes]:
    numbers = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return "F32", shape, numbers.tobytes()


def llama_tensors() -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    shapes = {
        "token_embd.weight": (4, 32),
        "output_norm.weight": (32,),
        "blk.0.attn_norm.weight": (32,),
        "blk.0.attn_q.weight": (32, 32),
        "blk.0.attn_k.weight": (16, 32),
        "blk.0.attn_v.weight": (16, 32),
        "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_norm.weight": (32,),
        "blk.0.ffn_gate.weight": (64, 32),
        "blk.0.ffn_up.weight": (64, 32),
        "blk.0.ffn_down.weight": (32, 64),
    }
    return {name: float_tensor(shape, i) for i, (name, shape) in enumerate(shapes.items())}


def write_gguf(
    path: Path,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] | None = None,
) -> Path:
    path.write_bytes(
        gguf_bytes(LLAMA if metadata is None else metadata, llama_tensors() if tensors is None else tensors)
    )
    return path


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A whole file; `header` is JSON-encoded unless it is bytes already."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def safetensors_of(tensors: dict[str, np.ndarray], types: dict[str, str] | None = None) -> bytes:
    """A valid file of arrays; types overrides dtype names."""
    names = {"float32": "F32", "float16": "F16", "int64": "I64", "uint16": "BF16"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        kind = (types or {}).get(name, names[str(array.dtype)])
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    return safetensors_bytes(header, data)


def write_directory(
    folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any] | None = None
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"architectures": ["LlamaForCausalLM"]}))
    (folder / "model.safetensors").write_bytes(safetensors_of(tensors))
    return folder


def blocks(kind: str, rows: int, width: int, seed: int = 0) -> bytes:
    """Random valid blocks of a quantised type."""
    elements, nbytes = TensorType(kind).block
    count = rows * width // elements
    data = np.random.default_rng(seed).integers(0, 60, (count, nbytes), dtype=np.uint8)
    return data.tobytes()


def refused(path: Path, pattern: str) -> str:
    """What is said of a model that does not open: one line that matches the pattern, and exit code 2."""
    try:
        open_checkpoint(path)
    except ModelError as error:
        said = str(error)
        assert re.search(pattern, said) and "\n" not in said and error.exit_code == 2, said
        return said
    raise AssertionError(f"{path} was opened")
