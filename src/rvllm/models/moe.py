"""Blocks with routed experts: reads how a config chooses them, and emits the two ops that do it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rvllm.models.config import REQUIRED, ModelConfig
from rvllm.program.builder import ProgramBuilder
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Activation, Buffer, Experts, Part, Route, Weight

MAX_EXPERTS = 1 << 17  # of all layers together; five times what the largest published models have
MAX_ALWAYS = 8  # experts that every token has; a wider shared MLP is worth products of its own


@dataclass(frozen=True)
class Mixture:
    """A layer's experts; the ops Route and Experts say what each field means.

    width: of one expert. parts: the names of its projections: gate and up, or up alone, then down.
    correction: the name of the router's correction bias beside its weight, if it has one.
    always: into how many experts of that width the shared MLP is cut, see `cut_shared`.
    """

    experts: int
    top_k: int
    width: int
    activation: Activation
    parts: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    correction: str | None = None
    scores: Literal["softmax", "sigmoid"] = "softmax"
    groups: int = 1
    kept_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    renormalise: bool = False
    scale: float = 1.0
    always: int = 0


def cut_shared(shared: int, width: int, *, bias: bool) -> int:
    """How many experts of `width` a shared MLP of width `shared` is; 0 where it stays a layer of its own.

    The activation works on each element by itself, so rows s * width to (s + 1) * width of its first
    matrices and the same columns of its last one are an expert, and the MLP's result is their sum.
    """
    count = shared // width
    return count if shared == count * width and count <= MAX_ALWAYS and not bias else 0


def read_experts(config: ModelConfig, name: str, default: Any = REQUIRED) -> int:
    """The number of routed experts a layer, small enough that a program of all of them can be written.

    Raises ModelError.
    """
    experts = config.int(name, default, high=MAX_EXPERTS)
    layers = config.int("num_hidden_layers", high=4096)
    if experts * layers > MAX_EXPERTS:
        raise config.fail(
            name, f"is {experts}, in {layers} layers that is more than the {MAX_EXPERTS} experts supported"
        )
    return experts


def read_groups(config: ModelConfig, experts: int, top_k: int) -> tuple[int, int]:
    """n_group and topk_group, checked against the number of experts. Raises ModelError."""
    groups = config.int("n_group", high=experts)
    if experts % groups:
        raise config.fail("n_group", f"must divide the number of experts {experts}, got {groups}")
    kept = config.int("topk_group", high=groups)
    if top_k > kept * (experts // groups):
        raise config.fail(
            "topk_group", f"{kept} leaves {kept * (experts // groups)} experts, fewer than the {top_k} chosen"
        )
    return groups, kept


def mixture(
    b: ProgramBuilder,
    name: str,
    x: Buffer,
    source: str,
    spec: Mixture,
    *,
    inner: Buffer | None = None,
) -> Buffer:
    """The experts' sum: the router is `source`.gate, experts are `source`.experts.N and .shared_experts.

    x [T, hidden] → [T, hidden]. inner: what the experts read and write in place of x, the router's input.
    """
    inner = x if inner is None else inner
    gate = b.matrix(f"{name}.router", Part(f"{source}.gate.weight", (spec.experts, x.width)))
    bias = None
    if spec.correction is not None:
        named = f"{source}.gate.{spec.correction}"
        in_gguf = (named.replace("_bias", ".bias"),)
        bias = b.vector(f"{name}.router.bias", Part(named, (spec.experts,), alternatives=in_gguf))
    ids = b.buffer(f"{name}.ids", spec.top_k + spec.always, dtype=DType.I32)
    shares = b.buffer(f"{name}.shares", spec.top_k + spec.always, dtype=DType.F32)
    b.emit(
        Route(
            name=f"{name}.route", x=x, ids=ids, shares=shares, weight=gate, bias=bias, top_k=spec.top_k,
            scores=spec.scores, groups=spec.groups, kept_groups=spec.kept_groups,
            group_score=spec.group_score, renormalise=spec.renormalise, scale=spec.scale, always=spec.always,
        )
    )  # fmt: skip
    if spec.always:
        b.note(
            f"experts {spec.experts} and up of a layer are the shared ones: every token has them with share 1"
        )
    *first, last = spec.parts
    up = stack(b, f"{name}.experts.up", source, first, spec, (spec.width, inner.width), "head_rows")
    down = stack(b, f"{name}.experts.down", source, [last], spec, (inner.width, spec.width), "columns")
    return b.emit(
        Experts(
            name=f"{name}.experts", x=inner, ids=ids, shares=shares, up=up, down=down,
            out=b.buffer(f"{name}.experts.out", inner.width), activation=spec.activation,
            gated=len(first) == 2, always=spec.always,
        )
    ).out  # fmt: skip


def stack(
    b: ProgramBuilder,
    name: str,
    source: str,
    parts: list[str],
    spec: Mixture,
    shape: tuple[int, int],
    cut: Literal["head_rows", "columns"],
) -> Weight:
    """[experts + always, len(parts) * shape[0], shape[1]]: each one's named projections, one below the other.

    cut: whether the shared MLP's projections are cut into experts by rows or by columns.
    """
    width, count = spec.width, spec.always
    found = [Part(f"{source}.experts.{e}.{p}.weight", shape) for e in range(spec.experts) for p in parts]
    whole = (count * shape[0], shape[1]) if cut == "head_rows" else (shape[0], count * shape[1])
    for begin in range(0, count * width, width):
        here = {"rows": (begin, width), "heads": 1} if cut == "head_rows" else {"columns": (begin, width)}
        found += [Part(f"{source}.shared_experts.{p}.weight", whole, cut, **here) for p in parts]
    stacked = spec.experts + count, len(parts) * shape[0], shape[1]
    return b.weight(Weight(name, stacked, tuple(found), "stack"))
