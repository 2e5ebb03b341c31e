"""The ops of a step as rows of a table: all that is known of each, or layers that are alike in one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rvllm.backends.cpu.measure import Rates
    from rvllm.program.cost import Cost, StepShape
    from rvllm.program.ops.dense import Op, Program
    from rvllm.weights.checkpoint import Checkpoint

Row = dict[str, str]
_NUMBERS = ("bytes", "FLOPs", "floor")


def shapes(op: Op, shape: StepShape) -> str:
    """`[1, 576] → [1, 960]`: the buffers an op reads and writes."""
    reads = " ".join(f"[{shape.rows(b)}, {b.width}]" for b in op.reads)
    writes = " ".join(f"[{shape.rows(b)}, {b.width}]" for b in op.writes)
    return " → ".join(text for text in (reads, writes) if text)


def numbers_of(
    op: Op, program: Program, checkpoint: Checkpoint | None, packed: Mapping[str, int] | None = None
) -> str:
    """`BF16`, or how an op's matrices are stored and kept where these differ: `Q8_0 > bfloat16`."""
    from rvllm.cli.common.matrices import kept_as, stored_as

    said = []
    for weight in op.weights:
        if weight.role != "vector":
            stored = stored_as(weight, checkpoint)
            kept = kept_as(weight, program, checkpoint, packed)
            said.append(kept if stored in ("random", kept) else f"{stored} > {kept}")
    return ", ".join(dict.fromkeys(said))


@dataclass(frozen=True)
class PlannedStep:
    """A step of a program, and what its ops cost.

    stored: the checkpoint, None without weights. rates: None where nobody knows how fast the device is.
    kernels: by op, on a GPU. packed: bytes of the weights that the CPU's compiled kernels keep, by name.
    """

    program: Program
    stored: Checkpoint | None
    shape: StepShape
    rates: Rates | None
    kernels: Mapping[str, str]
    packed: Mapping[str, int]

    def cost(self, op: Op) -> Cost:
        from rvllm.program.cost import op_cost

        return op_cost(self.program, op, self.shape, self.packed)

    def floor(self, op: Op) -> float | None:
        """The least seconds that an op can take."""
        return self.cost(op).floor_seconds(self.rates.bandwidth, self.rates.flops) if self.rates else None

    @property
    def total(self) -> Cost:
        from rvllm.program.cost import program_cost

        return program_cost(self.program, self.shape, self.packed)

    @property
    def total_floor(self) -> float | None:
        """The sum of the ops' floors: they run one after the other."""
        return sum(self.floor(op) or 0.0 for op in self.program.ops) if self.rates else None

    def dtype(self, op: Op) -> str:
        """The element type of an op's result."""
        return op.writes[0].dtype.value if op.writes else self.program.dtype.value


def op_rows(step: PlannedStep) -> list[Row]:
    """What is known of each op, by the table's headings."""
    from rvllm.cli.common.tables import human_bytes, human_flops, human_seconds

    rows = []
    for op in step.program.ops:
        cost, floor = step.cost(op), step.floor(op)
        rows.append({
            "op": op.name, "kind": op.kind, "rows": shapes(op, step.shape),
            "weights": " ".join(str(list(w.shape)) for w in op.weights),
            "numbers": numbers_of(op, step.program, step.stored, step.packed), "dtype": step.dtype(op),
            "bytes": human_bytes(cost.nbytes), "FLOPs": human_flops(cost.flops),
            "floor": human_seconds(floor) if floor is not None else "",
            "kernel": step.kernels.get(op.name, ""),
        })  # fmt: skip
    return rows


Table = tuple[list[str], list[list[str]], list[int]]  # headings, cells, columns to align to the right


def whole_table(rows: list[Row], floors: bool, kernels: bool) -> Table:
    """Every op with all that is known of it."""
    return _table(["kind", "rows", "weights", "numbers", "dtype", "bytes", "FLOPs"], rows, floors, kernels)


def folded_table(rows: list[Row], floors: bool, kernels: bool) -> Table:
    """Neighbouring layers that are alike in one, `layers.0-29.qkv`, in 80 columns.

    Figures are those of one layer.
    """
    found = []
    for first, last, layer in folded(rows):
        among = f"layers.{first}-{last}." if last > first else f"layers.{first}."
        found += [{**row, "op": row["op"].replace(f"layers.{first}.", among, 1)} for row in layer]
    return _table(["weights", "numbers", "bytes"], found, floors, kernels)


def _table(columns: list[str], rows: list[Row], floors: bool, kernels: bool) -> Table:
    header = ["op", *columns, *(["floor"] if floors else []), *(["kernel"] if kernels else [])]
    numbers = [header.index(name) for name in _NUMBERS if name in header]
    return header, [[row[name] for name in header] for row in rows], numbers


def folded(rows: list[Row]) -> list[tuple[int, int, list[Row]]]:
    """(first layer, last layer, rows of the first) of each run of layers alike; -1 for ops of no layer."""
    runs: list[tuple[int, int, list[Row]]] = []
    for layer, of_layer in groupby(rows, key=lambda row: _layer_of(row["op"])):
        group = list(of_layer)
        if runs and layer >= 0 and runs[-1][1] == layer - 1 and _alike(runs[-1][2], group):
            first, _, kept = runs.pop()
            runs.append((first, layer, kept))
        else:
            runs.append((layer, layer, group))
    return runs


def _layer_of(name: str) -> int:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "layers" and len(parts) > 2 and parts[1].isdigit() else -1


def _alike(one: list[Row], other: list[Row]) -> bool:
    def bare(row: Row) -> Row:
        return {**row, "op": row["op"].partition(".")[2].partition(".")[2]}

    return [bare(row) for row in one] == [bare(row) for row in other]
