"""Nemotron-H's states: the recurrence, the engine under pressure, slots, costs."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from rvllm.backends.cpu.reference.mamba2 import Chunk, scan
from rvllm.backends.cpu.reference.mamba2 import softplus as softplus_of
from rvllm.config import EngineConfig
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import Generate, Sampling
from rvllm.errors import CapacityError, ModelError
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.cost import StepShape, program_cost
from rvllm.program.dtypes import DType
from rvllm.program.ops.mamba2 import CHUNK
from support.models import archs_tiny as tiny
from support.models.nemotron_tiny import CASES

CONFIG = CASES["nemotron_h"].config


def save(path: Path, **changed: Any) -> Path:
    return tiny.save(path, CONFIG | changed, tiny.random_tensors("nemotron_h", CONFIG))


def test_chunks_compute_the_recurrence() -> None:
    source = np.random.default_rng(3)

    def normal(*shape: int) -> np.ndarray:
        return source.standard_normal(shape, dtype=np.float32)

    heads, dim, size, sequences = 3, 5, 7, 2
    x, b, c = (
        normal(sequences, CHUNK, heads, dim),
        normal(sequences, CHUNK, size),
        normal(sequences, CHUNK, size),
    )
    steps = softplus_of(normal(sequences, CHUNK, heads) * 3)
    decay, skip, h = -np.exp(normal(heads)), normal(heads), normal(sequences, heads, dim, size)
    chunk = Chunk(x.transpose(0, 2, 1, 3), steps.swapaxes(1, 2), b, c, decay.astype(np.float32), skip)
    after = h.copy()
    y = chunk.outputs(list(after), [0, 0], [CHUNK, CHUNK])
    chunk.advance(list(after), np.array([True, False]))
    for s in range(sequences):
        wanted, state = scan(x[s], steps[s], b[s][:, None], c[s][:, None], decay, skip, h[s])
        np.testing.assert_allclose(y[s].swapaxes(0, 1), wanted, atol=1e-4)
        np.testing.assert_allclose(after[s], state if s == 0 else h[s], atol=1e-4)


def requests() -> list[Generate]:
    """Prompts of which several share a beginning of whole blocks."""
    random = Random(4)
    prefix = [random.randrange(tiny.VOCAB) for _ in range(70)]
    made = []
    for i in range(10):
        own = random.choices(range(tiny.VOCAB), k=random.randint(1, 40))
        sampling = Sampling(
            temperature=random.choice([0.0, 1.0]), seed=i, max_tokens=random.randint(8, 40),
            prompt_logprobs=random.choice([None, 1]),
        )  # fmt: skip
        made.append(Generate(str(i), prefix[: random.choice([0, 33, 64, 70])] + own, sampling))
    return made


def run(core: EngineCore, wanted: list[Generate], aborted: dict[int, str] | None = None) -> dict[str, Any]:
    """Tokens and prompt logprobs by request; `aborted` says who is aborted after which step."""
    found: dict[str, Any] = {request.request_id: [] for request in wanted}
    for request in wanted:
        core.add_request(request)
    step = 0
    while core.has_work():
        if aborted and step in aborted:
            core.abort([aborted[step]])
        for output in core.step():
            found[output.request_id] += [*output.token_ids, *(output.prompt_logprobs or [])]
        step += 1
    return found


def test_engine_under_pressure(tmp_path: Path) -> None:
    """In chunks, together, preempted, in reused slots, from snapshots: the tokens of each alone."""
    config = EngineConfig(
        model=str(save(tmp_path)), device="cpu", threads=1, max_model_len=160, num_blocks=100,
        num_state_snapshots=0,
    )  # fmt: skip
    wanted = requests()
    core = EngineCore.from_config(config)
    alone = {name: tokens for r in wanted for name, tokens in run(core, [r]).items()}
    core.close()
    assert len({str(tokens) for tokens in alone.values()}) == len(wanted)
    for settings, preempted in (
        ({"max_num_batched_tokens": 13, "max_num_seqs": 3}, False),
        ({"max_num_batched_tokens": 50, "num_state_snapshots": None}, False),
        ({"num_blocks": 14, "max_num_batched_tokens": 50, "num_state_snapshots": 3}, True),
    ):
        core = EngineCore.from_config(EngineConfig(**{**_fields(config), **settings}))
        assert run(core, wanted) == alone
        cut = run(core, wanted, {9: "0", 15: "3"})
        for name, tokens in cut.items():
            assert tokens == alone[name][: len(tokens)]
            assert name in "03" or tokens == alone[name]
        stats = core.stats()
        if not preempted:
            assert bool(stats.cached_prompt_tokens) == ("num_state_snapshots" in settings)
        assert (
            stats.blocks_used == 0 and (stats.preemptions > 0) == preempted and stats.finished["abort"] == 2
        )
        assert any("states of" in line.name for line in core.ready.ledger)
        kept = any("prefixes" in line.name for line in core.ready.ledger)
        assert kept == ("num_state_snapshots" in settings)
        core.close()


def _fields(config: EngineConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in EngineConfig.__dataclass_fields__}


def test_states_bound_the_sequences(tmp_path: Path) -> None:
    path = save(tmp_path)
    config = ModelConfig(CONFIG, "tiny")
    each = 4 * build_program(config, DType.F32).state_elements_per_slot

    def limit(gb: float) -> int:
        core = EngineCore.from_config(
            EngineConfig(model=str(path), device="cpu", max_num_seqs=9, kv_cache_memory_gb=gb)
        )
        core.close()
        return core.ready.limits.max_num_seqs

    assert limit(1.0) == 9 and limit(3.5 * each / 1e9) == 3
    with pytest.raises(CapacityError, match="state of one sequence"):
        limit(0.9 * each / 1e9)


def test_costs_of_a_step() -> None:
    program = build_program(ModelConfig(CONFIG, "tiny"), DType.F32)
    assert any("prefix" in note for note in program.notes)
    decode = program_cost(program, StepShape(1, 1, 64))
    later = program_cost(program, StepShape(1, 1, 128))
    attention = 4 * 64 * 2 * 2 * 16  # 64 more tokens of keys and values
    assert later.kv_bytes - decode.kv_bytes == attention
    two = program_cost(program, StepShape(2, 1, 64))
    assert two.kv_bytes == 2 * decode.kv_bytes and two.weight_bytes < 2 * decode.weight_bytes


def test_weights_of_another_shape_are_refused_in_one_line(tmp_path: Path) -> None:
    path = save(tmp_path, mamba_num_heads=8)
    with pytest.raises(ModelError, match=r"in_proj.weight has shape") as caught:
        EngineCore.from_config(EngineConfig(model=str(path), device="cpu"))
    assert "\n" not in str(caught.value)
