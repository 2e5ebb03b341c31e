"""Which neighbouring ops become one launch, and which must not."""

from __future__ import annotations

from dataclasses import replace

from rvllm.backends.cuda.layout.fusion import Stage, fuse
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.program.memory import lifetimes
from rvllm.program.ops.attention import LatentRopeKV
from rvllm.program.ops.base import Part, Weight
from rvllm.program.ops.dense import Activate, Add, GatedActivation, Linear, Norm, Program, RopeKV
from support.models.real_configs import CONFIGS


def program(name: str) -> Program:
    return build_program(ModelConfig({**CONFIGS[name], "num_hidden_layers": 2}, name), DType.BF16)


def kinds(stages: list[Stage], layer: str = "layers.0.") -> list[list[str]]:
    return [[op.kind for op in s.ops] for s in stages if s.ops[0].name.startswith(layer)]


def test_activations_without_a_gate_end_the_product() -> None:
    stages = kinds(fuse(program("Pythia-6.9b")))
    assert ["linear", "activate"] in stages
    assert ["linear", "add"] in stages
    assert ["activate"] not in stages
    assert ["linear", "clampedgate"] in kinds(fuse(program("Phi-3-small")))


def test_without_epilogues_products_stay_alone() -> None:
    for name in ("Pythia-6.9b", "Phi-3-small", "Qwen2.5-7B"):
        stages = fuse(program(name), gated_epilogue=False)
        with_act = [s for s in stages if isinstance(s.ops[0], Linear) and len(s.ops) == 2]
        assert with_act
        assert all(isinstance(s.ops[1], Add) for s in with_act)


def test_norms_around_a_block_are_one_pass() -> None:
    stages = fuse(program("Gemma-2-9B"))
    assert ["norm", "add", "norm"] in kinds(stages)
    merged = next(s for s in stages if len(s.ops) == 3)
    assert merged.inner == (merged.ops[0].writes[0].name,)
    assert merged.inner[0] not in {life.buffer.name for life in lifetimes(stages)}
    last = [s for s in stages if [op.kind for op in s.ops] == ["norm", "add"]]
    assert len(last) == 1  # before the rows are gathered, whose norm is another


def test_head_norms_go_with_the_rope_only_where_they_are_those_of_its_heads() -> None:
    given = program("Qwen3-8B")
    assert ["norm", "norm", "ropekv", "attention"] in kinds(fuse(given))
    ropes = [i for i, op in enumerate(given.ops) if isinstance(op, RopeKV)]
    bias = Weight("bias", (128,), (Part("bias", (128,)),), "vector")  # which the joined kernel would lose
    for change in ({"eps": 0.5}, {"start": 128}, {"group": 64}, {"bias": bias}):
        ops = list(given.ops)
        norm = ops[ropes[0] - 1]
        assert isinstance(norm, Norm)
        ops[ropes[0] - 1] = replace(norm, **change)
        assert ["ropekv", "attention"] in kinds(fuse(replace(given, ops=tuple(ops))))


def test_what_somebody_else_reads_is_not_merged_away() -> None:
    for name, kind in (("Pythia-6.9b", Activate), ("Qwen2.5-7B", GatedActivation)):
        given = program(name)
        at = next(i for i, op in enumerate(given.ops) if isinstance(op, kind))
        op = given.ops[at]
        again = replace(op, name="again", out=replace(op.writes[0], name="again"))
        stages = fuse(replace(given, ops=(*given.ops[: at + 1], again, *given.ops[at + 1 :])))
        assert Stage((op,)) in stages
        assert Stage((again,)) in stages


def test_a_latents_norm_goes_with_its_rope_only_when_it_is_plain() -> None:
    given = program("DeepSeek-V2-Lite")
    joined = ["norm", "latentropekv", "headlinear"]
    assert joined in kinds(fuse(given))
    at = next(i for i, op in enumerate(given.ops) if isinstance(op, LatentRopeKV)) - 1
    norm = given.ops[at]
    assert isinstance(norm, Norm) and norm.weight is not None
    for change in ({"bias": replace(norm.weight, name="bias")}, {"weight": None}, {"kind_": "layer"}):
        ops = (*given.ops[:at], replace(norm, **change), *given.ops[at + 1 :])
        assert joined not in kinds(fuse(replace(given, ops=ops)))
