"""Shared experts as a branch of the step: what becomes one, and that nothing of it overwrites another's."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from emulator import available
from emulator.driver import emulated_driver
from gpu_engine import backend, core_of, model, run
from real_configs import CONFIGS

from rvllm.backends.cuda.branches import JoinStage, SideStage, branched, workspace_of
from rvllm.backends.cuda.fuse import Stage, fuse
from rvllm.backends.cuda.graphs import Recipe
from rvllm.backends.cuda.launches import Planned
from rvllm.engine.messages import Sampling
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType

SHARED = {
    "DeepSeek-V2-Lite": 26,
    "DeepSeek-V3": 58,
}  # layers with shared experts; with a bias they stay apart


def stages_of(name: str) -> list[Stage]:
    config = ModelConfig({**CONFIGS[name], "mlp_bias": True}, name)
    return branched(fuse(build_program(config, DType.BF16)))


def regions(stages: Sequence[Stage]) -> list[list[Stage]]:
    """The stages between each fork and its join."""
    found: list[list[Stage]] = []
    inside = False
    for stage in stages:
        if isinstance(stage, JoinStage):
            inside = False
        elif isinstance(stage, SideStage) and not inside:
            found.append([])
            inside = True
        if inside:
            found[-1].append(stage)
    return found


@pytest.mark.parametrize("name", SHARED)
def test_shared_experts_run_beside_the_others(name: str) -> None:
    found = regions(stages_of(name))
    assert len(found) == SHARED[name]
    for region in found:
        kinds = [(type(stage).__name__, stage.ops[0].kind) for stage in region]
        assert sorted(kinds) == [("SideStage", "linear"), ("SideStage", "linear"), ("Stage", "experts")]


@pytest.mark.parametrize("name", SHARED)
def test_a_branch_and_what_runs_beside_it_share_no_memory(name: str) -> None:
    stages = stages_of(name)
    places = workspace_of(stages, 100, 7).placements
    for region in regions(stages):
        side, main = (
            {b.name for s in region if isinstance(s, SideStage) is which for b in (*s.reads, *s.writes)}
            for which in (True, False)
        )
        written = {b.name for s in region for b in s.writes}
        for a in side | main:
            for b in side | main:
                apart = places[a].offset >= places[b].offset + places[b].nbytes
                apart = apart or places[b].offset >= places[a].offset + places[a].nbytes
                assert a == b or apart, (a, b)
        assert not written & side & main


def test_models_without_shared_experts_have_no_branch() -> None:
    for name in ("Qwen3-30B-A3B", "Llama-3.1-8B"):
        stages = fuse(build_program(ModelConfig(CONFIGS[name], name), DType.BF16))
        assert branched(stages) == stages


# ---- the order in which a GPU runs two branches is its own

TINY: dict[str, Any] = model(
    "DeepseekV2ForCausalLM", hidden_size=64, intermediate_size=72, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=2, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
    q_lora_rank=None, n_routed_experts=6, n_shared_experts=2, num_experts_per_tok=2, moe_intermediate_size=24,
    first_k_dense_replace=1, topk_method="greedy", vocab_size=99, mlp_bias=True,
)  # fmt: skip
Order = Callable[[list[Planned]], list[Planned]]


def reordered(planned: list[Planned], side_first: bool) -> list[Planned]:
    """The same launches with each branch before, or behind, what runs beside it."""
    out: list[Planned] = []
    side: list[Planned] = []
    main: list[Planned] = []
    for launch in planned:
        if launch.joins:
            out += [*side, *main] if side_first else [*main, *side]
            side, main = [], []
        if launch.side:
            side.append(launch)
        elif side:
            main.append(launch)
        else:
            out.append(launch)
    return out + side + main


@pytest.mark.skipif(not available(), reason="the emulator needs g++")
@pytest.mark.skipif(os.environ.get("RVLLM_TEST_EMULATE") == "1", reason="the driver is emulated already")
def test_both_orders_of_the_branches_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [(list(range(n)), Sampling(max_tokens=4, logprobs=2)) for n in (1, 6, 19)]
    found, seen = [], []
    for side_first in (False, True):
        with monkeypatch.context() as patched:
            for kind in ("decode", "body"):
                original = getattr(Recipe, kind)

                def changed(recipe: Recipe, size: int, plan: Any = original, first: bool = side_first) -> Any:
                    planned = plan(recipe, size)
                    seen.append(sum(p.side for p in planned))
                    return reordered(planned, first)

                patched.setattr(Recipe, kind, changed)
            with emulated_driver():
                core = core_of(backend(TINY, "cuda", DType.BF16), TINY)
                found.append([[(o.token_ids, o.logprobs) for o in outputs] for outputs in run(core, asked)])
                core.close()
    assert max(seen) == 4  # two layers, two launches each
    assert found[0] == found[1]
