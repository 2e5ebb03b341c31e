"""Checkpoints of integers, run as they are stored, against float32 on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rvllm.backends.cuda.device.driver import device_count
from rvllm.backends.cuda.layout.fusion import fuse
from rvllm.backends.cuda.layout.weights import packed as packed_weight
from rvllm.backends.cuda.layout.weights import packed_weights
from rvllm.backends.cuda.loaded_model import loading_kernels
from rvllm.engine.ipc.messages import Sampling
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.program.formats import BlocksFormat, IntegerFormat
from rvllm.program.ops.dense import Embed
from rvllm.weights.checkpoint import Checkpoint
from rvllm.weights.formats import with_formats
from rvllm.weights.open import open_checkpoint
from support.emulator import available
from support.emulator.driver import emulated_driver
from support.kernels.gpu_engine import CONFIG, core_of, model, run
from support.kernels.integer_checks import stored_blocks
from support.kernels.stored_models import check_runs
from support.models.tiny import weights_of
from support.weights.model_files import LLAMA, gguf_bytes
from support.weights.quantisers import (
    AWQ,
    GPTQ,
    MIXED_BITS,
    Quantiser,
    Tensors,
    awq,
    compressed,
    file_of,
    gptq,
    in_layers,
    int8_groups,
    int8_zeros,
    packed,
    save_quantised,
)

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not available() and device_count() == 0, reason="needs g++ or a GPU"),
]


def of_module(rules: dict[str, Quantiser], otherwise: Quantiser) -> Quantiser:
    """Each matrix by the first rule whose word its name has."""

    def quantise(name: str, matrix: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        chosen = next((quantiser for word, quantiser in rules.items() if word in name), otherwise)
        return chosen(name, matrix, rng)

    return quantise


def ordered(seed: int, quantiser: Quantiser) -> Quantiser:
    """The same order of columns for every matrix of one width, as quantisers find it."""
    return lambda name, matrix, rng: quantiser(name, matrix, np.random.default_rng([seed, matrix.shape[1]]))


METHODS: dict[str, tuple[dict[str, Any], Quantiser]] = {
    "gptq": (GPTQ | {"bits": 4, "group_size": 32}, gptq(4, 32)),
    "gptq in order of importance, padded": (
        GPTQ | {"bits": 4, "group_size": 40, "desc_act": True},
        ordered(1, gptq(4, 40, desc_act=True)),
    ),
    "packed, padded": (
        compressed("pack-quantized", num_bits=8, group_size=48, strategy="group", type="int"),
        packed(8, 48, symmetric=False),
    ),
    "gptq 8 bits, whole rows": (GPTQ | {"bits": 8, "group_size": -1}, gptq(8, -1)),
    "awq": (AWQ | {"group_size": 64}, awq(64)),
    "packed": (
        compressed("pack-quantized", num_bits=4, group_size=32, strategy="group", type="int"),
        packed(4, 32),
    ),
    "gptq, rules": (
        GPTQ | {"bits": 4, "group_size": 64, "dynamic": {"+:.*(v|down)_proj": {"bits": 8}, "+:.*up": {}}},
        of_module({"v_proj": gptq(8, 32), "down": gptq(8, 64), "up": gptq(4, 32)}, gptq(4, 64)),
    ),
    "packed, two numbers of bits": (
        MIXED_BITS,
        of_module({"q_proj": packed(8, 64, symmetric=False), "down": packed(8, 32)}, packed(4, 64)),
    ),
    "int8, groups": (compressed("int-quantized", num_bits=8, type="int"), int8_groups(64)),
    "int8, zeros": (compressed("int-quantized", num_bits=8, type="int"), int8_zeros(True)),
}
KINDS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS",
         "MXFP4"]  # fmt: skip


@pytest.fixture(autouse=True)
def machine() -> Iterator[None]:
    if device_count() > 0:
        yield
    else:
        with emulated_driver():
            yield


def kept_formats(checkpoint: Checkpoint) -> list[IntegerFormat]:
    program = build_program(ModelConfig(checkpoint.config, "tiny"), DType.BF16)
    weights = with_formats(program, checkpoint, "auto").weights
    return [w.format for w in weights if isinstance(w.format, IntegerFormat)]


@pytest.mark.parametrize("method", METHODS)
def test_packed_integers(method: str, tmp_path: Path) -> None:
    quantisation, quantise = METHODS[method]
    config = model(num_hidden_layers=1, hidden_size=128, intermediate_size=192, num_attention_heads=2)
    numbers = weights_of(build_program(ModelConfig(config, "tiny"), DType.F32))
    save_quantised(tmp_path, config, numbers, quantisation, quantise, in_layers)
    checkpoint = open_checkpoint(tmp_path)
    formats = kept_formats(checkpoint)
    mixed = "rules" in method or "bits" in method.partition(", ")[2]
    assert [len(f.parts) for f in formats] == [1 + mixed, 1, 1, 1]
    padded = "padded" in method
    assert all(f.reordered == ("importance" in method or padded) for f in formats)
    assert all(bool(f.width) == padded for f in formats)
    check_runs(checkpoint, config["vocab_size"])


def gguf_model(path: Path, kind_of: dict[str, str], default: str, tied: bool = False) -> Checkpoint:
    """A Llama of one layer whose matrices are random blocks of the kinds given by llama.cpp's names.

    tied: its embeddings are the head too.
    """
    rng = np.random.default_rng(1)
    hidden, inner, heads, kv, words = 256, 512, 4, 2, 96
    metadata = LLAMA | {
        "llama.context_length": 256, "llama.embedding_length": hidden, "llama.feed_forward_length": inner,
        "llama.attention.head_count": heads, "llama.attention.head_count_kv": kv,
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(words)],
    }  # fmt: skip
    shapes = {
        "token_embd": (words, hidden), "output": (words, hidden), "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (hidden // 2, hidden), "blk.0.attn_v": (hidden // 2, hidden),
        "blk.0.attn_output": (hidden, hidden), "blk.0.ffn_gate": (inner, hidden),
        "blk.0.ffn_up": (inner, hidden), "blk.0.ffn_down": (hidden, inner),
    }  # fmt: skip
    if tied:
        del shapes["output"]
    tensors = {
        f"{name}.weight": (kind, shape, stored_blocks(rng, kind, *shape).tobytes())
        for name, shape in shapes.items()
        for kind in [kind_of.get(name, default)]
    }
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        numbers = 1 + rng.standard_normal(hidden).astype(np.float32) / 20
        tensors[f"{name}.weight"] = ("F32", (hidden,), numbers.tobytes())
    path.write_bytes(gguf_bytes(metadata, tensors))
    return open_checkpoint(path)


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_blocks(kind: str, tmp_path: Path) -> None:
    checkpoint = gguf_model(tmp_path / "m.gguf", {}, kind)
    assert [f.stored for f in kept_formats(checkpoint)] == [kind] * 5
    check_runs(checkpoint, 96)


def test_kinds_mixed_within_a_product(tmp_path: Path) -> None:
    kinds = {"blk.0.attn_v": "Q6_K", "blk.0.ffn_down": "Q6_K", "output": "Q6_K", "token_embd": "Q4_K"}
    checkpoint = gguf_model(tmp_path / "m.gguf", kinds, "Q4_K")
    assert sorted(len(f.parts) for f in kept_formats(checkpoint)) == [1, 1, 1, 1, 2]
    check_runs(checkpoint, 96)


def test_embeddings_stay_in_blocks(tmp_path: Path) -> None:
    """Looked up in the file's blocks, bits as if expanded; where they are the head too, packed beside it."""
    for tied in (False, True):
        checkpoint = gguf_model(tmp_path / f"{tied}.gguf", {"token_embd": "Q6_K"}, "Q4_K", tied)
        plain = build_program(ModelConfig(checkpoint.config, "tiny"), DType.BF16)
        program = with_formats(plain, checkpoint, "auto")
        (table,) = {op.table for op in program.ops if isinstance(op, Embed)}
        assert packed_weight(table, "table").nbytes == 96 * 210
        assert isinstance(table.format, IntegerFormat if tied else BlocksFormat)
        names = loading_kernels(packed_weights(fuse(program)), DType.BF16, checkpoint)
        assert "sm80_bf16_dequant_q6_k" not in names
        check_runs(checkpoint, 96)


