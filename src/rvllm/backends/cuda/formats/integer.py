"""Integer weights on the GPU (GPTQ, AWQ, compressed-tensors, GGUF blocks): loading, memory, launches.

Levels stay as few bits as they are stored in, in the order in which the tensor cores take them
(`kernels/gemm/integer/formats.cuh`); activations stay in 16 bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.cuda.device.catalog import Catalog
from rvllm.backends.cuda.device.driver import Launch, Stream
from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.device.launches import ints
from rvllm.backends.cuda.formats.base import format_of, stored_kinds
from rvllm.backends.cuda.layout.packed import PackedWeight
from rvllm.backends.cuda.ops.family import Lowering
from rvllm.backends.cuda.ops.gemm import integer
from rvllm.backends.cuda.ops.gemm.common import Kind
from rvllm.backends.cuda.ops.gemm.epilogue import Epilogue, plan_launch
from rvllm.backends.cuda.staging import Span, Staging
from rvllm.kernels.gemm.integer.specs import LAYOUTS, IntegerLayout, sm80_smem
from rvllm.kernels.gemm.tiles import TILE
from rvllm.kernels.types import SHORT
from rvllm.program.dtypes import DType
from rvllm.program.formats import IntegerFormat
from rvllm.program.ops.dense import Linear, Logits, Weight
from rvllm.weights.checkpoint import Checkpoint
from rvllm.weights.formats import QUANTISED_INT4, PackedPart, packed_part
from rvllm.weights.packing import find_tensor, raw_parts, readable_parts
from rvllm.weights.safetensors.grouped import PackedMatrix
from rvllm.weights.safetensors.stored import StoredTensor

REORDERED = "integer.reordered"  # scratch: activations in the order of a weight's columns
_ALIGN = 256
_GRID = 132 * 8
_SCALES = {"F16": 0, "BF16": 1, "F32": 2}  # ScaleKind in pack_words.cu
_GATHER_THREADS = 128


@dataclass(frozen=True)
class Run:
    """Successive rows in one layout, from packed row `first` on, at `offset` bytes of the weight's place."""

    first: int
    rows: int
    offset: int
    layout: IntegerLayout


