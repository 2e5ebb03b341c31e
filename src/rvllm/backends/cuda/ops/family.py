"""What a family of ops is to the backend: how its stages become launches, and the memory those need.

A family knows this module and the layout of things; the registry (`lowering.py`) knows the families.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.device.launches import Counts, GridOf, MatrixMap, Planned, fixed
from rvllm.backends.cuda.layout.addresses import Addresses, Shape
from rvllm.backends.cuda.layout.fusion import Stage
from rvllm.backends.cuda.layout.metadata import Layout
from rvllm.backends.cuda.layout.packed import WeightLayout
from rvllm.backends.cuda.ops.attention.plan import DecodePlan, PrefillPlan
from rvllm.backends.cuda.ops.decode.chains import ARRIVALS, Joiner
from rvllm.backends.cuda.ops.gemm.strategy import GemmStrategy
from rvllm.kernels.types import SHORT
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Op, Program, Weight

BEGIN_THREADS = 256


@dataclass
class Lowering:
    """What families plan the launches of one padded step size with, and the list they add them to.

    counts: rows the launches must cover. decode, prefill: by op, how attention is launched; prefill is None
    where no sequence of the step has several tokens. strategy: of products, `--gemm-strategy`.
    quantised: the buffers that norms write as E4M3 (see `formats.fp8`). path: `--decode-path`.
    leaves_best: whether the logits go straight to the sampler, so that where nothing but the largest is asked
    for, the product that computes them leaves that alone; cleared where the product cannot.
    alone: whether one token's products are launches of their own, see `ops/decode/one.py`.
    planned: the launches so far.
    """

    dtype: DType
    chip: DeviceInfo
    shape: Shape
    at: Addresses
    layout: Layout
    counts: Counts
    decode: Mapping[str, DecodePlan]
    prefill: Mapping[str, PrefillPlan] | None
    strategy: GemmStrategy
    quantised: frozenset[str] = frozenset()
    path: str = "batched"
    leaves_best: bool = False
    alone: bool = False
    planned: list[Planned] = field(default_factory=list)

    @property
    def tag(self) -> str:
        """The type in kernels' names."""
        return SHORT[self.dtype.value]

    def joiner(self) -> Joiner:
        """What joins one token's launches."""
        return Joiner(self.path, self.tag, self.chip, self.at.scratch[ARRIVALS])

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
        does: object = None,
    ) -> None:
        """Adds one launch; see `Planned`."""
        self.planned.append(Planned(op, kernel, grid, block, parameters, smem, cluster, why, does))

    def boxes(self, address: int, rows: int, width: int, box_rows: int) -> MatrixMap:
        """A tensor map over [rows, width] elements of the model's type, in boxes of 64 columns."""
        return MatrixMap(address, rows, width, box_rows, 64, self.dtype is DType.BF16)

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


@dataclass(frozen=True)
class TileShape:
    """The blocks of a step's tile list: `rows` query rows, row r being token r // group under head r % group.

    group: query heads that share their keys. See `attention.prefill_tiles`.
    """

    rows: int
    group: int


@dataclass(frozen=True)
class PagedPlans:
    """How the ops of one type that attend to the paged cache are planned; see `paged`.

    decode(op, dtype, chip, seqs, longest, blocks, rotates): for up to `seqs` sequences of one token each and
    up to `longest` tokens, out of a pool of `blocks` KV blocks; rotates: whether its stage rotates queries
    and keys first, which a kernel may do besides; found again as `lowering.decode[op.name]`.
    prefill(op, dtype, chip): for sequences of several tokens, cut into tiles; `lowering.prefill[op.name]`.
    group(op): see TileShape. The two plans raise MissingKernelError.
    """

    decode: Callable[[Op, DType, DeviceInfo, int, int, int, bool], DecodePlan]
    prefill: Callable[[Op, DType, DeviceInfo], PrefillPlan]
    group: Callable[[Op], int]


Emitter = Callable[[Lowering, Stage], None]
Scratch = dict[str, int]  # bytes by name; addresses in `Addresses.scratch` under the same names
Wanted = tuple[Weight | None, WeightLayout]


@dataclass(frozen=True)
class Family:
    """A family of ops: all that the backend has to know of them.

    emitters: what plans the launches of a stage that an op of this type leads.
    leading: those of them whose kernels do what stands before them in a stage too.
    weights(op, stage, matrices): the weights that an op wants, and in which forms; matrices: the form of
    plain matrices.
    scratch(program, tokens, seqs, capability): memory beside the program's buffers, for steps of so many
    tokens and sequences; zeroed at start.
    paged: how the ops that attend to the paged cache are planned.
    """

    emitters: Mapping[type[Op], Emitter]
    leading: tuple[type[Op], ...] = ()
    weights: Callable[[Op, Stage, WeightLayout], Iterable[Wanted]] = lambda op, stage, matrices: ()
    scratch: Callable[[Program, int, int, int], Scratch] = lambda program, tokens, seqs, capability: {}
    paged: Mapping[type[Op], PagedPlans] = field(default_factory=dict)
