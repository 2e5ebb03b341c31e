"""Routing and experts against the NumPy reference, by the launches that the backend plans."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np

from rvllm.backends.cpu.reference import moe
from rvllm.backends.cpu.threads import Workers
from rvllm.backends.cuda.device.driver import TensorMap
from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.device.launches import Counts, MatrixMap, Planned
from rvllm.backends.cuda.ops.gemm.plan import interleave_gate_up, pack_matrix
from rvllm.backends.cuda.ops.moe import router as router_plan
from rvllm.backends.cuda.ops.moe.plan import ExpertsAt, ExpertsPlan, Path, most_tiles
from rvllm.backends.cuda.ops.moe.router import RouteAt, plan_route
from rvllm.kernels.moe.specs import BLOCKS, GROUPED_TOKENS, WIDE
from rvllm.kernels.rowwise.specs import norm_kernel
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Activation, Buffer, Experts, Norm, Route, Weight
from support.kernels.harness import SHORT, Array, Machine, error, expect, rounded

LIMIT = {"bfloat16": 8e-3, "float16": 1.5e-3}
WORKERS = Workers(1)
DTYPES = {"bfloat16": DType.BF16, "float16": DType.F16}


def run(gpu: Machine, planned: Planned) -> None:
    """One planned launch."""
    args = [ctypes.c_uint64(p) if isinstance(p, int) else mapped(p) for p in planned.parameters]
    grid = planned.grid(Counts(0, 0, 0))
    gpu.launch(planned.kernel, grid, planned.block, args, planned.smem, cluster=planned.cluster)


def mapped(parameter: object) -> object:
    """A launch's parameter as the driver wants it."""
    if not isinstance(parameter, MatrixMap):
        return parameter
    m = parameter
    return TensorMap.matrix(m.address, m.rows, m.width, 2 * m.width, m.box_rows, m.box_width, m.bf16)


def chip(gpu: Machine) -> DeviceInfo:
    return DeviceInfo(gpu.facts.capability, gpu.facts.sm_count, gpu.facts.smem_per_block)


def normal(rng: np.random.Generator, dtype: np.dtype, *shape: int, scale: float = 1.0) -> np.ndarray:
    return rounded(rng.standard_normal(shape, np.float32) * np.float32(scale), dtype)


# ---- routing


@dataclass(frozen=True)
class Routing:
    """A router; the fields of the op Route."""

    experts: int
    k: int
    top_k: int
    scores: str = "softmax"
    bias: bool = False
    groups: int = 1
    kept: int = 1
    group_score: str = "max"
    renormalise: bool = False
    scale: float = 1.0
    always: int = 0

    def op(self, dtype: np.dtype) -> Route:
        kind = DTYPES[dtype.name]
        return Route(
            name="route", x=Buffer("x", "tokens", self.k, kind),
            ids=Buffer("ids", "tokens", self.top_k + self.always, DType.I32),
            shares=Buffer("shares", "tokens", self.top_k + self.always, DType.F32),
            weight=Weight("gate", (self.experts, self.k), (), "matrix"),
            bias=Weight("gate.bias", (self.experts,), (), "vector") if self.bias else None, top_k=self.top_k,
            scores=self.scores, groups=self.groups, kept_groups=self.kept, group_score=self.group_score,
            renormalise=self.renormalise, scale=self.scale, always=self.always,
        )  # type: ignore[arg-type]  # fmt: skip


ROUTINGS = {
    "mixtral": Routing(8, 4096, 2, renormalise=True),
    "qwen3": Routing(128, 2048, 8, renormalise=True),
    "deepseek_v2_lite": Routing(64, 2048, 6, scale=1.5, always=2),
    "deepseek_v2": Routing(160, 320, 6, groups=8, kept=3, scale=16.0, always=2),
    "deepseek_v3": Routing(256, 1032, 8, "sigmoid", True, 8, 4, "top2", True, 2.5, always=1),
    "nemotron": Routing(20, 72, 3, "sigmoid", True, 4, 2, "top2", True, 5.0, always=2),
    "apart": Routing(160, 320, 6, groups=8, kept=3, scale=16.0),
    "tiny": Routing(4, 8, 1),
    "all": Routing(512, 64, 32, "sigmoid"),
    "all_always": Routing(512, 64, 25, "sigmoid", always=7),
}


