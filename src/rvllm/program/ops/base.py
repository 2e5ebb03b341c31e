"""What a model program is made of: buffers, weights, caches, and what every op has.

The ops stand in the files beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

from rvllm.program.dtypes import DType
from rvllm.program.formats import WeightFormat

Rows = Literal["tokens", "samples"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
Layout = Literal[
    "plain", "transposed", "head_qkv", "grouped_qkv", "pairs", "head_rows", "head_columns", "columns"
]


@dataclass(frozen=True)
class Buffer:
    """An activation of shape [T or S, width]; its memory is planned from its lifetime."""

    name: str
    rows: Rows
    width: int
    dtype: DType


@dataclass(frozen=True)
class Part:
    """One tensor of a checkpoint that becomes consecutive rows (axis 0) of a packed weight.

    source: its name in Hugging Face's layout (a GGUF reader maps its own names to these).
    shape: as stored in the checkpoint.
    layout: how its rows are rearranged on the way in.
      plain         as they are
      transposed    [in, out] on disk, [out, in] wanted
      head_qkv      GPT-NeoX: rows ordered [head][q|k|v][dim], wanted [q|k|v][head][dim]
      grouped_qkv   Phi-3-small and kin: rows ordered [kv head][its queries, k, v][dim], wanted
                    [queries | k | v][head][dim]
      pairs         rows ordered (gate, up), (gate, up), ..., wanted all gates, then all ups
      head_rows     rows ordered [head][row], wanted the rows `rows` = (first, count) of each head
      head_columns  the same, and each head's [count, K] transposed: [head][K][count]
      columns       of each row the elements `columns` = (first, count)
    heads: head count for head_qkv, head_rows and head_columns, kv head count for grouped_qkv.
    head_dim: dim for grouped_qkv; the other layouts follow from heads.
    add: a constant added to every element (Gemma's norms store w, compute with 1 + w).
    alternatives: other names the same tensor goes by; the first one found is used.
    prepared: the name of a tensor that some checkpoints hold instead, already laid out as wanted.
    """

    source: str
    shape: tuple[int, ...]
    layout: Layout = "plain"
    heads: int = 0
    head_dim: int = 0
    add: float = 0.0
    alternatives: tuple[str, ...] = ()
    rows: tuple[int, int] = (0, 0)
    prepared: str = ""
    columns: tuple[int, int] = (0, 0)

    @property
    def elements(self) -> int:
        """Number of elements it becomes."""
        if self.layout == "columns":
            return math.prod(self.shape[:-1]) * self.columns[1]
        if self.layout in ("head_rows", "head_columns"):
            return self.heads * self.rows[1] * self.shape[-1]
        return math.prod(self.shape)


@dataclass(frozen=True)
class Weight:
    """A packed weight: parts stacked along axis 0 in order, then viewed as `shape`.

    role: matrix (multiplied with activations, stored in the model's dtype or its quantised form), stack
    (several matrices of one shape, one an expert or a head: [E, N, K]), table (looked up by row) or vector
    (norm weights and biases, small).
    format: of its numbers in memory; None: the model's own type (see `weights.formats.with_formats`).
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    role: Literal["matrix", "stack", "table", "vector"]
    format: WeightFormat | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def nbytes(self, size: int) -> int:
        """Bytes of its numbers and scales; size: bytes of an element of the model's type."""
        if self.format is None:
            return self.elements * size
        rows, columns = self.shape[-2:]
        return math.prod(self.shape[:-2]) * self.format.nbytes(rows, columns)


@dataclass(frozen=True)
class KVCache:
    """A paged cache of one attention layer: per token `heads * (key_dim + value_dim)` elements.

    value_dim 0: keys and values are one vector, the latent (see LatentAttention).
    fp8: keys and values are rounded to E4M3 times a power of two, of each token and head its own (see
    decision 0039).
    """

    name: str
    heads: int
    key_dim: int
    value_dim: int
    window: int | None = None  # tokens a query may look back, itself included; None is all
    fp8: bool = False

    def row_bytes(self, dim: int, size: int) -> int:
        """Bytes of a token's key or value of `dim` elements, of one head; size: of the model's type."""
        return dim + 1 if self.fp8 else dim * size

    def token_bytes(self, size: int) -> int:
        """Bytes one token takes; size: of an element of the model's type."""
        return self.heads * (self.row_bytes(self.key_dim, size) + self.row_bytes(self.value_dim, size))


@dataclass(frozen=True)
class StateCache:
    """What one recurrent layer carries from token to token: `elements` float32 a slot, zero at its start.

    Unlike keys and values it is of one size however long the sequence is, and holds only its newest moment:
    a prefix's blocks alone do not let another sequence go on from there.
    """

    name: str
    elements: int


@dataclass(frozen=True, kw_only=True)
class Op:
    """One step of a program. READS and WRITES name the fields that hold the buffers read and written.

    A field may hold None where it is optional. A buffer in both READS and WRITES is updated in place.
    """

    name: str  # unique within the program: "layers.3.attn"
    READS: ClassVar[tuple[str, ...]] = ("x",)
    WRITES: ClassVar[tuple[str, ...]] = ("out",)

    @property
    def kind(self) -> str:
        """The op's type in lower case, as catalogs and listings name it."""
        return type(self).__name__.lower()

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return tuple(b for b in (getattr(self, f) for f in self.READS) if b is not None)

    @property
    def writes(self) -> tuple[Buffer, ...]:
        return tuple(b for b in (getattr(self, f) for f in self.WRITES) if b is not None)

    @property
    def weights(self) -> tuple[Weight, ...]:
        return tuple(w for f in fields(self) if isinstance(w := getattr(self, f.name), Weight))

    def mapped(self, change: Callable[[Any], Any]) -> Self:
        """The op with `change` applied to what each of its fields holds."""
        old = {f.name: getattr(self, f.name) for f in fields(self)}
        new = {name: made for name, value in old.items() if (made := change(value)) is not value}
        return replace(self, **new) if new else self
