"""Hugging Face directories: what is read, and that damaged ones are refused in one line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rvllm.weights.checkpoint import TensorType
from rvllm.weights.open import open_checkpoint
from rvllm.weights.safetensors.directory import INDEX
from support.weights.model_files import refused, safetensors_bytes, safetensors_of, write_directory

ARRAYS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.weight": np.arange(5, dtype=np.float16),
    "c.position_ids": np.arange(4, dtype=np.int64),
    "empty": np.zeros((0, 4), dtype=np.float32),
}


def test_reads_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5}')
    save_file(ARRAYS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == {"hidden_size": 4} and checkpoint.generation_config == {"temperature": 0.5}
    assert checkpoint.config_origin == str(tmp_path / "config.json")
    assert set(checkpoint.tensors) == {"a.weight", "b.weight", "empty"}
    assert checkpoint.unreadable == {"c.position_ids": "I64"}
    for name, info in checkpoint.tensors.items():
        assert info.shape == ARRAYS[name].shape and checkpoint.raw(info).tobytes() == ARRAYS[name].tobytes()
    assert checkpoint.tensors["b.weight"].type is TensorType.F16


def sharded(folder: Path) -> dict[str, str]:
    (folder / "config.json").write_text("{}")
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file({"x": ARRAYS["a.weight"]}, folder / first)
    save_file({"y": ARRAYS["b.weight"]}, folder / second)
    weight_map = {"x": first, "y": second}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_shards(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert {n: i.file.name for n, i in checkpoint.tensors.items()} == weight_map
    assert checkpoint.raw(checkpoint.tensors["y"]).tobytes() == ARRAYS["b.weight"].tobytes()


def test_missing_and_inconsistent_shards(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map | {"z": weight_map["x"]}}))
    refused(tmp_path, r"00001-of-00002\.safetensors: tensor 'z' is missing")
    for name in ("../x.safetensors", "/etc/passwd", "", 3, "a/b"):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
        refused(tmp_path, "weight_map: 'x' must name a file beside the index")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    save_file({"x": ARRAYS["a.weight"], "y": ARRAYS["b.weight"]}, tmp_path / weight_map["y"])
    refused(tmp_path, "tensor 'x' is in another shard as well")
    (tmp_path / weight_map["y"]).unlink()
    refused(tmp_path, r"are missing: model-00002-of-00002\.safetensors; fetch")
    (tmp_path / INDEX).write_text("{}")
    refused(tmp_path, "weight_map must be an object")
    (tmp_path / INDEX).unlink()
    save_file({"x": ARRAYS["a.weight"]}, tmp_path / "other.safetensors")
    refused(tmp_path, "2 safetensors files but no model")


def test_a_config_alone_opens(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    assert open_checkpoint(tmp_path).tensors == {}


@pytest.mark.parametrize(
    "text,message",
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "must hold a JSON object, holds list"),
        (b'{"a": 1, "a": 2}', "a key is given twice"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    ],
)
def test_broken_config(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    assert "config.json" in refused(tmp_path, message)


def test_no_config(tmp_path: Path) -> None:
    refused(tmp_path, r"no config\.json")


def one(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"t": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


VALID = safetensors_of({"t": np.zeros(2, np.float32)})

BROKEN = {
    "empty": (b"", "the file is empty"),
    "short": (b"\1\0\0", "too short"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "run `git lfs pull`"),
    "header length": (safetensors_bytes({}, length=1 << 62), "is absurd"),
    "truncated header": (VALID[:40], "truncated"),
    "truncated data": (VALID[:-1], "tensor 't' lies at"),
    "more data": (VALID + b"x", "1 bytes belong to no tensor"),
    "json": (safetensors_bytes(b"{nonsense"), "not valid JSON"),
    "utf-8": (safetensors_bytes(b'{"\xff": 1}'), "not UTF-8"),
    "list": (safetensors_bytes([]), "must hold a JSON object"),
    "twice": (safetensors_bytes(b'{"a": {}, "a": {}}'), "a key is given twice"),
    "entry": (safetensors_bytes({"t": 3}), "must be an object"),
    "nothing": (safetensors_bytes({"t": {}}), "shape None is not a list"),
    "dtype": (safetensors_bytes(one(dtype="F31"), bytes(8)), "dtype 'F31' is not known"),
    "dtype list": (safetensors_bytes(one(dtype=["F32"]), bytes(8)), "is not known"),
    "negative": (safetensors_bytes(one(shape=(-2,)), bytes(8)), "is not a list of sizes"),
    "boolean": (safetensors_bytes(one(shape=(True, 2)), bytes(8)), "is not a list of sizes"),
    "float": (safetensors_bytes(one(shape=(2.0,)), bytes(8)), "is not a list of sizes"),
    "huge": (safetensors_bytes(one(shape=(1 << 40, 1 << 40)), bytes(8)), "is absurd"),
    "size": (safetensors_bytes(one(shape=(3,)), bytes(8)), "takes 12 bytes, data_offsets give it 8"),
    "backwards": (safetensors_bytes(one(offsets=(8, 0)), bytes(8)), "data_offsets give it -8"),
    "outside": (safetensors_bytes(one(offsets=(80, 88)), bytes(8)), "lies at"),
    "one offset": (safetensors_bytes(one(offsets=(8,)), bytes(8)), "are not two positions"),
    "hole": (safetensors_bytes(one(offsets=(4, 12)), bytes(12)), "4 bytes belong to no tensor"),
    "overlap": (
        safetensors_bytes(one() | {"u": one(offsets=(4, 12))["t"]}, bytes(12)),
        "'t' and 'u' overlap",
    ),
}


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_broken_files_are_refused(case: str, tmp_path: Path) -> None:
    data, message = BROKEN[case]
    write_directory(tmp_path, {})
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    assert str(path) in refused(tmp_path, re.escape(message))


def test_a_long_name_is_cut(tmp_path: Path) -> None:
    write_directory(tmp_path, {})
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes({"x" * 5000 + "\n": 1}))
    assert len(refused(tmp_path, r"model\.safetensors: ")) < 400


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    write_directory(tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    refused(tmp_path, r"no config\.json")
