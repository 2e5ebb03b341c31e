"""Checkpoint tensors into the weights a program declares: checked, rearranged, converted, stacked."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rvllm.errors import ModelError
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Part, Program, Weight
from rvllm.weights.checkpoint import Checkpoint, TensorInfo, TensorType
from rvllm.weights.gguf.blocks import PIECE, dequantise, dequantise_into
from rvllm.weights.parallel import in_threads

T = TypeVar("T")
TASK = 1 << 19  # elements a thread takes at a time
NAMED = 5  # tensors an error message names before it counts


def find_tensor(part: Part, checkpoint: Checkpoint) -> TensorInfo | None:
    """The tensor a part is made of: its source, the first alternative there is, or one already laid out."""
    names = (part.source, *part.alternatives, part.prepared)
    return next((checkpoint.tensors[name] for name in names if name in checkpoint.tensors), None)


def check_weights(program: Program, checkpoint: Checkpoint) -> None:
    """Checks that every tensor of the program is there in the right shape and no bias beside one left over.

    Nothing is read but such biases: zeros may be left over, as some quantisers write them to every module.

    Raises ModelError: one line with the file, up to five tensors and how many more.
    """
    if not checkpoint.tensors and not checkpoint.unreadable:
        raise ModelError(
            f"{checkpoint.path}: holds no weights that can be read (safetensors or GGUF); "
            "--load-format dummy runs it with random ones"
        )
    problems = []
    for part in (part for weight in program.weights for part in weight.parts):
        info = find_tensor(part, checkpoint)
        if info is None:
            kind = checkpoint.unreadable.get(part.source)
            readable = ", ".join(t.value for t in TensorType)
            problem = f"has type {kind}, not one of {readable}" if kind else "is missing"
            problems.append(f"{part.source} {problem}")
        elif _without_ones(info.shape) != _without_ones(stored_shape(part, info)):
            wanted = list(stored_shape(part, info))
            problems.append(f"{info.name} has shape {list(info.shape)} instead of {wanted}")
    if not problems:
        problems = [
            f"{info.name} is there, and the config asks for no bias"
            for info in _left_over(program, checkpoint)
        ]
    problems = list(dict.fromkeys(problems))  # a tensor may be several parts
    if problems:
        more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise ModelError(
            f"{checkpoint.path}: does not hold the weights of a {program.architecture}: "
            f"{'; '.join(problems[:NAMED])}{more}"
        )


def _left_over(program: Program, checkpoint: Checkpoint) -> list[TensorInfo]:
    """Biases that are not zero, of modules whose weight the program reads and whose bias it does not."""
    found = (find_tensor(part, checkpoint) for weight in program.weights for part in weight.parts)
    read = {info.name for info in found if info is not None}
    names = (name.removesuffix("weight") + "bias" for name in read if name.endswith(".weight"))
    biases = [
        checkpoint.tensors[name] for name in sorted(names) if name not in read and name in checkpoint.tensors
    ]
    return [info for info in biases if _any_number(info, checkpoint)]


def _any_number(info: TensorInfo, checkpoint: Checkpoint) -> bool:
    """Whether any element differs from zero; of quantised types it is taken to."""
    if info.type not in (TensorType.F32, TensorType.F16, TensorType.BF16):
        return True
    words = checkpoint.raw(info).view(np.uint32 if info.type is TensorType.F32 else np.uint16)
    return bool((words << np.array(1, words.dtype)).any())  # without the sign


def stored_shape(part: Part, info: TensorInfo) -> tuple[int, ...]:
    """The shape the tensor must have: the part's, or that of its result where it is stored laid out."""
    if info.name != part.prepared:
        return part.shape
    columns, count = part.shape[-1], part.rows[1]
    return (part.heads, *((columns, count) if part.layout == "head_columns" else (count, columns)))


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def pack(weight: Weight, checkpoint: Checkpoint, dtype: DType) -> NDArray[Any]:
    """The weight as an array of `weight.shape` in `dtype`, read through the memory map.

    Works on several threads; besides the result and the tensor being rearranged nothing is held. Raises
    ModelError when a tensor is missing or does not fit, or a number is too large for float16.
    """
    out = np.empty(weight.elements, dtype=dtype.numpy)
    position = 0
    for part in weight.parts:
        info = _require(part, checkpoint)
        count = part.elements
        _pack_part(part, info, checkpoint.raw(info), out[position : position + count], dtype)
        position += count
    if position != weight.elements:
        raise ValueError(f"{weight.name}: parts have {position} elements, the weight {weight.elements}")
    return out.reshape(weight.shape)


def _require(part: Part, checkpoint: Checkpoint) -> TensorInfo:
    info = find_tensor(part, checkpoint)
    if info is None:
        raise ModelError(f"{checkpoint.path}: tensor {part.source} is missing")
    wanted = stored_shape(part, info)
    if math.prod(info.shape) != math.prod(wanted):
        raise ModelError(
            f"{info.file}: tensor {info.name} has shape {list(info.shape)} instead of {list(wanted)}"
        )
    return info


