"""Arrays for emulated kernels: poisoned, with a page after each that must not be touched."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass

PAGE = mmap.PAGESIZE
_NO_ACCESS = 0  # PROT_NONE
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


_THREADS, _STACK = 1024, 128 << 10  # as in state.hpp
_stacks: list[mmap.mmap] = []


def _forbid(address: int) -> None:
    if _LIBC.mprotect(address, PAGE, _NO_ACCESS):
        raise OSError(ctypes.get_errno(), "mprotect")


def _address(pages: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(pages))


def stacks() -> int:
    """The address of the threads' stacks, each with a forbidden page at its low end."""
    if not _stacks:
        pages = mmap.mmap(-1, _THREADS * _STACK, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for i in range(_THREADS):
            _forbid(_address(pages) + i * _STACK)
        _stacks.append(pages)
    return _address(_stacks[0])


@dataclass
class Region:
    """Pages that end in a forbidden one; the array ends where it begins, up to the next 16 bytes."""

    pages: mmap.mmap
    base: int  # address of the first page
    address: int  # of the array
    nbytes: int
    end: int  # address of the forbidden page

    def slack_untouched(self) -> bool:
        """Whether the bytes of its pages around the array are still poison."""
        before = ctypes.string_at(self.base, self.address - self.base)
        after = ctypes.string_at(self.address + self.nbytes, self.end - self.address - self.nbytes)
        return before.count(b"\xff") == len(before) and after.count(b"\xff") == len(after)


class Memory:
    """Regions, given back together."""

    def __init__(self) -> None:
        self.regions: list[Region] = []

    def take(self, nbytes: int) -> int:
        """The address of `nbytes` of poison (0xff), aligned to 16 bytes."""
        usable = max(1, -(-nbytes // PAGE)) * PAGE
        pages = mmap.mmap(-1, usable + PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        base = _address(pages)
        ctypes.memset(base, 0xFF, usable)
        _forbid(base + usable)
        end = base + usable
        region = Region(pages, base, end - -(-nbytes // 16) * 16, nbytes, end)
        self.regions.append(region)
        return region.address

    def give_back(self, address: int) -> None:
        """Gives one array back."""
        self.regions = [region for region in self.regions if region.address != address]

    def clear(self) -> None:
        """Gives all back."""
        self.regions.clear()

    def damaged(self) -> Region | None:
        """A region beside whose array something has been written."""
        return next((r for r in self.regions if not r.slack_untouched()), None)

    def near(self, address: int) -> tuple[Region, int] | None:
        """The region whose pages hold an address, and how far past the array's end that is."""
        for region in self.regions:
            if region.base <= address < region.end + PAGE:
                return region, address - region.address - region.nbytes
        return None
