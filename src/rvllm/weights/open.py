"""Opens a model on disk, whatever format it came in."""

from __future__ import annotations

from pathlib import Path

from rvllm.errors import ModelError
from rvllm.weights.checkpoint import Checkpoint
from rvllm.weights.gguf.container import MAGIC


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens and checks a directory in Hugging Face's layout or a .gguf file.

    Reads configuration and headers only; tensors are mapped and read when used. Raises ModelError (one
    line that names file and field) for whatever is missing, damaged or not supported.
    """
    if path.is_dir():
        from rvllm.weights.safetensors.directory import open_directory

        return open_directory(path)
    if not path.exists():
        raise ModelError(f"{path}: no such file or directory")
    if not path.is_file():
        raise ModelError(f"{path}: neither a directory nor a regular file")
    if path.suffix == ".gguf" or _starts_with(path, MAGIC):
        from rvllm.weights.gguf.config import open_gguf

        return open_gguf(path)
    raise ModelError(f"{path}: neither a model directory nor a GGUF file")


def _starts_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError as error:
        raise ModelError(f"{path}: cannot read the file: {error.strerror}") from None
