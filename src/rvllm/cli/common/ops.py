"""The ops of a step as rows of a table: all that is known of each, or layers that are alike in one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rvllm.backends.cpu.measure import Rates
    from rvllm.program.cost import StepShape
    from rvllm.program.ops.dense import Op, Program
    from rvllm.weights.checkpoint import Checkpoint

Row = dict[str, str]
_NUMBERS = ("bytes", "FLOPs", "floor")


def shapes(op: Op, shape: StepShape) -> str:
    """`[1, 576] → [1, 960]`: the buffers an op reads and writes."""
    reads = " ".join(f"[{shape.rows(b)}, {b.width}]" for b in op.reads)
    writes = " ".join(f"[{shape.rows(b)}, {b.width}]" for b in op.writes)
    return " → ".join(text for text in (reads, writes) if text)


def weight_shapes(op: Op) -> str:
    """The shapes of an op's weights."""
    return " ".join("[" + ", ".join(map(str, w.shape)) + "]" for w in op.weights)


def numbers_of(
    op: Op, program: Program, checkpoint: Checkpoint | None, packed: Mapping[str, int] | None = None
) -> str:
    """`BF16`, or how an op's matrices are stored and kept where these differ: `Q8_0 > bfloat16`."""
    from rvllm.cli.common.matrices import kept_as, stored_as

    said = []
    for weight in op.weights:
        if weight.role != "vector":
            stored = stored_as(weight, checkpoint)
            kept = kept_as(weight, program, checkpoint, packed or {})
            said.append(kept if stored in ("random", kept) else f"{stored} > {kept}")
    return ", ".join(dict.fromkeys(said))


def dtype_of(op: Op, program: Program) -> str:
    """The element type of an op's result."""
    return op.writes[0].dtype.value if op.writes else program.dtype.value


def op_rows(
    program: Program,
    checkpoint: Checkpoint | None,
    shape: StepShape,
    rates: Rates | None,
    kernels: dict[str, str],
    packed: Mapping[str, int],
) -> list[Row]:
    """What is known of each op, by the table's headings."""
    from rvllm.cli.common.tables import human_bytes, human_flops, human_seconds
    from rvllm.program.cost import op_cost

    rows = []
    for op in program.ops:
        cost = op_cost(program, op, shape, packed)
        rows.append({
            "op": op.name, "kind": op.kind, "rows": shapes(op, shape), "weights": weight_shapes(op),
            "numbers": numbers_of(op, program, checkpoint, packed), "dtype": dtype_of(op, program),
            "bytes": human_bytes(cost.nbytes), "FLOPs": human_flops(cost.flops),
            "floor": human_seconds(cost.floor_seconds(rates.bandwidth, rates.flops)) if rates else "",
            "kernel": kernels.get(op.name, ""),
        })  # fmt: skip
    return rows


def whole_table(rows: list[Row], floors: bool, kernels: bool) -> tuple[list[str], list[list[str]], list[int]]:
    """(headings, cells, columns to align to the right) of every op with all that is known of it."""
    header = ["op", "kind", "rows", "weights", "numbers", "dtype", "bytes", "FLOPs"]
    header += (["floor"] if floors else []) + (["kernel"] if kernels else [])
    cells = [[row[name] for name in header] for row in rows]
    return header, cells, [header.index(name) for name in _NUMBERS if name in header]


def folded_table(
    rows: list[Row], floors: bool, kernels: bool
) -> tuple[list[str], list[list[str]], list[int]]:
    """The same with neighbouring layers that are alike in one, `layers.0-29.qkv`, in 80 columns.

    Figures are those of one layer.
    """
    header = ["op", "weights", "numbers", "bytes"]
    header += (["floor"] if floors else []) + (["kernel"] if kernels else [])
    cells = []
    for first, last, layer in folded(rows):
        for row in layer:
            name = row["op"]
            if last > first:
                name = name.replace(f"layers.{first}.", f"layers.{first}-{last}.", 1)
            cells.append([name, *(row[column] for column in header[1:])])
    return header, cells, [header.index(name) for name in _NUMBERS if name in header]


def folded(rows: list[Row]) -> list[tuple[int, int, list[Row]]]:
    """(first layer, last layer, rows of the first) of each run of layers alike; -1 for ops of no layer."""
    groups: list[tuple[int, list[Row]]] = []
    for row in rows:
        layer = _layer_of(row["op"])
        if groups and groups[-1][0] == layer:
            groups[-1][1].append(row)
        else:
            groups.append((layer, [row]))
    runs: list[tuple[int, int, list[Row]]] = []
    for layer, group in groups:
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
