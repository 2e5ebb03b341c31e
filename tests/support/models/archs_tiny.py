"""Tiny random checkpoints of the dense architectures, and what tests ask of a loaded one."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from rvllm.backends.base import KV_BLOCK
from rvllm.backends.cpu.backend import CpuBackend
from rvllm.backends.cpu.reference.interpreter import execute
from rvllm.backends.cpu.reference.run import Run
from rvllm.backends.cpu.step import flat_step
from rvllm.config import EngineConfig
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Part
from rvllm.weights.checkpoint import Checkpoint
from rvllm.weights.open import open_checkpoint

VOCAB = 128
PROMPT = 137  # tokens: more than one split of the CPU's attention, and odd
GREEDY = 32
GOLDEN_ROWS = (0, 23, 136)  # positions whose logits the golden files hold
GAINS = {"embed_tokens": 0.4, "embed_in": 0.4, "lm_head": 1.0, "embed_out": 1.0}  # of other matrices: 1.6
MAMBA = {"dt_bias": (5.0, -3.0), ".D": (5.0, 1.0), "conv1d.weight": (3.0, 0.0)}  # gains and means
F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """A config in Hugging Face's words, and how long a sequence the engine is to allow."""

    name: str
    config: dict[str, Any]
    max_model_len: int = 256


