"""Products of one input that are small and follow each other, made one: a launch less, and fewer idle SMs.

Queries and latents of a layer whose queries have no latent of their own are the one case. In the program
that comes out of this both lie in one buffer, a token's queries first, and LatentRopeKV names it twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rvllm.program.ops.dense import Buffer, HeadLinear, LatentRopeKV, Linear, Norm, Op, Program, Weight


def joined(program: Program) -> Program:
    """The program with those products joined; the same program where there are none."""
    ops: list[Op] = []
    buffers = {b.name: b for b in program.buffers}
    weights = {w.name: w for w in program.weights}
    position = 0
    while position < len(program.ops):
        given = program.ops[position : position + 5]
        new = _join(given)
        if new is None:
            ops.append(given[0])
            position += 1
            continue
        for old in given[:2]:
            assert isinstance(old, Linear)
            del buffers[old.out.name], weights[old.weight.name]
        both = new[0]
        buffers[both.out.name], weights[both.weight.name] = both.out, both.weight
        ops += new
        position += len(given)
    return replace(program, ops=tuple(ops), buffers=tuple(buffers.values()), weights=tuple(weights.values()))


def _join(ops: Sequence[Op]) -> tuple[Linear, Norm, LatentRopeKV, HeadLinear] | None:
    """What replaces products of queries and latents, the latents' norm, rotation and absorbed queries."""
    match ops:
        case [Linear() as q, Linear() as kv, Norm() as norm, LatentRopeKV() as rope, HeadLinear() as absorb]:
            pass
        case _:
            return None
    biased = q.bias is not None or kv.bias is not None
    if q.x != kv.x or biased or (rope.q, rope.kv, absorb.x) != (q.out, kv.out, q.out) or norm.x != kv.out:
        return None
    rows, width = q.weight.shape[0] + kv.weight.shape[0], q.weight.shape[1]
    weight = Weight(
        f"{q.weight.name} + {kv.weight.name}", (rows, width), (*q.weight.parts, *kv.weight.parts), "matrix"
    )
    out = Buffer(f"{q.out.name} + {kv.out.name}", q.out.rows, rows, q.out.dtype)
    return (
        replace(q, name=f"{q.name} + {kv.name}", weight=weight, out=out),
        replace(norm, x=out, out=out, start=q.out.width + norm.start),
        replace(rope, q=out, kv=out),
        replace(absorb, x=out),
    )