class Router:
    """A router on the machine."""

    def __init__(
        self, gpu: Machine, dtype: np.dtype, routing: Routing, weight: np.ndarray, bias: np.ndarray
    ) -> None:
        self.gpu, self.dtype, self.op = gpu, dtype, routing.op(dtype)
        self.weight, self.bias = gpu.array(weight.astype(dtype)), gpu.array(bias) if routing.bias else None

    def choose(
        self, x: np.ndarray, padded: int, norm_weight: np.ndarray | None = None, capability: int = 80
    ) -> tuple[np.ndarray, np.ndarray]:
        """ids and shares of the rows of x, in a step of up to `padded`; checks that other rows stay.

        norm_weight: x is to be normalised by them before; `normed` has what it became then. capability: of
        the GPU that the launch is planned for.
        """
        gpu, op, tokens = self.gpu, self.op, len(x)
        rows = np.full((padded, x.shape[1]), np.nan, np.float32)
        rows[:tokens] = x
        ids, shares = (gpu.empty((padded, op.ids.width), kind) for kind in (np.int32, np.float32))
        logits = gpu.empty((padded, op.weight.shape[0]), np.float32)
        arrivals, count = gpu.zeros((padded,), np.int32), gpu.array([tokens], np.int32)
        given, normed = gpu.array(rows.astype(self.dtype)), gpu.empty(rows.shape, self.dtype)
        norm = Norm(name="norm", x=op.x, out=op.x, weight=None, eps=1e-5) if norm_weight is not None else None
        weights = gpu.array(np.ones(1) if norm_weight is None else norm_weight, np.float32)
        at = RouteAt(
            x=(given if norm is None else normed).address, raw=given.address,
            norm_weight=weights.address, ids=ids.address, shares=shares.address,
            weight=self.weight.address, bias=self.bias.address if self.bias else 0, logits=logits.address,
            arrivals=arrivals.address, num_tokens=count.address,
        )  # fmt: skip
        on = DeviceInfo(capability, gpu.facts.sm_count, gpu.facts.smem_per_block)
        run(gpu, plan_route(op, padded, SHORT[self.dtype.name], at, on, norm))
        self.normed = normed.get()
        assert np.isnan(self.normed[tokens:].astype(np.float32)).all()
        assert (ids.get()[tokens:] == -1).all() and np.isnan(shares.get()[tokens:]).all()
        assert not arrivals.get().any(), "the counters are not zero again"
        return ids.get()[:tokens], shares.get()[:tokens]


def check_route(
    gpu: Machine,
    rng: np.random.Generator,
    dtype: np.dtype,
    name: str,
    sizes: tuple[int, ...] = (1, 2, 7, 33, 130),
) -> float:
    """Ids and shares equal the reference's, but for scores that nearly tie; bits alone as in company."""
    routing = ROUTINGS[name]
    weight = normal(rng, dtype, routing.experts, routing.k, scale=routing.k**-0.5)
    bias = rng.standard_normal(routing.experts).astype(np.float32) * 0.1
    router = Router(gpu, dtype, routing, weight, bias)
    x = normal(rng, dtype, max(sizes), routing.k)
    logits = (x.astype(np.float64) @ weight.T.astype(np.float64)).astype(np.float32)
    wanted_ids, wanted = moe.choose(logits, bias if routing.bias else None, router.op)
    worst, first = 0.0, None
    for tokens in sizes:
        ids, shares = router.choose(x[:tokens], tokens + tokens % 3)
        with patch.object(router_plan, "FEW_ROUTED", 0):  # by the kernel for many tokens
            again = router.choose(x[:tokens], tokens + tokens % 3)
        assert (again[0] == ids).all() and (again[1] == shares).all()
        if first is None:
            first = (ids, shares)
        assert (ids[:1] == first[0]).all() and (shares[:1] == first[1]).all(), (
            "token 0 is not the same in company"
        )
        same = (ids == wanted_ids[:tokens]).all(axis=1)
        assert same.mean() > 0.9 or (tokens < 10 and same.sum() >= tokens - 1), (
            ids[~same],
            wanted_ids[:tokens][~same],
        )
        assert all(len(set(row)) == len(row) for row in ids.tolist())
        worst = max(worst, error(shares[same], wanted[:tokens][same]))
    expect("route", worst, 1e-5)
    return worst


