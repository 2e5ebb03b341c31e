"""The planned cost of dense products: no batch size that is worse off than a smaller one."""

from __future__ import annotations

import pytest

from rvllm.backends.cuda.buckets import MIXED_TOKENS, bucket_of, decode_buckets, mixed_tokens, token_buckets
from rvllm.backends.cuda.ops.gemm import cost
from rvllm.backends.cuda.ops.gemm import plan as gemm
from rvllm.bench.cliffs import cliffs, dips

SMS = 132
# Layers, the weights [rows, K] of a layer, the head.
MODELS = {
    "Qwen2.5-7B": (28, [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)], (152064, 3584)),
    "Llama-3.1-8B": (32, [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)], (128256, 4096)),
    "Qwen2.5-14B": (48, [(7168, 5120), (5120, 5120), (27648, 5120), (5120, 13824)], (152064, 5120)),
    "Llama-3.2-1B": (16, [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)], (128256, 2048)),
}


def planned_cycles(n: int, k: int, tokens: int) -> float:
    plan = gemm.plan_gemm(n, k, tokens, "bf16", SMS)
    work = cost.Work(n, tokens, plan.blocks, plan.segments, SMS)
    return cost.cycles(plan.mode, plan.token_tile, work)


# Where one round of blocks is full, the next graph takes a second one: known, and bounded here.
KNOWN = {"Llama-3.2-1B": 0.2, "Llama-3.1-8B": 0.13, "Qwen2.5-14B": 0.13}


@pytest.mark.parametrize("model", MODELS)
def test_no_graph_is_planned_worse_than_a_smaller_one(model: str) -> None:
    """Tokens a cycle of a step's products never fall by more than a ninth, from graph to graph."""
    layers, weights, head = MODELS[model]
    rates = {}
    for bucket in decode_buckets(512):
        layer = sum(planned_cycles(n, k, bucket) for n, k in weights)
        rates[bucket] = bucket / (layers * layer + planned_cycles(*head, bucket))
    fallen = cliffs(rates, KNOWN.get(model, 0.11))
    assert not fallen, fallen


def test_padding_to_a_graph_is_small() -> None:
    buckets = decode_buckets(512)
    for size in range(128, 513):
        assert bucket_of(buckets, size) <= size * 17 / 16


@pytest.mark.parametrize("model", MODELS)
def test_the_chosen_way_is_the_cheapest(model: str) -> None:
    """Among all kernels and token tiles that can run a product, not only those thought of."""
    for n, k in MODELS[model][1]:
        segments = gemm.segments_of(n, k)
        for tokens in (136, 200, 264, 320, 400, 512, 1000, 4096):
            work = cost.Work(n, tokens, -(-k // 64), segments, SMS)
            modes: list[gemm.Mode] = ["flow", "tall"] if segments == 1 else ["split", "sum", "wide"]
            least = min(cost.cycles(mode, tile, work) for mode in modes for tile in gemm.token_tiles(mode))
            assert planned_cycles(n, k, tokens) <= 1.1 * least, (n, k, tokens)


# Microseconds of (rows, K, tokens) by way, on an H200: the quickest and others.
TIMED = {
    (4096, 4096, 224): {"pair128": 21.2, "split224": 33.5},
    (4096, 4096, 256): {"pair128": 21.3, "split256": 36.0},
    (4096, 14336, 224): {"pair128": 55.1, "split224": 81.4},
    (4096, 14336, 256): {"pair128": 52.7, "split256": 95.6},
    (4096, 14336, 448): {"sum160": 101.0, "sum128": 104.6, "split224": 132.4},
    (3584, 18944, 224): {"split224": 57.2},
    (3584, 18944, 256): {"split256": 67.1},
}


@pytest.mark.parametrize("shape", TIMED, ids=str)
def test_the_chosen_way_is_nearly_the_quickest_timed(shape: tuple[int, int, int]) -> None:
    """Clusters of four: 28 row pairs of a 7B take one round, 32 of an 8B two."""
    plan = gemm.plan_gemm(*shape, "bf16", SMS)
    timed = TIMED[shape]
    assert timed[f"{plan.mode}{plan.token_tile}"] <= 1.04 * min(timed.values())


def test_measured_main_loops_are_what_the_model_says() -> None:
    """Cycles for 64 of K traced on an H200 (docs/decisions/0011-matrix-kernels.md); power takes a tenth."""
    for tokens, measured in {96: 520, 128: 570, 160: 650, 192: 781, 256: 1043}.items():
        assert cost.step_cycles(2, tokens) == pytest.approx(measured, rel=0.09)


def test_cliffs_are_found() -> None:
    assert cliffs({1: 10.0, 2: 20.0, 3: 17.0, 4: 19.0}) == [(3, pytest.approx(0.15))]
    assert cliffs({1: 10.0, 2: 9.5}) == []
    assert dips({16: 0.9, 100: 0.6, 500: 0.8, 1000: 0.79, 4000: 0.5}) == [(100, pytest.approx(0.25))]


def test_clusters_that_crowd_share_multiprocessors() -> None:
    """16 clusters of eight, of which 14 fit with a block a multiprocessor; two blocks fit into its memory."""
    for tokens, mode in ((32, "split"), (33, "eight"), (100, "eight"), (128, "eight")):
        plan = gemm.plan_gemm(2048, 4096, tokens, "bf16", 132)
        assert (plan.mode, plan.cluster, plan.grid) == (mode, 8, (8, 1, 16))
        assert 2 * (plan.smem + 1024) <= 232448 + 1024
    assert gemm.plan_gemm(1792, 4096, 128, "bf16", 132).mode == "split"


def test_steps_with_decodes_are_as_long_as_is_worth_the_wait() -> None:
    """A step of 3,584 tokens of the 7B fills three rounds of tiles, where 2,048 take two for 1.7."""
    layers = {name: weights for name, (_, weights, _) in MODELS.items()}

    def chosen(model: str) -> int:
        cost_of = lambda tokens: sum(gemm.planned_cycles(n, k, tokens, SMS) for n, k in layers[model])  # noqa: E731
        return mixed_tokens(token_buckets(8192), cost_of)

    assert chosen("Qwen2.5-7B") == 3584
    assert chosen("Llama-3.1-8B") == 2560
    assert mixed_tokens(token_buckets(8192), lambda tokens: tokens) == MIXED_TOKENS
    assert mixed_tokens(token_buckets(512), lambda tokens: tokens) == MIXED_TOKENS
