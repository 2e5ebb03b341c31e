"""Weights onto the device: stored bytes through pinned memory, dequantised and packed by kernels there.

Reading and copying overlap: while the device works on one staging buffer, threads fill the other. The
staging memory on the device lies where the KV cache will be, so loading costs no memory of its own.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.base import Progress
from rvllm.backends.cuda.device.arena import Range
from rvllm.backends.cuda.device.catalog import Catalog
from rvllm.backends.cuda.device.driver import Event, Launch, Pinned, Stream
from rvllm.backends.cuda.layout.weights import PackedWeight
from rvllm.backends.cuda.ops.gemm.plan import Interleave, interleave_gate_up, pack_arguments
from rvllm.errors import ModelError
from rvllm.program.dtypes import DType
from rvllm.weights.checkpoint import Checkpoint, TensorType
from rvllm.weights.packing import pack, readable_parts

STAGING = 32 << 20  # bytes of one pinned buffer
BLOCK = 256
_PLAIN = {TensorType.F32: "f32", TensorType.F16: "f16", TensorType.BF16: "bf16"}


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a weight as they are stored, and where they go.

    address: of the matrix; in a stack, of the one that the rows belong to.
    first: the row of the packed matrix or of the table where the first of them goes.
    padded: rows to write, with zeros behind the real ones.
    """

    wanted: PackedWeight
    address: int
    type: TensorType
    data: NDArray[np.uint8]  # [rows, bytes of a row]
    first: int
    padded: int
    interleave: Interleave


