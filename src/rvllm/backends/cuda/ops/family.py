"""What a family of ops hands to the lowering: how its stages become launches, and the memory those need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rvllm.program.ops.dense import Op

if TYPE_CHECKING:
    from rvllm.backends.cuda.device.info import DeviceInfo
    from rvllm.backends.cuda.layout.fusion import Stage
    from rvllm.backends.cuda.lowering import Lowering
    from rvllm.backends.cuda.ops.attention.plan import DecodePlan, PrefillPlan
    from rvllm.program.dtypes import DType

Emitter = Callable[["Lowering", "Stage"], None]
Scratch = dict[str, int]  # bytes by name; addresses in `Addresses.scratch` under the same names


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

    decode(op, dtype, chip, seqs, longest, blocks): for up to `seqs` sequences of one token each and up to
    `longest` tokens, out of a pool of `blocks` KV blocks; found again as `lowering.decode[op.name]`.
    prefill(op, dtype, chip): for sequences of several tokens, cut into tiles; `lowering.prefill[op.name]`.
    group(op): see TileShape. The two plans raise MissingKernelError.
    """

    decode: Callable[[Op, DType, DeviceInfo, int, int, int], DecodePlan]
    prefill: Callable[[Op, DType, DeviceInfo], PrefillPlan]
    group: Callable[[Op], int]
