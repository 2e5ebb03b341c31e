"""Paged KV blocks: who holds which, and which still hold a prefix worth keeping."""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING

from rvllm.backends.base import COPY, MOVE_IN, MOVE_OUT
from rvllm.engine.scheduling.host import HostBlocks

if TYPE_CHECKING:
    from rvllm.engine.kv_events import KvEvents

Digest = bytes
ROOT: Digest = b""
AHEAD_SHARE, MAX_AHEAD = 16, 256  # one in so many blocks is kept empty, so many at most
STEP_AHEAD = 32  # blocks that a step evicts
ON_HOST = -1  # in place of a block's number: host memory has it


def chain(parent: Digest, tokens: array[int], size: int) -> list[Digest]:
    """Content hashes of full blocks of `size` tokens: of each and, through `parent`, of all tokens before it.

    128 bits of BLAKE2b, so that equal digests can be taken for equal contents. tokens: of whole blocks.
    """
    data, width, found = tokens.tobytes(), size * tokens.itemsize, []
    for start in range(0, len(data), width):
        parent = blake2b(parent + data[start : start + width], digest_size=16).digest()
        found.append(parent)
    return found


class BlockManager:
    """Hands out blocks 0 .. num_blocks - 1, counts references and remembers reusable prefixes.

    A block is in use (one reference or more), empty (free, nothing worth keeping) or cached (free to
    take, but found by the digest of what it holds). Empty blocks are taken first, then the cached block
    that was released longest ago. With a tier in host memory, what that one held moves there, and comes back
    when it is shared; the copies gather in `take_moves`, in the order in which they must happen.

    steps: how many steps were planned so far, which the scheduler keeps up to date.
    """

    def __init__(
        self, num_blocks: int, block_size: int, caching: bool = True, num_cpu_blocks: int = 0
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.caching = caching
        self.host = HostBlocks(num_cpu_blocks) if caching and num_cpu_blocks else None
        self.moved_out = self.moved_in = 0
        self.steps = 0
        self._moves: list[tuple[int, int, int]] = []
        self._moves_after = -1
        self._last_use = [-1] * num_blocks  # the last step that may use a block that was released
        self._not_worth_moving: set[int] = set()
        self.forgotten: KvEvents | None = None  # who is told which prefixes are no longer kept
        self._references = [0] * num_blocks
        self._digest: list[Digest | None] = [None] * num_blocks
        self._by_digest: dict[Digest, int] = {}
        self._empty = deque(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # longest released first

    @property
    def available(self) -> int:
        """Blocks that can be taken now, cached ones included."""
        return len(self._empty) + len(self._cached)

    @property
    def cached(self) -> int:
        """Blocks free to take that hold a reusable prefix."""
        return len(self._cached)

    @property
    def moving(self) -> int:
        """Copies to be made before the next step."""
        return len(self._moves)

    def filled(self) -> list[int]:
        """Blocks whose contents somebody may want: in use, cached, or about to be copied elsewhere."""
        leaving = {source for kind, source, _ in self._moves if kind in (COPY, MOVE_OUT)}
        return [
            block
            for block, references in enumerate(self._references)
            if references or self._digest[block] is not None or block in leaving
        ]

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
        """Blocks holding the longest known prefix of a digest chain, ON_HOST for those in host memory.

        Nothing is taken yet.
        """
        found: list[int] = []
        for digest in digests:
            block = self._by_digest.get(digest)
            if block is None and self.host is not None and digest in self.host:
                block = ON_HOST
            if block is None:
                break
            found.append(block)
        return found

    def idle_among(self, blocks: Sequence[int]) -> int:
        """How many of these blocks count as available now and would not once shared."""
        references = self._references
        return sum(block == ON_HOST or not references[block] for block in blocks)

    def share(self, blocks: Sequence[int], digests: Sequence[Digest]) -> list[int]:
        """Takes one more reference to each of these blocks, in use or cached, and returns them.

        Those in host memory, whose digests are at the same places, get blocks of the device in their place.
        """
        for block in blocks:
            if block != ON_HOST:
                if self._references[block] == 0:
                    del self._cached[block]
                    self._not_worth_moving.discard(block)
                self._references[block] += 1
        found = list(blocks)
        if self.host is None or ON_HOST not in found:
            return found
        places = [i for i, block in enumerate(found) if block == ON_HOST]
        # Claimed before taking blocks makes others move; both in order, so that neighbours move together.
        claimed = sorted((self.host.claim(digests[i]), i) for i in places)
        blocks = sorted(self._take_one() for _ in claimed)
        for (other, i), block in zip(claimed, blocks, strict=True):
            found[i] = block
            self._by_digest[digests[i]] = block
            self._digest[block] = digests[i]
            self._moves.append((MOVE_IN, block, other))
            self._moves_after = max(self._moves_after, self._last_use[block])
            self.host.free(other)
        self.moved_in += len(places)
        return found

    def copy(self, block: int, to: int) -> None:
        """Has a block of the device copied to one that was just taken."""
        self._moves.append((COPY, block, to))
        self._moves_after = self.steps - 1  # the step before may write what is copied

    def list_move(self, move: tuple[int, int, int]) -> None:
        """Adds a copy of something else, in its order among those of blocks."""
        self._moves.append(move)

    def take_moves(self) -> tuple[list[tuple[int, int, int]], int]:
        """The copies to be made before the next step, rows of StepBatch.moves, and its moves_after.

        They are the caller's now.
        """
        moves, after = self._moves, self._moves_after
        self._moves, self._moves_after = [], -1
        return moves, after

    def take(self, count: int) -> list[int]:
        """`count` blocks with one reference each; there must be so many available."""
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        if self._empty:
            # Steps under way may still use what was released last; what is moved in waits for them.
            block = self._empty.pop() if self.host is None else self._empty.popleft()
        else:
            block, _ = self._cached.popitem(last=False)
            self._evict(block, self._moves)
        self._references[block] = 1
        return block

    def evict_ahead(self) -> list[tuple[int, int, int]]:
        """With a tier in host memory: copies that leave a few blocks empty, made beside the next step.

        Whoever needs blocks then waits for no copy out of them.
        """
        missing = min(self.num_blocks // AHEAD_SHARE, MAX_AHEAD) - len(self._empty)
        if self.host is None or missing <= 0:
            return []
        moves: list[tuple[int, int, int]] = []
        oldest = [
            self._cached.popitem(last=False)[0] for _ in range(min(missing, STEP_AHEAD, len(self._cached)))
        ]
        for block in sorted(oldest):
            self._evict(block, moves)
            self._empty.append(block)
        return moves

    def _evict(self, block: int, moves: list[tuple[int, int, int]]) -> None:
        """Forgets what a block holds, or has it moved to host memory."""
        digest = self._digest[block]
        assert digest is not None
        del self._by_digest[digest]
        self._digest[block] = None
        place = None
        if self.host is not None and block not in self._not_worth_moving:
            place = self.host.put(digest)
        if place is not None:
            moves.append((MOVE_OUT, block, place))
            self.moved_out += 1
        self._not_worth_moving.discard(block)
        if self.forgotten is not None:
            self.forgotten.removed(digest)

    def release(self, blocks: Sequence[int], keep: bool = True) -> None:
        """Drops a sequence's references, given in the order of its tokens.

        The end of the sequence is dropped first, so that its beginning, which more requests have in
        common, is kept longest. keep: whether they may move to host memory when their place is needed.
        """
        references = self._references
        for block in reversed(blocks):
            references[block] -= 1
            if references[block] == 0:
                self._last_use[block] = self.steps - 1
                if self._digest[block] is None:
                    self._empty.append(block)
                else:
                    self._cached[block] = None
                    if not keep:
                        self._not_worth_moving.add(block)
            elif references[block] < 0:
                raise RuntimeError(f"block {block} released twice")

    def publish(self, block: int, digest: Digest) -> bool:
        """Makes a full, computed block findable, and says whether its contents are new; the first block with
        given contents stays the one."""
        if not self.caching or self._digest[block] is not None or digest in self._by_digest:
            return False
        self._by_digest[digest] = block
        self._digest[block] = digest
        if self.host is not None:
            self.host.drop(digest)
        return True

    def forget(self) -> None:
        """Makes every free block that holds a prefix an empty one, in both memories."""
        if self.host is not None:
            self.host.forget()
        self._not_worth_moving.clear()
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
        free = {*self._empty, *self._cached}
        if len(free) != self.available:
            raise RuntimeError("a block is free twice")
        if free != {block for block, references in enumerate(self._references) if references == 0}:
            raise RuntimeError(f"references {self._references}, free {sorted(free)}")
        digests = self._digest
        if [digests[block] for block in self._by_digest.values()] != list(self._by_digest):
            raise RuntimeError("a block is found under a digest it does not hold")
        if any(digests[block] is None for block in self._cached):
            raise RuntimeError("a cached block cannot be found")
        if not self._not_worth_moving <= self._cached.keys():
            raise RuntimeError("a block in use is marked as not worth moving")
        if self.host is not None:
            self.host.check(self._by_digest.keys())
