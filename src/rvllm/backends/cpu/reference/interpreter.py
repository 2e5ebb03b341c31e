"""Runs a program's ops one after the other: the table of kernels, a family's from its own module.

A kernel is a function (op, run) that reads and writes the run's buffers; which one an op takes is
settled once, when the program is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.base import KV_BLOCK
from rvllm.backends.cpu.reference import encoder, mamba2, mla, moe, ops
from rvllm.backends.cpu.reference.attention import Pages, Scoring, paged_attention
from rvllm.backends.cpu.reference.fp8_cache import stored
from rvllm.backends.cpu.reference.gemm import product
from rvllm.backends.cpu.reference.run import F32, Kernel, Run
from rvllm.errors import MissingKernelError
from rvllm.program.memory import lifetimes
from rvllm.program.ops import dense as program_ops
from rvllm.program.ops.dense import KVCache, Op, Program

RESULTS = ("logits", "embeddings")  # buffers that outlive the run


def embed(op: program_ops.Embed, run: Run) -> None:
    run[op.out] = ops.embed(run.step.tokens, run.model.weights[op.table.name], op.scale)


def norm(op: program_ops.Norm, run: Run) -> None:
    """See ops.rms_norm and ops.layer_norm; slices of a row are normalised as rows of their own."""
    whole = run[op.x]
    width = whole.shape[-1] - op.start if op.width is None else op.width
    x = whole if width == whole.shape[-1] else whole[:, op.start : op.start + width]
    weight, bias = run.weight(op.weight), run.weight(op.bias)
    if op.group is not None:
        x = x.reshape(len(x), -1, op.group)
        weight = None if weight is None else weight.reshape(-1, op.group)
        bias = None if bias is None else bias.reshape(-1, op.group)
    out = np.empty(x.shape, dtype=np.float32)

    def work(rows: slice) -> None:
        if op.kind_ == "rms":
            out[rows] = ops.rms_norm(x[rows], weight, op.eps)
        else:
            out[rows] = ops.layer_norm(x[rows], weight, bias, op.eps)

    run.by_rows(len(x), work)
    if op.out == op.x:
        whole[:, op.start : op.start + width] = out.reshape(len(whole), width)
    else:
        run[op.out] = out.reshape(len(whole), width)


def linear(op: program_ops.Linear, run: Run) -> None:
    """ops.linear in pieces of fixed shape."""
    out = product(run[op.x], run.model.weights[op.weight.name], run.model.workers)
    bias = run.weight(op.bias)
    if bias is not None:
        out += bias
    run[op.out] = out


def rope_kv(op: program_ops.RopeKV, run: Run) -> None:
    """Rotates queries and keys in place and writes keys and values to their places in the cache."""
    qkv, step = run[op.qkv], run.step
    heads = qkv.reshape(len(qkv), -1, op.head_dim)
    rotated = op.heads + op.kv_heads
    if op.rope is not None:
        cos, sin = run.model.ropes[op.rope]
        cos, sin = cos[step.positions], sin[step.positions]
        interleaved = op.rope.interleaved

        def work(rows: slice) -> None:
            heads[rows, :rotated] = ops.rotate(heads[rows, :rotated], cos[rows], sin[rows], interleaved)

        run.by_rows(len(qkv), work)
    keys, values = run.model.caches[op.cache.name]
    for cache, rows in ((keys, heads[:, op.heads : rotated]), (values, heads[:, rotated:])):
        cache.reshape(-1, *cache.shape[2:])[step.places] = stored(rows) if op.cache.fp8 else rows


def attention(op: program_ops.Attention | program_ops.BlockSparseAttention, run: Run) -> None:
    """ops.attention over the paged cache, in splits of fixed shape; keys that a head does not see weigh
    nothing."""
    qkv = run[op.qkv]
    q = qkv[:, : op.heads * op.head_dim].reshape(len(qkv), op.heads, op.head_dim)
    keys, values = run.model.caches[op.cache.name]
    if isinstance(op, program_ops.Attention):
        scoring = Scoring(op.scale, op.window, op.soft_cap)
    else:
        groups = (op.kv_heads, op.heads // op.kv_heads)
        scoring = Scoring(op.scale, sparsity=op.sparsity, groups=groups)
    out = paged_attention(q, Pages(keys, values), run.step, scoring, run.model.workers)
    run[op.out] = out.reshape(len(qkv), -1)


def activate(op: program_ops.Activate | program_ops.GatedActivation, run: Run) -> None:
    """See ops.activate and ops.gated_activation."""
    x = run[op.x]
    out = np.empty((len(x), op.out.width), dtype=np.float32)
    function = ops.activate if isinstance(op, program_ops.Activate) else ops.gated_activation

    def work(rows: slice) -> None:
        out[rows] = function(x[rows], op.activation)

    run.by_rows(len(x), work)
    run[op.out] = out


def add(op: program_ops.Add, run: Run) -> None:
    run[op.x] = ops.add(run[op.x], run[op.y], op.scale)


def gather_rows(op: program_ops.GatherRows, run: Run) -> None:
    """The rows whose logits are wanted."""
    run[op.out] = run[op.x][run.step.rows]


def logits(op: program_ops.Logits, run: Run) -> None:
    """ops.logits in pieces of fixed shape."""
    out = product(run[op.x], run.model.weights[op.weight.name], run.model.workers)
    run[op.out] = ops.finish_logits(out, run.weight(op.bias), op.scale, op.soft_cap)


def sample(op: program_ops.Sample, run: Run) -> None:
    """The draw itself is the backend's: it needs the slots' state. Hands it the logits."""
    run.buffers["logits"] = run[op.logits]


KERNELS: dict[type[Op], Kernel] = {
    program_ops.Embed: embed,
    program_ops.Norm: norm,
    program_ops.Linear: linear,
    program_ops.RopeKV: rope_kv,
    program_ops.Attention: attention,
    program_ops.GatedActivation: activate,
    program_ops.Activate: activate,
    program_ops.Add: add,
    program_ops.GatherRows: gather_rows,
    program_ops.Logits: logits,
    program_ops.Sample: sample,
    program_ops.BlockSparseAttention: attention,
    **moe.KERNELS,
    **mla.KERNELS,
    **mamba2.KERNELS,
    **encoder.KERNELS,
}


@dataclass(frozen=True)
class Launch:
    """An op with its kernel, and the buffers that nothing reads after it."""

    op: Op
    kernel: Kernel
    dead: tuple[str, ...]


def resolve(program: Program) -> list[Launch]:
    """Every op's kernel. Raises MissingKernelError listing all op types that have none."""
    missing = sorted({op.kind for op in program.ops if type(op) not in KERNELS})
    if missing:
        raise MissingKernelError(
            f"{program.architecture}: the CPU backend has no kernel for {', '.join(missing)}; "
            f"it has {', '.join(sorted(t.__name__.lower() for t in KERNELS))}"
        )
    dead: dict[int, list[str]] = {}
    for life in lifetimes(program.ops):
        dead.setdefault(life.last, []).append(life.buffer.name)
    return [
        Launch(op, KERNELS[type(op)], tuple(n for n in dead.get(i, ()) if n not in RESULTS))
        for i, op in enumerate(program.ops)
    ]


def execute(launches: list[Launch], run: Run) -> None:
    """Runs all ops; a buffer's memory is given back after its last use."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        for launch in launches:
            launch.kernel(launch.op, run)
            for name in launch.dead:
                run.buffers.pop(name, None)


def empty_caches(program: Program, blocks: int) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Key and value arrays of every cache, with one block more that stays zero to pad block tables.

    float32 [blocks, KV_BLOCK, heads, dim], or bytes [blocks, KV_BLOCK, heads, dim + 1] (see `fp8_cache`).
    Memory is taken as it is first written.
    """

    def empty(cache: KVCache, dim: int) -> NDArray[Any]:
        shape = (blocks + 1, KV_BLOCK, cache.heads, dim + cache.fp8)
        return np.zeros(shape, dtype=np.uint8 if cache.fp8 else np.float32)

    return {c.name: (empty(c, c.key_dim), empty(c, c.value_dim)) for c in program.caches}


def empty_states(program: Program, slots: int) -> dict[str, F32]:
    """What recurrent layers carry, [slots, elements] each; memory is taken as it is first written."""
    return {s.name: np.zeros((slots, s.elements), dtype=np.float32) for s in program.states}
