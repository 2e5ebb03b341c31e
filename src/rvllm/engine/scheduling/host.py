"""The second tier: KV blocks in host memory that hold what was evicted from the device, and how it moves."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import KeysView

from rvllm.engine.scheduling.cost import PrefillCost

Digest = bytes


class Places:
    """Places 0 .. count - 1 by the digest of what they hold; what is here longest makes room."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._by_digest: OrderedDict[Digest, int] = OrderedDict()  # longest here first
        self._empty = deque(range(count))  # given out in their order, so that neighbours move together

    def __contains__(self, digest: Digest) -> bool:
        return digest in self._by_digest

    @property
    def used(self) -> int:
        """Places that hold something."""
        return len(self._by_digest)

    def put(self, digest: Digest) -> int | None:
        """The place that what has this digest is to be copied to; None when all are claimed."""
        if not self._empty and not self._by_digest:
            return None
        place = self._empty.popleft() if self._empty else self._by_digest.popitem(last=False)[1]
        self._by_digest[digest] = place
        return place

    def forget(self) -> None:
        """Makes every place an empty one."""
        self._empty += self._by_digest.values()
        self._by_digest.clear()

    def check_places(self, what: str) -> None:
        """Raises RuntimeError when the books do not balance."""
        if sorted([*self._empty, *self._by_digest.values()]) != list(range(self.count)):
            raise RuntimeError(f"a {what} is lost, or taken twice")


class HostBlocks(Places):
    """Blocks in host memory. A digest is on the device or here, never on both sides."""

    def claim(self, digest: Digest) -> int:
        """Takes a block out of the tier, to be copied to the device; give it back with `free` after that."""
        return self._by_digest.pop(digest)

    def free(self, block: int) -> None:
        """What was claimed is on its way: copies happen in order, so the block may be written behind it."""
        self._empty.append(block)

    def drop(self, digest: Digest) -> None:
        """Forgets what has this digest, if it is here: the device has computed it again."""
        if digest in self:
            self.free(self.claim(digest))

    def check(self, elsewhere: KeysView[Digest]) -> None:
        """Raises RuntimeError when the books do not balance; elsewhere: what the device holds."""
        if not self._by_digest.keys().isdisjoint(elsewhere):
            raise RuntimeError("a block is in both tiers")
        self.check_places("host block")


def worth_moving(mode: str, block_size: int, move_seconds: float, cost: PrefillCost) -> bool:
    """Whether the blocks of a preempted sequence are moved to host memory rather than computed again.

    mode: --preemption-mode; auto compares a block's two copies, `move_seconds` each, with what its tokens
    have cost to compute lately. Nothing was computed yet: they are moved.
    """
    if mode != "auto":
        return mode == "swap"
    return not cost.dearest or 2 * move_seconds <= block_size * cost.dearest
