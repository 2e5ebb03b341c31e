"""The second tier: KV blocks in host memory that hold what was evicted from the device, and how it moves."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import KeysView

from rvllm.engine.scheduling.cost import PrefillCost

Digest = bytes


class HostBlocks:
    """Blocks 0 .. num_blocks - 1 in host memory, found by the digest of what they hold.

    A digest is on the device or here, never on both sides. When all are taken, the one that came longest ago
    makes room.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._by_digest: OrderedDict[Digest, int] = OrderedDict()  # longest here first
        self._empty = deque(range(num_blocks))  # given out in their order, so that neighbours move together

    def __contains__(self, digest: Digest) -> bool:
        return digest in self._by_digest

    @property
    def used(self) -> int:
        """Blocks that hold a prefix."""
        return len(self._by_digest)

    def put(self, digest: Digest) -> int | None:
        """The block that what has this digest is to be copied to; None when all are claimed."""
        if not self._empty and not self._by_digest:
            return None
        block = self._empty.popleft() if self._empty else self._by_digest.popitem(last=False)[1]
        self._by_digest[digest] = block
        return block

    def claim(self, digest: Digest) -> int:
        """Takes a block out of the tier, to be copied to the device; give it back with `free` after that."""
        return self._by_digest.pop(digest)

    def free(self, block: int) -> None:
        """What was claimed is on its way: copies happen in order, so the block may be written behind it."""
        self._empty.append(block)

    def drop(self, digest: Digest) -> None:
        """Forgets what has this digest, if it is here: the device has computed it again."""
        block = self._by_digest.pop(digest, None)
        if block is not None:
            self._empty.append(block)

    def forget(self) -> None:
        """Makes every block an empty one."""
        self._empty += self._by_digest.values()
        self._by_digest.clear()

    def check(self, elsewhere: KeysView[Digest]) -> None:
        """Raises RuntimeError when the books do not balance; elsewhere: what the device holds."""
        if not self._by_digest.keys().isdisjoint(elsewhere):
            raise RuntimeError("a block is in both tiers")
        blocks = [*self._empty, *self._by_digest.values()]
        if sorted(blocks) != list(range(self.num_blocks)):
            raise RuntimeError("a host block is lost, or taken twice")


def worth_moving(mode: str, block_size: int, move_seconds: float, cost: PrefillCost) -> bool:
    """Whether the blocks of a preempted sequence are moved to host memory rather than computed again.

    mode: --preemption-mode; auto compares a block's two copies, `move_seconds` each, with what its tokens
    have cost to compute lately. Nothing was computed yet: they are moved.
    """
    if mode != "auto":
        return mode == "swap"
    return not cost.dearest or 2 * move_seconds <= block_size * cost.dearest
