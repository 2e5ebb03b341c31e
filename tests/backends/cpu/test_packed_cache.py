"""Packed weights between starts: the same bits, never another model's, never damaged ones, never too many."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

from rvllm.backends.cpu.backend import CpuBackend
from rvllm.backends.cpu.compiled import formats, library, packed_cache
from rvllm.backends.cpu.compiled.formats import FORMATS, Matrix, pack_matrix, segment
from rvllm.config import EngineConfig
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.weights.open import open_checkpoint
from support.models import tiny
from support.weights.model_files import blocks, llama_tensors, write_gguf
from support.weights.random_blocks import random_blocks


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, in which small models are worth keeping."""
    monkeypatch.setattr(packed_cache, "MIN_BYTES", 1)
    monkeypatch.setenv("RVLLM_CACHE_DIR", str(tmp_path))
    return tmp_path / "packed"


def every_format() -> dict[str, Matrix]:
    """A matrix of each stored type, of 40 rows, and one of two segments."""
    made = {}
    for number, kind in enumerate(FORMATS):
        made[kind.value] = Matrix((segment(kind, 0, 512, random_blocks(kind, 40, 512, number).reshape(-1)),))
    made["two"] = Matrix((made["Q4_0"].segments[0], made["F32"].segments[0]))
    return made


def same(a: Matrix, b: Matrix) -> bool:
    """Whether two matrices are equal in every byte and number."""
    return len(a.segments) == len(b.segments) and all(
        (x.format, x.first, x.rows, x.inner) == (y.format, y.first, y.rows, y.inner)
        and np.array_equal(x.data, y.data)
        and y.data.ctypes.data % 64 == 0
        for x, y in zip(a.segments, b.segments, strict=True)
    )


def test_what_is_kept_comes_back(folder: Path) -> None:
    made = every_format()
    packed_cache.store("k", made, folder, 10**9)
    found = packed_cache.load("k", list(made), folder)
    assert found is not None and all(same(made[name], found[name]) for name in made)
    assert packed_cache.load("other", list(made), folder) is None
    assert packed_cache.load("k", [*made, "one more"], folder) is None
    (folder / "k.packed").rename(folder / "j.packed")
    assert packed_cache.load("j", list(made), folder) is None


def test_damage_is_seen_wherever_it_is(folder: Path) -> None:
    made = {"a": every_format()["Q4_1"]}
    packed_cache.store("k", made, folder, 10**9)
    path = folder / "k.packed"
    whole, source = path.read_bytes(), random.Random(0)
    used = made["a"].nbytes
    header = whole.index(b"\n", 70)
    places = [*source.sample(range(header), 20), *(4096 + at for at in source.sample(range(used), 20))]
    for place in places:
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ 1 << source.randrange(8)]) + whole[place + 1 :]
        )
        assert packed_cache.load("k", ["a"], folder) is None, place
    for length in (0, 10, header, 4096, 4096 + used - 1):
        path.write_bytes(whole[:length])
        assert packed_cache.load("k", ["a"], folder) is None, length
    path.write_bytes(whole)
    assert packed_cache.load("k", ["a"], folder) is not None


def test_the_least_lately_used_goes(folder: Path) -> None:
    made = every_format()
    one = sum(matrix.nbytes for matrix in made.values())
    for number, name in enumerate("abc"):
        packed_cache.store(name, made, folder, int(3.5 * one))
        os.utime(folder / f"{name}.packed", (number, number))
    assert packed_cache.load("a", list(made), folder) is not None  # and so used just now
    old = folder / "x.part"
    old.write_text("")
    os.utime(old, (0, 0))
    packed_cache.store("d", made, folder, int(3.5 * one))
    assert sorted(path.name for path in folder.iterdir()) == ["a.packed", "c.packed", "d.packed"]
    packed_cache.store("e", made, folder, one // 2)  # larger than all that may be kept
    assert len(list(folder.iterdir())) == 3


def test_a_disk_that_is_full_or_not_ours_keeps_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"a": every_format()["F16"]}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(packed_cache, "_write", full)
        packed_cache.store("k", made, folder, 10**9)
    assert list(folder.iterdir()) == []
    with monkeypatch.context() as patched:
        patched.setattr(packed_cache, "SPARE", 1 << 62)
        packed_cache.store("k", made, folder, 10**9)
    assert list(folder.iterdir()) == []
    folder.rmdir()
    folder.write_text("a file where the folder should be")
    packed_cache.store("k", made, folder, 10**9)
    assert packed_cache.load("k", ["a"], folder) is None


def backend_of(path: Path) -> CpuBackend:
    """The model on compiled kernels."""
    checkpoint = open_checkpoint(path)
    program = build_program(ModelConfig(checkpoint.config, checkpoint.config_origin), DType.F32)
    config = EngineConfig(device="cpu", cpu_kernels="compiled", num_blocks=16, max_num_seqs=2, threads=1)
    return CpuBackend.load(program, checkpoint, config)


@pytest.mark.skipif(library.missing() is not None, reason="no compiled kernels")
def test_a_second_start_has_the_same_bits_and_another_file_is_packed_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = llama_tensors()
    for name in ("blk.0.attn_q.weight", "blk.0.ffn_gate.weight", "token_embd.weight"):
        tensors[name] = ("Q4_1", tensors[name][1], blocks("Q4_1", *tensors[name][1]))
    path = write_gguf(tmp_path / "m.gguf", tensors=tensors)
    packed: list[str] = []

    def counted(weight: formats.Weight, *rest: object) -> Matrix:
        packed.append(weight.name)
        return pack_matrix(weight, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(formats, "pack_matrix", counted)
    prompt = np.array([0, 2, 1, 1, 0], dtype=np.int32)
    first = tiny.logits_of(backend_of(path), prompt)
    assert packed and len(list(folder.iterdir())) == 1
    packed.clear()
    assert np.array_equal(first, tiny.logits_of(backend_of(path), prompt)) and packed == []
    tensors["blk.0.attn_q.weight"] = ("Q4_1", (32, 32), blocks("Q4_1", 32, 32, seed=9))
    stat = path.stat()
    write_gguf(path, tensors=tensors)  # of the same size, and made to look as old
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not np.array_equal(first, tiny.logits_of(backend_of(path), prompt)) and packed
    packed.clear()
    monkeypatch.setenv("RVLLM_PACKED_CACHE_GB", "0")
    backend_of(path)
    assert packed
