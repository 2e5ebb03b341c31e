"""Routing, experts, latent and block-sparse attention against their definitions, token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rvllm.backends.cpu.reference import mla as latent
from rvllm.backends.cpu.reference import moe, ops
from rvllm.backends.cpu.reference.attention import Pages, Scoring, paged_attention
from rvllm.backends.cpu.step import Step, flat_step
from rvllm.backends.cpu.threads import Workers
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import BlockSparsity, Buffer, Route, Weight
from support.models import tiny

F32 = np.ndarray
WORKERS = Workers(1)


def route(experts: int, **fields: object) -> Route:
    x, ids, shares = (Buffer(n, "tokens", 4, DType.F32) for n in ("x", "ids", "shares"))
    weight = Weight("router", (experts, 4), (), "matrix")
    return Route(name="route", x=x, ids=ids, shares=shares, weight=weight, **fields)  # type: ignore[arg-type]


def chosen_by_hand(logits: F32, bias: F32, op: Route) -> list[tuple[int, float]]:
    """One token's experts and shares, in float64."""
    scores = [1 / (1 + math.exp(-v)) for v in logits]
    if op.scores == "softmax":
        total = sum(math.exp(v) for v in logits)
        scores = [math.exp(v) / total for v in logits]
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(logits) // op.groups
    worths = []
    for group in range(op.groups):
        best = sorted(choice[group * size : (group + 1) * size], reverse=True)
        worths.append(best[0] if op.group_score == "max" else best[0] + best[1])
    kept = sorted(range(op.groups), key=lambda g: -worths[g])[: op.kept_groups]
    candidates = [e for e in range(len(logits)) if e // size in kept]
    ids = sorted(candidates, key=lambda e: -choice[e])[: op.top_k]
    total = sum(scores[e] for e in ids) if op.renormalise else 1.0
    return [(e, scores[e] / total * op.scale) for e in ids]


@pytest.mark.parametrize(
    "op",
    [
        route(8, top_k=2, renormalise=True),
        route(128, top_k=8),
        route(160, top_k=6, groups=8, kept_groups=3, scale=16.0),
        route(256, top_k=8, scores="sigmoid", groups=8, kept_groups=4, group_score="top2", renormalise=True,
              scale=2.5),
        route(9, top_k=9, scores="sigmoid"),
    ],
    ids=["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "all"],
)  # fmt: skip
def test_routing(op: Route) -> None:
    source = np.random.default_rng(1)
    experts = op.weight.shape[0]
    logits = source.standard_normal((37, experts), dtype=np.float32) * 2
    bias = source.standard_normal(experts).astype(np.float32) * 0.3
    ids, shares = moe.choose(logits, bias, op)
    assert ids.shape == shares.shape == (37, op.top_k) and shares.dtype == np.float32
    for token in range(37):
        wanted = chosen_by_hand(logits[token], bias, op)
        assert ids[token].tolist() == [e for e, _ in wanted]
        np.testing.assert_allclose(shares[token], [s for _, s in wanted], rtol=3e-6)
        alone = moe.choose(logits[token : token + 1], bias, op)
        assert np.array_equal(alone[1][0], shares[token])


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_experts_that_every_token_has_come_last_with_share_one(scores: str) -> None:
    fields = {"top_k": 3, "scores": scores, "renormalise": True, "scale": 2.5}
    logits = np.random.default_rng(4).standard_normal((9, 10), dtype=np.float32)
    ids, shares = moe.choose(logits, None, route(10, **fields))
    more, with_more = moe.choose(logits, None, route(10, always=2, **fields))
    assert more.dtype == np.int32 and with_more.dtype == np.float32
    assert np.array_equal(more, np.hstack([ids, np.tile([[10, 11]], (9, 1))]))
    assert np.array_equal(with_more, np.hstack([shares, np.ones((9, 2), np.float32)]))


def test_of_equal_experts_the_first_is_chosen() -> None:
    logits = np.zeros((2, 6), np.float32)
    logits[1, [2, 5]] = 1.0
    assert moe.choose(logits, None, route(6, top_k=3))[0].tolist() == [[0, 1, 2], [2, 5, 0]]


@pytest.mark.parametrize("gated", [True, False])
def test_experts(gated: bool) -> None:
    source = np.random.default_rng(2)
    experts, width, hidden, out_width = 7, 20, 24, 28
    up = source.standard_normal((experts, width * (1 + gated), hidden), dtype=np.float32)
    down = source.standard_normal((experts, out_width, width), dtype=np.float32)
    x = source.standard_normal((33, hidden), dtype=np.float32)
    ids = np.array([source.permutation(5)[:3] for _ in range(33)], dtype=np.int32)  # 5 and 6 are never hit
    shares = source.random((33, 3), dtype=np.float32)
    up[5:] = down[5:] = np.nan
    ours = moe.run_experts(x, ids, shares, up, down, "relu2", gated, WORKERS)
    for token in range(33):
        wanted = np.zeros(out_width)
        for expert, share in zip(ids[token], shares[token], strict=True):
            inner = up[expert].astype(np.float64) @ x[token]
            act = np.maximum(inner[:width], 0) ** 2 * (inner[width:] if gated else 1.0)
            wanted += share * (down[expert] @ act)
        np.testing.assert_allclose(ours[token], wanted, rtol=1e-4, atol=1e-3)
        one = slice(token, token + 1)
        alone = moe.run_experts(x[one], ids[one], shares[one], up, down, "relu2", gated, WORKERS)
        assert np.array_equal(alone[0], ours[token])


def test_clamped_gate() -> None:
    x = np.array([[0.5, 3.0, -9.0, 0.25, 7.0, -7.0]], np.float32)  # three gates, three linear parts
    gate, up = [0.5, 2.0, -9.0], [0.25, 2.0, -2.0]
    wanted = [g / (1 + math.exp(-1.702 * g)) * (u + 1) for g, u in zip(gate, up, strict=True)]
    np.testing.assert_allclose(moe.clamped_gate(x, 2.0, 1.702)[0], wanted, rtol=1e-6)
    assert moe.clamped_gate(x, None, 1.702)[0, 2] == pytest.approx(-9 / (1 + math.exp(15.318)) * -6, rel=1e-5)


def batch(source: np.random.Generator) -> tuple[Step, list[int], list[int], F32]:
    lens, starts = [1, 1, 70, 33], [0, 290, 0, 200]
    tables = source.permutation(100).astype(np.int32)[:96].reshape(4, 24)
    step = flat_step(
        np.zeros(sum(lens), np.int32), tiny.i32(lens), tiny.i32(starts), tables, np.zeros(0, np.int64)
    )
    return step, lens, starts, tables


@pytest.mark.parametrize(("heads", "rank", "rotated"), [(3, 24, 8), (16, 64, 16)])
def test_latent_attention_is_attention_over_projected_latents(heads: int, rank: int, rotated: int) -> None:
    source = np.random.default_rng(heads)
    step, lens, starts, tables = batch(source)
    plain, value = 12, 10
    w_uk = source.standard_normal((heads, plain, rank), dtype=np.float32) / np.float32(rank**0.5)
    w_uv = source.standard_normal((heads, value, rank), dtype=np.float32)
    cache = source.standard_normal((100, 16, 1, rank + rotated), dtype=np.float32)
    q = source.standard_normal((sum(lens), heads, plain + rotated), dtype=np.float32)
    absorbed = latent.head_linear(q, np.ascontiguousarray(w_uk.swapaxes(1, 2)), WORKERS)
    assert np.array_equal(absorbed[:, :, rank:], q[:, :, plain:])
    mixed = paged_attention(absorbed, Pages(cache, None, rank), step, Scoring(0.3), WORKERS)
    ours = latent.head_linear(mixed, w_uv, WORKERS)
    at = 0
    for n, start, table in zip(lens, starts, tables, strict=True):
        rows = cache[table].reshape(-1, rank + rotated)[: start + n]
        keys = np.einsum("hpr,tr->thp", w_uk, rows[:, :rank])
        shared = np.broadcast_to(rows[:, None, rank:], (len(rows), heads, rotated))
        k = np.concatenate([keys, shared], axis=2)
        v = np.einsum("hvr,tr->thv", w_uv, rows[:, :rank])
        wanted = ops.attention(q[at : at + n], k, v, start, 0.3)
        np.testing.assert_allclose(ours[at : at + n], wanted, atol=3e-5, rtol=0)
        at += n


@pytest.mark.parametrize(
    "sparsity",
    [BlockSparsity(*n) for n in ((16, 2, 4, 1), (8, 3, 9, 2), (64, 1, 3, 0), (5, 1, 1, 1))],
    ids=["rotating", "wide_stride", "same_for_all", "everything"],
)  # fmt: skip
def test_block_sparse_attention(sparsity: BlockSparsity) -> None:
    source = np.random.default_rng(5)
    step, lens, starts, tables = batch(source)
    heads, kv_heads, dim = 4, 2, 16
    keys, values = (source.standard_normal((100, 16, kv_heads, dim), dtype=np.float32) for _ in range(2))
    q = source.standard_normal((sum(lens), heads, dim), dtype=np.float32)
    scoring = Scoring(0.3, sparsity=sparsity, groups=(kv_heads, heads // kv_heads))
    ours = paged_attention(q, Pages(keys, values), step, scoring, Workers(2))
    row = 0
    for n, start, table in zip(lens, starts, tables, strict=True):
        for position in range(start, start + n):
            for head in range(heads):
                seen = [
                    s for s in range(position + 1)
                    if position // sparsity.size - s // sparsity.size < sparsity.local
                    or (s // sparsity.size + 1 + head * sparsity.head_step) % sparsity.stride == 0
                ]  # fmt: skip
                k, v = (c[table].reshape(-1, kv_heads, dim)[seen, head // 2] for c in (keys, values))
                weights = np.exp(k @ q[row, head] * 0.3)
                wanted = weights @ v / weights.sum()
                np.testing.assert_allclose(ours[row, head], wanted, atol=1e-5, rtol=0)
            row += 1