def case(name: str, architecture: str, model_type: str, **fields: Any) -> Case:
    """A case with the fields all of them share."""
    limit = fields.pop("max_model_len", 256)
    shared = {
        "architectures": [architecture], "model_type": model_type, "vocab_size": VOCAB,
        "max_position_embeddings": 256, "num_hidden_layers": 2, "torch_dtype": "float32",
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return Case(name, shared | fields, limit)


def _factors(count: int, step: float) -> list[float]:
    return [1.0 + step * i for i in range(count)]


_PHI3_LONG = {
    "hidden_size": 48, "intermediate_size": 72, "num_attention_heads": 3, "num_key_value_heads": 1,
    "partial_rotary_factor": 0.75, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "rope_theta": 5000.0,
    "rope_scaling": {"type": "longrope", "short_factor": _factors(6, 0.1), "long_factor": _factors(6, 0.7)},
}  # fmt: skip

CASES = {
    c.name: c
    for c in [
        case(
            "cohere", "CohereForCausalLM", "cohere", hidden_size=48, intermediate_size=80,
            num_attention_heads=4, num_key_value_heads=2, logit_scale=1.75, rope_theta=8000.0,
            layer_norm_eps=1e-5,
        ),
        case(
            "cohere_qk_norm", "CohereForCausalLM", "cohere", hidden_size=60, intermediate_size=50,
            num_attention_heads=5, num_key_value_heads=1, num_hidden_layers=3, logit_scale=1.5,
            use_qk_norm=True, attention_bias=True, tie_word_embeddings=False, layer_norm_eps=1e-3,
            rope_parameters={"rope_type": "default", "rope_theta": 900.0},
        ),
        case(
            "cohere2", "Cohere2ForCausalLM", "cohere2", hidden_size=48, intermediate_size=80,
            num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4, logit_scale=1.5,
            sliding_window=20, sliding_window_pattern=4, rope_theta=8000.0,
        ),
        case(
            "cohere2_layer_types", "Cohere2ForCausalLM", "cohere2", hidden_size=36, intermediate_size=50,
            num_attention_heads=3, num_hidden_layers=3, logit_scale=1.0, sliding_window=7,
            attention_bias=True, tie_word_embeddings=False,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
        ),
        case(
            "gpt_neox", "GPTNeoXForCausalLM", "gpt_neox", hidden_size=48, intermediate_size=96,
            num_attention_heads=4, rotary_pct=0.5, rotary_emb_base=5000, use_parallel_residual=True,
            hidden_act="gelu", layer_norm_eps=1e-5, tie_word_embeddings=False,
        ),
        case(
            "gpt_neox_sequential", "GPTNeoXForCausalLM", "gpt_neox", hidden_size=60, intermediate_size=70,
            num_attention_heads=3, num_hidden_layers=3, use_parallel_residual=False, attention_bias=False,
            hidden_act="gelu_new", tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 1.0},
        ),
        case(
            "stablelm", "StableLmForCausalLM", "stablelm", hidden_size=64, intermediate_size=72,
            num_attention_heads=4, num_key_value_heads=4, partial_rotary_factor=0.25,
            layer_norm_eps=1e-5, tie_word_embeddings=False, rope_theta=10000,
        ),
        case(
            "stablelm_parallel", "StableLmForCausalLM", "stablelm", hidden_size=96, intermediate_size=50,
            num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=3, use_qkv_bias=True,
            qk_layernorm=True, use_parallel_residual=True, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        ),
        case(
            "stablelm_qk_norm", "StableLmForCausalLM", "stablelm", hidden_size=48, intermediate_size=50,
            num_attention_heads=3, num_key_value_heads=1, qk_layernorm=True, partial_rotary_factor=0.5,
            tie_word_embeddings=False,
        ),
        case(
            "gemma", "GemmaForCausalLM", "gemma", hidden_size=32, intermediate_size=80,
            num_attention_heads=2, num_key_value_heads=1, hidden_act="gelu", rms_norm_eps=1e-6,
        ),  # head_dim 256 because it is not said
        case(
            "gemma_bias", "GemmaForCausalLM", "gemma", hidden_size=40, intermediate_size=50,
            num_attention_heads=3, num_key_value_heads=3, head_dim=18, attention_bias=True,
            num_hidden_layers=3, hidden_act="gelu_pytorch_tanh", tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 600.0},
        ),
        case(
            "gemma2", "Gemma2ForCausalLM", "gemma2", hidden_size=48, intermediate_size=80,
            num_attention_heads=4, num_key_value_heads=2, head_dim=20, num_hidden_layers=3,
            query_pre_attn_scalar=9, sliding_window=24, attn_logit_softcapping=2.0,
            final_logit_softcapping=4.0, hidden_activation="gelu_pytorch_tanh",
        ),
        case(
            "gemma2_no_caps", "Gemma2ForCausalLM", "gemma2", hidden_size=36, intermediate_size=50,
            num_attention_heads=3, num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16,
            sliding_window=9, attn_logit_softcapping=None, final_logit_softcapping=None,
            attention_bias=True, tie_word_embeddings=False,
            layer_types=["full_attention", "sliding_attention"],
        ),
        case(
            "gemma3", "Gemma3ForCausalLM", "gemma3_text", hidden_size=48, intermediate_size=80,
            num_attention_heads=4, num_key_value_heads=2, head_dim=20, num_hidden_layers=3,
            query_pre_attn_scalar=30, sliding_window=24, final_logit_softcapping=5.0,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 20000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        ),
        case(
            "gemma3_old", "Gemma3ForCausalLM", "gemma3_text", hidden_size=36, intermediate_size=50,
            num_attention_heads=3, num_key_value_heads=1, head_dim=16, num_hidden_layers=4,
            query_pre_attn_scalar=16, sliding_window=11, sliding_window_pattern=3, attention_bias=True,
            rope_theta=50000.0, rope_local_base_freq=200.0, tie_word_embeddings=False,
            rope_scaling={"rope_type": "linear", "factor": 4.0},
        ),
        case(
            "qwen3", "Qwen3ForCausalLM", "qwen3", hidden_size=40, intermediate_size=56,
            num_attention_heads=3, num_key_value_heads=1, head_dim=24, rms_norm_eps=1e-6,
            rope_theta=1000000.0, tie_word_embeddings=False,
        ),
        case(
            "qwen3_window", "Qwen3ForCausalLM", "qwen3", hidden_size=48, intermediate_size=50,
            num_attention_heads=4, num_key_value_heads=2, head_dim=12, num_hidden_layers=3,
            attention_bias=True, use_sliding_window=True, sliding_window=13, max_window_layers=1,
            tie_word_embeddings=True, max_position_embeddings=64,
            rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        case(
            "phi3", "Phi3ForCausalLM", "phi3", hidden_size=48, intermediate_size=80,
            num_attention_heads=4, num_key_value_heads=4, sliding_window=21, rms_norm_eps=1e-5,
            original_max_position_embeddings=256, tie_word_embeddings=False,
        ),
        case(
            "granite", "GraniteForCausalLM", "granite", hidden_size=48, intermediate_size=80,
            num_attention_heads=4, num_key_value_heads=2, embedding_multiplier=3.0,
            attention_multiplier=0.2, residual_multiplier=0.7, logits_scaling=0.4, rms_norm_eps=1e-5,
            tie_word_embeddings=True, rope_theta=7000.0,
        ),
        case(
            "granite_plain", "GraniteForCausalLM", "granite", hidden_size=30, intermediate_size=50,
            num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=3, attention_bias=True,
            mlp_bias=True, attention_multiplier=0.3, tie_word_embeddings=False,
        ),
        case(
            "smollm3", "SmolLM3ForCausalLM", "smollm3", hidden_size=48, intermediate_size=80,
            num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4, rope_theta=5000.0,
            tie_word_embeddings=True,
        ),
        case(
            "smollm3_window", "SmolLM3ForCausalLM", "smollm3", hidden_size=30, intermediate_size=50,
            num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=3, attention_bias=True,
            mlp_bias=True, no_rope_layers=[0, 1, 1], use_sliding_window=True, sliding_window=15,
            tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 300.0},
        ),
        case("phi3_long", "Phi3ForCausalLM", "phi3", **_PHI3_LONG, original_max_position_embeddings=64),
        case(
            "phi3_short", "Phi3ForCausalLM", "phi3", **_PHI3_LONG, original_max_position_embeddings=192,
            max_model_len=192,
        ),
    ]
}  # fmt: skip


