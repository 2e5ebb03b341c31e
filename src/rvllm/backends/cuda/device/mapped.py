"""Device memory whose pages can be given back and taken again while its addresses stay.

What is behind a range of addresses is mapped there by us, so that launches and graphs that were made for the
addresses are valid again as soon as pages are.
"""

from __future__ import annotations

from typing import Any

from rvllm.backends.cuda.device import driver
from rvllm.backends.cuda.device.driver import CudaError, call

PIECE = 2 << 30  # bytes of pages at a time: whole, 124 GB that were just given back take a third longer


class MappedMemory:
    """A range of device addresses at `base`, `nbytes` long and with pages behind it.

    Raises CudaError where the driver has not as much.
    """

    def __init__(self, nbytes: int) -> None:
        words = driver.api()
        self._kind = words.CUmemAllocationProp()
        self._kind.type = words.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._kind.location.type = words.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._kind.location.id = int(call("cuCtxGetDevice"))
        least = words.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self._page = int(call("cuMemGetAllocationGranularity", self._kind, least))
        self.nbytes = -(-nbytes // self._page) * self._page
        self.base = int(call("cuMemAddressReserve", self.nbytes, 0, 0, 0))
        self._taken, self._pages = 0, list[Any]()
        try:
            self.take()
        except CudaError:
            self.close()
            raise

    @property
    def taken(self) -> bool:
        """Whether there are any pages."""
        return bool(self._pages)

    def take(self) -> None:
        """Puts pages behind all addresses; what they hold is undefined."""
        while self._taken < self.nbytes:
            size = min(PIECE, self.nbytes - self._taken)
            pages = call("cuMemCreate", size, self._kind, 0)
            self._pages.append(pages)
            call("cuMemMap", self.base + self._taken, size, 0, pages, 0)
            self._taken += size
        words = driver.api()
        access = words.CUmemAccessDesc()
        access.location = self._kind.location
        access.flags = words.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        call("cuMemSetAccess", self.base, self.nbytes, [access], 1)

    def give_back(self) -> None:
        """Gives the pages back; nothing may use the addresses until they are taken again."""
        if self._taken:
            call("cuMemUnmap", self.base, self._taken)
        for pages in self._pages:
            call("cuMemRelease", pages)
        self._taken, self._pages = 0, []

    def close(self) -> None:
        """Gives back addresses too."""
        if self.taken:
            self.give_back()
        call("cuMemAddressFree", self.base, self.nbytes)
