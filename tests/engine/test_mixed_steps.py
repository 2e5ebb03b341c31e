"""Prompts beside decodes: a step's bound, whole tiles, and the order of requests that come together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rvllm.backends.base import Limits
from rvllm.config import EngineConfig
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import Generate, Sampling
from rvllm.engine.scheduling.mixed import SPREAD, TILE, prompt_share
from support.doubles.engine import PagedDouble, facts


@given(st.integers(1, 1024), st.integers(0, 100_000), st.integers(1, 8192))
def test_prompts_always_go_on_and_keep_to_the_bound(decodes: int, waiting: int, most: int) -> None:
    share = prompt_share(decodes, waiting, most)
    assert share >= TILE // 2 or share == most - decodes >= TILE // 2
    assert decodes + share <= max(most, decodes + TILE // 2)
    if decodes >= TILE and decodes + share < most:
        assert (decodes + share) % TILE == 0 and share * SPREAD >= waiting


def test_many_decodes_take_a_tile_of_prompts_and_few_take_all() -> None:
    assert prompt_share(255, 100, 2048) == 384 - 255
    assert prompt_share(255, 1000, 2048) == 512 - 255
    assert prompt_share(255, 100_000, 2048) == 2048 - 255
    assert prompt_share(8, 300, 2048) == 2040


def test_a_step_with_decodes_is_bounded_and_one_of_prompts_alone_is_not() -> None:
    limits = Limits(
        max_num_seqs=8, max_num_batched_tokens=400, max_model_len=500, block_size=16, num_blocks=300,
        pipeline_depth=1, max_mixed_tokens=100,
    )  # fmt: skip
    core = EngineCore(PagedDouble(limits), facts(500), EngineConfig())
    sizes: list[tuple[int, int]] = []
    schedule = core.scheduler.schedule

    def watched() -> object:
        step = schedule()
        if step is not None:
            sizes.append((step.decodes, step.batch.num_tokens))
        return step

    core.scheduler.schedule = watched  # type: ignore[method-assign, assignment]
    core.add_request(Generate("first", [5] * 390, Sampling(max_tokens=30)))
    core.step()
    core.add_request(Generate("second", [6] * 390, Sampling(max_tokens=2)))
    while core.has_work():
        core.step()
    assert sizes[0] == (0, 390)
    assert [tokens for decodes, tokens in sizes if decodes and tokens > decodes] == [100, 100, 100, 94]