def parts_of(config: dict[str, Any]) -> list[Part]:
    """Every tensor that the config's program reads."""
    program = build_program(ModelConfig(config, "tiny"), DType.F32)
    return [part for weight in program.weights for part in weight.parts]


def random_tensors(name: str, config: dict[str, Any]) -> dict[str, F32]:
    """The same random tensors for the same case on every machine.

    Logits come out as a few units. The blocks outweigh the embedding in the residual stream, so that the
    next token depends on what went before and not on the last token alone; yet not by so much that float32
    rounding alone moves logits by 1e-4.
    """
    tensors: dict[str, F32] = {}
    for part in parts_of(config):
        source = np.random.default_rng([zlib.crc32(name.encode()), zlib.crc32(part.source.encode())])
        numbers = source.standard_normal(part.shape, dtype=np.float32)
        if "norm" in part.source and part.source.endswith("weight"):
            strength = 4 if "post_" in part.source and part.add else 1  # Gemma's norms after the blocks
            tensors[part.source] = numbers * np.float32(0.2) + np.float32(strength - part.add)
        elif len(part.shape) == 2:
            gain = next((g for key, g in GAINS.items() if key in part.source), 1.6)
            tensors[part.source] = numbers * np.float32(gain / part.shape[1] ** 0.5)
        elif part.source.endswith("A_log"):  # decays, steps and skips of a trained Mamba-2's size
            tensors[part.source] = np.log(np.linspace(0.3, 8.0, len(numbers), dtype=np.float32))
        else:
            gain, mean = next((g for key, g in MAMBA.items() if part.source.endswith(key)), (1.0, 0.0))
            tensors[part.source] = numbers * np.float32(0.2) * np.float32(gain) + np.float32(mean)
    return tensors


def digest(tensors: dict[str, F32]) -> str:
    """A checksum of names and numbers."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].tobytes())
    return total.hexdigest()


def save(path: Path, config: dict[str, Any], tensors: dict[str, F32], shards: int = 1) -> Path:
    """Writes config.json and one or several safetensors files."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path
    where: dict[str, str] = {}
    names = sorted(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[shard::shards]
        save_file({n: tensors[n] for n in mine}, path / file, metadata={"format": "pt"})
        where |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def load(path: Path, max_model_len: int = 256) -> CpuBackend:
    """The CPU backend with the checkpoint at `path`, a directory or a GGUF file."""
    checkpoint: Checkpoint = open_checkpoint(path)
    program = build_program(ModelConfig(checkpoint.config, checkpoint.config_origin), DType.F32)
    config = EngineConfig(
        device="cpu", cpu_kernels="numpy", max_model_len=max_model_len, max_num_seqs=4, threads=1,
        num_blocks=4 * max_model_len // KV_BLOCK,
    )  # fmt: skip
    return CpuBackend.load(program, checkpoint, config)


def prompt_of(name: str, length: int = PROMPT) -> NDArray[np.int32]:
    """A random prompt."""
    source = np.random.default_rng(zlib.crc32(name.encode()))
    return source.integers(3, VOCAB, length, dtype=np.int32)


def step_logits(backend: CpuBackend, tokens: Sequence[NDArray[np.int32]], starts: Sequence[int]) -> list[F32]:
    """Logits of every row of one step, for each of its sequences; sequence s keeps its own KV blocks."""
    own = -(-backend.limits.max_model_len // KV_BLOCK)
    tables = np.zeros((len(tokens), -(-own // 8) * 8), np.int32)  # padded to whole attention splits
    tables[:, :own] = np.arange(len(tokens) * own).reshape(-1, own)
    lens = np.array([len(t) for t in tokens], np.int32)
    rows = np.arange(int(lens.sum()))
    step = flat_step(np.concatenate(tokens), lens, np.array(starts, np.int32), tables, rows)
    run = Run(backend._model, step)
    execute(backend._launches, run)
    return np.split(run.buffers["logits"], np.cumsum(lens)[:-1])
