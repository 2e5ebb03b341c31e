"""MLA: latents in the cache and the products that absorb its projections: their launches.

EMITTERS: what plans the launches of a stage that begins with an op of this type. PAGED: how those
of them that attend to the paged cache are planned. `scratch` sizes the device
memory that these launches need beside the program's buffers.
"""

from __future__ import annotations

from rvllm.backends.cuda.families import Emitter, PagedPlans, Scratch
from rvllm.program.ops import Op, Program

EMITTERS: dict[type[Op], Emitter] = {}
PAGED: dict[type[Op], PagedPlans] = {}


def scratch(program: Program, tokens: int, seqs: int) -> Scratch:
    """Bytes by name for steps of up to `tokens` tokens of `seqs` sequences; empty where it has no such op."""
    return {}