def _pack_part(part: Part, info: TensorInfo, raw: NDArray[np.uint8], out: NDArray[Any], dtype: DType) -> None:
    add = part.add + info.add
    if info.logarithm:
        _store(info, _logarithms(info, raw) + np.float32(add), out)
        return
    if is_transposed(part, info):
        stored = dequantise(info.type, raw, info.shape)
        if part.layout == "transposed":
            turned = stored.reshape(part.shape).T
        else:
            first, count = part.rows
            turned = stored.reshape(part.heads, -1, part.shape[-1])[:, first : first + count].swapaxes(1, 2)
        _store(info, (turned + np.float32(add)).reshape(-1), out)
        return
    order = row_order(part, info)
    if order is not None and len(info.shape) < 2:
        _store(info, dequantise(info.type, raw, info.shape).reshape(-1)[order] + np.float32(add), out)
        return
    rows, width = _as_rows(info.shape)
    if part.layout == "columns":
        first, width = part.columns
        span = column_bytes(part, info)
        if span is None:
            cut = dequantise(info.type, raw, info.shape).reshape(rows, -1)[:, first : first + width]
            _store(info, ((cut if order is None else cut[order]) + np.float32(add)).reshape(-1), out)
            return
        raw = raw.reshape(rows, -1)[:, span]
    elif order is None and info.type.block[0] == 1:
        rows, width = rows * width, 1  # plain elements can be cut anywhere
    stored_rows, wanted = raw.reshape(rows, -1), out.reshape(-1, width)

    def convert(start: int, stop: int) -> None:
        piece = stored_rows[start:stop] if order is None else stored_rows[order[start:stop]]
        _convert(info, piece.reshape(-1), wanted[start:stop].reshape(-1), dtype, add)

    in_threads(convert, len(wanted), max(1, TASK // max(width, 1)))


def _as_rows(shape: tuple[int, ...]) -> tuple[int, int]:
    width = shape[-1] if shape else 1
    return (math.prod(shape[:-1]), width) if width else (0, 0)


def _logarithms(info: TensorInfo, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    numbers = dequantise(info.type, raw, (math.prod(info.shape),))
    if not (numbers < 0).all():
        raise ModelError(f"{info.file}: tensor {info.name} must hold negative numbers")
    return np.log(-numbers)


def _convert(info: TensorInfo, raw: NDArray[np.uint8], out: NDArray[Any], dtype: DType, add: float) -> None:
    """Stored bytes to elements of `dtype`, plus a constant."""
    if dtype is DType.F32:
        dequantise_into(info.type, raw, out)
        if add:
            out += np.float32(add)
        return
    if dtype.name == info.type.name and not add:
        out.view(np.uint8)[:] = raw
        return
    elements, nbytes = info.type.block
    scratch = np.empty(min(PIECE, out.size), dtype=np.float32)
    for start in range(0, out.size, PIECE):
        stop = min(start + PIECE, out.size)
        numbers = scratch[: stop - start]
        dequantise_into(info.type, raw[start // elements * nbytes : stop // elements * nbytes], numbers)
        if add:
            numbers += np.float32(add)
        _store(info, numbers, out[start:stop])


def _store(info: TensorInfo, numbers: NDArray[np.float32], out: NDArray[Any]) -> None:
    with np.errstate(over="ignore"):
        out[:] = numbers
    if out.dtype == np.float16 and np.isinf(out).any() and not np.isinf(numbers).any():
        raise ModelError(
            f"{info.file}: tensor {info.name} holds numbers too large for float16; use --dtype bfloat16"
        )


def is_transposed(part: Part, info: TensorInfo) -> bool:
    """Whether the tensor's rows become columns of the part."""
    return part.layout in ("transposed", "head_columns") and info.name != part.prepared


def has_stored_form(part: Part, info: TensorInfo) -> bool:
    """Whether the part's rows are the tensor's, in whatever order, or whole blocks of each.

    None is turned, and no constant is added.
    """
    if is_transposed(part, info) or part.add or info.add or len(info.shape) < 2:
        return False
    return part.layout != "columns" or column_bytes(part, info) is not None


def readable_type(part: Part, info: TensorInfo) -> TensorType:
    """The type in which `readable_parts` gives the part."""
    return info.type if has_stored_form(part, info) else TensorType.F32


def column_bytes(part: Part, info: TensorInfo) -> slice | None:
    """Where in a stored row the part's columns lie; None when they begin or end within a block."""
    elements, nbytes = info.type.block
    first, count = part.columns
    if first % elements or count % elements:
        return None
    return slice(first // elements * nbytes, (first + count) // elements * nbytes)


def row_order(part: Part, info: TensorInfo) -> NDArray[np.intp] | None:
    """Which stored row becomes row i of the part; None when they stay as they are."""
    rearranged = part.layout in ("head_qkv", "grouped_qkv", "pairs", "head_rows")
    if info.name == part.prepared or not (rearranged or info.unpermute_heads or info.regroup_heads):
        return None
    rows = info.shape[0] if info.shape else 1
    order = np.arange(rows)
    if info.unpermute_heads:  # stored [head][dim/2][half], wanted [head][half][dim/2]
        order = order.reshape(info.unpermute_heads, -1, 2).swapaxes(1, 2).reshape(-1)
    if info.regroup_heads:  # stored [q|k|v][head][dim], wanted [head][q|k|v][dim]
        order = order.reshape(3, info.regroup_heads, -1).swapaxes(0, 1).reshape(-1)
    if part.layout == "head_qkv":
        order = order.reshape(part.heads, 3, -1).swapaxes(0, 1).reshape(-1)
    elif part.layout == "grouped_qkv":
        groups = order.reshape(part.heads, -1, part.head_dim)
        order = np.concatenate([g.reshape(-1) for g in (groups[:, :-2], groups[:, -2], groups[:, -1])])
    elif part.layout == "pairs":
        order = order.reshape(-1, 2).T.reshape(-1)
    elif part.layout == "head_rows":
        first, count = part.rows
        order = order.reshape(part.heads, -1)[:, first : first + count].reshape(-1)
    return None if np.array_equal(order, np.arange(rows)) else order


@dataclass(frozen=True)
class RawPart:
    """A part in the form it is stored in: `data` uint8 [rows, bytes of a row], rows in wanted order."""

    type: TensorType
    width: int  # elements of a row
    data: NDArray[np.uint8]


def raw_parts(weight: Weight, checkpoint: Checkpoint) -> list[RawPart]:
    """A matrix's parts as stored blocks, for backends that compute on them.

    Rows are in the wanted order; those that already are remain views of the mapped file. Raises ModelError
    for a part that cannot be had this way: transposed, cut within a block, or with a constant to add.
    """
    found = [(part, _require(part, checkpoint)) for part in weight.parts]
    for part, info in found:
        if not has_stored_form(part, info):
            raise ModelError(
                f"{info.file}: tensor {info.name} cannot be used in its stored form {info.type.value}"
            )
    return [_raw_part(part, info, checkpoint) for part, info in found]


def readable_parts(weight: Weight, checkpoint: Checkpoint) -> Iterator[RawPart]:
    """A matrix's parts in turn, as stored blocks; those that cannot be had this way as float32.

    Only one that is quantised or rearranged is held at a time.
    """
    for part in weight.parts:
        info = _require(part, checkpoint)
        if has_stored_form(part, info):
            yield _raw_part(part, info, checkpoint)
            continue
        numbers = np.empty(part.elements, dtype=np.float32)
        _pack_part(part, info, checkpoint.raw(info), numbers, DType.F32)
        width = weight.shape[-1]
        yield RawPart(TensorType.F32, width, numbers.reshape(-1, width).view(np.uint8))


def _raw_part(part: Part, info: TensorInfo, checkpoint: Checkpoint) -> RawPart:
    rows, width = _as_rows(info.shape)
    data, order = checkpoint.raw(info).reshape(rows, -1), row_order(part, info)
    if part.layout == "columns":
        width, data = part.columns[1], data[:, column_bytes(part, info)]
    return RawPart(info.type, width, data if order is None else data[order])


def by_name(
    weights: Sequence[Weight], load: Callable[[Weight], T], progress: Callable[[float, str], None] | None
) -> dict[str, T]:
    """What `load` makes of each weight; tells which part of all elements is there."""
    found: dict[str, T] = {}
    done, total = 0, sum(w.elements for w in weights) or 1
    for weight in weights:
        found[weight.name] = load(weight)
        done += weight.elements
        if progress is not None:
            progress(done / total, "loading weights")
    return found


def in_float32(weight: Weight, checkpoint: Checkpoint | None, seed: int) -> NDArray[np.float32]:
    """The weight of a checkpoint (see `pack`), or a random one where there is none (see `dummy`)."""
    return dummy(weight, seed) if checkpoint is None else pack(weight, checkpoint, DType.F32)


def dummy(weight: Weight, seed: int, dtype: DType = DType.F32) -> NDArray[Any]:
    """Random weights for measurements: the same for the same name and seed, on every machine.

    Normal with standard deviation 0.02, around 1 for norms. Weights longer than a million elements repeat
    a random run of prime length, which no row length divides, so rows differ and filling is fast.
    """
    generator = np.random.default_rng([seed, zlib.crc32(weight.name.encode())])
    run = min(weight.elements, 1_048_573)
    numbers = generator.standard_normal(run, dtype=np.float32) * np.float32(0.02)
    source = weight.parts[0].source.lower() if weight.parts else ""
    if weight.role == "vector" and "norm" in source and source.endswith(".weight"):
        numbers += np.float32(1.0)
    values = numbers.astype(dtype.numpy)
    out = np.empty(weight.elements, dtype=dtype.numpy)
    for start in range(0, weight.elements, run or 1):
        piece = out[start : start + run]
        piece[:] = values[: len(piece)]
    return out.reshape(weight.shape)
