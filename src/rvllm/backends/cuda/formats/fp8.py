"""E4M3 weights on the GPU: loading, memory, and the launches of their products.

sm_90: activations are quantised to E4M3 too, a scale for each token and 256 columns, and the tensor cores
multiply E4M3; any scales of activations that a checkpoint holds are coarser and left aside. Elsewhere: the
weights are widened to the activations' 16-bit type on their way to the tensor cores.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.cuda.device.catalog import Catalog
from rvllm.backends.cuda.device.driver import Launch, Stream
from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.device.launches import MatrixMap, ints
from rvllm.backends.cuda.formats import fp8_plan
from rvllm.backends.cuda.formats.base import format_of, stored_kinds
from rvllm.backends.cuda.layout.fusion import Stage
from rvllm.backends.cuda.layout.packed import PackedWeight
from rvllm.backends.cuda.ops.family import Lowering
from rvllm.backends.cuda.ops.gemm.epilogue import Epilogue, plan_launch
from rvllm.backends.cuda.staging import Staging
from rvllm.errors import MissingKernelError
from rvllm.kernels.gemm.fp8.specs import (
    BLOCK_K,
    QUANTISE_GROUPS,
    QUANTISE_THREADS,
    SCALE_BLOCKS,
    scale_groups,
)
from rvllm.kernels.gemm.tiles import TILE
from rvllm.program.dtypes import DType
from rvllm.program.formats import FP8_ROWS, Fp8Format
from rvllm.program.ops.dense import Add, Experts, Linear, Logits, Norm, Op, Weight
from rvllm.weights.checkpoint import Checkpoint
from rvllm.weights.formats import Fp8Part, fp8_part
from rvllm.weights.packing import find_tensor, readable_parts

ACTIVATIONS, SCALES = "fp8.activations", "fp8.scales"  # scratch
NORMED, NORMED_SCALES = "fp8.normed", "fp8.normed_scales"  # of what norms write quantised
SPARE_TOKENS = 256  # scales of a whole tile of tokens are loaded, whether they exist or not
DEVIATION = 0.02 / 60  # scale of dummy weights, whose bytes have deviation 60


class Fp8Device:
    """See `DeviceFormat`."""

    def refusal(self, weight: Weight, dtype: DType, info: DeviceInfo) -> str | None:
        """See DeviceFormat."""
        return "FP8 needs an inner size of 8, 16, ..." if weight.shape[-1] % 8 else None

    def packed_nbytes(self, kept: Fp8Format, rows: int, columns: int) -> int:
        """See DeviceFormat."""
        return fp8_plan.packed_nbytes(rows, columns, kept.scales)

    def scratch(self, weight: Weight, tokens: int, capability: int) -> dict[str, int]:
        """See DeviceFormat."""
        if capability != 90:
            return {}
        pitch = fp8_plan.activation_pitch(weight.shape[-1])
        rows = activation_capacity(tokens)  # more than rows of logits
        scales = 4 * scale_groups(pitch // BLOCK_K) * rows
        return {ACTIVATIONS: rows * pitch, SCALES: scales, NORMED: rows * pitch, NORMED_SCALES: scales}

    def loading_kernels(self, packed: PackedWeight, dtype: DType, checkpoint: Checkpoint | None) -> list[str]:
        """See DeviceFormat."""
        if checkpoint is None:
            return ["sm80_fp8_fill", "sm80_fp8_fill_scales"]
        if _parts(packed.weight, checkpoint) is not None:
            return ["sm80_fp8_pack"]
        return [f"sm80_fp8_quantise_{kind}" for kind in stored_kinds(packed.weight, checkpoint)]

    def load(self, loader: Staging, packed: PackedWeight, address: int, checkpoint: Checkpoint) -> int:
        """See DeviceFormat."""
        rows, k = packed.rows, packed.width
        behind = fp8_plan.scales_offset(rows, k)
        blocks = ctypes.c_int(-(-k // BLOCK_K))
        parts = _parts(packed.weight, checkpoint)
        nbytes = 0
        for name, span in loader.spans(packed, address, _sources(packed, parts, checkpoint)):
            nbytes += span.data.nbytes
            for source, first, count, padded in loader.stream(span):
                scales = [] if parts is not None else [span.address + behind]
                sizes = [ctypes.c_int64(count), ctypes.c_int64(padded), ctypes.c_int(k), blocks]
                where = [ctypes.c_int64(first), ctypes.c_int(int(span.interleave))]
                loader.run(name, [source, span.address, *scales, *sizes, *where], 132 * 8)
        if parts is not None:
            numbers = np.concatenate([_spread(p.scales(), _kept(packed), k) for p in parts])
            gated, matrices = packed.form in ("gated", "gated_stack"), _matrices(packed)
            for i, of_one in enumerate(np.split(numbers, matrices)):
                arranged = arrange_scales(of_one, rows, _kept(packed).scales, gated)
                nbytes += arranged.nbytes
                loader.copy(arranged, address + i * packed.matrix_bytes + behind)
        return nbytes

    def fill(self, catalog: Catalog, stream: Stream, packed: PackedWeight, address: int, seed: int) -> None:
        """See DeviceFormat."""
        rows, k = packed.rows, packed.width
        count = int(np.prod(fp8_plan.scales_shape(rows, k, _kept(packed).scales)))
        payload, behind = fp8_plan.payload_nbytes(rows, k), fp8_plan.scales_offset(rows, k)
        for i in range(_matrices(packed)):
            place = address + i * packed.matrix_bytes
            work: list[tuple[str, list[Any]]] = [
                ("fill", [place, ctypes.c_uint64(payload), ctypes.c_uint((seed + i) & 0xFFFFFFFF)]),
                ("fill_scales", [place + behind, ctypes.c_uint64(count), ctypes.c_float(DEVIATION)]),
            ]
            for name, arguments in work:
                Launch(catalog[f"sm80_fp8_{name}"], 256, 0, arguments, pdl=False).run(stream, (132 * 8, 1, 1))

    def product(self, to: Lowering, name: str, op: Linear | Logits, end: Epilogue) -> None:
        """See DeviceFormat."""
        rows, k = end.rows(op), op.weight.shape[-1]
        count = to.rows(op.x.rows)(to.counts)
        if to.chip.capability != 90:
            self._widened(to, name, op, end, rows, count)
            return
        normed = op.x.name in to.quantised
        plan = fp8_plan.plan_fp8(rows, k, count, to.tag, to.chip.sm_count, quantised=normed)
        x, capacity = to.at.buffers[op.x.name], to.capacity(op.x.rows)
        at, scales_at = (NORMED, NORMED_SCALES) if normed else (ACTIVATIONS, SCALES)
        scale_pitch = activation_capacity(to.shape.tokens)
        pitch = fp8_plan.activation_pitch(k)
        if not normed and not plan.quantises:
            self._quantise(to, name, op, k, pitch, scale_pitch)
        parameters = fp8_plan.fp8_arguments(
            plan,
            MatrixMap(to.at.scratch[at], capacity, pitch // 2, plan.box_rows, 64, bf16=True),
            x if plan.quantises else to.at.scratch[at],
            0 if plan.quantises else to.at.scratch[scales_at],
            to.weight(op.weight, end.form),
            end.out,
            end.pitch,
            k=k,
            scales=_format(op.weight).scales,
            x_pitch=op.x.width if plan.quantises else scale_pitch,
            **end.options(to, op),
        )
        plan_launch(to, name, plan, parameters)

    def _quantise(
        self, to: Lowering, name: str, op: Linear | Logits, k: int, pitch: int, capacity: int
    ) -> None:
        """Activations to E4M3, in a launch of its own."""
        rows, groups = to.rows(op.x.rows), -(-pitch // (BLOCK_K * SCALE_BLOCKS * QUANTISE_GROUPS))
        to.plan(
            name,
            f"sm80_{to.tag}_fp8_quantise",
            lambda c: (groups, rows(c), 1),
            QUANTISE_THREADS,
            to.at.buffers[op.x.name],
            to.at.scratch[ACTIVATIONS],
            to.at.scratch[SCALES],
            *ints(k, op.x.width, pitch, capacity),
        )

    def _widened(
        self, to: Lowering, name: str, op: Linear | Logits, end: Epilogue, rows: int, count: int
    ) -> None:
        """The product on GPUs where weights alone are E4M3."""
        k = op.weight.shape[-1]
        plan = fp8_plan.plan_widened(rows, k, count, to.tag)
        if plan.smem > to.chip.smem_per_block:
            raise MissingKernelError(f"{plan.kernel} needs {plan.smem} bytes of shared memory")
        arguments = fp8_plan.widened_arguments(
            plan,
            to.at.buffers[op.x.name],
            to.weight(op.weight, end.form),
            end.out,
            end.pitch,
            k=k,
            x_pitch=op.x.width,
            scales=_format(op.weight).scales,
            **end.options(to, op),
        )
        plan_launch(to, name, plan, arguments)


def quantised_buffers(stages: Sequence[Stage], capability: int) -> frozenset[str]:
    """The buffers that norms write as E4M3 right away: those that only products of E4M3 weights read.

    They share one place, so none may be written before the last one has been read.
    """
    if capability != 90 or not any(_of_fp8(op) for stage in stages for op in stage.ops):
        return frozenset()
    readers: dict[str, list[tuple[int, Op]]] = {}
    writers: dict[str, list[int]] = {}
    for i, stage in enumerate(stages):
        for op in stage.ops:
            for buffer in op.reads:
                readers.setdefault(buffer.name, []).append((i, op))
        for buffer in stage.writes:
            writers.setdefault(buffer.name, []).append(i)
    found, other, free_from = set[str](), set[str](), 0
    for i, stage in enumerate(stages):
        written = {b.name for b in stage.writes}
        norm = stage.ops[-1]
        if not (isinstance(norm, Norm) and _writes_rows(stage, norm)):
            other |= written
            continue
        name = norm.out.name
        until = next((j for j in writers.get(name, []) if j > i), len(stages))
        following = [(j, op) for j, op in readers.get(name, []) if i < j <= until]
        fit = all(_of_fp8(op) for _, op in following)
        if following and fit and i >= free_from:
            found.add(name)
            other |= written - {name}
            free_from = max(j for j, _ in following) + 1
        else:
            other |= written
    return frozenset(found - other)


def _of_fp8(op: Op) -> bool:
    """Whether it is a product of E4M3 weights."""
    return isinstance(op, Linear) and isinstance(op.weight.format, Fp8Format)


def _writes_rows(stage: Stage, norm: Norm) -> bool:
    """Whether it is a norm of whole rows, alone or behind a residual add, of experts it may be."""
    *before, _ = stage.ops
    alone = [type(op) for op in before] in ([], [Add], [Experts, Add])
    return alone and norm.group is None and norm.width is None and norm.out != norm.x


def activation_capacity(tokens: int) -> int:
    """Tokens that a row of activations' scales has room for."""
    return -(-tokens // SPARE_TOKENS) * SPARE_TOKENS + SPARE_TOKENS


def _matrices(packed: PackedWeight) -> int:
    return packed.weight.shape[0] if packed.weight.role == "stack" else 1


def _format(weight: Weight) -> Fp8Format:
    kept = format_of(weight)
    assert isinstance(kept, Fp8Format)
    return kept


def _kept(packed: PackedWeight) -> Fp8Format:
    return _format(packed.weight)


def _parts(weight: Weight, checkpoint: Checkpoint) -> list[Fp8Part] | None:
    """The weight's parts as E4M3; None where it is quantised on the way in."""
    infos = [(part, find_tensor(part, checkpoint)) for part in weight.parts]
    parts = [fp8_part(part, info) for part, info in infos if info is not None]
    return [p for p in parts if p is not None] if all(p is not None for p in parts) else None


def _sources(
    packed: PackedWeight, parts: list[Fp8Part] | None, checkpoint: Checkpoint
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """The kernel that packs each part, and the part's rows as bytes."""
    if parts is not None:
        yield from (("sm80_fp8_pack", part.codes()) for part in parts)
        return
    for raw in readable_parts(packed.weight, checkpoint):
        yield f"sm80_fp8_quantise_{raw.type.value.lower()}", raw.data


def _spread(scales: NDArray[np.float32], kept: Fp8Format, k: int) -> NDArray[np.float32]:
    """A part's scales [rows, 1] for each block of columns where the weight's change along a row."""
    blocks = -(-k // BLOCK_K)
    return scales if kept.scales == "row" or scales.shape[1] == blocks else np.repeat(scales, blocks, axis=1)


def arrange_scales(
    scales: NDArray[np.float32], rows: int, kind: fp8_plan.Scales, gated: bool
) -> NDArray[np.float32]:
    """Scales [N, 1 or K blocks] as they lie behind the tiles of a matrix of `rows` packed rows; see
    `scales_shape`.
    """
    order = np.arange(len(scales))
    if gated:
        half = len(scales) // 2
        inner = order % half
        order = inner // 8 * 16 + inner % 8 + np.where(order < half, 0, 8)
    placed = np.zeros((-(-rows // TILE) * TILE, scales.shape[1]), np.float32)
    placed[order] = scales
    if kind == "row":
        return np.ascontiguousarray(placed[:, 0])
    groups = placed.reshape(-1, TILE // FP8_ROWS, FP8_ROWS, scales.shape[1])
    # A group that ends with rows of padding has its scale in its first row.
    return np.ascontiguousarray(groups[:, :, 0].transpose(2, 0, 1))
