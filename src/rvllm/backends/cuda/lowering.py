"""The registry of families: from fused stages to planned launches, or a list of what lacks a kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rvllm.backends.cuda.device.launches import Planned
from rvllm.backends.cuda.layout.fusion import Stage
from rvllm.backends.cuda.layout.packed import WeightLayout
from rvllm.backends.cuda.ops.attention.launches import FAMILY as ATTENTION
from rvllm.backends.cuda.ops.encoder.launches import FAMILY as ENCODER
from rvllm.backends.cuda.ops.family import Emitter, Family, Lowering, PagedPlans, Scratch, Wanted
from rvllm.backends.cuda.ops.gemm.launches import FAMILY as GEMM
from rvllm.backends.cuda.ops.mamba2 import FAMILY as MAMBA2
from rvllm.backends.cuda.ops.mla.launches import FAMILY as MLA
from rvllm.backends.cuda.ops.moe.launches import FAMILY as MOE
from rvllm.backends.cuda.ops.rowwise import FAMILY as ROWWISE
from rvllm.backends.cuda.ops.sampling.launches import FAMILY as SAMPLING
from rvllm.errors import MissingKernelError
from rvllm.program.ops.dense import Op, Program
from rvllm.program.ops.encoder import Classify

FAMILIES: tuple[Family, ...] = (ROWWISE, GEMM, ATTENTION, MOE, MLA, MAMBA2, ENCODER, SAMPLING)
OF: dict[type[Op], Family] = {kind: family for family in FAMILIES for kind in family.emitters}
EMITTERS: dict[type[Op], Emitter] = {k: emit for family in FAMILIES for k, emit in family.emitters.items()}
LOWERED: tuple[type[Op], ...] = tuple(EMITTERS)
LEADING: tuple[type[Op], ...] = tuple(kind for family in FAMILIES for kind in family.leading)
PAGED: dict[type[Op], PagedPlans] = {k: plans for family in FAMILIES for k, plans in family.paged.items()}


def wanted_weights(stage: Stage, matrices: WeightLayout) -> Iterator[Wanted]:
    """The weights that a stage's ops want, each in its form; see `Family.weights`."""
    for op in stage.ops:
        if type(op) in OF:
            yield from OF[type(op)].weights(op, stage, matrices)


def scratch_of(program: Program, tokens: int, seqs: int, capability: int) -> Scratch:
    """Device memory that families of ops need beside the program's buffers, in bytes by name.

    For steps of up to `tokens` tokens of `seqs` sequences.
    """
    return {
        name: nbytes
        for family in FAMILIES
        for name, nbytes in family.scratch(program, tokens, seqs, capability).items()
    }


def refuse_unknown(program: Program) -> None:
    """Raises MissingKernelError listing, by kind, every op of the program that no CUDA kernel computes.

    A classification head is computed on the host (`backends/heads.py`).
    """
    unknown = Counter(op.kind for op in program.ops if not isinstance(op, (*LOWERED, Classify)))
    if unknown:
        listed = ", ".join(f"{kind} ({count}x)" for kind, count in unknown.items())
        raise MissingKernelError(
            f"{program.architecture} needs ops that have no CUDA kernel: {listed}; run it with --device cpu"
        )


def lower(to: Lowering, stages: Sequence[Stage]) -> list[Planned]:
    """The launches of all stages, in order.

    Raises MissingKernelError listing every op without a kernel, those with one reason together.
    """
    missing: dict[str, list[str]] = {}
    for stage in stages:
        leader = next((op for op in stage.ops if isinstance(op, LEADING)), stage.ops[0])
        emit = EMITTERS.get(type(leader))
        if emit is None:
            missing.setdefault(stage.ops[0].kind, []).append(stage.name)
            continue
        try:
            emit(to, stage)
        except MissingKernelError as error:
            missing.setdefault(str(error), []).append(stage.name)
    if missing:
        shown = "; ".join(f"{', '.join(names)} ({why})" for why, names in missing.items())
        raise MissingKernelError(f"{sum(map(len, missing.values()))} ops have no CUDA kernel: {shown}")
    return to.planned