class Loader:
    """Moves a checkpoint's weights to their places."""

    def __init__(self, catalog: Catalog, stream: Stream, dtype: DType, scratch: Range) -> None:
        self._catalog = catalog
        self._stream = stream
        self._dtype = dtype
        self._tag = "bf16" if dtype is DType.BF16 else "f16"
        raw = min(STAGING, scratch.nbytes // 12 // 4096 * 4096)
        # Two raw buffers and, as Q4 blocks grow fourfold in 16 bits, room for one dequantised piece.
        self._raw = [scratch.address, scratch.address + raw]
        self._rows = scratch.address + 2 * raw
        self._rows_bytes = scratch.nbytes - 2 * raw
        self._staging = [Pinned(raw), Pinned(raw)]
        self._free = [Event(), Event()]
        self._readers = ThreadPoolExecutor(4, thread_name_prefix="load")

    @staticmethod
    def kernels(dtype: DType, types: Sequence[TensorType]) -> list[str]:
        """The kernels that loading tensors of these types needs."""
        tag = "bf16" if dtype is DType.BF16 else "f16"
        names = [f"sm80_{tag}_gemm_pack_{source}" for source in ("f32", "f16", "bf16")]
        return names + [f"sm80_{tag}_dequant_{t.value.lower()}" for t in dict.fromkeys(types)]

    def load(
        self, places: Sequence[tuple[PackedWeight, int]], checkpoint: Checkpoint, progress: Progress | None
    ) -> float:
        """Loads every weight to its address and returns GB/s of stored bytes."""
        total = sum(wanted.nbytes for wanted, _ in places) or 1
        done, stored, started = 0, 0, time.perf_counter()
        for wanted, address in places:
            if wanted.form in ("norm", "bias", "gated_bias"):
                self._vector(wanted, address, checkpoint)
            else:
                for piece in self._pieces(wanted, address, checkpoint):
                    stored += piece.data.nbytes
                    self._matrix(piece)
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

    def _pieces(self, wanted: PackedWeight, address: int, checkpoint: Checkpoint) -> Iterator[Piece]:
        """The weight's stored rows, cut where the interleaving changes and where a matrix of a stack ends.

        Parts that must be rearranged element by element come as float32 from the host.
        """
        stacked, gated = wanted.form in ("stack", "gated_stack"), wanted.form in ("gated", "gated_stack")
        last = wanted.weight.elements // wanted.width // (wanted.weight.shape[0] if stacked else 1)
        position, half = 0, last // 2
        for part in readable_parts(wanted.weight, checkpoint):
            type_, data, start = part.type, part.data, 0
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
                            f"{wanted.weight.name}: a part of a gate or up matrix starts within eight rows"
                        )
                else:
                    stop, first, kind = min(len(data), start + last - row), row, Interleave.PLAIN
                    whole = wanted.form in ("packed", "stack") and row + stop - start == last
                    padded = stop - start + (-last % 64 if whole else 0)
                place = address + matrix * wanted.matrix_bytes if stacked else address
                yield Piece(wanted, place, type_, data[start:stop], first, padded, kind)
                start = stop
            position += len(data)

    def _matrix(self, piece: Piece) -> None:
        """Sends a piece in slices that fit the staging buffers, each dequantised and packed as it arrives."""
        width = piece.wanted.width
        row_bytes = piece.data.shape[1]
        fit = min(self._staging[0].nbytes // row_bytes, self._rows_bytes // (2 * width)) // 8 * 8
        if fit < 8:
            raise ModelError(
                f"{piece.wanted.weight.name}: 8 rows of {width} elements exceed the staging memory; "
                "raise --num-gpu-blocks"
            )
        rows = len(piece.data)
        for turn, start in enumerate(range(0, rows, fit)):
            stop = min(start + fit, rows)
            padded = stop - start + (piece.padded - rows if stop == rows else 0)
            source = self._send(piece.data[start:stop], turn % 2)
            self._place(piece, source, start, stop - start, padded)
            self._free[turn % 2].record(self._stream)

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

    def _place(self, piece: Piece, source: int, start: int, rows: int, padded: int) -> None:
        width, kind = piece.wanted.width, piece.type
        if piece.wanted.form == "table":
            target = piece.address + (piece.first + start) * width * 2
            self._dequantise(kind, target, source, rows * width)
            return
        if kind not in _PLAIN:
            self._dequantise(kind, self._rows, source, rows * width)
            source, name = self._rows, self._tag
        else:
            name = _PLAIN[kind]
        first = piece.first + (start if piece.interleave == Interleave.PLAIN else start // 8 * 16)
        arguments = pack_arguments(
            source, piece.address, rows, width, first=first, padded_rows=padded, interleave=piece.interleave
        )
        self._run(f"sm80_{self._tag}_gemm_pack_{name}", arguments, 132 * 8)

    def _dequantise(self, kind: TensorType, target: int, source: int, count: int) -> None:
        arguments = [target, source, ctypes.c_uint64(count)]
        self._run(f"sm80_{self._tag}_dequant_{kind.value.lower()}", arguments, -(-count // 8 // BLOCK))

    def _run(self, name: str, arguments: Sequence[Any], grid: int) -> None:
        Launch(self._catalog[name], BLOCK, 0, arguments, pdl=False).run(self._stream, (grid, 1, 1))

    def _vector(self, wanted: PackedWeight, address: int, checkpoint: Checkpoint) -> None:
        """Norm weights and biases: small, converted on the host."""
        if wanted.form == "norm":
            values = pack(wanted.weight, checkpoint, DType.F32)
        else:
            values = pack(wanted.weight, checkpoint, self._dtype)
            if wanted.form == "gated_bias":
                gate, up = values.reshape(2, -1, 1)
                values = interleave_gate_up(gate, up)
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        for start in range(0, flat.nbytes, self._staging[0].nbytes):
            piece = flat[start : start + self._staging[0].nbytes]
            self._free[0].wait()
            self._staging[0].array[: piece.nbytes] = piece
            self._stream.copy_to_device(address + start, self._staging[0].address, piece.nbytes)
            self._free[0].record(self._stream)


def fill_dummy(
    catalog: Catalog, stream: Stream, dtype: DType, places: Sequence[tuple[PackedWeight, int]], seed: int
) -> None:
    """Random weights where the real ones would be: deviation 0.02, norms around 1; no file is read."""
    tag = "bf16" if dtype is DType.BF16 else "f16"
    for index, (wanted, address) in enumerate(places):
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
