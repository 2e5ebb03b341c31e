"""Bytes come from the files, not through their mappings, and a file that changes is told of."""

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from rvllm.errors import ModelError
from rvllm.weights.mapped import map_file
from rvllm.weights.reading import FileReader


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng()
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_bytes(rng.bytes(int(rng.integers(9000, 20000)) // 8 * 8))
    return paths


def test_views_of_files_and_other_arrays_are_copied(paths: list[Path]) -> None:
    files = [map_file(path) for path in paths]
    reader = FileReader(files)
    for path, file in zip(paths, files, strict=True):
        data = np.frombuffer(path.read_bytes(), np.uint8)
        for start, stop in ((0, len(data)), (7, 4103), (len(data) - 1, len(data)), (8, 8)):
            to = np.full(stop - start, 0xA5, np.uint8)
            reader.copy(file.bytes[start:stop], to)
            assert np.array_equal(to, data[start:stop])
        rows = file.bytes[:4096].reshape(64, 64)
        for view in (rows[3:9], rows[::2], rows[:, 5:9], rows.view(ml_dtypes.bfloat16), rows[3:9].copy()):
            out = np.zeros(view.shape, view.dtype)
            reader.copy(view, out)
            assert np.array_equal(out.view(np.uint8), np.ascontiguousarray(view).view(np.uint8))
    reader.close()


def test_the_file_is_read_and_not_its_mapping(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    file = map_file(paths[0])
    reads: list[int] = []
    preadv = os.preadv

    def few(handle: int, buffers: list[memoryview], offset: int) -> int:
        reads.append(offset)
        return preadv(handle, [buffers[0][:1000]], offset)  # a read may give less than was asked for

    monkeypatch.setattr(os, "preadv", few)
    reader, to = FileReader([file]), np.zeros(4096, np.uint8)
    reader.copy(file.bytes[512:4608], to)
    assert reads == [512, 1512, 2512, 3512, 4512] and np.array_equal(to, file.bytes[512:4608])
    reader.close()
    to[:] = 0
    reader.copy(file.bytes[512:4608], to)  # closed: by way of the mapping
    assert len(reads) == 5 and np.array_equal(to, file.bytes[512:4608])


def test_a_file_that_was_cut_is_named(paths: list[Path]) -> None:
    file = map_file(paths[1])
    reader, to = FileReader([file]), np.zeros(8000, np.uint8)
    os.truncate(paths[1], 4096)
    with pytest.raises(ModelError, match=f"{paths[1]}: the file became shorter while it was read"):
        reader.copy(file.bytes[:8000], to)
    reader.close()


@pytest.mark.parametrize("gone", [False, True])
def test_a_file_that_was_replaced_is_read_as_it_was_mapped(paths: list[Path], gone: bool) -> None:
    file, data = map_file(paths[2]), paths[2].read_bytes()
    if gone:
        paths[2].unlink()
    else:
        paths[0].rename(paths[2])
    reader, to = FileReader([file]), np.zeros(len(data), np.uint8)
    reader.copy(file.bytes, to)
    assert to.tobytes() == data
    reader.close()
