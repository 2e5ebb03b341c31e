"""Kernels of the Mamba-2 ops: every sum in an order that depends on the token's own position alone.

The scan works on whole chunks of CHUNK positions. What of a chunk is not known yet is zero, so each of its
matrix products has one shape, whether a prompt brings the chunk at once or decoding token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.cpu.reference import ops
from rvllm.backends.cpu.reference.run import Kernel, Run
from rvllm.backends.cpu.step import Step
from rvllm.program.ops import mamba2 as recurrent
from rvllm.program.ops.dense import Op
from rvllm.program.ops.mamba2 import CHUNK

F32 = NDArray[np.float32]
Ints = NDArray[np.int64]

TILE = 4  # tokens of a chunk that meet the state in one product
CAUSAL = np.tril(np.ones((CHUNK, CHUNK), dtype=np.bool_))  # [token, earlier token]


def softplus(x: F32) -> F32:
    """log(1 + exp(x))."""
    return np.logaddexp(x, np.float32(0))


def scan(x: F32, steps: F32, b: F32, c: F32, decay: F32, skip: F32, h: F32) -> tuple[F32, F32]:
    """The recurrence of StateScan as it stands, token by token, for one sequence: the reference.

    x [L, heads, dim], steps [L, heads], b and c [L, groups, size], decay and skip [heads],
    h [heads, dim, size] → y [L, heads, dim] and the state after the last token.
    """
    group = x.shape[1] // b.shape[1]
    b, c = np.repeat(b, group, axis=1), np.repeat(c, group, axis=1)
    y = np.empty_like(x)
    for t in range(len(x)):
        h = np.exp(steps[t] * decay)[:, None, None] * h
        h = h + steps[t][:, None, None] * x[t][:, :, None] * b[t][:, None, :]
        y[t] = np.einsum("hps,hs->hp", h, c[t]) + skip[:, None] * x[t]
    return y, h


@dataclass(frozen=True)
class Chunk:
    """The tokens of one chunk, for n sequences and the heads of one group, R of them.

    x [n, R, CHUNK, dim]; steps [n, R, CHUNK]; b, c [n, CHUNK, size]; decay, skip [R].
    """

    x: F32
    steps: F32
    b: F32
    c: F32
    decay: F32
    skip: F32

    def exponents(self) -> NDArray[np.float64]:
        """Sums of steps * decay up to each token [n, R, CHUNK]: only their differences matter, which may be
        far smaller, hence float64."""
        return np.cumsum(self.steps * self.decay[:, None], axis=-1, dtype=np.float64)

    def outputs(self, h: Sequence[F32], first: Sequence[int], end: Sequence[int]) -> F32:
        """y [n, R, CHUNK, dim] from each sequence's state [R, dim, size] before the chunk.

        Of each sequence, tokens first .. end - 1 of the chunk are wanted; the others may come out wrong.
        """
        total = self.exponents()
        between = np.where(CAUSAL, total[..., :, None] - total[..., None, :], -np.inf)
        near = np.exp(between.astype(np.float32)) * self.steps[..., None, :]
        near *= np.matmul(self.c, self.b.swapaxes(1, 2))[:, None]
        y: F32 = np.matmul(near, self.x)
        before = np.zeros_like(y)
        tiles = before.reshape(*y.shape[:2], -1, TILE, y.shape[3]).swapaxes(1, 2)  # a view [n, tiles, R, ...]
        queries = self.c.reshape(len(h), -1, 1, TILE, self.c.shape[2])
        for i, state in enumerate(h):
            part = slice(first[i] // TILE, -(-end[i] // TILE))
            np.matmul(queries[i, part], state.swapaxes(1, 2), out=tiles[i, part])
        y += before * np.exp(total.astype(np.float32))[..., None]
        y += self.skip[:, None, None] * self.x
        return y

    def advance(self, h: Sequence[F32], complete: NDArray[np.bool_]) -> None:
        """Moves the states of the sequences all of whose tokens are known behind the chunk, in place."""
        total = self.exponents()
        left = np.exp((total[..., -1:] - total).astype(np.float32)) * self.steps
        kept = np.exp(total[..., -1].astype(np.float32))
        for i in np.flatnonzero(complete).tolist():
            weighted = np.ascontiguousarray((self.x[i] * left[i][..., None]).swapaxes(1, 2))
            state = h[i]
            state *= kept[i][:, None, None]
            state += np.matmul(weighted, self.b[i])


@dataclass(frozen=True)
class Round:
    """One chunk of each of the sequences `which`, [n]; of it, tokens first .. end - 1 are this step's.

    complete: whether all tokens of the chunk are known.
    """

    which: Ints
    complete: NDArray[np.bool_]
    first: list[int]
    end: list[int]


@dataclass(frozen=True)
class Chunks:
    """Where a step's tokens stand in chunks; all scans of the step share it.

    The chunks of sequence s are counted from bases[s]. places: [T] chunk * CHUNK + offset of each token.
    known, sources: places of tokens that earlier steps brought, and (sequence, offset) where they are kept.
    last: [S] each sequence's newest chunk. rounds: one for the first, second ... chunk of each sequence.
    """

    count: int
    bases: Ints
    places: Ints
    known: Ints
    sources: tuple[Ints, Ints]
    last: Ints
    rounds: list[Round]

    @staticmethod
    def of(step: Step) -> Chunks:
        offsets = step.starts % CHUNK
        ends = offsets + step.query_lens
        counts = -(-ends // CHUNK)
        bases = np.cumsum(counts) - counts
        sequence = np.repeat(np.arange(len(counts)), step.query_lens)
        row = np.arange(len(sequence)) - step.first_rows[sequence]
        earlier = np.repeat(np.arange(len(counts)), offsets)
        place = np.arange(len(earlier)) - (np.cumsum(offsets) - offsets)[earlier]
        rounds = []
        for j in range(int(counts.max(initial=0))):
            which = np.flatnonzero(counts > j)
            first = np.maximum(offsets[which] - j * CHUNK, 0)
            end = np.minimum(ends[which] - j * CHUNK, CHUNK)
            rounds.append(Round(which, end == CHUNK, first.tolist(), end.tolist()))
        return Chunks(
            count=int(counts.sum()),
            bases=bases,
            places=bases[sequence] * CHUNK + offsets[sequence] + row,
            known=bases[earlier] * CHUNK + place,
            sources=(earlier, place),
            last=bases + counts - 1,
            rounds=rounds,
        )


def state_scan_op(op: recurrent.StateScan, run: Run) -> None:
    """Chunk after chunk, all sequences together, the groups of heads side by side."""
    step, weights = run.step, run.model.weights
    state = run.model.states[op.state.name]
    chunks = step.shared("chunks", lambda: Chunks.of(step))
    inner, wide = op.heads * op.dim, op.groups * op.size
    carried, recent = state[:, : inner * op.size], state[:, inner * op.size :].reshape(len(state), CHUNK, -1)

    xbc, raw = run[op.xbc], run[op.steps][:, op.first : op.first + op.heads]
    rows = np.zeros((chunks.count * CHUNK, inner + 2 * wide + op.heads), dtype=np.float32)
    rows[chunks.known] = recent[step.slots[chunks.sources[0]], chunks.sources[1]]
    rows[chunks.places, : inner + 2 * wide] = xbc
    rows[chunks.places, inner + 2 * wide :] = raw
    tokens = rows.reshape(chunks.count, CHUNK, -1)
    recent[step.slots] = tokens[chunks.last]

    per_group = op.heads // op.groups
    steps = softplus(tokens[..., inner + 2 * wide :] + weights[op.bias.name])
    np.maximum(steps, np.float32(op.floor), out=steps)
    decay, skip = -np.exp(weights[op.log_decay.name]), weights[op.skip.name]
    out = np.empty((chunks.count, CHUNK, op.heads, op.dim), dtype=np.float32)
    h = carried.reshape(len(state), op.groups, per_group, op.dim, op.size)
    h[step.slots[step.starts == 0]] = 0

    def work(group: int) -> None:
        heads = slice(group * per_group, (group + 1) * per_group)
        columns = slice(heads.start * op.dim, heads.stop * op.dim)
        first_b = inner + group * op.size
        for j, now in enumerate(chunks.rounds):
            at = chunks.bases[now.which] + j
            slots = step.slots[now.which].tolist()
            x = tokens[at, :, columns].reshape(len(at), CHUNK, per_group, op.dim).transpose(0, 2, 1, 3)
            chunk = Chunk(
                x=np.ascontiguousarray(x),
                steps=np.ascontiguousarray(steps[at, :, heads].swapaxes(1, 2)),
                b=np.ascontiguousarray(tokens[at, :, first_b : first_b + op.size]),
                c=np.ascontiguousarray(tokens[at, :, first_b + wide : first_b + wide + op.size]),
                decay=decay[heads],
                skip=skip[heads],
            )
            states = [h[slot, group] for slot in slots]
            out[at, :, heads] = chunk.outputs(states, now.first, now.end).transpose(0, 2, 1, 3)
            if now.complete.any():
                chunk.advance(states, now.complete)

    run.model.workers.each(op.groups, work)
    run[op.out] = out.reshape(chunks.count * CHUNK, -1)[chunks.places]


@dataclass(frozen=True)
class Windows:
    """Each sequence's rows with `before` earlier ones in front, all one behind the other.

    firsts: [S] the first earlier row. places: [T] the row of each token's oldest input.
    """

    rows: int
    firsts: Ints
    places: Ints

    @staticmethod
    def of(step: Step, before: int) -> Windows:
        firsts = step.first_rows + before * np.arange(len(step.first_rows))
        sequence = np.repeat(np.arange(len(firsts)), step.query_lens)
        return Windows(
            rows=len(sequence) + before * len(firsts),
            firsts=firsts,
            places=np.arange(len(sequence)) + before * sequence,
        )


def causal_conv_op(op: recurrent.CausalConv, run: Run) -> None:
    """The taps added in order, elementwise."""
    step, weight, bias = run.step, run.model.weights[op.weight.name], run.weight(op.bias)
    width, kernel = weight.shape
    before = kernel - 1
    state = run.model.states[op.state.name].reshape(-1, before, width)
    windows = step.shared(("windows", before), lambda: Windows.of(step, before))
    state[step.slots[step.starts == 0]] = 0
    rows = np.empty((windows.rows, width), dtype=np.float32)
    rows[windows.firsts[:, None] + np.arange(before)] = state[step.slots]
    rows[windows.places + before] = run[op.x][:, op.start : op.start + width]
    ends = windows.firsts + step.query_lens
    state[step.slots] = rows[ends[:, None] + np.arange(before)]
    out = np.empty((len(windows.places), width), dtype=np.float32)

    def work(part: slice) -> None:
        places = windows.places[part]
        total = rows[places] * weight[:, 0]
        for tap in range(1, kernel):
            total += rows[places + tap] * weight[:, tap]
        if bias is not None:
            total += bias
        out[part] = ops.activate(total, op.activation)

    run.by_rows(len(out), work)
    run[op.out] = out


def gated_norm_op(op: recurrent.GatedNorm, run: Run) -> None:
    """See ops.rms_norm; each group is a row of its own."""
    x, weight = run[op.x], run.model.weights[op.weight.name].reshape(-1, op.group)
    gate = run[op.gate][:, : x.shape[1]]
    out = np.empty_like(x)

    def work(rows: slice) -> None:
        gated = x[rows] * ops.silu(gate[rows])
        normed = ops.rms_norm(gated.reshape(len(gated), -1, op.group), weight, op.eps)
        out[rows] = normed.reshape(len(gated), -1)

    run.by_rows(len(out), work)
    run[op.out] = out


KERNELS: dict[type[Op], Kernel] = {
    recurrent.CausalConv: causal_conv_op,
    recurrent.StateScan: state_scan_op,
    recurrent.GatedNorm: gated_norm_op,
}
