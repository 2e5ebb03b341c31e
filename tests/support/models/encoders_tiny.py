"""Tiny random encoders in sentence-transformers' layout, and fifty texts of mixed length."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.base import StepBatch
from rvllm.backends.cpu.backend import CpuEncoder
from rvllm.config import EngineConfig
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.weights.open import open_checkpoint
from support.models import archs_tiny as tiny

F32 = NDArray[np.float32]
VOCAB = 120
GOLDEN_LENGTHS = (1, 33, 60)


def _case(architecture: str, model_type: str, how: str, normalise: bool, **fields: Any) -> dict[str, Any]:
    config = {
        "architectures": [architecture], "model_type": model_type, "vocab_size": VOCAB, "hidden_size": 48,
        "intermediate_size": 72, "num_attention_heads": 4, "num_hidden_layers": 2,
        "max_position_embeddings": 64, "type_vocab_size": 2, "pad_token_id": 0, "dtype": "float32",
        "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    }  # fmt: skip
    return {"config": config | fields, "how": how, "normalise": normalise}


CASES: dict[str, dict[str, Any]] = {
    "bert_mean": _case("BertModel", "bert", "mean", True),
    "bert_cls": _case(
        "BertModel", "bert", "cls", False, num_attention_heads=3, num_hidden_layers=3,
        hidden_act="gelu_new", type_vocab_size=1, layer_norm_eps=1e-5,
    ),
    "roberta_last": _case(
        "RobertaModel", "roberta", "last", True, pad_token_id=1, max_position_embeddings=66,
        type_vocab_size=1, layer_norm_eps=1e-5, hidden_act="relu",
    ),
    "xlm_roberta_mean": _case(
        "XLMRobertaModel", "xlm-roberta", "mean", False, pad_token_id=3, max_position_embeddings=70,
        num_hidden_layers=1,
    ),
}  # fmt: skip

_SWITCHES = {
    "mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken",
}  # fmt: skip


def save_modules(path: Path, how: str, normalise: bool, longest: int | None = None) -> None:
    """modules.json and what it points to."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalise else [])]
    folders = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, folder) in enumerate(zip(kinds, folders, strict=False))
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir(exist_ok=True)
    pooling = {switch: name == how for name, switch in _SWITCHES.items()}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    length = json.dumps({"max_seq_length": longest, "do_lower_case": False})
    (path / "sentence_bert_config.json").write_text(length)


def save(path: Path, name: str) -> Path:
    """A case's directory with weights from a seed."""
    case = CASES[name]
    tiny.save(path, case["config"], tiny.random_tensors(name, case["config"]))
    save_modules(path, case["how"], case["normalise"])
    return path


def load(path: Path, **settings: Any) -> CpuEncoder:
    """The encoder at `path` on the CPU backend."""
    checkpoint = open_checkpoint(path)
    program = build_program(ModelConfig(checkpoint.config, checkpoint.config_origin), DType.F32)
    return CpuEncoder.load(program, checkpoint, EngineConfig(device="cpu", **{"threads": 2, **settings}))


def embed(backend: CpuEncoder, texts: list[list[int]]) -> F32:
    """The vectors of texts that share one step, [S, width]."""
    nothing = np.zeros(len(texts), np.int32)
    lengths = np.array([len(t) for t in texts], np.int32)
    tokens = np.concatenate([np.array(t, np.int32) for t in texts])
    return backend.embed(StepBatch(0, nothing, lengths, nothing, tokens, nothing.astype(np.bool_)))


def token_texts(name: str) -> list[list[int]]:
    """Random token ids of several lengths, some of them equal."""
    source = np.random.default_rng(zlib.crc32(name.encode()))
    lengths = (1, 33, 60, 33, 2, 60, 17)
    return [source.integers(4, VOCAB, n).tolist() for n in lengths]


WORDS = (
    "harbour winter copper question river engine violet answer basket morning theorem lantern window orchard "
    "signal garden protein bridge memory candle station quantum pepper letter island hammer journey compiler "
    "glacier whisper market planet tensor kitchen museum thunder ribbon forest captain algorithm 東京 café "
    "naïve Привет 42 3.14 e-mail (brackets) don't co-operate übermäßig 🙂 https://x.org"
)


def sentences() -> list[str]:
    """Fifty texts from one word to more than MiniLM reads (256 tokens)."""
    source, words = np.random.default_rng(50), WORDS.split()
    lengths = [1, 2, 3, 400, *source.integers(1, 40, 30).tolist(), *source.integers(40, 220, 16).tolist()]
    return [" ".join(source.choice(words, n)) for n in lengths]
