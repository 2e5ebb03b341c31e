"""Which format each matrix of a program is kept in: as the checkpoint stores it, where kernels can compute
on that.

`with_formats` writes it into the program's weights, where plans, costs, memory and kernels find it. A
matrix that no reader knows is expanded to the model's type as it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rvllm.errors import UsageError
from rvllm.kernels.gemm.integer.specs import GGUF_LAYOUTS
from rvllm.kernels.moe.specs import QUANTISED
from rvllm.program.formats import FP8_BLOCK, FP8_ROWS, BlocksFormat, Fp8Format, IntegerFormat, WeightFormat
from rvllm.program.ops.dense import Embed, Experts, Linear, Logits, Op, Part, Program, Weight
from rvllm.program.ops.encoder import embedding_size
from rvllm.weights.checkpoint import Checkpoint, TensorInfo, TensorType
from rvllm.weights.packing import find_tensor, has_stored_form, row_order
from rvllm.weights.safetensors.grouped import Grouped, PackedMatrix
from rvllm.weights.safetensors.scaled import Scaled

Stored = Sequence[tuple[Part, TensorInfo]]
Reader = Callable[[Weight, Stored], WeightFormat | None]  # None: not a format of this reader's
QUANTISED_INT4 = "INT4, groups of 128"  # what --quantization int4 makes
INTEGER_GROUPS = (128, 64, 32)  # columns of a group that there are kernels for
PADDED_BITS = 12  # of an element at most, where groups are padded to a multiple of the last of these
QUANTISABLE = (TensorType.F32, TensorType.F16, TensorType.BF16)


def with_formats(program: Program, checkpoint: Checkpoint | None, quantization: str) -> Program:
    """The program with the format of every matrix in its weights; unchanged weights have none.

    Encoders are computed in the model's type. checkpoint: None for dummy weights. quantization: see the flag.
    Raises UsageError where it asks for
    what cannot be.
    """
    if embedding_size(program) is not None:
        if quantization == "fp8":
            raise UsageError("--quantization fp8: encoders run in 16 bits; leave the flag away")
        return program
    chosen: dict[str, WeightFormat] = {}
    for op in program.ops:
        for weight in matrices_of(op):
            found = _format_of(weight, isinstance(op, Logits), checkpoint, quantization)
            if found is not None and _has_kernel(weight, found):
                chosen[weight.name] = found
    chosen |= _tables(program, checkpoint, chosen) if quantization != "none" else {}

    def of(weight: Weight) -> Weight:
        kept = chosen.get(weight.name)
        return weight if weight.format == kept else replace(weight, format=kept)

    return program.with_weights(of)


def expanded(program: Program, checkpoint: Checkpoint) -> str:
    """One line that names the quantised matrices which are kept in the model's type; empty without any."""
    found: dict[str, list[str]] = {}
    total = 0
    for weight in (weight for op in program.ops for weight in matrices_of(op)):
        infos = [info for part in weight.parts if (info := find_tensor(part, checkpoint)) is not None]
        stored = [info.stored_as for info in infos if info.quantised or info.type not in QUANTISABLE]
        total += bool(stored)
        if stored and weight.format is None:
            found.setdefault(" + ".join(dict.fromkeys(stored)), []).append(weight.name)
    if not found:
        return ""
    shown = "; ".join(
        f"{kind}: {', '.join(names[:2])}{f' and {len(names) - 2} more' if len(names) > 2 else ''}"
        for kind, names in found.items()
    )
    count = sum(len(names) for names in found.values())
    return f"{count} of {total} quantised matrices are expanded to {program.dtype.value} ({shown})"


def _tables(
    program: Program, checkpoint: Checkpoint | None, chosen: dict[str, WeightFormat]
) -> dict[str, WeightFormat]:
    """The formats of tables of embeddings; of those that are the head too, the head's with theirs in it."""
    heads = {op.weight.name for op in program.ops if isinstance(op, Logits)}
    found: dict[str, WeightFormat] = {}
    for op in program.ops:
        blocks = _blocks(op.table, checkpoint) if isinstance(op, Embed) and checkpoint is not None else None
        if blocks is None or not isinstance(op, Embed):
            continue
        head = chosen.get(op.table.name)
        if isinstance(head, IntegerFormat):
            found[op.table.name] = replace(head, table=blocks)
        elif op.table.name not in heads:
            found[op.table.name] = blocks
    return found


