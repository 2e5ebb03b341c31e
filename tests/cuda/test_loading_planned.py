"""Whatever a checkpoint stores, the kernels that load and run it exist, for every architecture and GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rvllm.backends.cuda.device.catalog import select
from rvllm.backends.cuda.device.driver import DeviceFacts
from rvllm.backends.cuda.device.launches import kernel_names
from rvllm.backends.cuda.formats.choose import kept
from rvllm.backends.cuda.layout.fusion import fuse
from rvllm.backends.cuda.layout.packed import PackedWeight
from rvllm.backends.cuda.layout.weights import packed_weights
from rvllm.backends.cuda.loaded_model import loading_kernels
from rvllm.backends.cuda.step_planner import StepPlanner, distinct
from rvllm.config import EngineConfig
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program
from rvllm.weights.checkpoint import TensorType
from rvllm.weights.formats import expanded
from support.kernels.planned import ROOM
from support.models.real_configs import CONFIGS, Config, on_one_card
from support.weights.stored_as import QUANTISED, Layout

GPUS = {
    80: DeviceFacts("A100", 80, 108, 80 << 30, 166912),
    86: DeviceFacts("A10", 86, 72, 24 << 30, 101376),
    89: DeviceFacts("L4", 89, 58, 24 << 30, 101376),
    90: DeviceFacts("H200", 90, 132, 141 << 30, 232448),
    120: DeviceFacts("RTX 5090", 120, 170, 32 << 30, 101376),
}
FEW = EngineConfig(max_num_seqs=8, max_num_batched_tokens=512, max_model_len=500, num_gpu_blocks=256)
TRIED = {(DType.BF16, 90), (DType.F16, 80)}  # what is planned whole: the kernels of the rest are named alike
STORED = (*(kind.value for kind in TensorType), *QUANTISED)


def small(name: str) -> Config:
    """The model with every kind of layer and every size of matrix, but few layers and experts of each."""
    config = dict(on_one_card(name)[1])
    if "hybrid_override_pattern" in config:
        config["hybrid_override_pattern"] = "".join(dict.fromkeys(config["hybrid_override_pattern"]))
        config.pop("num_hidden_layers", None)
    inner = config
    if "text_config" in config:
        inner = config["text_config"] = dict(config["text_config"])
    if "num_hidden_layers" in inner:
        inner["num_hidden_layers"] = min(inner["num_hidden_layers"], inner.get("sliding_window_pattern", 2))
    for field in ("num_experts", "n_routed_experts", "num_local_experts"):
        if field in config:
            config[field] = min(config[field], 16)
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_loading_and_running_resolve_to_kernels(name: str) -> None:
    for dtype in (DType.BF16, DType.F16):
        plain = build_program(ModelConfig(small(name), name), dtype)
        for stored in STORED:
            layout = Layout(plain, stored)
            for capability, facts in GPUS.items():
                program = kept(plain, layout, FEW, facts)
                names = loading_kernels(weights_of(program), dtype, layout)
                if (dtype, capability) in TRIED and any(w.format for w in program.weights):
                    names += running(program, facts)
                _, missing = select(names, capability)
                assert not missing, (stored, capability, missing)


def weights_of(program: Program) -> list[PackedWeight]:
    return packed_weights(fuse(program))


def running(program: Program, facts: DeviceFacts) -> list[str]:
    """Kernels of a few sizes of steps; a plain model's of all sizes are tested with the architectures."""
    planner, _ = StepPlanner.plan(program, FEW, facts, ROOM)
    few = replace(planner, stages=distinct(planner.stages))
    return [name for plan in (few.decode(1), few.decode(8), few.body(512)) for name in kernel_names(plan)]


def test_rearranged_parts_come_as_float32() -> None:
    """Latent attention's matrices in 16 bits: what is turned on the host needs the float32 kernels."""
    program = build_program(ModelConfig(on_one_card("DeepSeek-V2-Lite")[1], "v2"), DType.BF16)
    layout = Layout(program, "BF16")
    program = kept(program, layout, FEW, GPUS[90])
    packed = StepPlanner.plan(program, FEW, GPUS[90], ROOM)[1]
    names = loading_kernels(packed, DType.BF16, layout)
    assert {"sm80_bf16_dequant_f32", "sm80_bf16_dequant_bf16", "sm80_bf16_gemm_pack_bf16"} <= set(names)


def test_what_is_expanded_is_said_in_one_line() -> None:
    """Shared experts that are cut out of words of eight columns have no kernel; FP8 ones have."""
    program = build_program(ModelConfig(small("DeepSeek-V2-Lite"), "v2"), DType.BF16)
    lines = {}
    for stored in ("gptq", "fp8", "BF16"):
        layout = Layout(program, stored)
        lines[stored] = expanded(kept(program, layout, FEW, GPUS[90]), layout)
    assert not lines["BF16"]
    assert "quantised matrices are expanded to bfloat16 (" in lines["gptq"]
    assert "GPTQ 4-bit: " in lines["gptq"] and "layers.1.moe.experts.up" in lines["gptq"]
    assert "experts" not in lines["fp8"]
