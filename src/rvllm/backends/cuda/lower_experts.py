"""Mixtures of experts: routing and grouped products: their launches.

EMITTERS: what plans the launches of a stage that begins with an op of this type. `scratch` sizes the device
memory that these launches need beside the program's buffers.
"""

from __future__ import annotations

from rvllm.backends.cuda.families import Emitter, Scratch
from rvllm.program.ops import Op, Program

EMITTERS: dict[type[Op], Emitter] = {}


def scratch(program: Program, tokens: int, seqs: int) -> Scratch:
    """Bytes by name for steps of up to `tokens` tokens of `seqs` sequences; empty where it has no such op."""
    return {}