def check_route_norm(gpu: Machine, rng: np.random.Generator, dtype: np.dtype, name: str) -> None:
    """A row normalised as it is routed has the bits of the norm's own kernel, and then of the router's."""
    routing = ROUTINGS[name]
    weight = normal(rng, dtype, routing.experts, routing.k, scale=routing.k**-0.5)
    router = Router(gpu, dtype, routing, weight, np.zeros(routing.experts, np.float32))
    for tokens, padded in ((1, 1), (3, 4), (8, 8)):
        x = normal(rng, dtype, tokens, routing.k, scale=3.0)
        scales = rng.standard_normal(routing.k).astype(np.float32)
        out = gpu.empty(x.shape, dtype)
        kernel, threads = norm_kernel(dtype.name, "rms", routing.k, False)
        args = [out, gpu.array(x.astype(dtype)), None, gpu.array(scales), None, routing.k, 1e-5, 1.0]
        gpu.launch(kernel, tokens, threads, args)
        apart = router.choose(out.get().astype(np.float32), padded)
        for capability in sorted({80, gpu.facts.capability}):
            together = router.choose(x, padded, scales, capability)
            assert (router.normed[:tokens].view(np.uint16) == out.get().view(np.uint16)).all()
            assert all((a == b).all() for a, b in zip(apart, together, strict=True)), capability


def check_route_ties(gpu: Machine, rng: np.random.Generator, dtype: np.dtype) -> None:
    """Equal scores go to the lower id; scores that are no numbers still give experts that exist."""
    for routing in (Routing(64, 64, 5), Routing(24, 64, 4, "sigmoid", True, 4, 2, "top2", True)):
        weight = normal(rng, dtype, routing.experts, routing.k)
        weight[1::2] = weight[::2]
        router = Router(gpu, dtype, routing, weight, np.zeros(routing.experts, np.float32))
        x = normal(rng, dtype, 20, routing.k)
        wanted, _ = moe.choose(x @ weight.T, np.zeros(1, np.float32), router.op)
        assert (router.choose(x, 20)[0] == wanted).all()
        assert (router.choose(np.zeros_like(x), 20)[0] == np.arange(routing.top_k)).all()
        ids, _ = router.choose(np.full_like(x, np.nan), 20)
        assert all(
            len(set(row)) == len(row) and set(row) <= set(range(routing.experts)) for row in ids.tolist()
        )


# ---- experts


@dataclass(frozen=True)
class Mixed:
    """Experts, and how many of them a token has; the fields of the op Experts."""

    experts: int
    top_k: int
    k: int
    width: int
    n: int
    activation: Activation = "silu"
    gated: bool = True
    always: int = 0

    def op(self, dtype: np.dtype) -> Experts:
        kind = DTYPES[dtype.name]
        return Experts(
            name="experts", x=Buffer("x", "tokens", self.k, kind), out=Buffer("out", "tokens", self.n, kind),
            ids=Buffer("ids", "tokens", self.top_k, DType.I32),
            shares=Buffer("shares", "tokens", self.top_k, DType.F32),
            up=Weight("up", (self.experts, self.width * (1 + self.gated), self.k), (), "stack"),
            down=Weight("down", (self.experts, self.n, self.width), (), "stack"), activation=self.activation,
            gated=self.gated, always=self.always,
        )  # fmt: skip


MIXTURES = {
    "mixtral": Mixed(8, 2, 1096, 136, 256),
    "qwen3": Mixed(64, 8, 192, 96, 200),
    "deepseek": Mixed(66, 8, 136, 88, 136, always=2),
    "nemotron": Mixed(18, 8, 64, 184, 72, "relu2", False, always=2),
    "deepseek_v3": Mixed(33, 5, 72, 72, 200, always=1),
    "only": Mixed(3, 2, 72, 40, 64, always=1),
    "gelu": Mixed(4, 2, 72, 40, 72, "gelu_tanh"),
    "one": Mixed(4, 1, 64, 1032, 64, "gelu", False),
    "large": Mixed(8, 2, 2048, 1408, 1024),
}


