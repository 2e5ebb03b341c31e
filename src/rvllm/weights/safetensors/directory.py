"""Hugging Face directories: config.json and single or sharded safetensors.

A safetensors file is eight bytes of header length (little-endian), a JSON header that gives each tensor's
type, shape and byte range, and the data, which the ranges must cover without holes or overlaps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rvllm.errors import ModelError
from rvllm.weights.checkpoint import Checkpoint, TensorInfo
from rvllm.weights.mapped import (
    MAX_JSON_BYTES,
    MappedFile,
    check_layout,
    map_file,
    parse_json,
    read_json,
    shown,
)
from rvllm.weights.safetensors.quantised import quantised_tensors
from rvllm.weights.safetensors.sentence import read_sentence
from rvllm.weights.safetensors.stored import FLOAT_TYPES, StoredTensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_RANK = 16
MAX_ELEMENTS = 1 << 48

# Of older checkpoints of GPTQ, AWQ and ModelOpt.
QUANTISE_CONFIGS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")

OTHER_SIZES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
SIZES = OTHER_SIZES | {name: kind.block[1] for name, kind in FLOAT_TYPES.items()}


def open_directory(path: Path) -> Checkpoint:
    """Opens a directory in Hugging Face's layout; one without weights has no tensors.

    Raises ModelError for anything missing, broken or inconsistent, naming the file and the field.
    """
    config_path = path / "config.json"
    if not config_path.is_file():
        raise ModelError(f"{path}: no config.json in it; a model directory has one beside its safetensors")
    config = read_json(config_path)
    sentence = read_sentence(path)
    if sentence is not None:
        config["sentence_transformers"] = sentence
    generation_path = path / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    files = [map_file(file) for file in _weight_files(path)]
    stored: dict[str, StoredTensor] = {}
    for file in files:
        found = read_safetensors(file)
        twice = stored.keys() & found.keys()
        if twice:
            raise ModelError(f"{file.path}: tensor {shown(min(twice))} is in another shard as well")
        stored |= found
    _check_index(path, stored)
    tensors = {
        name: TensorInfo(name, t.shape, FLOAT_TYPES[t.kind], t.file, t.offset, t.data.nbytes)
        for name, t in stored.items()
        if t.kind in FLOAT_TYPES
    }
    if stored:
        tensors |= quantised_tensors(_quantisation(path, config), str(config_path), stored)
    return Checkpoint(
        path=path,
        config=config,
        config_origin=str(config_path),
        generation_config=generation,
        tensors=tensors,
        files={file.path: file for file in files},
        unreadable={name: t.kind for name, t in stored.items() if name not in tensors},
    )


def _quantisation(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What the model says of its quantisation: in its config, or in a file of its own; empty if nothing."""
    found = config.get("quantization_config") or config.get("compression_config")
    for name in QUANTISE_CONFIGS:
        if found is None and (path / name).is_file():
            found = read_json(path / name)
    if found is not None and not isinstance(found, dict):
        raise ModelError(f"{path / 'config.json'}: quantization_config must be an object")
    return found or {}


def _weight_files(path: Path) -> list[Path]:
    index = path / INDEX
    if index.is_file():
        names = sorted(set(weight_map(index).values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ModelError(
                f"{path}: shards named in {INDEX} are missing: {', '.join(missing[:3])}{more}; "
                "fetch the model again"
            )
        return [path / name for name in names]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    found = sorted(p for p in path.glob("*.safetensors") if p.is_file())
    if len(found) > 1:
        raise ModelError(
            f"{path}: {len(found)} safetensors files but no {INDEX} that says which belong together"
        )
    return found


def weight_map(index: Path) -> dict[str, str]:
    """Which file each tensor is in, from model.safetensors.index.json; files lie beside the index."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ModelError(f"{index}: weight_map must be an object that maps tensors to files")
    for name, file in found.items():
        plain = isinstance(file, str) and file not in ("", ".", "..") and "\0" not in file
        if not plain or "/" in file or "\\" in file:
            raise ModelError(f"{index}: weight_map: {shown(name)} must name a file beside the index")
    return found


def _check_index(path: Path, stored: dict[str, StoredTensor]) -> None:
    index = path / INDEX
    if not index.is_file():
        return
    for name, file in weight_map(index).items():
        if name not in stored or stored[name].file.name != file:
            raise ModelError(f"{path / file}: tensor {shown(name)} is missing, {INDEX} says it is here")


def read_safetensors(file: MappedFile) -> dict[str, StoredTensor]:
    """The tensors of a file, checked, whatever their types."""
    path, size = file.path, file.size
    if size < 8:
        raise ModelError(f"{path}: {size} bytes long, too short for a safetensors file")
    length = int.from_bytes(file.bytes[:8].tobytes(), "little")
    if length > MAX_JSON_BYTES:
        raise ModelError(f"{path}: header length {length} is absurd; not a safetensors file")
    if length > size - 8:
        raise ModelError(
            f"{path}: the header should be {length} bytes, the file has {size - 8}; "
            "it is truncated, fetch it again"
        )
    header = parse_json(file.bytes[8 : 8 + length].tobytes(), f"{path} header")
    header.pop("__metadata__", None)
    tensors, start = {}, 8 + length
    spans = []
    for name, entry in header.items():
        kind, shape, begin, end = _checked(f"{path}: tensor {shown(name)}", entry, start)
        tensors[name] = StoredTensor(kind, shape, path, begin, file.bytes[begin:end])
        spans.append((begin, end, name))
    check_layout(path, spans, size)
    covered = start + sum(end - begin for begin, end, _ in spans)
    if covered != size:
        raise ModelError(f"{path}: {size - covered} bytes belong to no tensor; the file is damaged")
    return tensors


def _checked(where: str, entry: Any, data_start: int) -> tuple[str, tuple[int, ...], int, int]:
    """(type, shape, first byte, end) of one tensor within its file."""
    if not isinstance(entry, dict):
        raise ModelError(f"{where}: must be an object with dtype, shape and data_offsets")
    kind, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_natural(n) for n in shape):
        raise ModelError(f"{where}: shape {shown(shape)} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_natural(n) for n in offsets):
        raise ModelError(f"{where}: data_offsets {shown(offsets)} are not two positions")
    elements = 1
    for n in shape:
        elements *= n
        if elements > MAX_ELEMENTS:
            raise ModelError(f"{where}: shape {shown(shape)} is absurd")
    item = SIZES.get(kind) if isinstance(kind, str) else None
    if item is None:
        raise ModelError(f"{where}: dtype {shown(kind)} is not known")
    begin, end = data_start + offsets[0], data_start + offsets[1]
    if end - begin != elements * item:
        raise ModelError(
            f"{where}: {kind} of shape {shown(shape)} takes {elements * item} bytes, "
            f"data_offsets give it {end - begin}"
        )
    return str(kind), tuple(shape), begin, end


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_ELEMENTS
