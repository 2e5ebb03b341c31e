"""All device memory, taken once: one allocation carved into named ranges, and the ledger that shows them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

from rvllm.backends.base import LedgerLine
from rvllm.backends.cuda.device.driver import CudaError, Stream, call
from rvllm.backends.cuda.device.host_memory import HostMemory
from rvllm.backends.cuda.device.mapped import MappedMemory
from rvllm.errors import CapacityError

ALIGNMENT = 1024  # bytes: what swizzled shared-memory images and vector loads want
CLEAR_RATE = 540e9  # bytes a second of pages that were given back and an H200's driver clears


def aligned(nbytes: int) -> int:
    """What a range of `nbytes` takes."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Range:
    """A named piece of device memory."""

    name: str
    address: int
    nbytes: int


class Arena:
    """One device allocation, carved front to back. There is no way to give a range back.

    sleeps: whether all of it can be given back for a while, see `sleep`. Raises CapacityError when the driver
    has not as much, which another process may have taken meanwhile.
    """

    taken: ClassVar[list[Arena]] = []  # by this process, and not closed

    def __init__(self, nbytes: int, sleeps: bool = False) -> None:
        self.nbytes = nbytes
        self._mapped: MappedMemory | None = None
        self._kept: HostMemory | None = None
        try:
            if sleeps:
                self._mapped = MappedMemory(nbytes)
                self.base = self._mapped.base
            else:
                self.base = int(call("cuMemAlloc", nbytes))
        except CudaError as error:
            raise CapacityError(
                f"GPU memory: the driver refuses {nbytes / 1e9:.2f} GB in one piece ({error}); another "
                "process may have taken some meanwhile; lower --gpu-memory-utilization or raise "
                "--gpu-memory-reserve-gb"
            ) from None
        Arena.taken.append(self)
        self._used = 0
        self._lines: dict[str, int] = {}

    @property
    def free(self) -> int:
        """Bytes not carved yet."""
        return self.nbytes - self._used

    def take(self, line: str, nbytes: int) -> Range:
        """A range of at least `nbytes`, entered in the ledger under `line`.

        Raises CapacityError with the shortfall when the arena is exhausted.
        """
        size = aligned(nbytes)
        if size > self.free:
            raise CapacityError(
                f"GPU memory: {line} needs {size / 1e9:.2f} GB and {self.free / 1e9:.2f} GB "
                f"are left of {self.nbytes / 1e9:.2f} GB; raise --gpu-memory-utilization, or lower "
                "--max-num-seqs, --max-num-batched-tokens or --max-model-len"
            )
        address = self.base + self._used
        self._used += size
        self._lines[line] = self._lines.get(line, 0) + size
        return Range(line, address, size)

    def ledger(self) -> list[LedgerLine]:
        """What was taken, line by line, and what is left over."""
        lines = [LedgerLine(name, nbytes) for name, nbytes in self._lines.items()]
        if self.free:
            lines.append(LedgerLine("unused", self.free))
        return lines

    @property
    def sleeps(self) -> bool:
        """Whether it can be given back for a while."""
        return self._mapped is not None

    def sleep(self, keep: int, constant: int, stream: Stream) -> bool:
        """Gives all memory back, and keeps what its first `keep` bytes hold in pinned host memory.

        constant: how many of these, the first ones, never change: they are copied once. The host memory is
        taken at the first sleep and stays: taking it is slower than a copy. Nothing may use the device's
        until `wake`. False when the host has not as much; nothing has happened then.
        """
        assert self._mapped is not None and self._mapped.taken
        known = constant if self._kept is not None else 0
        if self._kept is None:
            try:
                self._kept = HostMemory(keep)
            except CudaError:
                return False
        stream.copy_to_host(self._kept.address + known, self.base + known, keep - known)
        stream.sync()
        began = time.perf_counter()
        self._mapped.give_back()
        # Nobody can take pages before the driver has cleared them, and a copy beside that takes twice as
        # long: to wait here costs a swap nothing, and who wakes up or takes the memory has it at once.
        time.sleep(max(0.0, began + self.nbytes / CLEAR_RATE - time.perf_counter()))
        return True

    def wake(self, stream: Stream) -> None:
        """Takes the memory again, at the same addresses, and fills in what was kept.

        Raises CapacityError when the driver has not as much any more; nothing is taken then.
        """
        assert self._mapped is not None and self._kept is not None
        try:
            self._mapped.take()  # all of it before the copy, as `sleep` says
            stream.copy_to_device(self.base, self._kept.address, self._kept.nbytes)
        except CudaError as error:
            self._mapped.give_back()
            raise CapacityError(
                f"waking up: the driver refuses {self.nbytes / 1e9:.2f} GB ({error}); another process has "
                "taken some meanwhile"
            ) from None
        stream.sync()

    def close(self) -> None:
        """Frees the allocation, and what is kept of it on the host."""
        Arena.taken.remove(self)
        if self._kept is not None:
            self._kept.close()
        if self._mapped is not None:
            self._mapped.close()
        else:
            call("cuMemFree", self.base)
