"""x @ weight.T on packed weights: a tile is 16 rows of the weight, one in each lane.

Every lane sums its own row from first to last element, in groups: within a group the stored levels times x,
each rounded once (fma), then `total = group * scale + total` and, for formats with a minimum,
`total = minimum * (sum of x over the group) + total`. Few rows of x read the levels straight from the
record, in up to four passes; more rows first unpack a tile into a panel of floats. Both do the same
arithmetic in the same order, so a row's bits do not depend on how many rows there are.
"""

from __future__ import annotations

from collections.abc import Callable

from rvllm.backends.cpu.compiled.codegen.emit import (
    F32,
    I8,
    I64,
    PTR,
    VF,
    VI,
    Kernel,
    Value,
    Var,
    kernel,
    lanes,
)
from rvllm.backends.cpu.compiled.formats import PLAIN_GROUP, Format
from rvllm.backends.cpu.compiled.slots import (
    CHUNK,
    CHUNK_COUNT,
    CHUNK_FIRST,
    CHUNK_ROWS,
    LANES,
    PIECE,
    SUM_GROUP,
)

PRODUCT = (
    "chunks", "x", "x_width", "out", "out_width", "pieces", "tiles", "inner", "bias", "sources", "targets",
    "scratch", "scratch_size", "counter",
)  # fmt: skip

STRIPS = 4  # items for each thread with few rows of x: few, since taking one costs a trip between cores
FINER = 4  # times as many where they differ: chunks of several experts, or many rows
DIRECT = 6  # the most rows of x that are multiplied by levels as they are read, side by side
PASSES = 4  # times that levels are read for more rows; beyond, it pays to unpack
UNROLL = 8
WIDE, UNROLL_WIDE = 4, 4  # of more rows than that fewer levels at a time: registers hold both


