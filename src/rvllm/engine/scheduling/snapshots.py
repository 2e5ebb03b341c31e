"""Snapshots of recurrent states: what a model that carries states needs to go on from a prefix.

Keys and values of a prefix are of no use to such a model without the state behind them. A state is as large
as thousands of tokens of these, so only a few are kept: that at the last block border of each prompt, and
that at the border up to which a prompt was found to agree with what is cached.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from rvllm.backends.base import RESTORE, SAVE
from rvllm.engine.scheduling.host import Places

if TYPE_CHECKING:
    from rvllm.engine.blocks import Digest
    from rvllm.engine.sequence import Sequence


class Snapshots(Places):
    """Snapshots by the digest of the prefix behind which they were taken.

    Copies gather in the caller's list of moves, whose order is that of the copies: a snapshot is known as
    soon as its copy is listed. When all are taken, the one that was used longest ago makes room.
    """

    def __init__(self, count: int, block_size: int) -> None:
        super().__init__(count)
        self._block_size = block_size
        self._coming: dict[Digest, Sequence] = {}  # who will reach the border behind which one is wanted

    def longest(self, digests: Seq[Digest]) -> int:
        """Blocks of the longest prefix of a digest chain behind which there is a snapshot; 0: of none."""
        return next((n for n in range(len(digests), 0, -1) if digests[n - 1] in self._by_digest), 0)

    def restore(self, digest: Digest, slot: int) -> tuple[int, int, int]:
        """The move that gives a slot what was kept."""
        self._by_digest.move_to_end(digest)
        return RESTORE, slot, self._by_digest[digest]

    def plan(self, seq: Sequence, found: int) -> None:
        """Marks the borders at which a sequence's state is to be kept; it has just been placed.

        found: blocks of it that are cached, of which it may use fewer.
        """
        blocks = {found, (seq.prompt_len - 1) // self._block_size}
        seq.borders = sorted(
            n * self._block_size
            for n in blocks
            if n * self._block_size > seq.launched and seq.digests[n - 1] not in self._by_digest
        )
        for border in seq.borders:
            self._coming.setdefault(seq.digests[border // self._block_size - 1], seq)

    def awaited(self, digests: Seq[Digest]) -> bool:
        """Whether a running sequence will keep its state behind one of these prefixes."""
        return bool(self._coming) and any(digest in self._coming for digest in digests)

    def reached(self, seq: Sequence) -> list[tuple[int, int, int]]:
        """The move that keeps a state, where the sequence has just been computed up to a border."""
        if not seq.borders or seq.launched < seq.borders[0]:
            return []
        digest = seq.digests[seq.borders.pop(0) // self._block_size - 1]
        if self._coming.get(digest) is seq:
            del self._coming[digest]
        place = None if digest in self else self.put(digest)
        return [] if place is None else [(SAVE, seq.slot, place)]

    def leave(self, seq: Sequence) -> None:
        """A sequence loses its place, whatever it was to keep."""
        for border in seq.borders:
            digest = seq.digests[border // self._block_size - 1]
            if self._coming.get(digest) is seq:
                del self._coming[digest]
        seq.borders = []

    def check(self, running: Seq[Sequence]) -> None:
        """Raises RuntimeError when the books do not balance."""
        self.check_places("snapshot")
        if not set(map(id, self._coming.values())) <= set(map(id, running)):
            raise RuntimeError("a snapshot is awaited of a sequence that does not run")
