"""Weights onto the device: stored bytes through pinned memory, dequantised and packed by kernels there.

`staging.py` is the way there; a format of its own packs its weights itself (`formats/`).
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from rvllm.backends.base import Progress
from rvllm.backends.cuda.device.catalog import Catalog
from rvllm.backends.cuda.device.driver import Launch, Stream
from rvllm.backends.cuda.formats import device_format
from rvllm.backends.cuda.formats.base import stored_kinds
from rvllm.backends.cuda.layout.packed import PackedWeight, WeightLayout
from rvllm.backends.cuda.ops.gemm.plan import interleave_gate_up, pack_arguments
from rvllm.backends.cuda.staging import BLOCK, Span, Staging
from rvllm.kernels.gemm.tiles import SOURCES
from rvllm.kernels.types import SHORT
from rvllm.program.dtypes import DType
from rvllm.weights.checkpoint import Checkpoint
from rvllm.weights.packing import pack, raw_parts, readable_parts
from rvllm.weights.reading import FileReader

VECTORS = ("norm", "bias", "gated_bias")


class Loader(Staging):
    """Moves a checkpoint's weights to their places."""

    @staticmethod
    def kernels(packed: Sequence[PackedWeight], dtype: DType, checkpoint: Checkpoint) -> list[str]:
        """The kernels that loading these weights needs. What is missing is left to `check_weights`."""
        tag, names = SHORT[dtype.value], list[str]()
        for wanted in packed:
            if wanted.form in VECTORS or wanted.blocks is not None:
                continue
            if wanted.format is not None:
                names += device_format(wanted.format).loading_kernels(wanted, dtype, checkpoint)
                continue
            for kind in stored_kinds(wanted.weight, checkpoint):
                names += _placing(wanted.form, kind, tag)
        return list(dict.fromkeys(names))

    def load(
        self, places: Sequence[tuple[PackedWeight, int]], checkpoint: Checkpoint, progress: Progress | None
    ) -> float:
        """Loads every weight to its address and returns GB/s of stored bytes."""
        self._files = FileReader.of(checkpoint)
        total = sum(wanted.nbytes for wanted, _ in places) or 1
        done, stored, started = 0, 0, time.perf_counter()
        for wanted, address in places:
            if wanted.form in VECTORS:
                self._vector(wanted, address, checkpoint)
            elif wanted.blocks is not None:
                stored += self._as_stored(wanted, address, checkpoint)
            elif wanted.format is not None:
                stored += device_format(wanted.format).load(self, wanted, address, checkpoint)
            else:
                stored += self._expand(wanted, address, checkpoint)
            done += wanted.nbytes
            if progress is not None:
                rate = stored / 1e9 / max(time.perf_counter() - started, 1e-9)
                progress(done / total, f"loading weights, {rate:.1f} GB/s")
        self.flush()
        self._stream.sync()
        return stored / 1e9 / (time.perf_counter() - started)

    def _expand(self, packed: PackedWeight, address: int, checkpoint: Checkpoint) -> int:
        """A matrix in the model's type; parts that must be rearranged come as float32 from the host."""
        width, nbytes = packed.width, 0
        parts = ((part.type.value.lower(), part.data) for part in readable_parts(packed.weight, checkpoint))
        for kind, span in self.spans(packed, address, parts):
            nbytes += span.data.nbytes
            self.queue(span, partial(self._place, span, kind), 2 * width)
        return nbytes

    def _place(self, span: Span, kind: str, source: int, first: int, rows: int, padded: int) -> None:
        """Queues the kernels that take a slice of a span's rows, stored as `kind`, to its place."""
        form, width = span.packed.form, span.packed.width
        *dequant, place = _placing(form, kind, self.tag)
        if form == "table":
            self._dequantise(place, span.address + first * width * 2, source, rows * width)
            return
        if dequant:
            self._dequantise(dequant[0], self.rows_at, source, rows * width)
            source = self.rows_at
        where = pack_arguments(source, span.address, rows, width, first=first, padded_rows=padded,
                               interleave=span.interleave)  # fmt: skip
        self.run(place, where, 132 * 8)

    def _as_stored(self, packed: PackedWeight, address: int, checkpoint: Checkpoint) -> int:
        """A table in the blocks of the file."""
        (part,) = raw_parts(packed.weight, checkpoint)
        self.copy(part.data, address)
        return part.data.nbytes

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


def _placing(form: WeightLayout, kind: str, tag: str) -> list[str]:
    """The kernels that put rows stored as `kind` in their place: at most one that dequantises, one that
    places.
    """
    dequant = f"sm80_{tag}_dequant_{kind}"
    if form == "table":
        return [dequant]
    if kind in SOURCES:
        return [f"sm80_{tag}_gemm_pack_{kind}"]
    return [dequant, f"sm80_{tag}_gemm_pack_{tag}"]


def fill_dummy(
    catalog: Catalog, stream: Stream, dtype: DType, places: Sequence[tuple[PackedWeight, int]], seed: int
) -> None:
    """Random weights where the real ones would be: deviation 0.02, norms around 1; no file is read."""
    tag = SHORT[dtype.value]
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
