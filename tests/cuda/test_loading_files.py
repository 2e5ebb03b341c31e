"""Weights of files get to a GPU's memory as those of arrays do; on the emulator's driver."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rvllm.backends.cuda import staging
from rvllm.backends.cuda.backend import CudaBackend
from rvllm.backends.cuda.device import host_memory
from rvllm.backends.cuda.layout.allocations import WEIGHTS
from rvllm.errors import RvllmError
from rvllm.program.dtypes import DType
from rvllm.weights.checkpoint import Checkpoint
from rvllm.weights.open import open_checkpoint
from rvllm.weights.reading import FileReader
from support.emulator import needs_emulator
from support.emulator.driver import emulated_driver
from support.kernels.gpu_engine import CONFIG
from support.models.arch_cases import MODELS, program_of, tensors_of
from support.weights.model_files import write_directory

pytestmark = needs_emulator
MODEL = {**MODELS["qwen3"].config, "num_hidden_layers": 2, "torch_dtype": "float16"}
ENGINE = replace(CONFIG, max_model_len=96, max_num_seqs=1, max_num_batched_tokens=80, num_gpu_blocks=40)


def loaded(checkpoint: Checkpoint) -> bytes:
    """All weights as they lie in the device's memory."""
    backend = CudaBackend.load(program_of(MODEL, DType.F16), checkpoint, ENGINE)
    weights = next(line.nbytes for line in backend.ledger() if line.name == WEIGHTS)
    found = ctypes.string_at(backend._gpu.arena.base, weights)
    backend.close()
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    arrays = tensors_of("qwen3", MODEL, DType.F16).arrays
    return write_directory(tmp_path, {k: v.astype(np.float16) for k, v in arrays.items()}, MODEL)


def test_weights_of_files_are_those_of_arrays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    copy = FileReader.copy

    def counted(self: FileReader, values, to) -> None:  # type: ignore[no-untyped-def]
        copied.append(self._place_of(values) is not None)
        copy(self, values, to)

    with emulated_driver():
        expected = loaded(tensors_of("qwen3", MODEL, DType.F16))
        monkeypatch.setattr(FileReader, "copy", counted)
        monkeypatch.setattr(staging, "STAGING", 8192)  # several slices a matrix, buffers in turn
        assert loaded(open_checkpoint(folder)) == expected
    assert sum(copied) > 30


def test_a_host_without_room_for_the_buffers_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "free_bytes", lambda: 1 << 10)
    with emulated_driver(), pytest.raises(RvllmError, match=r"the host has 0\.00 GB free"):
        loaded(open_checkpoint(folder))
