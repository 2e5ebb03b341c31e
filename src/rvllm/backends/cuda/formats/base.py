"""What the backend has to know of a weight format: how much memory, how it is loaded, which kernels run
it.
"""

from __future__ import annotations

from typing import Any, Protocol

from rvllm.backends.cuda.device.catalog import Catalog
from rvllm.backends.cuda.device.driver import Stream
from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.layout.packed import PackedWeight
from rvllm.backends.cuda.ops.family import Lowering
from rvllm.backends.cuda.ops.gemm.epilogue import Epilogue
from rvllm.backends.cuda.staging import Staging
from rvllm.program.dtypes import DType
from rvllm.program.formats import WeightFormat
from rvllm.program.ops.dense import Linear, Logits, Weight
from rvllm.weights.checkpoint import Checkpoint
from rvllm.weights.packing import find_tensor, readable_type


class DeviceFormat(Protocol):
    """A weight format on the GPU; `formats.FORMATS` has one for each type of WeightFormat."""

    def refusal(self, weight: Weight, dtype: DType, info: DeviceInfo) -> str | None:
        """Why there is no kernel for this weight on this GPU; None where there is one."""

    def packed_nbytes(self, kept: Any, rows: int, columns: int) -> int:
        """Bytes of a packed matrix on the device: tiles, scales and all padding. kept: its WeightFormat."""

    def loading_kernels(self, packed: PackedWeight, dtype: DType, checkpoint: Checkpoint | None) -> list[str]:
        """The kernels that `load` runs, or `fill` where there is no checkpoint."""

    def load(self, loader: Staging, packed: PackedWeight, address: int, checkpoint: Checkpoint) -> int:
        """Puts a weight in its place; returns the bytes read from the checkpoint."""

    def fill(self, catalog: Catalog, stream: Stream, packed: PackedWeight, address: int, seed: int) -> None:
        """Puts random numbers there, of deviation 0.02."""

    def scratch(self, weight: Weight, tokens: int, capability: int) -> dict[str, int]:
        """Device memory its products need for steps of so many tokens, in bytes by name; shared by all
        weights.
        """

    def product(self, to: Lowering, name: str, op: Linear | Logits, end: Epilogue) -> None:
        """Plans the launches of y = x W^T with what becomes of the sums."""


def format_of(weight: Weight) -> WeightFormat:
    """A weight's format, which it must have."""
    assert weight.format is not None, weight.name
    return weight.format


def stored_kinds(weight: Weight, checkpoint: Checkpoint) -> list[str]:
    """The type of each of its parts that is there, as it reaches the device and as kernels' names have it."""
    found = ((part, find_tensor(part, checkpoint)) for part in weight.parts)
    return [readable_type(part, info).value.lower() for part, info in found if info is not None]
