"""Nemotron-H: against Transformers, in any pieces, through the engine under pressure."""

from __future__ import annotations

import json
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
from rvllm.program.ops.dense import Part
from rvllm.program.ops.mamba2 import CHUNK
from rvllm.weights.open import open_checkpoint
from rvllm.weights.packing import pack
from support.models import archs_tiny as tiny
from support.models import nemotron_gguf
from support.models import nemotron_tiny as nemotron

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "archs"
PIECES = [(5, 1, 64, 3, 40, 24), (16,) * 8 + (9,), (1,) * 137, (130, 7)]


def save(path: Path, name: str, **changed: Any) -> Path:
    """A case's directory."""
    return tiny.save(path, nemotron.CASES[name].config | changed, nemotron.random_tensors(name))


@pytest.mark.oracle
@pytest.mark.parametrize("name", nemotron.CASES)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        save(tmp_path, name), dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    prompt = tiny.prompt_of(name)
    tokens = torch.from_numpy(prompt)[None].long()

    def logits_of(tokens: Any) -> Any:
        with torch.no_grad():
            return model.eval()(tokens, use_cache=False).logits[0]

    theirs = logits_of(tokens).numpy()
    assert np.abs(theirs).max() > 1.0
    backend = tiny.load(tmp_path)
    ours = tiny.all_logits(backend, prompt, (len(prompt),))
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    for _ in range(tiny.GREEDY):
        tokens = torch.cat([tokens, logits_of(tokens)[-1:].argmax(-1, keepdim=True)], dim=1)
    assert tiny.greedy(backend, prompt, tiny.GREEDY) == tokens[0, len(prompt) :].tolist()
    backend.close()

    model.save_pretrained(tmp_path / "saved")  # its own names and config
    again = tiny.load(tmp_path / "saved")
    assert np.array_equal(ours, tiny.all_logits(again, prompt, (len(prompt),)))
    again.close()


@pytest.mark.parametrize("name", nemotron.CASES)
def test_equals_golden_file_in_any_pieces(name: str, tmp_path: Path) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    assert tiny.digest(nemotron.random_tensors(name)) == golden["weights_sha256"], "other weights"
    backend = tiny.load(save(tmp_path, name))
    prompt = tiny.prompt_of(name)
    whole = tiny.all_logits(backend, prompt, (len(prompt),))
    wanted = np.array(golden["logits"], np.float32)
    np.testing.assert_allclose(whole[list(tiny.GOLDEN_ROWS)], wanted, atol=1e-4, rtol=0)
    for pieces in PIECES:
        assert np.array_equal(whole, tiny.all_logits(backend, prompt, pieces)), pieces
    assert tiny.greedy(backend, prompt, tiny.GREEDY) == golden["greedy"]
    backend.close()


@pytest.mark.parametrize("name", nemotron.CASES)
def test_batch_mates_change_no_bit(name: str, tmp_path: Path) -> None:
    backend = tiny.load(save(tmp_path, name))
    prompts = [tiny.prompt_of(f"{name} {i}", length) for i, length in enumerate((35, 129, 7))]
    alone = [tiny.all_logits(backend, prompt, (len(prompt),)) for prompt in prompts]
    first = tiny.step_logits(backend, [p[:-1] for p in prompts[:2]], [0, 0])
    # two sequences decode their last token, one of them the first of its chunk, while a prompt joins them
    second = tiny.step_logits(backend, [prompts[0][-1:], prompts[1][-1:], prompts[2]], [34, 128, 0])
    backend.close()
    for s, rows in enumerate([*map(np.concatenate, zip(first, second[:2], strict=True)), second[2]]):
        assert np.array_equal(rows, alone[s]), f"sequence {s}"


# What llama.cpp's files cannot say: the least step, and plain MLPs beside experts.
IN_GGUF: dict[str, dict[str, Any]] = {
    "nemotron_h": {},
    "nemotron_h_moe": {"time_step_min": 0.001},
    "nemotron_h_latent": {"layers_block_type": ["mamba", "moe", "attention", "moe"]},
    "nemotron_h_shared": {},
}


def cut(part: Part, tensor: tiny.F32) -> tiny.F32:
    """What a part is of its tensor: all, or rows or columns of a shared MLP that is cut into experts."""
    if part.layout == "columns":
        return tensor[:, part.columns[0] : sum(part.columns)]
    return tensor[part.rows[0] : sum(part.rows)] if part.layout == "head_rows" else tensor