class Bench:
    """Experts on the machine, with scratch memory for `most` tokens.

    cancel: the second half of every sum takes back most of the first, for inputs whose halves are equal, so
    that another order of summing shows.
    """

    def __init__(
        self,
        gpu: Machine,
        rng: np.random.Generator,
        dtype: np.dtype,
        mixed: Mixed,
        most: int,
        cancel: bool = False,
    ) -> None:
        self.gpu, self.dtype, self.mixed, self.op, self.most = gpu, dtype, mixed, mixed.op(dtype), most
        m = mixed
        self.up = normal(rng, dtype, m.experts, m.width * (1 + m.gated), m.k, scale=2 * m.k**-0.5)
        self.down = normal(rng, dtype, m.experts, m.n, m.width, scale=m.width**-0.5)
        if cancel:
            halves = self.up.reshape(m.experts, 1 + m.gated, 2, m.width // 2, m.k)
            halves[:, :, 1] = halves[:, :, 0]
            for weight in (self.up, self.down):
                half = weight.shape[2] // 2
                noise = normal(rng, dtype, *weight.shape[:2], half, scale=0.01 * half**-0.5)
                weight[:, :, half:] = rounded(noise - weight[:, :, :half], dtype)
        self._up = gpu.array(np.concatenate([self._packed(w, m.gated) for w in self.up]))
        self._down = gpu.array(np.concatenate([self._packed(w, False) for w in self.down]))
        entries = most * m.top_k
        self.inner = gpu.empty((entries, m.width), dtype)
        self.parts = gpu.empty((entries, max(m.n, m.k)), dtype)
        self.order = gpu.empty((entries,), np.int32)
        self.places = gpu.empty((entries,), np.int32)
        self.tiles = gpu.empty((most_tiles(entries, m.experts, 8), 4), np.int32)
        self.num_tiles = gpu.empty((1,), np.int32)

    def _packed(self, weight: np.ndarray, gated: bool) -> np.ndarray:
        stored = weight.astype(self.dtype)
        return pack_matrix(interleave_gate_up(*np.split(stored, 2)) if gated else stored)

    def run(
        self, x: np.ndarray, ids: np.ndarray, shares: np.ndarray, padded: int,
        residual: np.ndarray | None = None, scale: float = 1.0, how: tuple[Path, int] | None = None,
    ) -> np.ndarray:  # fmt: skip
        """The experts' sum for the rows of x, in a step of up to `padded`; checks that other rows stay.

        how: by which kernels, with tiles of so many entries; as planned by default.
        """
        gpu, tokens = self.gpu, len(x)

        def given(values: np.ndarray, dtype: np.dtype) -> Array:
            poison = np.full((padded, values.shape[1]), -1 if dtype == np.int32 else np.nan, np.float64)
            poison[:tokens] = values
            return gpu.array(poison.astype(dtype))

        out = (
            gpu.empty((padded, self.mixed.n), self.dtype) if residual is None else given(residual, self.dtype)
        )
        held = [given(x, self.dtype), given(ids, np.dtype(np.int32)), given(shares, np.dtype(np.float32))]
        count = gpu.array([tokens], np.int32)
        at = ExpertsAt(
            x=held[0].address, ids=held[1].address, shares=held[2].address, out=out.address,
            residual=0 if residual is None else out.address, up=self._up.address, down=self._down.address,
            inner=self.inner.address, parts=self.parts.address, order=self.order.address,
            places=self.places.address, tiles=self.tiles.address, num_tiles=self.num_tiles.address,
            num_tokens=count.address,
        )  # fmt: skip
        plan = ExpertsPlan(self.op, "experts", padded, SHORT[self.dtype.name], chip(gpu), at, scale)
        if how:
            plan.path = how[0]
        if how and how[0] == "quantised":
            plan.set_tile(how[1])
        elif how:
            plan.tile = how[1] if how[0] == "grouped" else plan.tile
            plan.block = next((b for b in BLOCKS if b.tokens == how[1]), plan.block)
        for planned in plan.launches():
            run(gpu, planned)
        result = out.get().astype(np.float32)
        assert np.isnan(result[tokens:]).all()
        return result[:tokens]

    def wanted(self, x: np.ndarray, ids: np.ndarray, shares: np.ndarray) -> np.ndarray:
        op = self.op
        return moe.run_experts(x, ids, shares, self.up, self.down, op.activation, op.gated, WORKERS)


def assign(rng: np.random.Generator, mixed: Mixed, tokens: int, how: str) -> tuple[np.ndarray, np.ndarray]:
    """ids and shares: experts at random, or `same`: every token the same ones, among them the last.

    Those that every token has come behind, with share 1.
    """
    experts, chosen = mixed.experts - mixed.always, mixed.top_k - mixed.always
    scores = rng.random((tokens, experts))
    if how == "same":
        scores[:] = np.arange(experts)
    ids = np.argsort(-scores, axis=1)[:, :chosen].astype(np.int32)
    shares = rng.random((tokens, chosen)).astype(np.float32)
    return moe.with_everyones(ids, shares / shares.sum(axis=1, keepdims=True), experts, mixed.always)


def check_experts(
    gpu: Machine,
    rng: np.random.Generator,
    dtype: np.dtype,
    name: str,
    sizes: tuple[int, ...] = (1, 2, 3, 7, 33, 130),
) -> float:
    """Sums against the reference, spread and unbalanced, with and without a residual."""
    mixed = MIXTURES[name]
    bench = Bench(gpu, rng, dtype, mixed, 2 * max(sizes) + 8)
    worst = 0.0
    for i, tokens in enumerate(sizes):
        for how in ("spread", "same"):
            x = normal(rng, dtype, tokens, mixed.k)
            ids, shares = assign(rng, mixed, tokens, how)
            padded = tokens if tokens < 8 else tokens + i
            out = bench.run(x, ids, shares, padded)
            wanted = bench.wanted(x, ids, shares)
            worst = max(worst, error(out, wanted))
            residual = normal(rng, dtype, tokens, mixed.n)
            out = bench.run(x, ids, shares, padded, residual, 0.75)
            worst = max(worst, error(out, residual + np.float32(0.75) * wanted))
    expect("experts", worst, LIMIT[dtype.name])
    return worst


def check_experts_that_do_not_exist(gpu: Machine, rng: np.random.Generator, dtype: np.dtype) -> None:
    """Whatever the ids are, only weights are read: a profile runs kernels apart from their router."""
    mixed = MIXTURES["gelu"]
    bench = Bench(gpu, rng, dtype, mixed, 24)
    for tokens in (1, 4, 20):
        x = normal(rng, dtype, tokens, mixed.k)
        ids = rng.integers(-(1 << 31), 1 << 31, (tokens, mixed.top_k)).astype(np.int32)
        bench.run(x, ids, np.ones(ids.shape, np.float32), tokens)


def ways(tokens: int, capability: int) -> list[tuple[Path, int]]:
    """The kernels that may do a step of so many tokens, and their tiles."""
    found: list[tuple[Path, int]] = [("many", block.tokens) for block in BLOCKS]
    if tokens == 1:
        found.append(("one", 0))
    if capability == 90:
        found += [("grouped", tile) for tile in (*GROUPED_TOKENS, WIDE)]
    return found


def check_experts_invariance(
    gpu: Machine,
    rng: np.random.Generator,
    dtype: np.dtype,
    name: str,
    sizes: tuple[int, ...] = (2, 5, 8, 9, 64, 300),
) -> None:
    """A token's bits alone, among few and among many; with every kernel that may do it."""
    mixed = MIXTURES[name]
    bench = Bench(gpu, rng, dtype, mixed, max(sizes), cancel=True)
    x = np.tile(normal(rng, dtype, max(sizes), mixed.k // 2), 2)
    ids, shares = assign(rng, mixed, max(sizes), "spread")
    together = bench.run(x, ids, shares, len(x))
    for tokens in sizes:
        for how in ways(tokens, gpu.facts.capability):
            out = bench.run(x[:tokens], ids[:tokens], shares[:tokens], tokens, how=how)
            assert (out == together[:tokens]).all(), (tokens, how)
    for t in (0, 1, len(x) - 1):
        for how in ways(1, gpu.facts.capability):
            alone = bench.run(x[t : t + 1], ids[t : t + 1], shares[t : t + 1], 1, how=how)
            assert (alone == together[t]).all(), (t, how)


def check_sum_and_norm(gpu: Machine, rng: np.random.Generator, dtype: np.dtype) -> None:
    """The weighted sum with the norm behind it: the bits of two launches; rows that are no tokens stay."""
    short, eps, scale = SHORT[dtype.name], 1e-6, 0.75
    for width, top_k, tokens, sorted_ in ((72, 8, 3, True), (2048, 3, 2, True), (264, 1, 5, False)):
        parts = gpu.array(normal(rng, dtype, tokens * top_k, width).astype(dtype))
        shares = gpu.array(rng.random((tokens, top_k)), np.float32)
        places = gpu.array(rng.permutation(tokens * top_k), np.int32) if sorted_ else None
        weight, count = gpu.array(rng.standard_normal(width), np.float32), gpu.array([tokens], np.int32)
        rows = normal(rng, dtype, tokens + 2, width).astype(dtype)
        given = [parts, shares]
        numbers = [count, places, top_k, width, scale]
        added, sums, out = gpu.array(rows), gpu.empty(rows.shape, dtype), gpu.empty(rows.shape, dtype)
        grid = (-(-width // 1024), tokens)
        gpu.launch(f"sm80_{short}_experts_combine", grid, 128, [sums, *given, None, *numbers])
        kernel, threads = norm_kernel(dtype.name, "rms", width, True)
        gpu.launch(kernel, tokens, threads, [out, added, sums, weight, None, width, eps, scale])
        x, normed = gpu.array(rows), gpu.empty(rows.shape, dtype)
        kernel, threads = f"sm80_{short}_experts_combine_norm", -(-width // 256) * 32
        gpu.launch(kernel, tokens + 2, threads, [normed, x, *given, weight, *numbers, eps])
        assert (x.get().view(np.uint16) == added.get().view(np.uint16)).all()
        assert (normed.get().view(np.uint16) == out.get().view(np.uint16)).all()
        assert np.isfinite(normed.get()[:tokens].astype(np.float32)).all()
