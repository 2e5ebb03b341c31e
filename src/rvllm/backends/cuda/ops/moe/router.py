"""How a mixture's router is launched: once, for few tokens with the norm before it.

The kernel is in `kernels/moe/router.cu`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from rvllm.backends.cuda.device.launches import Planned, fixed
from rvllm.errors import MissingKernelError
from rvllm.kernels.moe.specs import MAX_CHOSEN, MAX_CLUSTER, MAX_EXPERTS, MAX_GROUPS, ROUTE_LANES, ROUTES
from rvllm.program.ops.dense import Norm, Route

WIDE_ROUTE = 16  # tokens from which on a block of the router's kernel takes several
SIGMOID, GROUP_TOP2, RENORMALISE = 1, 2, 4  # flags of `route`


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


def plan_route(
    op: Route, tokens: int, tag: str, at: RouteAt, norm: Norm | None = None, capability: int = 80
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
    suffix = _route_kernel(experts, tokens, norm is not None, capability)
    shape = ROUTES[suffix]
    flags = SIGMOID * (op.scores == "sigmoid") + RENORMALISE * op.renormalise
    flags += GROUP_TOP2 * (op.group_score == "top2")
    blocks = -(-experts // (shape.warps * shape.experts))
    numbers = (k, experts, op.top_k, op.always, op.groups, op.kept_groups, flags)
    lanes = next(32 * n for n in ROUTE_LANES if experts <= 32 * n)
    return Planned(
        op.name if norm is None else f"{norm.name} + {op.name}",
        f"sm{90 if shape.cluster else 80}_{tag}_route{suffix}_e{lanes}",
        fixed(blocks, -(-tokens // shape.tokens)),
        32 * shape.warps,
        (
            at.ids, at.shares, at.x, at.weight, at.bias, at.logits, at.arrivals, at.num_tokens, at.raw,
            at.norm_weight, *map(ctypes.c_int, numbers), ctypes.c_float(op.scale),
            ctypes.c_float(norm.eps if norm is not None else 0.0),
        ),
        cluster=blocks if shape.cluster else 1,
    )  # fmt: skip


def _route_kernel(experts: int, tokens: int, norm: bool, capability: int) -> str:
    """Which of ROUTES: a token's blocks as a cluster where they are few enough."""
    if not norm:
        return "_wide" if tokens >= WIDE_ROUTE else ""
    fits = (
        name
        for name, shape in ROUTES.items()
        if shape.cluster and experts <= MAX_CLUSTER * shape.warps * shape.experts
    )
    return next(fits, "_norm") if capability >= 90 else "_norm"
