"""Paged KV blocks: who holds which, and which still hold a prefix worth keeping."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from itertools import islice
from typing import Protocol

Digest = bytes
ROOT: Digest = b""


def chain(parent: Digest, tokens: array[int]) -> Digest:
    """Content hash of one full block: of its tokens and, through `parent`, of all tokens before it.

    128 bits of BLAKE2b, so that equal digests can be taken for equal contents.
    """
    return blake2b(parent + tokens.tobytes(), digest_size=16).digest()


class Forgotten(Protocol):
    """Who wants to know which prefixes are no longer kept."""

    def removed(self, digest: Digest) -> None:
        """The block with this digest was given to something else."""

    def cleared(self) -> None:
        """Nothing is kept any more."""


class BlockManager:
    """Hands out blocks 0 .. num_blocks - 1, counts references and remembers reusable prefixes.

    A block is in use (one reference or more), empty (free, nothing worth keeping) or cached (free to
    take, but found by the digest of what it holds). Empty blocks are taken first, then the cached block
    that was released longest ago.
    """

    def __init__(self, num_blocks: int, block_size: int, caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.caching = caching
        self.forgotten: Forgotten | None = None
        self._references = [0] * num_blocks
        self._digest: list[Digest | None] = [None] * num_blocks
        self._by_digest: dict[Digest, int] = {}
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # longest released first

    @property
    def available(self) -> int:
        """Blocks that can be taken now, cached ones included."""
        return len(self._empty) + len(self._cached)

    @property
    def cached(self) -> int:
        """Blocks free to take that hold a reusable prefix."""
        return len(self._cached)

    def oldest_cached(self, count: int) -> list[int]:
        """Up to `count` of the cached blocks, released longest ago first."""
        return list(islice(self._cached, count))

    @property
    def used(self) -> int:
        """Blocks that a sequence holds."""
        return self.num_blocks - self.available

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens need."""
        return -(-tokens // self.block_size)

    def find(self, digests: Sequence[Digest]) -> list[int]:
        """Blocks holding the longest known prefix of a digest chain; nothing is taken yet."""
        found: list[int] = []
        for digest in digests:
            block = self._by_digest.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def idle_among(self, blocks: Sequence[int]) -> int:
        """How many of these blocks count as available now and would not once shared."""
        references = self._references
        return sum(not references[block] for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Takes one more reference to each of these blocks, in use or cached."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def take(self, count: int) -> list[int]:
        """`count` blocks with one reference each; there must be so many available."""
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            digest = self._digest[block]
            assert digest is not None
            del self._by_digest[digest]
            self._digest[block] = None
            if self.forgotten is not None:
                self.forgotten.removed(digest)
        self._references[block] = 1
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """Drops a sequence's references, given in the order of its tokens.

        The end of the sequence is dropped first, so that its beginning, which more requests have in
        common, is kept longest.
        """
        references = self._references
        for block in reversed(blocks):
            references[block] -= 1
            if references[block] == 0:
                if self._digest[block] is None:
                    self._empty.append(block)
                else:
                    self._cached[block] = None
            elif references[block] < 0:
                raise RuntimeError(f"block {block} released twice")

    def publish(self, block: int, digest: Digest) -> bool:
        """Makes a full, computed block findable, and says whether its contents are new; the first block with
        given contents stays the one."""
        if not self.caching or self._digest[block] is not None or digest in self._by_digest:
            return False
        self._by_digest[digest] = block
        self._digest[block] = digest
        return True

    def forget(self) -> None:
        """Makes every free block that holds a prefix an empty one."""
        told = self.forgotten if len(self._by_digest) > len(self._cached) else None
        for block in self._cached:
            digest, self._digest[block] = self._digest[block], None
            if digest is not None:
                del self._by_digest[digest]
                if told is not None:
                    told.removed(digest)
            self._empty.append(block)
        self._cached.clear()
        if told is None and self.forgotten is not None:
            self.forgotten.cleared()

    def check(self) -> None:
        """Raises RuntimeError when the books do not balance; for tests and debugging."""
        free = set(self._empty) | set(self._cached)
        if len(free) != self.available:
            raise RuntimeError("a block is free twice")
        for block, references in enumerate(self._references):
            if (block in free) != (references == 0):
                raise RuntimeError(f"block {block} has {references} references, free: {block in free}")
        for digest, block in self._by_digest.items():
            if self._digest[block] != digest:
                raise RuntimeError(f"block {block} is found under a digest it does not hold")
        if any((self._digest[block] is None) for block in self._cached):
            raise RuntimeError("a cached block cannot be found")
