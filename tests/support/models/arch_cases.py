"""A tiny model of every architecture for comparisons of two devices: particulars on and off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rvllm.backends.base import StepBatch
from rvllm.engine.ipc.messages import Output, Sampling
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program
from support.kernels.gpu_engine import ROUND
from support.models import archs_moe_tiny, archs_tiny, nemotron_tiny
from support.models.tiny import ArrayCheckpoint

VOCAB = 259
DTYPES = [DType.BF16, DType.F16]
LENGTHS = (1, 5, 17, 64, 139)
TOLERANCE = {DType.BF16: 0.12, DType.F16: 0.02}  # of log-probabilities; float32 sums, 16-bit activations
ROUTED = {DType.BF16: 0.75, DType.F16: 0.9}  # of tokens within it where a near tie may choose other experts
COSINE = {DType.BF16: 2e-3, DType.F16: 1e-4}


BASE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 200, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "tie_word_embeddings": False, "hidden_act": "silu", "rms_norm_eps": 1e-5, "layer_norm_eps": 1e-5,
}  # fmt: skip
OWN = {  # of a model for the comparison with Transformers: sizes, and what a program does not read
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "model_type", "torch_dtype", "bos_token_id",
    "eos_token_id", "pad_token_id",
}  # fmt: skip
TINY = archs_tiny.CASES | archs_moe_tiny.CASES | nemotron_tiny.CASES


@dataclass(frozen=True)
class Case:
    """A config."""

    config: dict[str, Any]

    @property
    def routed(self) -> bool:
        """Whether tokens choose experts."""
        return "num_experts_per_tok" in self.config


def case(architecture: str, **fields: Any) -> Case:
    """A case with the fields all of them share."""
    return Case({"architectures": [architecture], **BASE, **fields})


def resized(name: str, **fields: Any) -> Case:
    """The model that is compared with Transformers under this name, in sizes that GPUs have kernels for."""
    particulars = {key: value for key, value in TINY[name].config.items() if key not in OWN}
    return Case({**BASE, **particulars, **fields})


def factors(count: int, step: float) -> list[float]:
    return [1.0 + step * i for i in range(count)]


PHI3_LONG = {
    "num_attention_heads": 2, "num_key_value_heads": 1,
    "rope_scaling": {"type": "longrope", "short_factor": factors(24, 0.1), "long_factor": factors(24, 0.7)},
}  # fmt: skip
DEEPSEEK = {
    "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 32, "moe_intermediate_size": 48, "n_routed_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
NEMOTRON = {"head_dim": 32, "ssm_state_size": 64, "mamba_head_dim": 16, "mamba_num_heads": 8}

MODELS: dict[str, Case] = {
    "llama": case("LlamaForCausalLM", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral_window": case("MistralForCausalLM", sliding_window=37, head_dim=128),
    "qwen2": case("Qwen2ForCausalLM", num_attention_heads=2, num_key_value_heads=1, rope_theta=1e6),
    "stablelm_parallel_d160": case(
        "StableLmForCausalLM", hidden_size=320, num_attention_heads=2, num_key_value_heads=1,
        partial_rotary_factor=0.25, qk_layernorm=True, use_parallel_residual=True,
    ),
    "gemma3_with_images": Case(
        {
            "architectures": ["Gemma3ForConditionalGeneration"], "vocab_size": VOCAB,
            "text_config": {
                "hidden_size": 128, "intermediate_size": 200, "num_hidden_layers": 2, "vocab_size": VOCAB,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
                "query_pre_attn_scalar": 32, "sliding_window": 40, "max_position_embeddings": 512,
            },
        }
    ),
}  # fmt: skip
RESIZED: dict[str, dict[str, Any]] = {
    "cohere": {"tie_word_embeddings": True},
    "cohere_qk_norm": {
        "hidden_size": 160, "num_attention_heads": 5, "num_key_value_heads": 1, "rope_parameters": None
    },
    "cohere2": {"num_hidden_layers": 4, "tie_word_embeddings": True},
    "cohere2_layer_types": {},
    "gpt_neox": {"hidden_size": 256, "num_key_value_heads": 4, "rotary_pct": 0.25},
    "gpt_neox_sequential": {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 3},
    "stablelm": {"hidden_size": 256, "use_qkv_bias": True},
    "stablelm_qk_norm": {"hidden_size": 192, "num_attention_heads": 6, "tie_word_embeddings": True},
    "gemma": {
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True, "rms_norm_eps": 1e-5
    },
    "gemma_bias": {
        "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 96, "rope_parameters": None
    },
    "gemma2": {"tie_word_embeddings": True, "head_dim": 64, "query_pre_attn_scalar": 40},
    "gemma2_no_caps": {"num_hidden_layers": 2, "head_dim": 32, "query_pre_attn_scalar": 32},
    "gemma3": {
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 256,
        "query_pre_attn_scalar": 200,
    },
    "gemma3_old": {"num_hidden_layers": 4, "head_dim": 64, "query_pre_attn_scalar": 64},
    "qwen3": {"head_dim": 128},
    "qwen3_window": {"head_dim": 32, "max_position_embeddings": 64},
    "phi3": {"num_key_value_heads": 4, "original_max_position_embeddings": 512},
    "phi3_long": PHI3_LONG,
    "phi3_short": PHI3_LONG | {"original_max_position_embeddings": 512},
    "granite": {},
    "granite_plain": {"attention_multiplier": 0.2},
    "smollm3": {"num_hidden_layers": 4},
    "smollm3_window": {"rope_parameters": None},
    "mixtral": {"num_local_experts": 4, "rope_theta": 1e6},
    "mixtral_window": {"head_dim": None, "rope_parameters": None},
    "qwen3_moe": {"head_dim": 64, "moe_intermediate_size": 48, "rope_theta": 10000.0},
    "qwen3_moe_some": {"num_hidden_layers": 5, "head_dim": 32, "moe_intermediate_size": 40},
    "deepseek_v2_lite": DEEPSEEK | {"rope_theta": 10000.0},
    "deepseek_v2": DEEPSEEK | {"q_lora_rank": 48},
    "deepseek_v3": DEEPSEEK | {"q_lora_rank": 32},
    "deepseek_v3_halves": DEEPSEEK | {"n_shared_experts": 1},
    "phi3small": {"hidden_size": 256, "num_hidden_layers": 4, "ff_intermediate_size": 96},
    "phi3small_plain": {
        "hidden_size": 256, "tie_word_embeddings": True, "ff_intermediate_size": 96,
        "rope_embedding_base": 5000, "rope_position_scale": 1.0, "blocksparse_block_size": 64,
        "blocksparse_num_local_blocks": 1, "blocksparse_vert_stride": 3,
    },
    "nemotron_h": NEMOTRON,
    "nemotron_h_moe": NEMOTRON | {
        "conv_kernel": 4, "moe_intermediate_size": 40, "moe_shared_expert_intermediate_size": 56
    },
    "nemotron_h_latent": NEMOTRON | {
        "moe_intermediate_size": 48, "moe_latent_size": 40, "moe_shared_expert_intermediate_size": 32
    },
    "nemotron_h_shared": NEMOTRON | {  # the shared MLP is two experts wide
        "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40,
        "moe_shared_expert_intermediate_size": 80,
    },
}  # fmt: skip
MODELS |= {name: resized(name, **fields) for name, fields in RESIZED.items()}


def encoder(architecture: str, how: str, normalise: bool, **fields: Any) -> dict[str, Any]:
    """An encoder's config."""
    base = {
        "architectures": [architecture], "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 200,
        "num_attention_heads": 4, "num_hidden_layers": 3, "max_position_embeddings": 160,
        "type_vocab_size": 2, "pad_token_id": 0, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
        "sentence_transformers": {"pooling": how, "normalise": normalise},
    }  # fmt: skip
    return base | fields


