"""One launch of an emulated kernel: its order, its limits, and what is said when it fails."""

from __future__ import annotations

import ctypes
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

from .chain import Chain
from .compiler import EmulatorError, Kernel, Launch
from .memory import Memory, stacks

SMEM = 166912  # bytes of shared memory a block may have, as on capability 8.0
MAX_THREADS, MAX_GRID = 1024, (2**31 - 1, 65535, 65535)  # of a block; blocks of a grid
PLAIN_SMEM = 48 * 1024  # bytes of shared memory that need no permission


@dataclass
class Launcher:
    """Runs kernels over one memory.

    order: who goes first among blocks, threads and lanes: 0 ascending, 1 descending, larger numbers shuffle;
    None takes another one at every launch.
    seconds: of processor time that a launch may take.
    """

    order: int | None = None
    seconds: int = 60
    memory: Memory = field(default_factory=Memory)
    launches: int = 0

    def __post_init__(self) -> None:
        self.chain = Chain(self.memory)

    def run(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: int,
        smem: int,
        pointers: int,
        pdl: bool,
        argument_at: Callable[[int], str] = lambda address: "",
        allowed: int | None = None,
    ) -> None:
        """Runs a kernel on the arguments whose addresses begin at `pointers`.

        pdl: it may start before its predecessors are done.
        allowed: bytes of shared memory it may have, by default what the catalog says.
        argument_at: words for the argument whose memory begins at an address.
        Raises EmulatorError for what a GPU would punish.
        """
        spec = kernel.spec
        most = max(min(spec.smem, SMEM - spec.static_smem) if allowed is None else allowed, PLAIN_SMEM)
        if smem > most:
            raise EmulatorError(
                f"{spec.name} may have {most} bytes of shared memory, the launch asks for {smem}"
            )
        if not (0 < block <= MAX_THREADS and all(0 < n <= m for n, m in zip(grid, MAX_GRID, strict=True))):
            raise EmulatorError(f"{spec.name}: no GPU launches a grid of {grid} blocks of {block} threads")
        order = self.order if self.order is not None else self._next(spec.name)
        self.launches += 1
        told = f"{spec.name}, grid {grid}, block {block}, order {order}: "
        launch = Launch(grid, (block, 1, 1), smem, self.seconds, order, pointers, stacks())
        keep = self.chain.begin(launch, pdl)
        if not kernel.run(launch):
            raise EmulatorError(told + launch.message.decode() + self._place(launch.fault, argument_at))
        del keep
        if pdl and not launch.waited:
            raise EmulatorError(told + "no thread waits for the predecessors: the order of the chain is lost")
        self.chain.end(launch)
        damaged = self.memory.damaged()
        if damaged:
            raise EmulatorError(told + "wrote beside an array" + argument_at(damaged.address))

    def _next(self, name: str) -> int:
        if self.launches < 2:
            return self.launches
        seed = os.environ.get("RVLLM_TEST_SEED", "0")
        return zlib.crc32(f"{seed} {name} {self.launches}".encode())

    def _place(self, address: int, argument_at: Callable[[int], str]) -> str:
        if not address:
            return ""
        near = self.memory.near(address)
        if near is None:
            return f" of address {address:#x}, far from every array"
        region, past = near
        return f", {past} bytes past the end of an array" + argument_at(region.address)


def pointers_to(cells: list[object]) -> ctypes.Array[ctypes.c_void_p]:
    """The addresses of ctypes cells, as a launch wants them."""
    return (ctypes.c_void_p * max(1, len(cells)))(*(ctypes.addressof(c) for c in cells))  # type: ignore[arg-type]
