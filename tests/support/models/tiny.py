"""Tiny models with weights from a seed: the same for our programs and for Transformers.

A case is a config in Hugging Face's names. Its weights are made by name from the parts its program
declares, so loading them strictly into Transformers also proves that the weight map is complete.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rvllm.backends.base import LAST_SAMPLED, SamplingSpec, SlotStart, StepBatch
from rvllm.backends.cpu.backend import CpuBackend
from rvllm.config import EngineConfig
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program
from rvllm.weights.checkpoint import Checkpoint, TensorInfo, TensorType

TOKENS = 48  # longer than the windows and trained contexts below

_BASE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def _case(architecture: str, **fields: Any) -> dict[str, Any]:
    kind = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2"}[
        architecture
    ]
    return {"architectures": [architecture], "model_type": kind, **_BASE, **fields}


def _llama(**fields: Any) -> dict[str, Any]:
    return _case("LlamaForCausalLM", **fields)


_LONG = [1.0 + 0.5 * i for i in range(8)]
_SHORT = [1.0 + 0.05 * i for i in range(8)]

CASES: dict[str, dict[str, Any]] = {
    "llama": _llama(),
    "llama_tied_biased_wide_heads": _llama(
        tie_word_embeddings=True, attention_bias=True, mlp_bias=True,
        num_attention_heads=6, num_key_value_heads=2, head_dim=24,
    ),
    "llama_mha_gelu": _llama(num_attention_heads=4, num_key_value_heads=4, hidden_act="gelu"),
    "llama_gelu_tanh": _llama(num_attention_heads=4, num_key_value_heads=2, hidden_act="gelu_pytorch_tanh"),
    "llama_linear": _llama(rope_scaling={"type": "linear", "factor": 2.5}, rope_theta=5000.0),
    "llama_dynamic": _llama(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
    "llama_llama3": _llama(
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        }
    ),
    "llama_yarn": _llama(
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    ),
    "llama_yarn_mscale": _llama(
        rope_scaling={
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0,
            "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False,
        }
    ),
    "llama_longrope": _llama(
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "long_factor": _LONG, "short_factor": _SHORT,
            "original_max_position_embeddings": 32, "factor": 4.0,
        }
    ),
    "mistral": _case(
        "MistralForCausalLM", sliding_window=None, num_attention_heads=5, num_key_value_heads=5, head_dim=16
    ),
    "mistral_window": _case(
        "MistralForCausalLM", sliding_window=13, num_attention_heads=6, num_key_value_heads=2, head_dim=8
    ),
    "qwen2": _case("Qwen2ForCausalLM", rope_theta=1000000.0),
    "qwen2_tied_yarn": _case(
        "Qwen2ForCausalLM",
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 2.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen2_window": _case("Qwen2ForCausalLM", use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen2_layer_types": _case(
        "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}  # fmt: skip


def program_of(config: Mapping[str, Any]) -> Program:
    """The case's program in float32."""
    return build_program(ModelConfig(config, "tiny"), DType.F32)


def weights_of(program: Program) -> dict[str, np.ndarray]:
    """Every checkpoint tensor of the program, from its name: matrices scaled to keep activations near 1."""
    found: dict[str, np.ndarray] = {}
    for part in (p for w in program.weights for p in w.parts):
        numbers = np.random.default_rng(zlib.crc32(part.source.encode())).standard_normal(part.shape)
        if part.source.endswith("norm.weight"):
            numbers = 1.0 + 0.2 * numbers
        elif len(part.shape) == 1:
            numbers = 0.2 * numbers
        elif "embed" not in part.source:
            numbers = numbers / part.shape[-1] ** 0.5
        found[part.source] = numbers.astype(np.float32)
    return found


class ArrayCheckpoint(Checkpoint):
    """A checkpoint over arrays in memory."""

    def __init__(
        self, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray], kind: TensorType = TensorType.F32
    ) -> None:
        path = Path("tiny")
        tensors = {n: TensorInfo(n, a.shape, kind, path, 0, a.nbytes) for n, a in arrays.items()}
        super().__init__(path, config, "tiny", {}, tensors)
        object.__setattr__(self, "arrays", arrays)

    def raw(self, info: TensorInfo) -> np.ndarray:
        """The tensor's bytes."""
        return self.arrays[info.name].reshape(-1).view(np.uint8)


def load(config: Mapping[str, Any], **settings: Any) -> CpuBackend:
    """The case's model on the CPU backend."""
    program = program_of(config)
    checkpoint = ArrayCheckpoint(config, weights_of(program))
    defaults = {"device": "cpu", "cpu_kernels": "numpy", "num_blocks": 64, "max_num_seqs": 8, "threads": 2}
    engine = EngineConfig(**{**defaults, **settings})
    return CpuBackend.load(program, checkpoint, engine)


def prompt_of(config: Mapping[str, Any], count: int = TOKENS, seed: int = 0) -> np.ndarray:
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, config["vocab_size"], count).astype(np.int32)


def i32(values: Any) -> np.ndarray:
    """An int32 array."""
    return np.asarray(values, dtype=np.int32)


def table_rows(slot: int, blocks: Any) -> np.ndarray:
    """new_blocks rows that give a slot these blocks from index 0 on."""
    return i32([(slot, i, b) for i, b in enumerate(blocks)]).reshape(-1, 3)


def started(slot: int, tokens: np.ndarray, sampling: SamplingSpec | None = None) -> SlotStart:
    """A slot that starts with a prompt."""
    return SlotStart(slot, sampling or SamplingSpec(), tokens, len(tokens))


def logits_of(backend: CpuBackend, tokens: np.ndarray, chunks: Any = None, slot: int = 0) -> np.ndarray:
    """Logits [T, vocab] of every position, computed in the given chunk lengths (default: one piece)."""
    blocks = range(-(-len(tokens) // 16))
    out, at = [], 0
    for n in chunks or [len(tokens)]:
        batch = StepBatch(0, i32([slot]), i32([n]), i32([at]), tokens[at : at + n], np.array([False]))
        if at == 0:
            batch.started = [started(slot, tokens)]
            batch.new_blocks = table_rows(slot, blocks)
        out.append(backend.forward(batch, np.arange(n)))
        at += n
    return np.concatenate(out)


def generate(
    backend: CpuBackend, prompt: np.ndarray, count: int, sampling: SamplingSpec | None = None
) -> list[int]:
    """`count` tokens after a prompt, alone in slot 0 of the backend."""
    blocks = range(-(-(len(prompt) + count) // 16))
    batch = StepBatch(
        0, i32([0]), i32([len(prompt)]), i32([0]), prompt, np.array([True]),
        [started(0, prompt, sampling)], table_rows(0, blocks),
    )  # fmt: skip
    drawn = []
    for i in range(count):
        drawn.append(int(backend.collect(backend.launch(batch)).tokens[0]))
        batch = StepBatch(
            i + 1, i32([0]), i32([1]), i32([len(prompt) + i]), i32([LAST_SAMPLED]), np.array([True])
        )
    return drawn