ENCODERS: dict[str, dict[str, Any]] = {
    "bert_mean": encoder("BertModel", "mean", True),
    "bert_cls": encoder(
        "BertModel", "cls", False, num_attention_heads=2, hidden_act="gelu_new", type_vocab_size=1
    ),
    "roberta_last": encoder(
        "RobertaModel", "last", True, pad_token_id=1, type_vocab_size=1, hidden_act="relu"
    ),
    "xlm_roberta_mean": encoder(
        "XLMRobertaModel", "mean", False, pad_token_id=3, hidden_size=384, num_attention_heads=3
    ),
}


def program_of(config: Mapping[str, Any], dtype: DType) -> Program:
    return build_program(ModelConfig(config, "tiny"), dtype)


def tensors_of(name: str, config: dict[str, Any], dtype: DType) -> ArrayCheckpoint:
    """The model's random weights, exact in `dtype`."""
    found = archs_tiny.random_tensors(name, config)
    return ArrayCheckpoint(config, {k: v.astype(ROUND[dtype]).astype(np.float32) for k, v in found.items()})


def asked(seed: int = 5) -> list[tuple[list[int], Sampling]]:
    rng = np.random.default_rng(seed)
    sampling = Sampling(max_tokens=6, logprobs=2, prompt_logprobs=1)
    return [(rng.integers(0, VOCAB, n).tolist(), sampling) for n in LENGTHS]


def scores(outputs: list[list[Output]]) -> np.ndarray:
    """Log-probabilities of all prompts' tokens."""
    return np.array([entry.logprob for out in outputs for entry in out[0].prompt_logprobs or []])


def text_batch(texts: list[list[int]]) -> StepBatch:
    nothing = np.zeros(len(texts), np.int32)
    lengths = np.array([len(t) for t in texts], np.int32)
    tokens = np.concatenate([np.array(t, np.int32) for t in texts])
    return StepBatch(
        0, np.arange(len(texts), dtype=np.int32), lengths, nothing, tokens, nothing.astype(np.bool_)
    )
