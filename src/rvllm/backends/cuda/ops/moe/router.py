"""How a mixture's router is launched: once, for few tokens with the norm before it.

The kernel is in `kernels/moe/router.cu`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.device.launches import Planned, fixed, ints
from rvllm.backends.cuda.ops.decode.chains import Part
from rvllm.backends.cuda.ops.decode.step import Mixture, NormFront, Step, Type
from rvllm.backends.cuda.ops.gemm.common import Kind
from rvllm.errors import MissingKernelError
from rvllm.kernels.decode.specs import MAX_NORM_WIDTH, ROWS
from rvllm.kernels.gemm.tiles import TILE
from rvllm.kernels.moe.specs import (
    MAX_CHOSEN,
    MAX_CLUSTER,
    MAX_EXPERTS,
    MAX_GROUPS,
    ROUTE_LANES,
    ROUTE_MANY,
    ROUTE_MANY_SMEM,
    ROUTE_SLICE,
    ROUTE_TOKENS,
    SPECS,
    route_smem,
    segments_of,
)
from rvllm.program.ops.dense import Norm, Route

NORM_ROUTED = 4  # tokens up to which the router normalises too: a block of it does so one by one
FEW_ROUTED = 512  # tokens up to which its blocks have a few tokens and 16 experts
SIGMOID, GROUP_TOP2, RENORMALISE = 1, 2, 4  # flags of `route`
_BY_NAME = {spec.name: spec for spec in SPECS}


@dataclass(frozen=True)
class RouteAt:
    """Device addresses of a Route; logits float32 [T, E] and arrivals int32 [T], zeros, are scratch.

    raw, norm_weight: where x is the RMS norm of raw by these float32 weights, and is still to be computed.
    """

    x: int
    ids: int
    shares: int
    weight: int
    bias: int
    logits: int
    arrivals: int
    num_tokens: int
    raw: int = 0
    norm_weight: int = 0


def _flags(op: Route) -> int:
    flags = SIGMOID * (op.scores == "sigmoid") + RENORMALISE * op.renormalise
    return flags + GROUP_TOP2 * (op.group_score == "top2")


def route_part(op: Route, at: RouteAt, norm: Norm | None) -> Part | None:
    """The router of one token as a step of a mixture; None for what such a step does not take."""
    experts, k = op.weight.shape
    if k % TILE or experts % ROWS or k > MAX_NORM_WIDTH:
        return None
    front = NormFront(at.raw, at.norm_weight, 0, at.x, k, norm.eps, False) if norm is not None else None
    mixture = Mixture(
        experts, op.top_k + op.always, op.always, op.groups, op.kept_groups, _flags(op), share_scale=op.scale
    )
    return Part(
        Step(
            at.weight,
            at.x,
            at.logits,
            experts,
            k,
            segments_of(k),
            experts,
            at.bias,
            kind=Kind.LOGITS,
            type=Type.ROUTE,
            norm=front,
            mixture=mixture,
        )
    )


def plan_route(
    op: Route, tokens: int, tag: str, at: RouteAt, chip: DeviceInfo, norm: Norm | None = None
) -> Planned:
    """The launch that scores and chooses experts for up to `tokens` tokens, after a norm if there is one.

    Raises MissingKernelError for what the kernel has no room for.
    """
    experts, k = op.weight.shape
    chosen = op.top_k + op.always
    if experts > MAX_EXPERTS or chosen > MAX_CHOSEN or op.groups > MAX_GROUPS or k % 8:
        raise MissingKernelError(
            f"no routing kernel for {chosen} of {experts} experts in {op.groups} groups of rows of {k}; "
            f"there is one for up to {MAX_CHOSEN} of {MAX_EXPERTS} in {MAX_GROUPS}, and rows of 8, 16, ..."
        )
    numbers = (k, experts, op.top_k, op.always, op.groups, op.kept_groups, _flags(op))
    lanes = next(32 * n for n in ROUTE_LANES if experts <= 32 * n)
    segments, scale = segments_of(k), ctypes.c_float(op.scale)
    if norm is None and tokens > FEW_ROUTED:
        return Planned(
            op.name, f"sm80_{tag}_route_many_e{lanes}", fixed(-(-tokens // ROUTE_MANY)), 256,
            (
                at.ids, at.shares, at.x, at.weight, at.bias, at.logits, at.num_tokens,
                *ints(*numbers, segments), scale,
            ),
            ROUTE_MANY_SMEM,
        )  # fmt: skip
    slices = -(-experts // ROUTE_SLICE)
    cluster = chip.capability == 90 and slices <= MAX_CLUSTER
    suffix = "_cluster" * cluster + "_norm" * (norm is not None)
    spec = _BY_NAME[f"sm{90 if cluster else 80}_{tag}_route{suffix}_e{lanes}"]
    room = chip.smem_per_block - spec.static_smem
    fits = [n for n in ROUTE_TOKENS if route_smem(segments, -(-k // TILE), n) <= room]
    if not fits:
        raise MissingKernelError(
            f"no routing kernel for rows of {k} with {chip.smem_per_block >> 10} KB of shared memory"
        )
    # A block takes its tokens one after the other: as few as give every multiprocessor a block.
    each = min((n for n in fits if slices * -(-tokens // n) <= chip.sm_count), default=fits[0])
    return Planned(
        op.name if norm is None else f"{norm.name} + {op.name}",
        spec.name,
        fixed(slices, -(-tokens // each)),
        32 * segments,
        (
            at.ids, at.shares, at.x, at.weight, at.bias, at.logits, at.arrivals, at.num_tokens, at.raw,
            at.norm_weight, *ints(*numbers, each), scale,
            ctypes.c_float(norm.eps if norm is not None else 0.0),
        ),
        route_smem(segments, -(-k // TILE), each),
        cluster=slices if cluster else 1,
    )  # fmt: skip
