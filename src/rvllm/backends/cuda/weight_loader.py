"""Weights onto the device: stored bytes through pinned memory, dequantised and packed by kernels there.

Reading and copying overlap: while the device works on one staging buffer, threads fill the other. The
staging memory on the device lies where the KV cache will be, so loading costs no memory of its own.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.base import Progress
from rvllm.backends.cuda.device.arena import Range
from rvllm.backends.cuda.device.catalog import Catalog
from rvllm.backends.cuda.device.driver import Event, Launch, Pinned, Stream
from rvllm.backends.cuda.formats import device_format
from rvllm.backends.cuda.layout.weights import PackedWeight, WeightLayout
from rvllm.backends.cuda.ops.gemm.plan import Interleave, interleave_gate_up, pack_arguments
from rvllm.errors import ModelError
from rvllm.program.dtypes import DType
from rvllm.weights.checkpoint import Checkpoint, TensorType
from rvllm.weights.packing import find_tensor, pack, readable_parts, readable_type

STAGING = 32 << 20  # bytes of one pinned buffer
BLOCK = 256
VECTORS = ("norm", "bias", "gated_bias")
Tag = TypeVar("Tag")  # what goes with a part's rows
_PLAIN = {TensorType.F32: "f32", TensorType.F16: "f16", TensorType.BF16: "bf16"}


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


class Loader:
    """Moves a checkpoint's weights to their places."""

    def __init__(self, catalog: Catalog, stream: Stream, dtype: DType, scratch: Range) -> None:
        self._catalog = catalog
        self._stream = stream
        self._dtype = dtype
        self.tag = "bf16" if dtype is DType.BF16 else "f16"
        raw = min(STAGING, scratch.nbytes // 12 // 4096 * 4096)
        # Two raw buffers and, as Q4 blocks grow fourfold in 16 bits, room for one dequantised piece.
        self._raw = [scratch.address, scratch.address + raw]
        self.rows_at = scratch.address + 2 * raw
        self._rows_bytes = scratch.nbytes - 2 * raw
        self._staging = [Pinned(raw), Pinned(raw)]
        self._free = [Event(), Event()]
        self._turn = 0  # of `send`
        self._readers = ThreadPoolExecutor(4, thread_name_prefix="load")

    @staticmethod
    def kernels(packed: Sequence[PackedWeight], dtype: DType, checkpoint: Checkpoint) -> list[str]:
        """The kernels that loading these weights needs. What is missing is left to `check_weights`."""
        tag, names = "bf16" if dtype is DType.BF16 else "f16", list[str]()
        for wanted in packed:
            if wanted.form in VECTORS:
                continue
            if wanted.format is not None:
                names += device_format(wanted.format).loading_kernels(wanted, dtype, checkpoint)
                continue
            found = ((part, find_tensor(part, checkpoint)) for part in wanted.weight.parts)
            for kind in (readable_type(part, info) for part, info in found if info is not None):
                names += _placing(wanted.form, kind, tag)
        return list(dict.fromkeys(names))

    def load(
        self, places: Sequence[tuple[PackedWeight, int]], checkpoint: Checkpoint, progress: Progress | None
    ) -> float:
        """Loads every weight to its address and returns GB/s of stored bytes."""
        total = sum(wanted.nbytes for wanted, _ in places) or 1
        done, stored, started = 0, 0, time.perf_counter()
        for wanted, address in places:
            if wanted.form in VECTORS:
                self._vector(wanted, address, checkpoint)
            elif wanted.format is not None:
                stored += device_format(wanted.format).load(self, wanted, address, checkpoint)
            else:
                stored += self._expand(wanted, address, checkpoint)
            done += wanted.nbytes
            if progress is not None:
                rate = stored / 1e9 / max(time.perf_counter() - started, 1e-9)
                progress(done / total, f"loading weights, {rate:.1f} GB/s")
        self._stream.sync()
        return stored / 1e9 / (time.perf_counter() - started)

    def close(self) -> None:
        """Frees the pinned buffers."""
        self._readers.shutdown()
        for staging, event in zip(self._staging, self._free, strict=True):
            staging.close()
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
        fit = self._staging[0].nbytes // span.data.shape[1]
        if row_bytes:
            fit = min(fit, self._rows_bytes // row_bytes)
        fit = fit // 8 * 8
        if fit < 8:
            raise ModelError(
                f"{span.packed.weight.name}: 8 rows of {span.packed.width} elements exceed the staging "
                "memory; raise --num-gpu-blocks"
            )
        rows = len(span.data)
        for turn, start in enumerate(range(0, rows, fit)):
            stop = min(start + fit, rows)
            padded = stop - start + (span.padded - rows if stop == rows else 0)
            first = span.first + (start if span.interleave == Interleave.PLAIN else start // 8 * 16)
            yield self._send(span.data[start:stop], turn % 2), first, stop - start, padded
            self._free[turn % 2].record(self._stream)

    def slices(self, rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
        """Rows start to stop, by eights, that `send` has room for."""
        fit = (self._staging[0].nbytes - 4096) // (row_bytes + 8) // 8 * 8
        if fit < 8:
            raise ModelError(f"8 rows of {row_bytes} bytes exceed the staging memory; raise --num-gpu-blocks")
        for start in range(0, rows, fit):
            yield start, min(start + fit, rows)

    def send(self, arrays: Sequence[NDArray[Any]]) -> list[int]:
        """Copies arrays to the device, contiguous; their addresses there, until `sent` was called twice."""
        self._turn ^= 1
        self._free[self._turn].wait()
        staging, offset, addresses = self._staging[self._turn].array, 0, []
        for values in arrays:
            pinned = staging[offset : offset + values.nbytes].view(values.dtype).reshape(values.shape)
            share = -(-len(values) // 4)
            list(
                self._readers.map(
                    lambda s, to=pinned, values=values, share=share: np.copyto(
                        to[s : s + share], values[s : s + share]
                    ),
                    range(0, len(values), share),
                )
            )
            addresses.append(self._raw[self._turn] + offset)
            offset += -(-values.nbytes // 256) * 256
        self._stream.copy_to_device(self._raw[self._turn], self._staging[self._turn].address, offset)
        return addresses

    def sent(self) -> None:
        """Says that the kernels which read what was sent last are queued."""
        self._free[self._turn].record(self._stream)

    def copy(self, values: NDArray[Any], address: int) -> None:
        """Copies an array to the device as it is."""
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        for start in range(0, flat.nbytes, self._staging[0].nbytes):
            piece = flat[start : start + self._staging[0].nbytes]
            self._free[0].wait()
            self._staging[0].array[: piece.nbytes] = piece
            self._stream.copy_to_device(address + start, self._staging[0].address, piece.nbytes)
            self._free[0].record(self._stream)

    def run(self, kernel: str, arguments: Sequence[Any], grid: int) -> None:
        """Queues a kernel of BLOCK threads a block."""
        Launch(self._catalog[kernel], BLOCK, 0, arguments, pdl=False).run(self._stream, (grid, 1, 1))

    def _expand(self, packed: PackedWeight, address: int, checkpoint: Checkpoint) -> int:
        """A matrix in the model's type; parts that must be rearranged come as float32 from the host."""
        width, nbytes = packed.width, 0
        parts = ((part.type, part.data) for part in readable_parts(packed.weight, checkpoint))
        for kind, span in self.spans(packed, address, parts):
            nbytes += span.data.nbytes
            *dequant, place = _placing(packed.form, kind, self.tag)
            for source, first, rows, padded in self.stream(span, 2 * width):
                if packed.form == "table":
                    self._dequantise(place, span.address + first * width * 2, source, rows * width)
                    continue
                if dequant:
                    self._dequantise(dequant[0], self.rows_at, source, rows * width)
                    source = self.rows_at
                where = pack_arguments(source, span.address, rows, width, first=first, padded_rows=padded,
                                       interleave=span.interleave)  # fmt: skip
                self.run(place, where, 132 * 8)
        return nbytes

    def _send(self, data: NDArray[np.uint8], buffer: int) -> int:
        """Copies rows to the device by way of a pinned buffer; returns their address there."""
        self._free[buffer].wait()
        pinned = self._staging[buffer].array[: data.nbytes].reshape(data.shape)
        share = -(-len(data) // 4)
        list(
            self._readers.map(
                lambda s: np.copyto(pinned[s : s + share], data[s : s + share]), range(0, len(data), share)
            )
        )
        self._stream.copy_to_device(self._raw[buffer], self._staging[buffer].address, data.nbytes)
        return self._raw[buffer]

    def _dequantise(self, kernel: str, target: int, source: int, count: int) -> None:
        self.run(kernel, [target, source, ctypes.c_uint64(count)], -(-count // 8 // BLOCK))

    def _vector(self, wanted: PackedWeight, address: int, checkpoint: Checkpoint) -> None:
        """Norm weights and biases: small, converted on the host."""
        if wanted.form == "norm":
            values = pack(wanted.weight, checkpoint, DType.F32)
        else:
            values = pack(wanted.weight, checkpoint, self._dtype)
            if wanted.form == "gated_bias":
                gate, up = values.reshape(2, -1, 1)
                values = interleave_gate_up(gate, up)
        self.copy(values, address)


def _placing(form: WeightLayout, kind: TensorType, tag: str) -> list[str]:
    """The kernels that put rows stored as `kind` in their place: at most one that dequantises, one that
    places.
    """
    dequant = f"sm80_{tag}_dequant_{kind.value.lower()}"
    if form == "table":
        return [dequant]
    if kind in _PLAIN:
        return [f"sm80_{tag}_gemm_pack_{_PLAIN[kind]}"]
    return [dequant, f"sm80_{tag}_gemm_pack_{tag}"]


def fill_dummy(
    catalog: Catalog, stream: Stream, dtype: DType, places: Sequence[tuple[PackedWeight, int]], seed: int
) -> None:
    """Random weights where the real ones would be: deviation 0.02, norms around 1; no file is read."""
    tag = "bf16" if dtype is DType.BF16 else "f16"
    for index, (wanted, address) in enumerate(places):
        if wanted.format is not None:
            device_format(wanted.format).fill(catalog, stream, wanted, address, seed * 1_000_003 + index)
            continue
        norm = wanted.form == "norm"
        size = 4 if norm else 2
        is_weight = norm and not wanted.weight.name.endswith(".bias")
        arguments: list[Any] = [
            address,
            ctypes.c_uint64(-(-wanted.nbytes // size // 8) * 8),
            ctypes.c_uint64(0),
            ctypes.c_uint((seed * 1_000_003 + index) & 0xFFFFFFFF),
            ctypes.c_float(1.0 if is_weight else 0.0),
            ctypes.c_float(0.02),
        ]
        function = catalog["sm80_f32_fill_random" if norm else f"sm80_{tag}_fill_random"]
        Launch(function, BLOCK, 0, arguments, pdl=False).run(stream, (132 * 8, 1, 1))
    stream.sync()