@pytest.mark.parametrize("name", nemotron.CASES)
def test_gguf_equals_safetensors(name: str, tmp_path: Path) -> None:
    """Equal but for decays, which the file holds as -exp(A_log)."""
    case = nemotron.CASES[name]
    config = case.config | IN_GGUF[name]
    tensors = nemotron.random_tensors(name, IN_GGUF[name])
    file = nemotron_gguf.write(tmp_path / "model.gguf", config, tensors)
    prompt, logits, greedy = tiny.prompt_of(name, 45), [], []
    for path in (tiny.save(tmp_path / "one", config, tensors), file):
        backend = tiny.load(path)
        logits.append(tiny.all_logits(backend, prompt, (len(prompt),)))
        greedy.append(tiny.greedy(backend, prompt, 8))
        backend.close()
    np.testing.assert_allclose(*logits, atol=2e-5, rtol=0)
    assert greedy[0] == greedy[1]
    program = build_program(ModelConfig(open_checkpoint(file).config, "gguf"), DType.F32)
    for weight in program.weights:
        wanted = np.concatenate([cut(p, tensors[p.source]).reshape(-1) for p in weight.parts])
        rounded = weight.parts[0].source.endswith("A_log")
        found = pack(weight, open_checkpoint(file), DType.F32).reshape(-1)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 if rounded else 0, err_msg=weight.name)


@pytest.mark.parametrize(
    ("instead", "message"),
    [
        ({"blk.0.ssm_a": np.ones((6, 1), np.float32)}, "must hold negative numbers"),
        ({"blk.0.ssm_norm.weight": np.ones((2, 23), np.float32)}, "norm.weight has shape"),
        ({"blk.0.ssm_d": np.ones((7, 1), np.float32)}, "mixer.D has shape"),
    ],
)
def test_a_wrong_gguf_is_refused_in_one_line(instead: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = nemotron.CASES["nemotron_h"].config
    path = nemotron_gguf.write(tmp_path / "x.gguf", config, nemotron.random_tensors("nemotron_h"), instead)
    with pytest.raises(ModelError, match=message) as caught:
        EngineCore.from_config(EngineConfig(model=str(path), device="cpu"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["time_step_min", "layer_norm_epsilon", "routed_scaling_factor"])
def test_every_particular_moves_the_logits(field: str, tmp_path: Path) -> None:
    prompt = tiny.prompt_of("particulars", 40)
    found = []
    for value in (0.02, 0.4):
        backend = tiny.load(save(tmp_path / str(value), "nemotron_h_moe", **{field: value}))
        found.append(tiny.all_logits(backend, prompt, (40,)))
        backend.close()
    assert np.abs(found[0] - found[1]).max() > 1e-2


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
        model=str(save(tmp_path, "nemotron_h")), device="cpu", threads=1, max_model_len=160, num_blocks=100,
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
    path = save(tmp_path, "nemotron_h")
    config = ModelConfig(nemotron.CASES["nemotron_h"].config, "tiny")
    each = 4 * build_program(config, DType.F32).state_elements_per_slot

    def limit(gb: float) -> int:
        core = EngineCore.from_config(
            EngineConfig(model=str(path), device="cpu", max_num_seqs=9, kv_cache_memory_gb=gb)
        )
        core.close()
        return core.ready.max_num_seqs

    assert limit(1.0) == 9 and limit(3.5 * each / 1e9) == 3
    with pytest.raises(CapacityError, match="state of one sequence"):
        limit(0.9 * each / 1e9)


def test_costs_of_a_step() -> None:
    program = build_program(ModelConfig(nemotron.CASES["nemotron_h"].config, "tiny"), DType.F32)
    assert any("prefix" in note for note in program.notes)
    decode = program_cost(program, StepShape(1, 1, 64))
    later = program_cost(program, StepShape(1, 1, 128))
    attention = 4 * 64 * 2 * 2 * 16  # 64 more tokens of keys and values
    assert later.kv_bytes - decode.kv_bytes == attention
    two = program_cost(program, StepShape(2, 1, 64))
    assert two.kv_bytes == 2 * decode.kv_bytes and two.weight_bytes < 2 * decode.weight_bytes


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hybrid_override_pattern": "M-X"}, "hybrid_override_pattern holds 'X'"),
        ({"hybrid_override_pattern": ""}, "hybrid_override_pattern must name"),
        ({"hybrid_override_pattern": None}, "hybrid_override_pattern is missing"),
        ({"layers_block_type": ["mamba", "rnn"]}, "layers_block_type holds 'rnn'"),
        ({"n_groups": 4}, "n_groups must divide"),
        ({"mlp_hidden_act": "mish"}, "mlp_hidden_act"),
        ({"conv_kernel": 1}, "conv_kernel"),
        ({"mamba_num_heads": 8, "n_groups": 2}, "in_proj.weight has shape"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = save(tmp_path, "nemotron_h", **changed)
    with pytest.raises(ModelError, match=message) as caught:
        EngineCore.from_config(EngineConfig(model=str(path), device="cpu"))
    assert "\n" not in str(caught.value)


def test_router_groups_of_one_expert_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, "nemotron_h_moe", n_group=8, topk_group=8)
    with pytest.raises(ModelError, match="fewer than two"):
        EngineCore.from_config(EngineConfig(model=str(path), device="cpu"))
