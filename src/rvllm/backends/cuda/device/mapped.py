"""Device memory whose pages can be given back and taken again while its addresses stay.

What is behind a range of addresses is mapped there by us, so that launches and graphs that were made for the
addresses are valid again as soon as pages are.
"""

from __future__ import annotations

from typing import Any

from rvllm.backends.cuda.device import driver
from rvllm.backends.cuda.device.driver import CudaError, call


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

    def take(self, first: int | None = None) -> None:
        """Puts pages behind all addresses, or only so that the `first` bytes have some; what they hold is
        undefined."""
        words = driver.api()
        end = self.nbytes if first is None else min(self.nbytes, -(-first // self._page) * self._page)
        at, size = self.base + self._taken, end - self._taken
        if size <= 0:
            return
        pages = call("cuMemCreate", size, self._kind, 0)
        self._pages.append(pages)
        call("cuMemMap", at, size, 0, pages, 0)
        self._taken = end
        access = words.CUmemAccessDesc()
        access.location = self._kind.location
        access.flags = words.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        call("cuMemSetAccess", at, size, [access], 1)

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
