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
        page = int(call("cuMemGetAllocationGranularity", self._kind, least))
        self.nbytes = -(-nbytes // page) * page
        self.base = int(call("cuMemAddressReserve", self.nbytes, 0, 0, 0))
        self._pages: Any = None
        try:
            self.take()
        except CudaError:
            self.close()
            raise

    @property
    def taken(self) -> bool:
        """Whether there are pages."""
        return self._pages is not None

    def take(self) -> None:
        """Puts pages behind the addresses; what they hold is undefined."""
        words = driver.api()
        pages = call("cuMemCreate", self.nbytes, self._kind, 0)
        call("cuMemMap", self.base, self.nbytes, 0, pages, 0)
        access = words.CUmemAccessDesc()
        access.location = self._kind.location
        access.flags = words.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        call("cuMemSetAccess", self.base, self.nbytes, [access], 1)
        self._pages = pages

    def give_back(self) -> None:
        """Gives the pages back; nothing may use the addresses until they are taken again."""
        call("cuMemUnmap", self.base, self.nbytes)
        call("cuMemRelease", self._pages)
        self._pages = None

    def close(self) -> None:
        """Gives back addresses too."""
        if self.taken:
            self.give_back()
        call("cuMemAddressFree", self.base, self.nbytes)