def _blocks(table: Weight, checkpoint: Checkpoint) -> BlocksFormat | None:
    """The blocks of a table that is one tensor of them."""
    found = [(part, find_tensor(part, checkpoint)) for part in table.parts]
    if len(found) != 1 or found[0][1] is None:
        return None
    part, info = found[0][0], found[0][1]
    if info.type.value not in GGUF_LAYOUTS or info.quantised is not None or not has_stored_form(part, info):
        return None
    return BlocksFormat(info.type.value, *info.type.block)


def matrices_of(op: Op) -> tuple[Weight, ...]:
    """The weights of an op that kernels can multiply in a format."""
    if isinstance(op, Linear | Logits):
        return (op.weight,)
    return (op.up, op.down) if isinstance(op, Experts) else ()


def _has_kernel(weight: Weight, kept: WeightFormat) -> bool:
    """Whether there is a kernel. Of stacks: for one layout of all."""
    if weight.role != "stack" or not isinstance(kept, IntegerFormat):
        return True
    return len(kept.parts) == 1 and kept.parts[0][1] in QUANTISED


def _format_of(
    weight: Weight, head: bool, checkpoint: Checkpoint | None, quantization: str
) -> WeightFormat | None:
    if quantization == "none":
        return None
    asked = None if head else _asked_for(weight, quantization)
    if checkpoint is None or asked is None:
        return asked if checkpoint is None else _stored_format(weight, checkpoint)
    chosen = _stored_format(weight, checkpoint)
    if isinstance(chosen, type(asked)):
        return chosen
    for info in (find_tensor(part, checkpoint) for part in weight.parts):
        if info is not None and (info.quantised is not None or info.type not in QUANTISABLE):
            raise UsageError(
                f"--quantization {quantization}: tensor {info.name} is stored as {info.stored_as} already; "
                f"{quantization} is for checkpoints in 16 or 32 bits, use --quantization auto"
            )
    return asked


def _asked_for(weight: Weight, quantization: str) -> WeightFormat | None:
    """The format into which a matrix is to be quantised as it is loaded."""
    if weight.shape[-1] % 8:
        return None
    if quantization == "int4":
        return IntegerFormat(((weight.shape[-2], "int4"),), QUANTISED_INT4)
    return Fp8Format("row") if quantization == "fp8" else None


def _stored_format(weight: Weight, checkpoint: Checkpoint) -> WeightFormat | None:
    """The format in which the checkpoint has all of a matrix's parts."""
    found = [(part, find_tensor(part, checkpoint)) for part in weight.parts]
    stored = [(part, info) for part, info in found if info is not None]
    if len(stored) < len(found):
        return None  # which loading says in full
    known = (reader(weight, stored) for reader in READERS)
    return next((form for form in known if form is not None), None)


