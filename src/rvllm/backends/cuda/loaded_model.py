"""What a loaded model holds of a GPU: its kernels, a stream, all memory, and the weights in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass

import numpy as np

from rvllm.backends.base import LedgerLine, Progress
from rvllm.backends.cuda.device.arena import Arena
from rvllm.backends.cuda.device.catalog import Catalog
from rvllm.backends.cuda.device.driver import CudaError, Device, DeviceFacts, Pinned, Stream
from rvllm.backends.cuda.device.host_memory import ComingHostMemory
from rvllm.backends.cuda.formats import device_format
from rvllm.backends.cuda.layout.addresses import Addresses
from rvllm.backends.cuda.layout.allocations import DeviceMemory, Placed
from rvllm.backends.cuda.layout.memory import Budget, budget_of
from rvllm.backends.cuda.layout.packed import PackedWeight
from rvllm.backends.cuda.staging import staging_bytes
from rvllm.backends.cuda.supported import check_device, check_supported
from rvllm.backends.cuda.weight_loader import Loader, fill_dummy
from rvllm.config import EngineConfig, kernel_cache_dir
from rvllm.kernels.types import SHORT
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program
from rvllm.weights.checkpoint import Checkpoint


@contextmanager
def given_back_on_failure() -> Iterator[None]:
    """What was opened and taken within goes back if an error ends it, so that another start finds it all.

    With the last user of the device everything else goes that hangs on its context: kernels, streams, graphs.
    """
    opened, taken = list(Device.opened), list(Arena.taken)
    try:
        yield
    except BaseException:
        new: list[Arena | Device] = [arena for arena in Arena.taken if arena not in taken]
        for held in [*new, *(device for device in Device.opened if device not in opened)]:
            with suppress(CudaError):  # of a device that the error has made unusable
                held.close()
        raise


def loading_kernels(packed: Sequence[PackedWeight], dtype: DType, checkpoint: Checkpoint | None) -> list[str]:
    """Kernels that put the weights in place; None as checkpoint: those that fill in random ones."""
    if checkpoint is not None:
        return Loader.kernels(packed, dtype, checkpoint)
    tag = SHORT[dtype.value]
    names = [f"sm80_{tag}_fill_random", "sm80_f32_fill_random"]
    for wanted in packed:
        if wanted.format is not None:
            names += device_format(wanted.format).loading_kernels(wanted, dtype, None)
    return list(dict.fromkeys(names))


def send_ropes(stream: Stream, at: Addresses, memory: DeviceMemory) -> None:
    """Computes the rotary tables on the host and copies them to the device."""
    sizes = {a.key: a.nbytes for a in memory.allocations if a.field == "ropes"}
    for rope, pair in at.ropes.items():
        for table, address in zip(rope.table(sizes[rope] // 4 // (rope.dim // 2)), pair, strict=True):
            flat = np.ascontiguousarray(table).reshape(-1).view(np.uint8)
            staging = Pinned(flat.nbytes)
            staging.array[:] = flat
            stream.copy_to_device(address, staging.address, flat.nbytes)
            stream.sync()
            staging.close()


@dataclass(frozen=True)
class OpenDevice:
    """A GPU that can run a program, and the memory that was free on it before anything was taken."""

    device: Device
    facts: DeviceFacts
    budget: Budget

    @staticmethod
    def for_program(program: Program, config: EngineConfig) -> OpenDevice:
        """Raises MissingKernelError or UsageError for what no GPU, or not this one, can run."""
        check_supported(program, config)
        device = Device()
        facts = device.facts()
        check_device(facts)
        free, total = device.free_memory()
        return OpenDevice(device, facts, budget_of(config, free, total))

    def staging(self, checkpoint: Checkpoint | None) -> AbstractContextManager[ComingHostMemory | None]:
        """Begins to take the pinned memory that weights pass through; None for those that are not read."""
        if checkpoint is None:
            return nullcontext()
        return ComingHostMemory(staging_bytes(checkpoint), self.device)


@dataclass(frozen=True)
class Gpu:
    """A GPU's kernels and memory in one model's hands. kernel_bytes: what the loaded kernels take."""

    device: Device
    facts: DeviceFacts
    catalog: Catalog
    arena: Arena
    stream: Stream
    budget: Budget
    kernel_bytes: int

    @staticmethod
    def load(
        found: OpenDevice,
        kernels: Sequence[str],
        memory: DeviceMemory,
        wanted: Sequence[PackedWeight],
        dtype: DType,
        checkpoint: Checkpoint | None,
        seed: int,
        report: Progress,
        staging: ComingHostMemory | None,
        through: str,
        sleeps: bool = False,
    ) -> tuple[Gpu, Addresses]:
        """Loads these kernels, compiling what is new, takes the memory and fills in weights and rope tables.

        checkpoint: None for random weights of that seed. staging, and the memory of the ledger's line
        `through`: what weights pass through on the host and on the device. sleeps: whether the memory can be
        given back for a while. Raises MissingKernelError listing kernels that there are not.
        """
        report(0.0, "loading kernels")
        catalog, stream = Catalog(found.facts.capability, kernel_cache_dir()), Stream()
        names = [*kernels, *loading_kernels(wanted, dtype, checkpoint)]
        catalog.require(names, lambda done, count: report(done / count, "compiling kernels"))
        report(0.0, "taking memory")
        free, total = found.device.free_memory()
        arena = Arena(memory.nbytes, sleeps)
        report(0.0, "clearing memory")
        placed = Placed.take(arena, memory.allocations)
        placed.clear(stream)
        at = placed.addresses(memory.workspace)
        send_ropes(stream, at, memory)
        report(0.0, "loading weights")
        places = [(w, at.weights[w.weight.name, w.form]) for w in wanted]
        if checkpoint is None:
            fill_dummy(catalog, stream, dtype, places, seed)
        else:
            assert staging is not None
            loader = Loader(catalog, stream, dtype, placed.line(through), staging.get())
            try:
                loader.load(places, checkpoint, report)
            finally:
                loader.close()
        taken = total - free - found.budget.used
        return Gpu(found.device, found.facts, catalog, arena, stream, found.budget, taken), at

    def ledger(self) -> list[LedgerLine]:
        """Device memory line by line, as far as it was taken from the start."""
        return [
            LedgerLine("in use before (driver, context, others)", self.budget.used),
            LedgerLine("kernels", self.kernel_bytes),
            *self.arena.ledger(),
        ]

    def close(self) -> None:
        """Gives everything back."""
        self.arena.close()
        self.catalog.close()
        self.stream.close()
        self.device.close()
