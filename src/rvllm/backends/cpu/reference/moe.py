"""Mixtures of experts: choosing experts for each token, and running those that were chosen.

A token's result does not depend on which tokens share its experts: products have rows of fixed bits (see
`product`), and a token's shares are added in the order of its own choice.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.cpu.reference import ops
from rvllm.backends.cpu.reference.gemm import product
from rvllm.backends.cpu.reference.run import Kernel, Run
from rvllm.backends.cpu.threads import Workers
from rvllm.program.ops import dense as program_ops
from rvllm.program.ops.dense import Activation, Op

F32 = NDArray[np.float32]
Ints = NDArray[np.int32]


def score(logits: F32, how: Literal["softmax", "sigmoid"]) -> F32:
    """softmax or sigmoid of the router's logits [T, E]."""
    if how == "sigmoid":
        out: F32 = np.float32(1) / (np.float32(1) + np.exp(-logits))
        return out
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    total = np.vecdot(weights, np.ones(weights.shape[1], np.float32))  # one order of sums, whatever T
    shares: F32 = weights / total[:, None]
    return shares


def largest(values: F32, count: int) -> Ints:
    """Indices of the `count` largest of each row, in descending order; of equals the lower index first."""
    return np.argsort(-values, axis=1, kind="stable")[:, :count].astype(np.int32)


def keep_groups(choice: F32, groups: int, kept: int, worth: Literal["max", "top2"]) -> F32:
    """choice [T, E] with -inf in all but the `kept` best of `groups` equal groups."""
    grouped = choice.reshape(len(choice), groups, -1)
    if worth == "max":
        worths = grouped.max(axis=2)
    else:
        best = np.sort(grouped, axis=2)
        worths = best[:, :, -1] + best[:, :, -2]
    out = np.full_like(grouped, -np.inf)
    best_groups = largest(worths, kept)[:, :, None]
    np.put_along_axis(out, best_groups, np.take_along_axis(grouped, best_groups, axis=1), axis=1)
    return out.reshape(choice.shape)


def choose(logits: F32, bias: F32 | None, op: program_ops.Route) -> tuple[Ints, F32]:
    """ids and shares [T, top_k + always] by the router's logits [T, E]; see the op Route."""
    scores = score(logits, op.scores)
    choice = scores if bias is None else scores + bias
    if op.kept_groups < op.groups:
        choice = keep_groups(choice, op.groups, op.kept_groups, op.group_score)
    ids = largest(choice, op.top_k)
    shares: F32 = np.take_along_axis(scores, ids, axis=1)
    if op.renormalise:
        total = shares[:, 0].copy()
        for j in range(1, op.top_k):
            total += shares[:, j]
        shares = shares / (total + np.float32(1e-20))[:, None]
    if op.scale != 1.0:
        shares = shares * np.float32(op.scale)
    return with_everyones(ids, shares, scores.shape[1], op.always)


def with_everyones(ids: Ints, shares: F32, experts: int, always: int) -> tuple[Ints, F32]:
    """ids and shares [T, k] followed by the experts `experts`, `experts` + 1, ... that all tokens have."""
    if not always:
        return ids, shares
    more = np.arange(experts, experts + always, dtype=np.int32)
    ones = np.ones((len(ids), always), dtype=np.float32)
    return np.hstack([ids, np.broadcast_to(more, ones.shape)]), np.hstack([shares, ones])


def run_experts(
    x: F32, ids: Ints, shares: F32, up: F32, down: F32, activation: Activation, gated: bool, workers: Workers
) -> F32:
    """See the op Experts: x [T, K], ids and shares [T, k], up [E, ., K], down [E, N, .] → [T, N]."""
    tokens, chosen = ids.shape
    flat = ids.reshape(-1)
    order = np.argsort(flat, kind="stable")  # places t * k + j, those of one expert side by side
    hit, begins = np.unique(flat[order], return_index=True)
    results = np.empty((tokens * chosen, down.shape[1]), dtype=np.float32)
    for expert, places in zip(hit.tolist(), np.split(order, begins[1:]), strict=True):
        inner = product(x[places // chosen], up[expert], workers)
        act = ops.gated_activation(inner, activation) if gated else ops.activate(inner, activation)
        results[places] = product(act, down[expert], workers)
    parts = results.reshape(tokens, chosen, -1)
    out: F32 = parts[:, 0] * shares[:, :1]
    for j in range(1, chosen):
        out += parts[:, j] * shares[:, j : j + 1]
    return out


def clamped_gate(x: F32, limit: float | None, alpha: float) -> F32:
    """See the op ClampedGate; [rows, 2 * width] → [rows, width]."""
    width = x.shape[-1] // 2
    gate, up = x[:, :width], x[:, width:]
    if limit is not None:
        gate = np.minimum(gate, np.float32(limit))
        up = np.clip(up, np.float32(-limit), np.float32(limit))
    out: F32 = gate / (np.float32(1) + np.exp(gate * np.float32(-alpha))) * (up + np.float32(1))
    return out


def route_op(op: program_ops.Route, run: Run) -> None:
    """`choose`, with the router's product in pieces of fixed shape."""
    logits = product(run[op.x], run.model.weights[op.weight.name], run.model.workers)
    run.buffers[op.ids.name], run[op.shares] = choose(logits, run.weight(op.bias), op)


def experts_op(op: program_ops.Experts, run: Run) -> None:
    weights = run.model.weights
    run[op.out] = run_experts(
        run[op.x], run.buffers[op.ids.name], run[op.shares], weights[op.up.name], weights[op.down.name],
        op.activation, op.gated, run.model.workers,
    )  # fmt: skip


def clamped_gate_op(op: program_ops.ClampedGate, run: Run) -> None:
    run[op.out] = clamped_gate(run[op.x], op.limit, op.alpha)


def hide_tokens_op(op: program_ops.HideTokens, run: Run) -> None:
    """logits of tokens that are none become -inf."""
    run[op.logits][:, list(op.tokens)] = np.float32(-np.inf)


KERNELS: dict[type[Op], Kernel] = {
    program_ops.Route: route_op,
    program_ops.Experts: experts_op,
    program_ops.ClampedGate: clamped_gate_op,
    program_ops.HideTokens: hide_tokens_op,
}
