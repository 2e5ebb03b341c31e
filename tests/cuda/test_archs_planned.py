"""Every architecture's published configurations resolve to kernels, for both types; no GPU needed."""

from __future__ import annotations

import pytest

from rvllm.backends.cuda.device.catalog import select
from rvllm.backends.cuda.device.driver import DeviceFacts
from rvllm.backends.cuda.encoder_plan import EncoderPlan
from rvllm.backends.cuda.layout.memory import Budget
from rvllm.backends.cuda.pooler import body_kernels, plan_pooler
from rvllm.backends.cuda.step_planner import StepPlanner
from rvllm.config import EngineConfig
from rvllm.errors import CapacityError, MissingKernelError, UsageError
from rvllm.models.config import ModelConfig
from rvllm.models.pooling import CLASSIFIER
from rvllm.models.registry import build_program, supported
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program
from rvllm.program.ops.encoder import embedding_size
from support.kernels.planned import A100, H200, ROOM, declared, kinds
from support.models.real_configs import CONFIGS, on_one_card

FEW = EngineConfig(max_num_seqs=8, max_num_batched_tokens=512, max_model_len=500, num_gpu_blocks=256)
MAX_LAUNCHES = {  # of a decode step, for each layer: what keeps small models near the memory's rate
    "Qwen3-8B": 8.3, "StableLM-2-12B": 7.3, "Gemma-2-9B": 8.3, "Gemma-3-4B": 8.4, "Pythia-6.9b": 8.3,
    "Phi-3-small": 8.3, "Command-R-35B": 7.3, "Qwen3-30B-A3B": 9.3,
}  # fmt: skip


def program(name: str, dtype: DType = DType.BF16) -> Program:
    return build_program(ModelConfig(on_one_card(name)[1], name), dtype)


def kernels(given: Program, facts: DeviceFacts) -> list[str]:
    if embedding_size(given) is not None:
        return EncoderPlan.make(given, EngineConfig(), facts, ROOM).kernels()
    return StepPlanner.plan(given, FEW, facts, ROOM)[0].kernels()


def test_every_architecture_has_a_published_config() -> None:
    assert {config["architectures"][0] for config in CONFIGS.values()} == set(supported())


@pytest.mark.parametrize(("facts", "dtype"), [(H200, DType.BF16), (A100, DType.F16)], ids=["sm_90", "sm_80"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_op_resolves_to_a_kernel(name: str, facts: DeviceFacts, dtype: DType) -> None:
    names = kernels(program(name, dtype), facts)
    specs, missing = select(names, facts.capability)
    assert not missing
    assert {spec.name for spec in specs} == set(names)


@pytest.mark.parametrize("name", MAX_LAUNCHES)
def test_a_decode_step_has_few_launches(name: str) -> None:
    given = program(name)
    planner, _ = StepPlanner.plan(given, FEW, H200, ROOM)
    layers = on_one_card(name)[1]["num_hidden_layers"]
    assert len(planner.decode(1)) <= MAX_LAUNCHES[name] * layers


def test_an_encoder_is_planned_within_its_budget() -> None:
    given = program("BERT-large", DType.F16)
    plan = EncoderPlan.make(given, EngineConfig(), H200, ROOM)
    assert 0.65e9 < plan.lines["weights"] < 0.7e9
    assert plan.longest == 512
    assert len(plan.launches(16)) == 24 * 7 + 4  # embed, positions, norm, layers, pool
    attention = next(launch for launch in plan.launches(16) if "text_attn" in launch.kernel)
    assert (attention.kernel, plan.rows) == ("sm90_f16_text_attn_d64", 128)
    assert kinds(attention) == declared("encoder/text_attention_sm90.cu", "text_attention_sm90")
    with pytest.raises(CapacityError, match="--max-num-batched-tokens"):
        EncoderPlan.make(given, EngineConfig(), H200, Budget(80 << 30, 79 << 30, 1 << 28))
    with pytest.raises(UsageError, match="the longest text whole, 512 tokens"):
        EncoderPlan.make(given, EngineConfig(max_num_batched_tokens=256), H200, ROOM)
    with pytest.raises(UsageError, match="--max-model-len 600"):
        EncoderPlan.make(given, EngineConfig(max_model_len=600), H200, ROOM)


def test_sizes_without_kernels_are_named() -> None:
    odd = {**CONFIGS["BERT-large"], "hidden_size": 1032, "num_attention_heads": 43}
    with pytest.raises(MissingKernelError, match="head size 24"):
        kernels(build_program(ModelConfig(odd, "odd"), DType.BF16), H200)
    odd = {**CONFIGS["Phi-3-small"], "num_attention_heads": 16}
    with pytest.raises(MissingKernelError, match="block-sparse attention kernel for head size 256"):
        kernels(build_program(ModelConfig(odd, "odd"), DType.BF16), H200)


@pytest.mark.parametrize("facts", [H200, A100], ids=["sm_90", "sm_80"])
@pytest.mark.parametrize("name", ["Qwen3-8B", "Mistral-7B-v0.3", "Gemma-2-9B"])
def test_decoders_that_pool_resolve_to_kernels(name: str, facts: DeviceFacts) -> None:
    config = on_one_card(name)[1]
    given = build_program(ModelConfig({**config, "runner": "pooling"}, name), DType.BF16)
    engine = EngineConfig(max_model_len=2048, max_num_batched_tokens=4096)
    planner, _ = plan_pooler(given, engine, facts, ROOM)
    names = body_kernels(planner)
    specs, missing = select(names, facts.capability)
    assert not missing and {spec.name for spec in specs} == set(names)
    assert "sm80_bf16_pool" in names and not any("sample" in kernel for kernel in names)
    assert planner.memory.lines["logits"] == 0, "nothing is drawn"
    assert planner.memory.shape.kv_blocks * 16 >= 4096 + 16 * 256


@pytest.mark.parametrize("name", ["BERT-large", "RoBERTa-large", "multilingual-E5-large"])
def test_classifiers_resolve_to_kernels(name: str) -> None:
    config = on_one_card(name)[1]
    architecture = config["architectures"][0].replace("Model", CLASSIFIER)
    config = {**config, "architectures": [architecture], "num_labels": 1}
    given = build_program(ModelConfig(config, name), DType.F16)
    assert given.ops[-1].kind == "classify" and not select(kernels(given, A100), 80)[1]