def test_quantised_as_it_is_loaded(tmp_path: Path) -> None:
    """INT4 made on the way in keeps most of the likeliest tokens, about as likely."""
    from rvllm.backends.cuda.backend import CudaBackend

    config = model(num_hidden_layers=1, hidden_size=128, intermediate_size=192, num_attention_heads=2)
    plain = weights_of(build_program(ModelConfig(config, "tiny"), DType.F32))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(file_of({n: ("F32", v) for n, v in plain.items()}))
    checkpoint = open_checkpoint(tmp_path)
    asked = [(np.random.default_rng(0).integers(0, 515, 17).tolist(), Sampling(max_tokens=1, logprobs=20))]
    found = []
    for mode in ("none", "int4"):
        program = build_program(ModelConfig(config, "tiny"), DType.BF16)
        engine = replace(CONFIG, device="cuda", max_num_batched_tokens=64, quantization=mode)
        core = core_of(CudaBackend.load(program, checkpoint, engine), config)
        first = run(core, asked)[0][0].logprobs[0]
        core.close()
        found.append(dict(zip(first.top_ids, first.top_logprobs, strict=True)))
    common = set(found[0]) & set(found[1])
    assert len(common) >= 10
    assert max(abs(found[0][token] - found[1][token]) for token in common) < 0.3