def runs_of(kept: IntegerFormat, rows: int, columns: int) -> tuple[list[Run], int]:
    """The runs of a packed matrix and where they end, in bytes; the order of columns lies behind."""
    found, first, offset, width = [], 0, 0, kept.packed_width(columns)
    for count, name in kept.parts:
        layout, here = LAYOUTS[name], rows if len(kept.parts) == 1 else count
        found.append(Run(first, here, offset, layout))
        first += here
        offset += -(-layout.nbytes(here, width) // _ALIGN) * _ALIGN
    return found, offset


class IntegerDevice:
    """See `DeviceFormat`."""

    def refusal(self, weight: Weight, dtype: DType, info: DeviceInfo) -> str | None:
        if info.capability == 90:
            return None
        needed = max(sm80_smem(LAYOUTS[name], 64) for _, name in _format(weight).parts)
        if needed > info.smem_per_block:
            return f"its kernel needs {needed} bytes of shared memory"
        return None

    def packed_nbytes(self, kept: IntegerFormat, rows: int, columns: int) -> int:
        return runs_of(kept, rows, columns)[1] + integer.order_bytes(kept, columns)

    def scratch(self, weight: Weight, tokens: int, capability: int) -> dict[str, int]:
        kept = _format(weight)
        return {REORDERED: 2 * tokens * kept.packed_width(weight.shape[-1])} if kept.reordered else {}

    def loading_kernels(self, packed: PackedWeight, dtype: DType, checkpoint: Checkpoint | None) -> list[str]:
        tag, kept = SHORT[dtype.value], _format(packed.weight)
        if checkpoint is None:
            return [f"sm80_{tag}_integer_fill"]
        words = [f"sm80_{tag}_integer_pack_{name}" for _, name in kept.parts if LAYOUTS[name].integers]
        kinds = stored_kinds(packed.weight, checkpoint)
        if kept.stored == QUANTISED_INT4:
            return words + [f"sm80_integer_quantise_{kind}" for kind in kinds]
        return words or [f"sm80_integer_pack_{kind}" for kind in kinds]

    def load(self, loader: Staging, packed: PackedWeight, address: int, checkpoint: Checkpoint) -> int:
        kept = _format(packed.weight)
        if kept.stored == QUANTISED_INT4:
            return _quantise(loader, packed, address, checkpoint)
        if LAYOUTS[kept.parts[0][1]].integers:
            return _load_words(loader, packed, address, checkpoint)
        return _load_blocks(loader, packed, address, checkpoint)

    def fill(self, catalog: Catalog, stream: Stream, packed: PackedWeight, address: int, seed: int) -> None:
        name = next(n for n in ("sm80_bf16_integer_fill", "sm80_f16_integer_fill") if n in catalog)
        matrices = packed.weight.shape[0] if packed.weight.role == "stack" else 1  # without gaps
        for run in runs_of(_format(packed.weight), packed.rows, packed.width)[0]:
            layout = run.layout
            arguments = [
                address + run.offset,
                ctypes.c_uint64(matrices * layout.nbytes(run.rows, packed.width) // 4),
                *ints(layout.chunk_bytes, layout.runs * TILE * 4),
                ctypes.c_uint(integer.dummy_word(layout)),
                ctypes.c_int(layout.integers and layout.bits == 4),
                ctypes.c_uint(seed & 0xFFFFFFFF),
            ]
            Launch(catalog[name], 256, 0, arguments, pdl=False).run(stream, (_GRID, 1, 1))

    def product(self, to: Lowering, name: str, op: Linear | Logits, end: Epilogue) -> None:
        kept, count = _format(op.weight), to.rows(op.x.rows)(to.counts)
        rows, k = end.rows(op), kept.packed_width(op.weight.shape[-1])
        x, pitch = to.at.buffers[op.x.name], op.x.width
        weights, options = to.weight(op.weight, end.form), end.options(to, op)
        runs, behind = runs_of(kept, rows, k)
        if kept.reordered:
            self._reorder(to, name, op, x, weights + behind, k)
            x, pitch = to.at.scratch[REORDERED], k
        for run in runs:
            plan = integer.plan_integer(
                run.rows, k, count, to.tag, run.layout, to.chip.sm_count, to.chip.capability
            )
            source = to.boxes(x, to.capacity(op.x.rows), k, plan.box_rows) if plan.box_rows else x
            parameters = plan.arguments(
                source,
                weights + run.offset,
                end.out + run.first * (4 if end.kind == Kind.LOGITS else 2),
                end.pitch,
                x_width=k,
                x_pitch=pitch,
                **options | {n: options[n] + 2 * run.first for n in ("bias", "residual") if options[n]},
            )
            plan_launch(to, name, plan, parameters)

    def _reorder(self, to: Lowering, name: str, op: Linear | Logits, x: int, order: int, k: int) -> None:
        """Activations in the order of the weight's k packed columns, in a launch of its own."""
        rows = to.rows(op.x.rows)
        to.plan(
            name,
            "sm80_integer_reorder",
            lambda c: (-(-k // (8 * _GATHER_THREADS)), rows(c), 1),
            _GATHER_THREADS,
            x,
            to.at.scratch[REORDERED],
            order,
            *ints(k, op.x.width),
        )


def _format(weight: Weight) -> IntegerFormat:
    kept = format_of(weight)
    assert isinstance(kept, IntegerFormat)
    return kept


def _placed(packed: PackedWeight, span: Span) -> tuple[Span, Run]:
    """A span with its rows counted from the run that they belong to."""
    runs, _ = runs_of(_format(packed.weight), packed.rows, packed.width)
    run = next(r for r in runs if span.first < r.first + r.rows)
    first, rows = span.first - run.first, len(span.data)
    padded = span.padded
    if len(runs) > 1:
        padded = rows + (-run.rows % TILE if first + rows == run.rows else 0)
    return replace(span, first=first, padded=padded), run


def _load_blocks(loader: Staging, packed: PackedWeight, address: int, checkpoint: Checkpoint) -> int:
    """GGUF blocks, as they lie in the file."""
    nbytes = 0
    parts = (
        (f"sm80_integer_pack_{p.type.value.lower()}", p.data) for p in raw_parts(packed.weight, checkpoint)
    )
    for kernel, whole in loader.spans(packed, address, parts):
        span, run = _placed(packed, whole)
        nbytes += span.data.nbytes
        for source, first, rows, padded in loader.stream(span):
            arguments = integer.pack_blocks_arguments(
                source, span.data.shape[1], span.address + run.offset, rows, packed.width,
                first=first, padded_rows=padded, interleave=span.interleave,
            )  # fmt: skip
            loader.run(kernel, arguments, _GRID)
    return nbytes


def _load_words(loader: Staging, packed: PackedWeight, address: int, checkpoint: Checkpoint) -> int:
    """Packed words, as they lie in the file: slices of rows with their zeros and scales."""
    kept = _format(packed.weight)
    k, ordered = kept.packed_width(packed.width), 0
    _, behind = runs_of(kept, packed.rows, packed.width)
    parts = list(_packed_parts(packed.weight, checkpoint))
    for part, whole in loader.spans(packed, address, ((p, _numbered(p.packed)) for p in parts)):
        span, run = _placed(packed, whole)
        order_at = span.address + behind if kept.reordered else 0
        if order_at > ordered:  # the matrix's first rows
            loader.copy(np.arange(k, dtype=np.int32) if part.order is None else part.order, order_at)
            ordered = order_at
        kernel = f"sm80_{loader.tag}_integer_pack_{run.layout.name}"
        begin = int(span.data[0].view(np.uint32)[0])
        for start, stop in loader.slices(len(span.data), -(-part.nbytes // _row_count(part.packed))):
            arrays, source = word_source(part.packed, begin + start, begin + stop)
            levels, scales, *zeros = loader.send(arrays)
            source = replace(
                source, levels=levels, scales=scales, zeros=zeros[0] if zeros else 0, order=order_at,
                group_size=part.group_size,
            )  # fmt: skip
            last = stop == len(span.data)
            arguments = integer.pack_words_arguments(
                source, span.address + run.offset, stop - start, k,
                first=span.first + start * (2 if span.interleave else 1),
                padded_rows=span.padded - start if last else stop - start, interleave=span.interleave,
            )  # fmt: skip
            loader.run(kernel, arguments, _GRID)
            loader.sent()
    return sum(p.nbytes for p in parts)


def _packed_parts(weight: Weight, checkpoint: Checkpoint) -> Iterator[PackedPart]:
    for part in weight.parts:
        info = find_tensor(part, checkpoint)
        found = None if info is None else packed_part(part, info)
        assert found is not None, part.source
        yield found


def _row_count(packed: PackedMatrix) -> int:
    if packed.kind == "packed":
        return packed.levels.shape[0]
    return packed.levels.shape[1] * (32 // packed.bits if packed.kind == "awq" else 1)


def _numbered(packed: PackedMatrix) -> NDArray[np.uint8]:
    """The numbers of a matrix's rows, in place of the rows."""
    return np.arange(_row_count(packed), dtype=np.uint32)[:, None].view(np.uint8)


def _matrix(tensor: StoredTensor) -> NDArray[Any]:
    item = {"I8": np.uint8, "F16": np.uint16, "BF16": np.uint16}.get(tensor.kind, np.uint32)
    return tensor.data.view(item).reshape(tensor.shape)


def word_source(packed: PackedMatrix, start: int, stop: int) -> tuple[list[NDArray[Any]], integer.WordSource]:
    """Levels, scales and perhaps zeros of rows start to stop, by eights, and how they lie.

    Addresses and the group's size are left to be filled in.
    """
    each, rows = 32 // packed.bits, stop - start
    levels, scales = _matrix(packed.levels), _matrix(packed.scales)
    if packed.signed:
        levels = levels.view(np.uint32)
    zeros = None if packed.zeros is None else _matrix(packed.zeros)
    first, skip = start // each, start % each
    if packed.kind == "packed":
        shared = len(scales) == 1 < len(levels)
        taken = [levels[start:stop], scales if shared else scales[start:stop]]
        where = {"level_n": levels.shape[1], "level_k": 1, "level_k_per": each,
                 "scale_n": 0 if shared else scales.shape[1], "scale_g": 1,
                 "zero_n": scales.shape[1], "zero_g": 1}  # fmt: skip
        if zeros is not None and packed.signed:  # a byte each: to words of successive rows
            bytes_of = np.zeros((zeros.shape[1], -(-rows // each) * each), np.uint8)
            bytes_of[:, :rows] = (zeros if shared else zeros[start:stop]).T
            taken.append(bytes_of.view(np.uint32))
            where |= {"zero_n": 1, "zero_g": bytes_of.shape[1] // each}
            skip = 0
        elif zeros is not None:
            taken.append(zeros[first : -(-stop // each)])
    else:
        awq = packed.kind == "awq"
        columns = slice(first, -(-stop // each))
        taken = [levels[:, columns] if awq else levels[:, start:stop], scales[:, start:stop]]
        taken += [] if zeros is None else [zeros[:, columns]]
        words = taken[-1].shape[1]
        where = {"level_n": 1, "level_k": words if awq else rows, "level_k_per": 1 if awq else each,
                 "level_n_per": each if awq else 1, "level_skip": skip if awq else 0, "scale_n": 1,
                 "scale_g": rows, "zero_n": 1, "zero_g": words}  # fmt: skip
    source = integer.WordSource(
        levels=0, scales=0, group_size=0, zero_n_per=each, zero_skip=skip, awq=packed.kind == "awq",
        plus_one=packed.plus_one, flip=128 if packed.signed else 0,
        scale_kind=_SCALES[packed.scales.kind], **where,
    )  # fmt: skip
    return taken, source


def _quantise(loader: Staging, packed: PackedWeight, address: int, checkpoint: Checkpoint) -> int:
    """A matrix of plain numbers, quantised on its way in."""
    nbytes, k = 0, packed.width
    groups, words = -(-k // 128), -(-k // 8)
    (run,), _ = runs_of(_format(packed.weight), packed.rows, k)
    parts = ((part.type.value.lower(), part.data) for part in readable_parts(packed.weight, checkpoint))
    for kind, span in loader.spans(packed, address, parts):
        nbytes += span.data.nbytes
        for source, first, rows, padded in loader.stream(span, 4 * words + 8 * groups):
            zeros = loader.rows_at + 4 * rows * words
            scales = zeros + 4 * rows * groups
            loader.run(
                f"sm80_integer_quantise_{kind}",
                [source, loader.rows_at, zeros, scales, ctypes.c_int64(rows), ctypes.c_int(k)],
                _GRID,
            )
            from_words = integer.WordSource(
                levels=loader.rows_at, level_n=words, level_k=1, level_k_per=8, zeros=zeros,
                zero_n=groups, zero_g=1, scales=scales, scale_n=groups, scale_g=1, scale_kind=2,
                group_size=128,
            )  # fmt: skip
            arguments = integer.pack_words_arguments(
                from_words, span.address + run.offset, rows, k,
                first=first, padded_rows=padded, interleave=span.interleave,
            )  # fmt: skip
            loader.run(f"sm80_{loader.tag}_integer_pack_int4", arguments, _GRID)
    return nbytes
