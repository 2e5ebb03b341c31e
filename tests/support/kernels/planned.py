"""Programs of a real size, planned for cards that are not here."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping

from rvllm.backends.cuda.device.driver import DeviceFacts
from rvllm.backends.cuda.device.launches import MatrixMap, Planned
from rvllm.backends.cuda.layout.memory import Budget
from rvllm.backends.cuda.step_planner import StepPlanner
from rvllm.config import EngineConfig
from rvllm.kernels import build
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program

QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "hidden_act": "silu",
}  # fmt: skip
GEMMA_27B = {
    "architectures": ["Gemma2ForCausalLM"], "hidden_size": 4608, "intermediate_size": 36864,
    "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128,
    "vocab_size": 256000, "max_position_embeddings": 8192, "rope_theta": 1e4, "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 144, "sliding_window": 4096,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip
H100 = DeviceFacts("H100", 90, 132, 80 << 30, 232448)
A100 = DeviceFacts("A100", 80, 108, 80 << 30, 166912)
L40 = DeviceFacts("L40", 89, 142, 48 << 30, 101376)
H200 = DeviceFacts("H200", 90, 132, 141 << 30, 232448)
GB80 = Budget(80 << 30, 1 << 30, 71 << 30)
GB120 = Budget(141 << 30, 1 << 30, 120 << 30)
GB125 = Budget(139 << 30, 1 << 30, 125 << 30)
ROOM = Budget(400 << 30, 1 << 30, 300 << 30)  # where kernels are asked about, not memory


def built(config: Mapping[str, object], dtype: DType = DType.BF16, **changes: object) -> Program:
    return build_program(ModelConfig({**config, **changes}, "test config"), dtype)


def program(dtype: DType = DType.BF16, **changes: object) -> Program:
    return built(QWEN_7B, dtype, **changes)


def planner(given: Program, facts: DeviceFacts, config: EngineConfig, budget: Budget = GB80) -> StepPlanner:
    return StepPlanner.plan(given, config, facts, budget)[0]


def kinds(planned: Planned) -> list[str]:
    """Of each parameter of a launch what C++ would call it."""
    names = {int: "pointer", MatrixMap: "map", ctypes.c_int: "int", ctypes.c_float: "float"}
    return [names[type(parameter)] for parameter in planned.parameters]


def declared(source: str, kernel: str) -> list[str]:
    """The same of the parameters that a kernel's source declares."""
    text = (build.SOURCES / source).read_text()
    found = re.search(rf"\n{kernel}\((.*?)\) {{", text, re.DOTALL)
    assert found, kernel
    kinds = []
    for parameter in found[1].split(","):
        words = parameter.split()
        pointer = any("*" in word for word in words)
        kinds.append("pointer" if pointer else "map" if "TensorMap" in words else words[0])
    return kinds
