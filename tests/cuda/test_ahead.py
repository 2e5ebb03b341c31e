"""Which weights idle blocks beside attention ask for; no GPU needed. That results stay: `test_emulated`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from real_configs import CONFIGS
from test_lowering import A100, H100, QWEN_7B, recipe

from rvllm.backends.cuda import ahead
from rvllm.backends.cuda.driver import DeviceFacts
from rvllm.backends.cuda.graphs import Recipe
from rvllm.backends.cuda.launches import Counts, Planned
from rvllm.config import EngineConfig
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType

MB = 1 << 20
# Which parameter is the number of blocks that share the work.
WORKERS = {"attn_decode": 19, "latent_decode": 16}
Asked = tuple[int, list[tuple[int, int]]]


def planned(config: dict[str, Any], longest: int, facts: DeviceFacts = H100) -> Recipe:
    """Two layers of a model, with an address for every weight."""
    program = build_program(ModelConfig({**config, "num_hidden_layers": 2}, "test config"), DType.BF16)
    given = recipe(program, facts, EngineConfig(max_model_len=longest))
    at = {key: 4096 * (i + 1) for i, key in enumerate(given.addresses.weights)}
    return replace(given, addresses=replace(given.addresses, weights=at))


def asked(launches: list[Planned]) -> list[Asked]:
    """Of each layer's attention: blocks beyond those that share the work, and the stretches asked for."""
    found = []
    for p in launches:
        at = next((at for name, at in WORKERS.items() if name in p.kernel), 0)
        if not at:
            continue
        workers, first, second, first_bytes, second_bytes = p.parameters[at : at + 5]
        stretches = [(first, first_bytes.value), (second, second_bytes.value)]
        grid = p.grid(Counts(1, 1, 1))[0]
        found.append((grid - workers.value, [s for s in stretches if s != (0, 0)]))
    return found


def test_nothing_is_asked_for_unless_wanted() -> None:
    assert ahead.ATTENTION_AHEAD == 0
    assert asked(planned(QWEN_7B, 512).decode(1)) == [(0, []), (0, [])]


def test_blocks_beside_attention_ask_for_the_next_products(monkeypatch: pytest.MonkeyPatch) -> None:
    given = planned(QWEN_7B, 512)
    at, o = given.addresses.weights, 2 * 3584 * 3584
    monkeypatch.setattr(ahead, "ATTENTION_AHEAD", 8 * MB)
    assert asked(given.decode(1)) == [(16, [(at[f"layers.{i}.o", "packed"], 8 * MB)]) for i in range(2)]
    monkeypatch.setattr(ahead, "ATTENTION_AHEAD", 40 * MB)
    first, second = (at["layers.1.o", "packed"], o), (at["layers.1.mlp.gate_up", "gated"], 40 * MB - o)
    assert asked(given.decode(8))[1] == (80 - 12, [first, second])
    assert asked(given.decode(1))[1] == (80, [first, second])


def test_where_experts_follow_only_the_product_before_them_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "ATTENTION_AHEAD", 24 * MB)
    given = planned(CONFIGS["Qwen3-30B-A3B"], 512)
    o = given.addresses.weights["layers.0.o", "packed"]
    assert asked(given.decode(4))[0] == (32, [(o, 16 * MB)])


def test_latent_attention_asks_behind_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    given = planned(CONFIGS["DeepSeek-V2-Lite"], 512)
    at, o = given.addresses.weights, 2 * 2048 * 2048
    assert asked(given.decode(1)) == [(0, []), (0, [])]
    monkeypatch.setattr(ahead, "ATTENTION_AHEAD", 24 * MB)
    dense, mixture = asked(given.decode(1))
    gate_up = (at["layers.0.mlp.gate_up", "gated"], 24 * MB - o)
    assert dense == (24, [(at["layers.0.o", "packed"], o), gate_up])
    assert mixture == (8, [(at["layers.1.o", "packed"], o)])


def test_no_second_wave_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "ATTENTION_AHEAD", 16 * MB)
    extra = [asked(planned(QWEN_7B, longest).decode(1))[0][0] for longest in (512, 8192, 32768)]
    assert extra == [32, 4, 0]


def test_large_steps_prompts_and_older_gpus_ask_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "ATTENTION_AHEAD", 16 * MB)
    given = planned(QWEN_7B, 512)
    for launches in (given.decode(16), given.body(16), planned(QWEN_7B, 512, A100).decode(1)):
        assert asked(launches) == [(0, []), (0, [])]
