"""One step as flat arrays: what every op of the program needs to know about the batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.base import KV_BLOCK

Ints = NDArray[np.int64]

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Step:
    """T tokens of S sequences, one sequence behind the other.

    tokens, positions: [T]; places: [T], each token's place in the cache (block * 16 + offset).
    first_rows, query_lens, starts: [S], each sequence's first row, its rows and its first position.
    tables: [S, blocks], each sequence's block table, padded to whole attention splits
    with a block of zeros.
    rows: [R] rows whose logits are wanted. slots: [S] each sequence's slot.
    kinds: [T] 1 for tokens of a pair's second text, else 0.
    """

    tokens: NDArray[np.int32]
    positions: Ints
    places: Ints
    first_rows: Ints
    query_lens: Ints
    starts: Ints
    tables: NDArray[np.int32]
    rows: Ints
    slots: Ints
    kinds: Ints
    _shared: dict[Hashable, Any] = field(default_factory=dict)

    def shared(self, key: Hashable, make: Callable[[], Thing]) -> Thing:
        """What all layers derive alike from the batch: made by the first that asks."""
        if key not in self._shared:
            self._shared[key] = make()
        made: Thing = self._shared[key]
        return made


def flat_step(
    tokens: NDArray[np.int32],
    query_lens: NDArray[np.int32],
    starts: NDArray[np.int32],
    tables: NDArray[np.int32],
    rows: Ints,
    slots: NDArray[np.int32] | None = None,
    seconds: Mapping[int, int] | None = None,
) -> Step:
    """The flat arrays of a step; see Step for the shapes. Without `slots`, sequence s is in slot s.

    seconds: by sequence, its first row of the pair's second text.
    """
    lens, first_positions = query_lens.astype(np.int64), starts.astype(np.int64)
    first_rows = np.concatenate([[0], np.cumsum(lens)[:-1]]) if len(lens) else lens
    sequence = np.repeat(np.arange(len(lens)), lens)
    positions = np.arange(len(tokens)) - first_rows[sequence] + first_positions[sequence]
    blocks = tables[sequence, positions // KV_BLOCK].astype(np.int64)
    kinds = np.zeros(len(tokens), dtype=np.int64)
    for s, second in (seconds or {}).items():
        kinds[first_rows[s] + second : first_rows[s] + lens[s]] = 1
    return Step(
        tokens=tokens,
        positions=positions,
        places=blocks * KV_BLOCK + positions % KV_BLOCK,
        first_rows=first_rows,
        query_lens=lens,
        starts=first_positions,
        tables=tables,
        rows=rows,
        slots=np.arange(len(lens)) if slots is None else slots.astype(np.int64),
        kinds=kinds,
    )
