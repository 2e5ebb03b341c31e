"""The way from the host's memory to the device's: rows by pinned buffers, and the kernels that take them.

Reading and copying overlap: while the device works on one staging buffer, threads fill the others. The
staging memory on the device lies where the KV cache will be, so loading costs no memory of its own.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.cuda.device.arena import Range
from rvllm.backends.cuda.device.catalog import Catalog
from rvllm.backends.cuda.device.driver import Event, Launch, Stream
from rvllm.backends.cuda.device.host_memory import HostMemory
from rvllm.backends.cuda.layout.packed import PackedWeight
from rvllm.backends.cuda.ops.gemm.plan import Interleave
from rvllm.errors import ModelError
from rvllm.kernels.types import SHORT
from rvllm.program.dtypes import DType
from rvllm.weights.checkpoint import Checkpoint
from rvllm.weights.reading import FileReader

BUFFERS, STAGING = 16, 16 << 20  # pinned buffers, and the bytes of one
FEW_BUFFERS, LARGE_STAGING = 4, 32 << 20  # where the device has little room for rows on their way
LEAST_STAGING = 1 << 18
READERS = 12  # threads at most, of which each copies out of the page cache at 3 to 6 GB/s
PIECE = 2 << 20  # bytes that a reader takes at a time of what is waited for
BLOCK = 256
Tag = TypeVar("Tag")  # what goes with a part's rows


@dataclass(frozen=True)
class Span:
    """Consecutive rows of a weight as they come from the host, and where they go.

    address: of the matrix; in a stack, of the one that the rows belong to.
    data: uint8 [rows, bytes of a row].
    first: the row of the packed matrix or of the table where the first of them goes.
    padded: rows to write, with zeros behind the real ones.
    """

    packed: PackedWeight
    address: int
    data: NDArray[np.uint8]
    first: int
    padded: int
    interleave: Interleave


@dataclass(frozen=True)
class _Buffer:
    """Pinned memory for the rows of one slice."""

    address: int
    array: NDArray[np.uint8]

    @property
    def nbytes(self) -> int:
        return len(self.array)


def staging_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of pinned memory for all buffers that loading this wants: less for small models."""
    largest = max((4 * math.prod(info.shape) for info in checkpoint.tensors.values()), default=0)
    return BUFFERS * min(STAGING, max(LEAST_STAGING, -(-largest // 4096) * 4096))


@dataclass
class _Slice:
    """Rows on their way into a pinned buffer. then: queues the kernels that take them on the device."""

    buffer: int
    nbytes: int
    pieces: list[Future[None]]
    then: Callable[[], None] | None = None


class Staging:
    """Sends rows of weights to the device in pieces that fit, and queues the kernels that place them."""

    def __init__(
        self, catalog: Catalog, stream: Stream, dtype: DType, scratch: Range, memory: HostMemory
    ) -> None:
        """scratch: of the device. memory: for the buffers, see `staging_bytes`; it must outlive this."""
        self._catalog = catalog
        self._stream = stream
        self._dtype = dtype
        self.tag = SHORT[dtype.value]
        # Raw buffers and, as Q4 blocks grow fourfold in 16 bits, room for one dequantised piece.
        count, most = BUFFERS, STAGING
        if scratch.nbytes < (BUFFERS + 8) * STAGING:
            count, most = FEW_BUFFERS, LARGE_STAGING
        raw = min(most, memory.nbytes // count, scratch.nbytes // (count + 8)) // 4096 * 4096
        self._raw = [scratch.address + i * raw for i in range(count)]
        self.rows_at = scratch.address + count * raw
        self._rows_bytes = scratch.nbytes - count * raw
        self._staging = [
            _Buffer(memory.address + start, memory.view(start, raw)) for start in range(0, count * raw, raw)
        ]
        self._free = [Event() for _ in range(count)]
        self._turn = self._sent = 0  # the buffer that is filled next, and the one of `send`
        self._files = FileReader()  # of what is loaded
        self._readers = ThreadPoolExecutor(min(READERS, os.cpu_count() or 1), thread_name_prefix="load")
        self._coming: deque[_Slice] = deque()  # being read, in their order

    def close(self) -> None:
        """Waits for what is on its way: nothing uses the pinned memory any more."""
        self._readers.shutdown()
        self._files.close()
        self._stream.sync()
        for event in self._free:
            event.close()

    def spans(
        self, packed: PackedWeight, address: int, arrays: Iterable[tuple[Tag, NDArray[np.uint8]]]
    ) -> Iterator[tuple[Tag, Span]]:
        """The weight's rows, cut where the interleaving changes and where a matrix of a stack ends.

        arrays: the rows of each part as uint8 [rows, bytes of a row], with whatever goes with them.
        """
        stacked, gated = packed.form in ("stack", "gated_stack"), packed.form in ("gated", "gated_stack")
        last = packed.weight.elements // packed.width // (packed.weight.shape[0] if stacked else 1)
        position, half = 0, last // 2
        for tag, data in arrays:
            start = 0
            while start < len(data):
                matrix, row = divmod(position + start, last)
                if gated:
                    up = row >= half
                    stop = min(len(data), start + (last if up else half) - row)
                    first = (row - half if up else row) // 8 * 16
                    kind = Interleave.UP if up else Interleave.GATE
                    padded = -(-(stop - start) // 8) * 8
                    if (row - half if up else row) % 8:
                        raise ModelError(
                            f"{packed.weight.name}: a part of a gate or up matrix starts within eight rows"
                        )
                else:
                    stop, first, kind = min(len(data), start + last - row), row, Interleave.PLAIN
                    whole = packed.form in ("packed", "stack") and row + stop - start == last
                    padded = stop - start + (-last % 64 if whole else 0)
                place = address + matrix * packed.matrix_bytes if stacked else address
                yield tag, Span(packed, place, data[start:stop], first, padded, kind)
                start = stop
            position += len(data)

    def stream(self, span: Span, row_bytes: int = 0) -> Iterator[tuple[int, int, int, int]]:
        """Sends a span's rows in slices that fit: (device address, first packed row, rows, rows to write).

        row_bytes: of scratch memory (`rows_at`) that each row needs beside. Kernels that take a slice are
        to be queued before the next one is asked for.
        """
        for start, stop, first, padded in self._cut(span, row_bytes):
            coming = self._read(span.data[start:stop], PIECE)
            self._send(coming)
            yield self._raw[coming.buffer], first, stop - start, padded
            self._free[coming.buffer].record(self._stream)

    def queue(self, span: Span, place: Callable[[int, int, int, int], None], row_bytes: int = 0) -> None:
        """As `stream`, and returns while rows are still being read: so that the next span's are, too.

        place: called with what `stream` gives, in order, once a slice is on its way; it queues the kernels
        that take it. `flush` waits for all of them.
        """
        for start, stop, first, padded in self._cut(span, row_bytes):
            coming = self._read(span.data[start:stop], STAGING)
            coming.then = partial(place, self._raw[coming.buffer], first, stop - start, padded)
            self._coming.append(coming)

    def flush(self) -> None:
        """Sends what is still being read, and has its kernels queued."""
        while self._coming:
            self._place_oldest()

    def _place_oldest(self) -> None:
        oldest = self._coming.popleft()
        self._send(oldest)
        assert oldest.then is not None
        oldest.then()
        self._free[oldest.buffer].record(self._stream)

    def _cut(self, span: Span, row_bytes: int) -> Iterator[tuple[int, int, int, int]]:
        """A span's rows in slices that fit: (start, stop, first packed row, rows to write)."""
        fit = self._staging[0].nbytes // span.data.shape[1]
        if row_bytes:
            fit = min(fit, self._rows_bytes // row_bytes)
        fit = fit // 8 * 8
        if fit < 8:
            raise ModelError(
                f"{span.packed.weight.name}: 8 rows of {span.packed.width} elements exceed the staging "
                "memory; raise --num-blocks"
            )
        rows = len(span.data)
        for start in range(0, rows, fit):
            stop = min(start + fit, rows)
            padded = stop - start + (span.padded - rows if stop == rows else 0)
            first = span.first + (start if span.interleave == Interleave.PLAIN else start // 8 * 16)
            yield start, stop, first, padded

    def slices(self, rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
        """Rows start to stop, by eights, that `send` has room for."""
        fit = (self._staging[0].nbytes - 4096) // (row_bytes + 8) // 8 * 8
        if fit < 8:
            raise ModelError(f"8 rows of {row_bytes} bytes exceed the staging memory; raise --num-blocks")
        for start in range(0, rows, fit):
            yield start, min(start + fit, rows)

    def send(self, arrays: Sequence[NDArray[Any]]) -> list[int]:
        """Copies arrays to the device, contiguous; their addresses there, until `sent` was called twice."""
        buffer = self._sent = self._next_buffer()
        staging, offset, addresses = self._staging[buffer].array, 0, []
        for values in arrays:
            pinned = staging[offset : offset + values.nbytes].view(values.dtype).reshape(values.shape)
            for piece in self._copied(values, pinned, PIECE):
                piece.result()
            addresses.append(self._raw[buffer] + offset)
            offset += -(-values.nbytes // 256) * 256
        self._stream.copy_to_device(self._raw[buffer], self._staging[buffer].address, offset)
        return addresses

    def sent(self) -> None:
        """Says that the kernels which read what was sent last are queued."""
        self._free[self._sent].record(self._stream)

    def copy(self, values: NDArray[Any], address: int) -> None:
        """Copies an array to the device as it is."""
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        for start in range(0, flat.nbytes, self._staging[0].nbytes):
            piece = flat[start : start + self._staging[0].nbytes]
            buffer = self._next_buffer()
            self._files.copy(piece, self._staging[buffer].array[: piece.nbytes])
            self._stream.copy_to_device(address + start, self._staging[buffer].address, piece.nbytes)
            self._free[buffer].record(self._stream)

    def run(self, kernel: str, arguments: Sequence[Any], grid: int) -> None:
        """Queues a kernel of BLOCK threads a block."""
        Launch(self._catalog[kernel], BLOCK, 0, arguments, pdl=False).run(self._stream, (grid, 1, 1))

    def _next_buffer(self) -> int:
        """The buffer whose turn it is, once what was in it has left and the device is done with it."""
        buffer, self._turn = self._turn, (self._turn + 1) % len(self._free)
        # Slices are sent a few turns before their buffer is wanted again, so that nobody waits for that.
        most = len(self._free) * 3 // 4
        while self._coming and (len(self._coming) >= most or self._coming[0].buffer == buffer):
            self._place_oldest()
        self._free[buffer].wait()
        return buffer

    def _read(self, data: NDArray[np.uint8], piece: int) -> _Slice:
        """Begins to copy rows into the next pinned buffer, so many bytes a thread: other buffers are read at
        the same time where it is all of them, and each piece costs a tenth of a millisecond."""
        buffer = self._next_buffer()
        pinned = self._staging[buffer].array[: data.nbytes].reshape(data.shape)
        return _Slice(buffer, data.nbytes, self._copied(data, pinned, piece))

    def _copied(self, values: NDArray[Any], to: NDArray[Any], piece: int) -> list[Future[None]]:
        """Copies rows in threads, so many bytes each."""
        share = max(1, piece * len(values) // max(1, values.nbytes))
        return [
            self._readers.submit(self._files.copy, values[start : start + share], to[start : start + share])
            for start in range(0, len(values), share)
        ]

    def _send(self, read: _Slice) -> None:
        """Copies what was read to the device."""
        for piece in read.pieces:
            piece.result()
        self._stream.copy_to_device(self._raw[read.buffer], self._staging[read.buffer].address, read.nbytes)
