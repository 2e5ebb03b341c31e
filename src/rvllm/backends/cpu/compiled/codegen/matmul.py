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
    VF,
    VI,
    Kernel,
    Value,
    Var,
    kernel,
    lanes,
)
from rvllm.backends.cpu.compiled.formats import PLAIN_GROUP, Format
from rvllm.backends.cpu.compiled.slots import BLOCK_ROWS, LANES, SUM_GROUP

PRODUCT = (
    "rows", "x", "x_width", "out", "out_width", "data", "tiles", "inner", "outer", "bias", "scratch",
    "scratch_size", "counter",
)  # fmt: skip

STRIPS = 4  # pieces for each thread with few rows of x: few, since taking one costs a trip between cores
DIRECT = 6  # the most rows of x that are multiplied by levels as they are read, side by side
PASSES = 4  # times that levels are read for more rows; beyond, it pays to unpack
UNROLL = 8
WIDE, UNROLL_WIDE = 4, 4  # of more rows than that fewer levels at a time: registers hold both


class Product:
    """Writes the product for one format. across: rows of x summed side by side where levels are unpacked."""

    def __init__(self, k: Kernel, format_: Format, across: int) -> None:
        self.k, self.format, self.across = k, format_, across
        self.x_width, self.out_width, self.inner = (k.int_arg(i) for i in (2, 4, 7))
        self.x, self.out, self.data, self.bias = (k.ptr_arg(i) for i in (1, 3, 5, 9))
        self.tiles, self.outer = k.int_arg(6), k.int_arg(8)
        self.group = format_.group or PLAIN_GROUP
        self.groups = self.inner // self.group
        self.tile_bytes = (
            self.groups * format_.record if format_.group else self.inner * (LANES * format_.element_bytes)
        )
        self.panel = k.at(k.ptr_arg(10), k.thread * k.int_arg(11))
        self.sums = k.at(self.panel, self.inner * LANES, F32)
        self.summed = k.var(k.i(-1))  # the block of rows whose sums this thread has

    def write(self) -> None:
        """Unless there are no rows, as of logits in a step that ends no prompt."""
        k = self.k
        rows, counter = k.load(k.ptr_arg(0), 0, I64), k.ptr_arg(12)
        few, many = (lambda: self._few(counter, rows)), (lambda: self._many(counter, rows))
        k.either(rows.equals(0), lambda: None, lambda: k.either(rows <= DIRECT * PASSES, few, many))

    # The two ways

    def _few(self, counter: Value, rows: Value) -> None:
        k = self.k
        passes = (rows + (DIRECT - 1)) // DIRECT
        each = (rows + (passes - 1)) // passes
        size = (self.tiles + (k.threads * STRIPS - 1)) // (k.threads * STRIPS)
        with k.items(counter, (self.tiles + (size - 1)) // size) as strip:
            self._sum_groups(k.i(0), rows)
            first = strip * size
            with (
                k.loop(first, k.least(first + size, self.tiles)) as tile,
                k.loop(k.i(0), rows, each) as row,
            ):
                self._direct(row, k.least(each, rows - row), tile, 1)

    def _direct(self, row: Value, rows: Value, tile: Value, count: int) -> None:
        """Rows from `row` on, `count` or more: each number of them up to DIRECT has code of its own."""
        k = self.k
        data = k.at(self.data, tile * self.tile_bytes)
        unroll = UNROLL if count <= WIDE else UNROLL_WIDE

        def level(index: Value, take: Callable[[int, Value], None]) -> None:
            self._levels(data, index, take, unroll)

        def here() -> None:
            self._sum(row, count, k.i(0), tile, data, level, unroll)

        if count == DIRECT:
            here()
        else:
            k.either(rows.equals(count), here, lambda: self._direct(row, rows, tile, count + 1))

    def _many(self, counter: Value, rows: Value) -> None:
        k = self.k
        blocks = (rows + (BLOCK_ROWS - 1)) // BLOCK_ROWS
        with k.items(counter, blocks * self.tiles) as item:
            tile, block = item % self.tiles, item // self.tiles
            begin = block * BLOCK_ROWS
            end = k.least(begin + BLOCK_ROWS, rows)
            self._sum_groups(block, end - begin)
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
                with k.loop(row, whole, across) as first:
                    self._sum(first, across, begin, tile, data, level, UNROLL)
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

    def _sum_groups(self, block: Value, count: Value) -> None:
        """Sums of x over each group, for the `count` rows of a block, unless this thread has them already."""
        k = self.k
        if not self.format.minimum:
            return
        with k.when(self.summed.get() < block), k.loop(0, count) as row:
            self.summed.set(block)
            with k.loop(0, self.groups) as g:
                at = (block * BLOCK_ROWS + row) * self.x_width + g * SUM_GROUP
                pair = k.load(self.x, at, VF) + k.load(self.x, at + LANES, VF)
                k.store(k.total(pair), self.sums, row * self.groups + g)

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
        """Elements [first .. first + count - 1, the tile's 16] of the output; `begin`: of their block."""
        k, kind = self.k, self.format
        rows = [first + t for t in range(count)]
        xs = [k.at(self.x, row * self.x_width, F32) for row in rows]
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
            place = k.at(self.out, row * self.out_width, F32)
            k.masked_store(value, place, tile * LANES, self.outer - tile * LANES)

    def _scale(self, record: Value, which: int) -> Value:
        return self.k.number(self.format.scale, record, which * LANES, lanes)


@kernel
def product(k: Kernel, format_: Format, across: int) -> None:
    """The kernel PRODUCT for a format, for processors whose registers hold the sums of `across` rows."""
    Product(k, format_, across).write()
