"""Shared experts beside routed ones: a second branch of the step's graph between a fork and a join.

A small product for one token is over before the memory is busy: launching, filling pipelines and adding up
take longer than its bytes. What a layer's shared experts compute needs nothing of its routed experts, so both
chains run at the same time and hide each other's latencies. The branch's result gets a buffer of its own,
which is added where both meet. Steps of all sizes are cut alike, so a token has the same bits in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rvllm.backends.cuda.fuse import Stage
from rvllm.program.memory import Workspace, plan_workspace
from rvllm.program.ops import Add, Buffer, Experts, Linear, Norm


class SideStage(Stage):
    """A stage of the branch."""


class JoinStage(Stage):
    """The first stage that needs what the branch computed."""


def branched(stages: Sequence[Stage]) -> list[Stage]:
    """The stages with every shared expert that can be made a branch made one.

    A branch's first product stands where it may start, behind the stage that its input comes from.
    """
    found = list(stages)
    for i, stage in enumerate(found):
        if not isinstance(stage.ops[0], Experts):
            continue
        begin = i - 1 if i and _reads_alike(found[i - 1], stage) else i
        window = found[begin : begin + 4]
        if len(window) < 4:
            continue
        up = window[0] if begin < i else window[1]
        new = _branch(up, stage, window[2], window[3])
        if new is not None:
            found[begin : begin + 4] = new
    return found


def _reads_alike(up: Stage, experts: Stage) -> bool:
    """Whether a product reads what the experts read."""
    op, other = up.ops[0], experts.ops[0]
    return isinstance(op, Linear) and isinstance(other, Experts) and op.x == other.x


def _branch(up: Stage, experts: Stage, down: Stage, after: Stage) -> list[Stage] | None:
    """Shared up and down beside the experts, then the sum; None where these stages are something else."""
    if not _reads_alike(up, experts) or len(down.ops) != 2:
        return None
    linear, add = down.ops
    if not isinstance(linear, Linear) or not isinstance(add, Add) or add.y != linear.out:
        return None
    if linear.x not in up.writes or {b.name for b in up.writes} & {b.name for b in experts.reads}:
        return None
    sides: list[Stage] = [SideStage(up.ops, up.inner), experts, SideStage((linear,))]
    norm = after.ops[0]
    if len(after.ops) == 1 and isinstance(norm, Norm) and _norms_sum(norm, add):
        return [*sides, JoinStage((add, norm))]
    return [*sides, JoinStage((add,)), after]


def _norms_sum(norm: Norm, add: Add) -> bool:
    return norm.x == add.x and norm.group is None and norm.width is None and norm.out != norm.x


@dataclass(frozen=True)
class _Span:
    """Buffers that have to lie apart."""

    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...] = ()


def workspace_of(stages: Sequence[Stage], tokens: int, samples: int) -> Workspace:
    """Where buffers lie: what is touched between a fork and a join keeps its place all that time."""
    spans: list[_Span] = []
    touched: list[Buffer] = []
    size = 0  # of the region between fork and join
    for stage in stages:
        if isinstance(stage, JoinStage):
            spans += [_Span(tuple(touched))] * size
            touched, size = [], 0
        if isinstance(stage, SideStage) or size:
            touched += [*stage.reads, *stage.writes]
            size += 1
        elif stage.reads or stage.writes:
            spans.append(_Span(stage.reads, stage.writes))
    return plan_workspace(spans, tokens, samples)
