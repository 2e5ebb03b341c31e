"""A Mamba layer as the backend plans it: its launches with their parameters, over a real step's metadata."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from rvllm.backends.base import StepBatch
from rvllm.backends.cpu.reference import ops
from rvllm.backends.cuda.device.driver import DeviceFacts
from rvllm.backends.cuda.device.launches import Counts
from rvllm.backends.cuda.layout.memory import Budget
from rvllm.backends.cuda.layout.metadata import SampledRows
from rvllm.backends.cuda.step_planner import StepPlanner
from rvllm.config import EngineConfig
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.program.ops.mamba2 import CausalConv, GatedNorm, StateScan
from support.kernels.harness import Machine, error, expect, rounded
from support.kernels.recurrent_checks import LIMIT, ScanShape, convolved, gathered, scanned

LENGTHS = (37, 20, 3)
STEPS = [  # (starts, tokens) of the sequences: prompts, decodes of two, of three, and both kinds
    ([0, 0, 0], [33, 14, 1]),
    ([33, 14], [1, 1]),
    ([34, 15, 1], [1, 1, 1]),
    ([35, 16, 2], [2, 4, 1]),
]


def check_planned(gpu: Machine, rng: np.random.Generator, config: dict[str, Any], dtype: DType) -> float:
    """Prompts in a padded body, decodes in padded decode steps, with the metadata of each."""
    np_dtype = np.dtype(ml_dtypes.bfloat16 if dtype is DType.BF16 else np.float16)
    program = build_program(ModelConfig(config, "tiny"), dtype)
    facts = DeviceFacts("any", 80, 4, 8 << 30, 166912)
    engine = EngineConfig(max_num_seqs=6, max_num_batched_tokens=96, max_model_len=128, num_gpu_blocks=64)
    planner, _ = StepPlanner.plan(program, engine, facts, Budget(8 << 30, 0, 6 << 30))
    conv = next(op for op in program.ops if isinstance(op, CausalConv))
    scan = next(op for op in program.ops if isinstance(op, StateScan))
    norm = next(op for op in program.ops if isinstance(op, GatedNorm))
    values = {
        w.name: rng.standard_normal(w.shape, np.float32) for op in (conv, scan, norm) for w in op.weights
    }
    values[scan.log_decay.name] = np.log(np.linspace(0.05, 12.0, scan.heads)).astype(np.float32)
    weights = {name: gpu.array(value) for name, value in values.items()}
    buffers = {b.name: gpu.empty((96, b.width), np_dtype) for b in (conv.x, conv.out, scan.out, norm.out)}
    states = {s.name: gpu.empty((6, s.elements), np.float32) for s in (conv.state, scan.state)}
    metadata = gpu.empty((planner.memory.layout.nbytes // 4,), np.int32)
    planner = replace(
        planner,
        stages=[stage for stage in planner.stages if stage.ops[0] in (conv, norm)],
        addresses=replace(
            planner.addresses,
            weights={(name, "norm"): array.address for name, array in weights.items()},
            buffers={name: array.address for name, array in buffers.items()},
            states={name: array.address for name, array in states.items()},
            metadata=metadata.address,
        ),
    )
    slots = np.array([4, 0, 2], np.int32)
    inputs = [rounded(rng.standard_normal((n, conv.x.width), np.float32), np_dtype) for n in LENGTHS]
    found = [np.zeros((n, norm.out.width), np.float32) for n in LENGTHS]
    for starts, counts in STEPS:
        seqs = len(starts)
        decode = max(counts) == 1
        padded = seqs + 1 if decode else sum(counts) + 5
        layout = planner.decode_layout(padded) if decode else planner.memory.layout
        batch = StepBatch(
            0, slots[:seqs], np.array(counts, np.int32), np.array(starts, np.int32),
            np.zeros(sum(counts), np.int32), np.ones(seqs, bool),
        )  # fmt: skip
        image = np.full(metadata.shape, -1, np.int32)
        none = np.zeros((0, 2), np.int32)
        layout.pack(batch, np.zeros((0, 3), np.int32), SampledRows.of(batch), none, image)
        metadata.put(image)
        parts = [(seq, at, n) for seq, (at, n) in enumerate(zip(starts, counts, strict=True))]
        rows = gathered(parts, inputs, 96 - sum(counts))
        buffers[conv.x.name].put(rows.astype(np_dtype))
        planned = planner.decode(padded) if decode else planner.body(padded)
        size = Counts(padded, padded if decode else planner.memory.shape.seqs, padded)
        for p in planned[1:]:
            args = [_pointer(a) if isinstance(a, int) else a for a in p.parameters]
            gpu.launch(p.kernel, p.grid(size), p.block, args, smem=p.smem)
        out, row = buffers[norm.out.name].get().astype(np.float32), 0
        for seq, at, n in parts:
            found[seq][at : at + n] = out[row : row + n]
            row += n
    worst = 0.0
    shape = ScanShape(scan.heads, scan.dim, scan.groups, scan.size)
    vectors = [values[w.name] for w in (scan.log_decay, scan.skip, scan.bias)]
    for x, y in zip(inputs, found, strict=True):
        own = x[:, conv.start : conv.start + conv.out.width]
        shift = values[conv.bias.name] if conv.bias else None
        xbc = rounded(convolved(own, values[conv.weight.name], shift, conv.activation), np_dtype)
        steps = x[:, scan.first : scan.first + scan.heads]
        z = rounded(scanned(xbc, steps, shape, vectors, scan.floor)[0], np_dtype)
        gated = (z * ops.silu(x[:, : z.shape[1]])).reshape(len(z), -1, norm.group)
        wanted = ops.rms_norm(gated, values[norm.weight.name].reshape(-1, norm.group), norm.eps)
        worst = max(worst, error(y, wanted.reshape(y.shape)))
    expect("planned layer", worst, 2 * LIMIT[np_dtype.name])
    return worst


def _pointer(address: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(address)