class Product:
    """Writes the product for one format. across: rows of x summed side by side where levels are unpacked.

    Rows come in chunks (see `slots`), each of one expert; a model without experts has one, and all rows are
    its own. `pieces` says for each expert where its rows of the weight lie, how many they are (0: in another
    format) and at which element of the output they begin. Row r of the chunks is row sources[r] of x and
    goes to row targets[r] of the output.
    """

    def __init__(self, k: Kernel, format_: Format, across: int) -> None:
        self.k, self.format, self.across = k, format_, across
        self.x_width, self.out_width, self.tiles, self.inner = (k.int_arg(i) for i in (2, 4, 6, 7))
        self.chunks, self.x, self.out, self.pieces, self.bias = (k.ptr_arg(i) for i in (0, 1, 3, 5, 8))
        self.sources, self.targets = k.ptr_arg(9), k.ptr_arg(10)
        self.group = format_.group or PLAIN_GROUP
        self.groups = self.inner // self.group
        self.tile_bytes = (
            self.groups * format_.record if format_.group else self.inner * (LANES * format_.element_bytes)
        )
        self.panel = k.at(k.ptr_arg(11), k.thread * k.int_arg(12))
        self.sums = k.at(self.panel, self.inner * LANES, F32)
        self.summed = k.var(k.i(-1))  # the chunk whose sums this thread has

    def write(self) -> None:
        """No rows, as of logits in a step that ends no prompt, are no chunks."""
        k = self.k
        count, rows = k.load(self.chunks, CHUNK_COUNT, I64), k.load(self.chunks, CHUNK_ROWS, I64)
        uneven = k.most(count, rows - (DIRECT * PASSES - 1)) > 1
        wanted = k.threads * STRIPS * k.select(uneven, k.i(FINER), k.i(1))
        size = k.least((count * self.tiles + (wanted - 1)) // wanted, self.tiles)
        strips = (self.tiles + (size - 1)) // k.most(size, k.i(1))
        with k.items(k.ptr_arg(13), count * strips) as item:
            chunk, first = item // strips, item % strips * size
            at = chunk * CHUNK + CHUNK_FIRST
            piece = k.load(self.chunks, at, I64) * PIECE
            begin = k.load(self.chunks, at + 1, I64)
            end = begin + k.load(self.chunks, at + 2, I64)
            self.data, self.outer, self.column = (
                k.load(self.pieces, piece + i, kind) for i, kind in enumerate((PTR, I64, I64))
            )
            last = k.least(first + size, (self.outer + (LANES - 1)) // LANES)
            with k.when(first < last):
                self._sum_groups(chunk, begin, end)
                few = end - begin <= DIRECT * PASSES
                k.either(
                    few,
                    lambda: self._few(begin, end, first, last),
                    lambda: self._many(begin, end, first, last),
                )

    # The two ways

    def _few(self, begin: Value, end: Value, first: Value, last: Value) -> None:
        k = self.k
        passes = (end - begin + (DIRECT - 1)) // DIRECT
        each = (end - begin + (passes - 1)) // passes
        with k.loop(first, last) as tile, k.loop(begin, end, each) as row:
            self._direct(row, k.least(each, end - row), begin, tile, 1)

    def _direct(self, row: Value, rows: Value, begin: Value, tile: Value, count: int) -> None:
        """Rows from `row` on, `count` or more: each number of them up to DIRECT has code of its own."""
        k = self.k
        data = k.at(self.data, tile * self.tile_bytes)
        unroll = UNROLL if count <= WIDE else UNROLL_WIDE

        def level(index: Value, take: Callable[[int, Value], None]) -> None:
            self._levels(data, index, take, unroll)

        def here() -> None:
            self._sum(row, count, begin, tile, data, level, unroll)

        if count == DIRECT:
            here()
        else:
            k.either(rows.equals(count), here, lambda: self._direct(row, rows, begin, tile, count + 1))

    def _many(self, begin: Value, end: Value, first: Value, last: Value) -> None:
        k = self.k
        with k.loop(first, last) as tile:
            data = k.at(self.data, tile * self.tile_bytes)
            panel = data
            if self.format.name != "F32":
                panel = self.panel
                self._unpack(data)

            def level(index: Value, take: Callable[[int, Value], None]) -> None:
                for u in range(UNROLL):
                    take(u, k.load(panel, (index + u) * LANES, VF))

            row, across = begin, self.across
            while across:
                whole = row + (end - row) // across * across
                with k.loop(row, whole, across) as here:
                    self._sum(here, across, begin, tile, data, level, UNROLL)
                row, across = whole, across // 2

    # Levels of a tile as floats

    def _levels(
        self, data: Value, index: Value, take: Callable[[int, Value], None], unroll: int = UNROLL
    ) -> None:
        """take(u, level) for elements index .. index + unroll - 1 of a row, all in one group."""
        k, kind = self.k, self.format
        if not kind.group:
            for u in range(unroll):
                take(u, k.number(kind.name, data, (index + u) * LANES, lanes))
            return
        place = index % self.group
        record = k.at(data, index // self.group * kind.record + kind.levels_at)
        if kind.bits == 4:
            for u in range(0, unroll, 2):
                pair = k.extend(k.load(record, (place + u) // 2 * LANES, lanes(I8)), VI)
                low, high = pair & 15, pair >> 4
                if kind.offset:
                    low, high = low - kind.offset, high - kind.offset
                take(u, k.to_float(low))
                take(u + 1, k.to_float(high))
            return
        for u in range(unroll):
            level = k.load(record, (place + u) * LANES, lanes(I8))
            take(u, k.to_float(k.extend(level, VI, signed=True)))

    def _unpack(self, data: Value) -> None:
        k = self.k
        whole = self.groups * self.group
        with k.loop(0, whole, UNROLL) as index:
            self._levels(data, index, lambda u, v: k.store(v, self.panel, (index + u) * LANES))
        if not self.format.group:
            with k.loop(whole, self.inner) as index:
                at = index * LANES
                k.store(k.number(self.format.name, data, at, lanes), self.panel, index * LANES)

    # Sums

    def _sum_groups(self, chunk: Value, begin: Value, end: Value) -> None:
        """Sums of x over each group, for the rows of a chunk, unless this thread has them already."""
        k = self.k
        if not self.format.minimum:
            return
        with k.when(self.summed.get() < chunk), k.loop(begin, end) as row:
            self.summed.set(chunk)
            x = self._row(self.x, self.sources, row, self.x_width)
            with k.loop(0, self.groups) as g:
                pair = k.load(x, g * SUM_GROUP, VF) + k.load(x, g * SUM_GROUP + LANES, VF)
                k.store(k.total(pair), self.sums, (row - begin) * self.groups + g)

    def _row(self, base: Value, places: Value, row: Value, width: Value) -> Value:
        """Where the row that `places` names for row `row` of the chunks begins."""
        return self.k.at(base, self.k.load(places, row, I64) * width, F32)

    def _sum(
        self,
        first: Value,
        count: int,
        begin: Value,
        tile: Value,
        data: Value,
        level: Callable[[Value, Callable[[int, Value], None]], None],
        unroll: int,
    ) -> None:
        """Elements [first .. first + count - 1, the tile's 16] of the output; `begin`: of their chunk."""
        k, kind = self.k, self.format
        rows = [first + t for t in range(count)]
        xs = [self._row(self.x, self.sources, row, self.x_width) for row in rows]
        totals = [k.var(k.vf(0.0)) for _ in rows]

        def multiply(sums: list[Var], index: Value, weight: Value) -> None:
            for x, sum_ in zip(xs, sums, strict=True):
                sum_.set(k.fma(weight, k.splat(k.load(x, index, F32)), sum_.get()))

        with k.loop(0, self.groups) as g:
            sums = [k.var(k.vf(0.0)) for _ in rows]
            with k.loop(0, self.group, unroll) as j:
                index = g * self.group + j
                level(index, lambda u, weight: multiply(sums, index + u, weight))
            record = k.at(data, g * kind.record)
            for row, sum_, total in zip(rows, sums, totals, strict=True):
                if not kind.group:
                    total.set(total.get() + sum_.get())
                    continue
                total.set(k.fma(self._scale(record, 0), sum_.get(), total.get()))
                if kind.minimum:
                    over = k.splat(k.load(self.sums, (row - begin) * self.groups + g, F32))
                    total.set(k.fma(self._scale(record, 1), over, total.get()))
        if not kind.group:
            sums = [k.var(k.vf(0.0)) for _ in rows]
            with k.loop(self.groups * self.group, self.inner) as index:
                multiply(sums, index, k.number(kind.name, data, index * LANES, lanes))
            for sum_, total in zip(sums, totals, strict=True):
                total.set(total.get() + sum_.get())
        for row, total in zip(rows, totals, strict=True):
            value = total.get() + k.load(self.bias, tile * LANES, VF)
            place = k.at(self._row(self.out, self.targets, row, self.out_width), self.column, F32)
            k.masked_store(value, place, tile * LANES, self.outer - tile * LANES)

    def _scale(self, record: Value, which: int) -> Value:
        return self.k.number(self.format.scale, record, which * LANES, lanes)


@kernel
def product(k: Kernel, format_: Format, across: int) -> None:
    """The kernel PRODUCT for a format, for processors whose registers hold the sums of `across` rows."""
    Product(k, format_, across).write()