def fp8_reader(weight: Weight, stored: Stored) -> WeightFormat | None:
    """FP8 with a scale a row or tensor, or in blocks of whole 128 columns and eights of rows."""
    parts = [fp8_part(part, info) for part, info in stored]
    if any(p is None for p in parts) or weight.shape[-1] % 8:
        return None
    known = [p for p in parts if p is not None]
    if all(p.block[1] >= weight.shape[-1] for p in known) and all(p.block[0] == 1 or p.single for p in known):
        return Fp8Format("row")
    if any(p.block[1] % FP8_BLOCK and p.block[1] < weight.shape[-1] for p in known):
        return None
    offset, groups = 0, []
    for p in known:
        groups.append(p.rows // p.block[0] + offset)
        offset += p.scaled.levels.shape[0]
    return Fp8Format("block") if _even(np.concatenate(groups)) else None


def _even(groups: NDArray[np.intp]) -> bool:
    """Whether eights of rows share a group, counted from the first row and from the middle one."""

    def alike(rows: NDArray[np.intp]) -> bool:
        whole = rows[: len(rows) // FP8_ROWS * FP8_ROWS].reshape(-1, FP8_ROWS)
        rest = rows[whole.size :]
        return bool((whole == whole[:, :1]).all() and (rest == rest[:1]).all())

    half = len(groups) // 2
    return alike(groups) and (half % FP8_ROWS == 0 or (alike(groups[:half]) and alike(groups[half:])))


class Fp8Part:
    """A part of a matrix that is stored as E4M3: its codes and scales in the wanted order of rows.

    columns: the stored ones that are wanted, from a multiple of FP8_BLOCK on.
    """

    def __init__(self, scaled: Scaled, rows: NDArray[np.intp], columns: slice) -> None:
        self.scaled, self.rows, self.columns, self.block = scaled, rows, columns, scaled.block

    @property
    def single(self) -> bool:
        """Whether one scale is for the whole tensor."""
        return self.scaled.grid == (1, 1)

    def codes(self) -> NDArray[np.uint8]:
        """E4M3 bytes [rows, K]; a view of the file where its rows are in order."""
        levels = self.scaled.levels
        data = levels.data.reshape(levels.shape)[:, self.columns]
        in_order = len(self.rows) == len(data) and bool((np.diff(self.rows) == 1).all())
        return data if in_order else data[self.rows]

    def scales(self) -> NDArray[np.float32]:
        """float32 [rows, 1], or [rows, ceil(K / 128)] where scales change along a row."""
        grid = replace(self.scaled.scales, shape=self.scaled.grid).floats()
        by_row = grid[self.rows // self.block[0]]
        if by_row.shape[1] == 1:
            return by_row
        columns = np.arange(self.columns.start, self.columns.stop, FP8_BLOCK)
        return np.ascontiguousarray(by_row[:, columns // self.block[1]])


def fp8_part(part: Part, info: TensorInfo) -> Fp8Part | None:
    """The part as E4M3; None where it is stored otherwise, turned, or cut within a block of columns."""
    scaled = info.quantised
    if not isinstance(scaled, Scaled) or scaled.levels.kind != "F8_E4M3":
        return None
    if not has_stored_form(part, info):
        return None
    first, count = part.columns if part.layout == "columns" else (0, info.shape[-1])
    if first % FP8_BLOCK:
        return None
    order = row_order(part, info)
    return Fp8Part(scaled, np.arange(info.shape[0]) if order is None else order, slice(first, first + count))


def gguf_reader(weight: Weight, stored: Stored) -> WeightFormat | None:
    """GGUF's blocks, each part of a fused matrix in its own kind; gates and ups in one layout."""
    kinds = [info.type.value for _, info in stored if info.quantised is None]
    if len(kinds) < len(stored) or any(kind not in GGUF_LAYOUTS for kind in kinds) or weight.shape[-1] % 8:
        return None
    if not all(has_stored_form(part, info) for part, info in stored):
        return None
    rows = [part.elements // weight.shape[-1] for part, _ in stored]
    parts = _runs(zip(rows, (GGUF_LAYOUTS[kind] for kind in kinds), strict=True))
    if weight.role == "stack":
        if len(parts) > 1:
            return None
        parts = ((weight.shape[-2], parts[0][1]),)
    if _interleaves(rows, parts):
        return None
    return IntegerFormat(parts, " and ".join(dict.fromkeys(kinds)))


def _runs(parts: Iterable[tuple[int, str]]) -> tuple[tuple[int, str], ...]:
    """Neighbours of one layout made one."""
    found: list[tuple[int, str]] = []
    for rows, layout in parts:
        if found and found[-1][1] == layout:
            found[-1] = (found[-1][0] + rows, layout)
        else:
            found.append((rows, layout))
    return tuple(found)


@dataclass(frozen=True)
class PackedPart:
    """A part of a matrix that is stored as packed integers.

    group_size: columns of a packed group, at most all; width: of a packed row. order: the stored column of
    each packed one, -1 for none; None where they are in order.
    """

    packed: PackedMatrix
    label: str
    nbytes: int
    group_size: int
    width: int
    order: NDArray[np.int32] | None


def packed_reader(weight: Weight, stored: Stored) -> WeightFormat | None:
    """GPTQ, AWQ, compressed-tensors and INT8, in groups of columns or of whole rows.

    Parts of different groups share the layout of the finest; those of 4 and of 8 bits have one each. Parts
    of one matrix have their columns in one order.
    """
    found = [packed_part(part, info) for part, info in stored]
    known = [p for p in found if p is not None]
    k = weight.shape[-1]
    if len(known) < len(found) or k % 8 or not _in_one_order(weight, [part for part, _ in stored], known):
        return None
    grouped = {p.group_size for p in known if p.group_size < p.width}
    group = next((g for g in INTEGER_GROUPS if all(size % g == 0 for size in grouped)), 0)
    if not group:
        return None
    end = "" if group == INTEGER_GROUPS[0] else f"g{group}"
    rows = [part.elements // k for part, _ in stored]
    parts = _runs(zip(rows, (f"int{p.packed.bits}{end}" for p in known), strict=True))
    if len(parts) == 1:
        parts = ((weight.shape[-2], parts[0][1]),)
    elif weight.role == "stack" or _interleaves(rows, parts):
        return None
    return IntegerFormat(
        parts,
        " and ".join(dict.fromkeys(p.label for p in known)),
        reordered=any(p.order is not None for p in known),
        width=known[0].width if known[0].width > k else 0,
    )


def _in_one_order(weight: Weight, parts: Sequence[Part], known: Sequence[PackedPart]) -> bool:
    """Whether the parts of each matrix have their columns in one order, and all matrices as many columns."""
    matrix = weight.elements // (weight.shape[0] if weight.role == "stack" else 1)
    first: dict[int, PackedPart] = {}
    position = 0
    for part, here in zip(parts, known, strict=True):
        begins = first.setdefault(position // matrix, here)
        if not _same(begins.order, here.order) or here.width != known[0].width:
            return False
        position += part.elements
    return True


def _interleaves(rows: list[int], parts: tuple[tuple[int, str], ...]) -> bool:
    """Whether parts of several layouts do not lie apart: two equal halves may be gates and ups, by eights."""
    return len(parts) > 1 and ((len(rows) == 2 and rows[0] == rows[1]) or any(n % 8 for n, _ in parts))


def _same(one: NDArray[np.int32] | None, other: NDArray[np.int32] | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))


def packed_part(part: Part, info: TensorInfo) -> PackedPart | None:
    """The part as packed integers; None where it is stored otherwise, its rows are in another order, or its
    groups are so small that padding them would take 16 bits an element.
    """
    found = info.quantised
    width = info.shape[-1]
    cut = part.layout == "columns" and part.columns != (0, width)
    if cut or not has_stored_form(part, info) or row_order(part, info) is not None:
        return None
    if isinstance(found, Grouped):
        try:
            order = found.column_order(width)
        except ValueError:
            return None
        return _padded(
            PackedPart(found.packed, found.format, found.stored_nbytes, found.group_size, width, order)
        )
    if not isinstance(found, Scaled) or found.levels.kind != "I8" or width % 4:
        return None
    if found.grid[0] not in (1, info.shape[0]):
        return None
    scales = replace(found.scales, shape=found.grid)
    zeros = None if found.zeros is None else replace(found.zeros, shape=found.grid)
    packed = PackedMatrix("packed", 8, found.levels, scales, zeros, signed=True)
    return _padded(PackedPart(packed, found.format, found.stored_nbytes, found.block[1], width, None))


def _padded(part: PackedPart) -> PackedPart | None:
    """The part with groups of a multiple of 32 columns, the last ones of each of no stored column."""
    size, width, least = min(part.group_size, part.width), part.width, INTEGER_GROUPS[-1]
    if size == width or size % least == 0:
        return replace(part, group_size=size)
    padded = -(-size // least) * least
    if part.packed.bits * padded > PADDED_BITS * size:
        return None
    at = np.arange(width)
    places = np.full(-(-(width // size * padded + width % size) // least) * least, -1, np.int32)
    places[at // size * padded + at % size] = at if part.order is None else part.order
    return replace(part, group_size=padded, width=len(places), order=places)


READERS: tuple[Reader, ...] = (fp8_reader, gguf_reader, packed_reader)
