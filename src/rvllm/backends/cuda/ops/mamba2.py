"""Mamba-2: the short convolution, the scan and the gated norm: their launches.

FAMILY: what the registry knows of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from rvllm.backends.cuda.device.launches import ints
from rvllm.backends.cuda.layout.fusion import Stage
from rvllm.backends.cuda.layout.metadata import NUM_SEQS
from rvllm.backends.cuda.layout.packed import WeightLayout
from rvllm.backends.cuda.ops.family import Family, Lowering, Wanted
from rvllm.errors import MissingKernelError
from rvllm.kernels.mamba2.specs import (
    conv_kernel,
    gated_norm_kernel,
    scan_convolves,
    scan_kernel,
    scan_smem,
)
from rvllm.program.ops.dense import Op
from rvllm.program.ops.mamba2 import CausalConv, GatedNorm, StateScan

CONV_THREADS = 64  # of 8 channels each: a decode step's blocks spread over many SMs
MANY_TOKENS = 512  # from here on a thread of the convolution takes MANY_ROWS, which read fewer rows twice
FEW_ROWS, MANY_ROWS = 2, 8
SCAN_ROWS = 32  # of blocks at most in a step with prompts, each walking over several sequences
KEEP_THREADS = 256


def conv_tile(tokens: int, prefill: bool) -> int:
    """Rows a thread of the convolution takes in a step of up to `tokens`; no bit depends on it."""
    if not prefill:
        return 1
    return MANY_ROWS if tokens >= MANY_TOKENS else FEW_ROWS


def _aligned(name: str, *columns: int) -> None:
    """Raises MissingKernelError unless rows of these sizes and offsets are made of whole 16-byte vectors."""
    odd = [n for n in columns if n % 8]
    if odd:
        raise MissingKernelError(f"{name} takes rows and offsets of multiples of 8 elements, not {odd[0]}")


class ConvAt(ctypes.Structure):
    """The convolution that a scan computes itself: `Conv` of mamba2/scan.cu; all zero for none."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("state", ctypes.c_void_p),
        ("pitch", ctypes.c_int),
        ("slot_elements", ctypes.c_int),
    )


def _conv_and_scan(lowering: Lowering, stage: Stage) -> None:
    """One launch for single tokens where the scan can convolve, two else."""
    conv, *rest = stage.ops
    assert isinstance(conv, CausalConv)
    kernel = conv_kernel(lowering.dtype.value, conv.weight.shape[1], conv.activation)
    _aligned("the convolution", conv.weight.shape[0], conv.x.width, conv.start)
    if not rest:
        _conv(lowering, conv.name, conv, kernel)
        return
    (scan,) = rest
    assert isinstance(scan, StateScan)
    if lowering.prefill is None and scan_convolves(conv.weight.shape[1], conv.activation):
        _scan(lowering, stage.name, scan, conv)
        return
    _conv(lowering, stage.name, conv, kernel)
    _scan(lowering, stage.name, scan, None)


def _state_scan(lowering: Lowering, stage: Stage) -> None:
    (op,) = stage.ops
    assert isinstance(op, StateScan)
    _scan(lowering, stage.name, op, None)


def _conv(lowering: Lowering, name: str, op: CausalConv, kernel: str) -> None:
    at, layout = lowering.at, lowering.layout
    width = op.weight.shape[0]
    tile = conv_tile(lowering.counts.tokens, lowering.prefill is not None)
    lowering.plan(
        name,
        kernel,
        lambda c: (-(-width // 8 // CONV_THREADS), -(-c.tokens // tile), 1),
        CONV_THREADS,
        at.buffers[op.out.name],
        at.buffers[op.x.name] + 2 * op.start,
        lowering.weight(op.weight, "norm"),
        lowering.weight(op.bias, "norm"),
        at.states[op.state.name],
        at.metadata,
        lowering.meta(layout.positions),
        lowering.meta(layout.token_slots),
        lowering.meta(layout.query_offsets),
        *ints(width, op.x.width, op.state.elements, tile),
    )


def _scan(lowering: Lowering, name: str, op: StateScan, conv: CausalConv | None) -> None:
    """The scan, and in steps with prompts a launch that keeps the newest chunk. conv: computed within."""
    kernel = scan_kernel(lowering.dtype.value, op.dim, op.size, conv is not None)
    at, layout = lowering.at, lowering.layout
    steps = at.buffers[op.steps.name] + 2 * op.first
    sequences = (
        at.states[op.state.name],
        lowering.meta(NUM_SEQS),
        lowering.meta(layout.seq_slots),
        lowering.meta(layout.kv_lens),
        lowering.meta(layout.query_offsets),
    )
    shape = [ctypes.c_int(n) for n in (op.state.elements, op.steps.width, op.heads, op.dim, op.groups)]
    prompts = lowering.prefill is not None
    lowering.plan(
        name,
        kernel,
        lambda c: (op.heads, min(c.seqs, c.tokens, SCAN_ROWS) if prompts else c.seqs, 1),
        2 * op.dim,
        at.buffers[op.out.name],
        at.buffers[op.xbc.name],
        steps,
        lowering.weight(op.log_decay, "norm"),
        lowering.weight(op.skip, "norm"),
        lowering.weight(op.bias, "norm"),
        *sequences,
        *shape,
        ctypes.c_float(op.floor),
        ctypes.c_int(0 if prompts else 1),
        _conv_at(lowering, conv) if conv else ConvAt(),
        smem=scan_smem(op.dim, op.size),
        why="the convolution too: sequences with one token" if conv else "",
    )
    if prompts:
        vectors = (op.heads * op.dim + op.groups * op.size) // 8
        lowering.plan(
            name,
            f"sm80_{lowering.tag}_scan_keep",
            lambda c: (-(-vectors // KEEP_THREADS), min(c.seqs, c.tokens, SCAN_ROWS), 1),
            KEEP_THREADS,
            at.buffers[op.xbc.name],
            steps,
            *sequences,
            *shape,
            ctypes.c_int(op.size),
            why="the newest chunk, for the next step",
        )


def _conv_at(lowering: Lowering, op: CausalConv) -> ConvAt:
    at = lowering.at
    return ConvAt(
        at.buffers[op.x.name] + 2 * op.start,
        lowering.weight(op.weight, "norm"),
        lowering.weight(op.bias, "norm") or None,
        at.states[op.state.name],
        op.x.width,
        op.state.elements,
    )


def _gated_norm(lowering: Lowering, stage: Stage) -> None:
    (op,) = stage.ops
    assert isinstance(op, GatedNorm)
    kernel, threads = gated_norm_kernel(lowering.dtype.value, op.group)
    width = op.x.width
    _aligned("the gated norm", width, op.gate.width)
    lowering.plan(
        stage.name,
        kernel,
        lambda c: (width // op.group, c.tokens, 1),
        threads,
        lowering.at.buffers[op.out.name],
        lowering.at.buffers[op.x.name],
        lowering.at.buffers[op.gate.name],
        lowering.weight(op.weight, "norm"),
        *ints(width, op.gate.width, op.group),
        ctypes.c_float(op.eps),
    )


def _weights(op: Op, stage: Stage, matrices: WeightLayout) -> Iterable[Wanted]:
    return ((weight, "norm") for weight in op.weights)


FAMILY = Family(
    emitters={CausalConv: _conv_and_scan, StateScan: _state_scan, GatedNorm: _gated_norm}, weights=_weights
)
