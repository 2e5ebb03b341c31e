"""What a family of ops hands to the lowering: how its stages become launches, and the memory those need."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rvllm.backends.cuda.fuse import Stage
    from rvllm.backends.cuda.lowering import Lowering

Emitter = Callable[["Lowering", "Stage"], None]
Scratch = dict[str, int]  # bytes by name; addresses in `Addresses.scratch` under the same names
