"""Which kernels `--gemm-strategy auto` compares for a product, and how each is launched to be timed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.device.launches import MatrixMap, Planned, fixed
from rvllm.backends.cuda.layout.fusion import Stage
from rvllm.backends.cuda.ops.gemm import cost, cutlass, sm80
from rvllm.backends.cuda.ops.gemm import plan as native
from rvllm.backends.cuda.ops.gemm.common import Kind, ProductPlan, ceil_div
from rvllm.backends.cuda.ops.gemm.cublas import KERNEL as CUBLAS
from rvllm.backends.cuda.ops.gemm.cublas import Matmul
from rvllm.backends.cuda.ops.gemm.strategy import BY_LIBRARY, ProductShape, Provider
from rvllm.kernels.gemm.tiles import TILE
from rvllm.program.ops.dense import Linear, Logits

TOKENS = (1, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 1024, 2048, 4096)
MAX_LOGITS = 512  # rows: float32 rows of a whole vocabulary are large
MAX_WAYS = 6  # of our kernels for one product: the model is seldom 2 % off, never by six places
KINDS = {"gated": Kind.GATED_SILU, "logits": Kind.LOGITS, "capped": Kind.LOGITS}


@dataclass(frozen=True)
class Candidate:
    """A kernel for a product. variant: `split:128` (ours), `r64:n8` (CUTLASS's), `heuristic` (cuBLASLt's)."""

    provider: Provider
    variant: str

    def __str__(self) -> str:
        return f"{self.provider} {self.variant}"


@dataclass(frozen=True)
class Places:
    """Device addresses that a product is timed at."""

    x: int
    weight: int
    out: int
    workspace: int
    partials: int


def shapes_of(stages: Iterable[Stage]) -> list[ProductShape]:
    """The shapes of a program's products with 16-bit weights, each once; others have our kernels alone."""
    found = (
        ProductShape.of(stage)
        for stage in stages
        if isinstance(stage.ops[0], Linear | Logits) and stage.ops[0].weight.format is None
    )
    return list(dict.fromkeys(found))


def tokens_of(shape: ProductShape) -> tuple[int, ...]:
    """The numbers of tokens that a shape is timed with."""
    few = shape.epilogue in ("logits", "capped")
    return tuple(tokens for tokens in TOKENS if not few or tokens <= MAX_LOGITS)


def candidates(
    shape: ProductShape, tokens: int, chip: DeviceInfo, providers: Iterable[Provider]
) -> list[Candidate]:
    """Every kernel worth a measurement, of those providers that there are."""
    found: list[Candidate] = []
    for provider in providers:
        match provider:
            case "native":
                found += [Candidate("native", f"{m}:{t}") for m, t in _ways(shape, tokens, chip)]
            case "cutlass" if chip.capability == cutlass.CAPABILITY:
                found += [Candidate("cutlass", f"r{t.rows}:n{t.tokens}") for t in cutlass.ways_of(tokens)]
            case "cublas" if shape.epilogue in BY_LIBRARY:
                found += [Candidate("cublas", "heuristic")]
    return found


def _ways(shape: ProductShape, tokens: int, chip: DeviceInfo) -> list[tuple[str, int]]:
    """Of our kernels those that the cost model likes best."""
    segments = native.segments_of(shape.rows, shape.width)
    work = cost.Work(shape.rows, tokens, ceil_div(shape.width, TILE), segments, chip.sm_count)
    if chip.capability != 90:
        card, of_mma = sm80.card_of(chip.capability), sm80.ways_of(segments, tokens)
        best = sorted(of_mma, key=lambda way: sm80.cycles(way, work, card))[:MAX_WAYS]
        return [(way.mode, way.tile.tokens) for way in best]
    ways: list[tuple[str, int]] = [*native.ways_of(segments, tokens)]
    return sorted(ways, key=lambda way: cost.cycles(way[0], way[1], work))[:MAX_WAYS]


def plan_of(
    shape: ProductShape, tokens: int, candidate: Candidate, tag: str, chip: DeviceInfo
) -> ProductPlan | None:
    """How one of ours or CUTLASS's kernels is launched; None for cuBLASLt, which plans itself."""
    size = shape.rows, shape.width, tokens, tag
    match candidate.provider:
        case "native":
            way = native.way_named(candidate.variant)
            return native.variant(*size, *way, chip.sm_count, capability=chip.capability)
        case "cutlass":
            return cutlass.variant(*size, cutlass.tile_named(candidate.variant), chip.sm_count)
    return None


def launch_of(
    shape: ProductShape, tokens: int, candidate: Candidate, tag: str, chip: DeviceInfo, at: Places
) -> Planned:
    kind = KINDS.get(shape.epilogue, Kind.STORE)
    pitch = shape.rows // 2 if shape.epilogue == "gated" else shape.rows
    pitch = -(-pitch // 8) * 8
    plan, bf16 = plan_of(shape, tokens, candidate, tag, chip), tag == "bf16"
    if plan is None:
        product = Matmul(
            x=at.x, weight=at.weight, out=at.out, bias=0, residual=0, tokens=tokens, rows=shape.rows,
            width=shape.width, pitch=pitch, scale=1.0, bf16=bf16, float_out=kind == Kind.LOGITS,
            workspace=at.workspace,
        )  # fmt: skip
        return Planned(str(shape), CUBLAS, fixed(1), 0, [product])
    boxed = MatrixMap(at.x, tokens, shape.width, plan.box_rows, 64, bf16) if plan.box_rows else at.x
    widths = {"x_width": shape.width, "x_pitch": shape.width}
    partials = {"partials": at.partials} if isinstance(plan, native.GemmPlan) and plan.partials else {}
    arguments = plan.arguments(boxed, at.weight, at.out, pitch, kind=kind, **widths, **partials)
    return Planned(str(shape), plan.kernel, fixed(*plan.grid), plan.block, arguments, plan.smem, plan.cluster)
