"""All that is taken of device memory, as one list: ledger, addresses and what is cleared follow from it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from rvllm.backends.cuda.device.arena import Arena, Range, aligned
from rvllm.backends.cuda.device.driver import Stream
from rvllm.backends.cuda.layout.addresses import Addresses
from rvllm.backends.cuda.layout.packed import PackedWeight
from rvllm.program.memory import Workspace

KEYED = tuple(f.name for f in fields(Addresses) if f.type != "int")
WEIGHTS = "weights"  # their line of the ledger; they come first
WORKSPACE = "workspace"  # the field of the one allocation that holds all buffers of the program


@dataclass(frozen=True)
class Allocation:
    """Device memory of `nbytes`, in the ledger under `line`.

    field: of `Addresses`, which gets its address; key: its place there where the field is a mapping. Two
    allocations of one key are a pair. zeroed: whether kernels want it zeroed before the first step.
    """

    field: str
    line: str
    nbytes: int
    key: Hashable = None
    zeroed: bool = False


def lines_of(allocations: Iterable[Allocation]) -> dict[str, int]:
    """Bytes by line of the ledger, as an arena takes them."""
    lines: dict[str, int] = {}
    for allocation in allocations:
        lines[allocation.line] = lines.get(allocation.line, 0) + aligned(allocation.nbytes)
    return lines


def weight_allocations(wanted: Iterable[PackedWeight]) -> list[Allocation]:
    """A place for each weight in each form that is wanted of it."""
    return [Allocation("weights", WEIGHTS, w.nbytes, (w.weight.name, w.form)) for w in wanted]


def addresses_of(allocations: Iterable[Allocation], places: Iterable[int], workspace: Workspace) -> Addresses:
    """Where everything lies when the allocations lie at `places`; what is not among them, nowhere."""
    found: dict[str, Any] = {f.name: {} if f.name in KEYED else 0 for f in fields(Addresses)}
    for allocation, address in zip(allocations, places, strict=True):
        if allocation.field == WORKSPACE:
            found["buffers"] = {n: address + place.offset for n, place in workspace.placements.items()}
        elif allocation.field not in KEYED:
            found[allocation.field] = address
        elif allocation.key in found[allocation.field]:
            found[allocation.field][allocation.key] = found[allocation.field][allocation.key], address
        else:
            found[allocation.field][allocation.key] = address
    return Addresses(**found)


def nowhere(allocations: Sequence[Allocation], workspace: Workspace) -> Addresses:
    """Addresses of nothing, for planning launches before any memory is taken."""
    unplaced = {n: replace(place, offset=0) for n, place in workspace.placements.items()}
    return addresses_of(allocations, [0] * len(allocations), Workspace(unplaced, 0))


@dataclass(frozen=True)
class DeviceMemory:
    """All that a model takes of the device's memory. workspace: where the program's buffers lie in theirs."""

    allocations: list[Allocation]
    workspace: Workspace

    @property
    def lines(self) -> dict[str, int]:
        """Bytes by line of the ledger."""
        return lines_of(self.allocations)

    @property
    def nbytes(self) -> int:
        """Bytes of the arena."""
        return sum(self.lines.values())


@dataclass(frozen=True)
class Placed:
    """Allocations in their places of the device's memory."""

    allocations: Sequence[Allocation]
    ranges: Sequence[Range]

    @staticmethod
    def take(arena: Arena, allocations: Sequence[Allocation]) -> Placed:
        """Takes them from the arena, one behind the other."""
        return Placed(allocations, [arena.take(a.line, a.nbytes) for a in allocations])

    def addresses(self, workspace: Workspace) -> Addresses:
        """Where everything lies."""
        return addresses_of(self.allocations, (r.address for r in self.ranges), workspace)

    def clear(self, stream: Stream) -> None:
        """Zeroes what kernels want zeroed."""
        for allocation, place in zip(self.allocations, self.ranges, strict=True):
            if allocation.zeroed and allocation.nbytes:
                stream.fill_bytes(place.address, 0, allocation.nbytes)

    def line(self, name: str) -> Range:
        """All memory of a line, whose allocations stand next to each other."""
        own = [r for r in self.ranges if r.name == name]
        return Range(name, own[0].address, own[-1].address + own[-1].nbytes - own[0].address)
