"""From fused stages to planned launches: one kernel for each stage, or a list of what lacks one.

What the launches of an op are stands with its family, in `lower_rows.py`, `lower_products.py` and so on. Here
is what every family uses: where things lie, and the list that launches are added to.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.device.launches import Counts, GridOf, Planned, fixed
from rvllm.backends.cuda.formats import device_format
from rvllm.backends.cuda.layout.addresses import Addresses, Shape
from rvllm.backends.cuda.layout.fusion import Stage
from rvllm.backends.cuda.layout.metadata import Layout
from rvllm.backends.cuda.layout.weights import WeightLayout
from rvllm.backends.cuda.ops.attention.launches import EMITTERS as ATTENTION
from rvllm.backends.cuda.ops.attention.plan import DecodePlan, PrefillPlan
from rvllm.backends.cuda.ops.encoder.launches import EMITTERS as ENCODER
from rvllm.backends.cuda.ops.family import Emitter, Scratch
from rvllm.backends.cuda.ops.gemm.launches import EMITTERS as PRODUCTS
from rvllm.backends.cuda.ops.mamba2 import EMITTERS as RECURRENT
from rvllm.backends.cuda.ops.mla.launches import EMITTERS as LATENT
from rvllm.backends.cuda.ops.moe.launches import EMITTERS as EXPERTS
from rvllm.backends.cuda.ops.moe.launches import scratch as experts_scratch
from rvllm.backends.cuda.ops.rowwise import EMITTERS as ROWS
from rvllm.backends.cuda.ops.rowwise import norm
from rvllm.backends.cuda.ops.sampling.launches import EMITTERS as SAMPLING
from rvllm.errors import MissingKernelError
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Linear, Logits, Op, Program, RopeKV, Route, Weight

BEGIN_THREADS = 256
FAMILIES = (ROWS, PRODUCTS, ATTENTION, EXPERTS, LATENT, RECURRENT, ENCODER, SAMPLING)
EMITTERS: dict[type[Op], Emitter] = {kind: emit for family in FAMILIES for kind, emit in family.items()}
LOWERED: tuple[type[Op], ...] = tuple(EMITTERS)
LEADING: tuple[type[Op], ...] = (*LATENT, RopeKV, Route)  # their kernels do what stands before them too


def scratch_of(program: Program, tokens: int, seqs: int, capability: int) -> Scratch:
    """Device memory that families of ops need beside the program's buffers, in bytes by name.

    For steps of up to `tokens` tokens of `seqs` sequences.
    """
    found = experts_scratch(program, tokens, seqs)
    for weight in (op.weight for op in program.ops if isinstance(op, Linear | Logits)):
        if weight.format is not None:
            for name, nbytes in (
                device_format(weight.format).scratch(weight, max(tokens, seqs), capability).items()
            ):
                found[name] = max(nbytes, found.get(name, 0))
    return found


def refuse_unknown(program: Program) -> None:
    """Raises MissingKernelError listing, by kind, every op of the program that no CUDA kernel computes."""
    unknown = Counter(op.kind for op in program.ops if not isinstance(op, LOWERED))
    if unknown:
        listed = ", ".join(f"{kind} ({count}x)" for kind, count in unknown.items())
        raise MissingKernelError(
            f"{program.architecture} needs ops that have no CUDA kernel: {listed}; run it with --device cpu"
        )


class Lowering:
    """Turns stages into launches for one padded step size.

    counts: rows the launches must cover. decode, prefill: by op, how attention is launched; prefill is None
    where no sequence of the step has several tokens. strategy: of products, `--gemm-strategy`.
    planned: the launches so far. stages: all that is being lowered, for emitters that look ahead.
    quantised: the buffers that norms write as E4M3 (see `formats.fp8`).
    """

    def __init__(
        self,
        dtype: DType,
        chip: DeviceInfo,
        shape: Shape,
        addresses: Addresses,
        layout: Layout,
        counts: Counts,
        decode: Mapping[str, DecodePlan],
        prefill: Mapping[str, PrefillPlan] | None,
        strategy: str,
    ) -> None:
        self.dtype = dtype
        self.tag = "bf16" if dtype is DType.BF16 else "f16"
        self.chip = chip
        self.shape = shape
        self.at = addresses
        self.layout = layout
        self.counts = counts
        self.decode = decode
        self.prefill = prefill
        self.strategy = strategy
        self.planned: list[Planned] = []
        self.stages: Sequence[Stage] = ()
        self.quantised: frozenset[str] = frozenset()

    def lower(self, stages: Sequence[Stage]) -> list[Planned]:
        """The launches of all stages, in order.

        Raises MissingKernelError listing every op without a kernel, those with one reason together.
        """
        self.stages, missing = stages, dict[str, list[str]]()
        for stage in stages:
            leader = next((op for op in stage.ops if isinstance(op, LEADING)), stage.ops[0])
            emit = EMITTERS.get(type(leader))
            if emit is None:
                missing.setdefault(stage.ops[0].kind, []).append(stage.name)
                continue
            try:
                emit(self, stage)
            except MissingKernelError as error:
                missing.setdefault(str(error), []).append(stage.name)
        if missing:
            shown = "; ".join(f"{', '.join(names)} ({why})" for why, names in missing.items())
            raise MissingKernelError(f"{sum(map(len, missing.values()))} ops have no CUDA kernel: {shown}")
        return self.planned

    def begin(self) -> list[Planned]:
        """The head of a step: block tables brought up to date."""
        parameters = [
            self.at.metadata,
            self.meta(self.layout.block_updates),
            self.at.tables,
            ctypes.c_int(self.shape.table_stride),
        ]
        return [Planned("begin", "sm80_begin_step", fixed(8), BEGIN_THREADS, parameters)]

    def plan(
        self,
        op: str,
        kernel: str,
        grid: GridOf,
        block: int,
        *parameters: object,
        smem: int = 0,
        cluster: int = 1,
        why: str = "",
    ) -> None:
        """Adds one launch; see `Planned`."""
        self.planned.append(Planned(op, kernel, grid, block, parameters, smem, cluster, why))

    def meta(self, word: int) -> int:
        """Address of a word of the step's metadata."""
        return self.at.metadata + 4 * word

    def rows(self, rows: str) -> Callable[[Counts], int]:
        """How many rows of that kind a step has."""
        return (lambda c: c.tokens) if rows == "tokens" else (lambda c: c.samples)

    def capacity(self, rows: str) -> int:
        """How many rows of that kind the largest step has."""
        return self.shape.tokens if rows == "tokens" else self.shape.samples

    def weight(self, weight: Weight | None, form: WeightLayout) -> int:
        """Address of a weight in that form, null for none."""
        return 0 if weight is None else self.at.weights[weight.name, form]

    def norm(self, stage: Stage) -> None:
        """A Norm that another emitter wants as a launch of its own."""
        norm(self, stage)
