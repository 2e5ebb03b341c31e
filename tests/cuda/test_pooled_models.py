"""Models that pool, on the emulator and on a GPU against the CPU backend: decoders, cross-encoders, tokens.

And `del llm` on a GPU: the process gives the device back, and the next model finds all of it.
"""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rvllm import LLM, SamplingParams
from rvllm.backends.base import StepBatch
from rvllm.backends.cpu.backend import CpuEncoder
from rvllm.backends.cuda.encoder import CudaEncoder
from rvllm.backends.cuda.pooler import CudaPooler
from rvllm.config import EngineConfig
from rvllm.errors import UsageError
from rvllm.program.dtypes import DType
from support.emulator import EMULATED
from support.emulator.driver import emulated_driver
from support.kernels.gpu_engine import needs_gpu
from support.models.arch_cases import ENCODERS, MODELS, VOCAB, program_of, tensors_of, text_batch

PLACES = [
    pytest.param("emulator", marks=EMULATED),
    pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu]),
]
QWEN = {**MODELS["qwen3"].config, "num_hidden_layers": 2}
BERT = {**ENCODERS["bert_mean"], "num_hidden_layers": 2}


@dataclass(frozen=True)
class Case:
    """A model, whether its texts are pairs, and how far apart half and full precision may be."""

    config: dict[str, Any]
    pairs: bool = False


CASES = {
    "decoder": Case(QWEN | {"runner": "pooling"}),
    "decoder_classes": Case(QWEN | {"architectures": ["Qwen3ForSequenceClassification"], "num_labels": 3}),
    "typed_pairs": Case(
        BERT | {"architectures": ["BertForSequenceClassification"], "num_labels": 1, "type_vocab_size": 2},
        pairs=True,
    ),
    "untyped_pairs": Case(
        BERT
        | {"architectures": ["XLMRobertaForSequenceClassification"], "num_labels": 1, "type_vocab_size": 1},
        pairs=True,
    ),
    "token_classes": Case(BERT | {"architectures": ["BertForTokenClassification"], "num_labels": 5}),
}


def batch_of(texts: list[list[int]], pairs: bool) -> StepBatch:
    seconds = {i: len(text) // 3 for i, text in enumerate(texts) if pairs and len(text) > 2}
    return replace(text_batch(texts), seconds=seconds)


def close(found: np.ndarray, wanted: np.ndarray, limit: float = 0.02) -> None:
    apart = np.abs(found - wanted).max() / max(1.0, np.abs(wanted).max())
    assert found.shape == wanted.shape and apart < limit, apart


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_cpu(name: str, place: str) -> None:
    config, pairs = CASES[name].config, CASES[name].pairs
    if place == "emulator":
        if name not in ("decoder_classes", "typed_pairs"):
            pytest.skip("on a GPU only: the emulator takes seconds for each")
        config = config | {"num_hidden_layers": 1}
    checkpoint, rng = tensors_of(name, config, DType.F16), np.random.default_rng(9)
    if name == "typed_pairs":
        checkpoint.arrays["embeddings.token_type_embeddings.weight"] *= 16
    lengths = (1, 9, 70) if place == "emulator" else (1, 33, 150, 2, 64, 65, 17)
    texts = [rng.integers(4, VOCAB, n).tolist() for n in lengths]
    batch = batch_of(texts, pairs)
    reference = CpuEncoder.load(
        program_of(config, DType.F32), checkpoint, EngineConfig(device="cpu", max_num_seqs=8)
    )
    wanted, rows = reference.embed(batch), reference.embed_tokens(batch)
    alike = reference.embed_tokens(text_batch(texts))
    reference.close()
    engine = EngineConfig(device="cuda", max_num_seqs=8, max_num_batched_tokens=512, max_model_len=152)
    if place == "emulator":
        with emulated_driver():
            check_places(config, checkpoint, engine, batch, (wanted, rows))
    else:
        check_places(config, checkpoint, engine, batch, (wanted, rows))
    if name == "typed_pairs":
        assert np.abs(rows[-1] - alike[-1]).max() > 0.05, "the second text's kind changes nothing: no test"


def check_places(
    config: dict[str, Any],
    checkpoint: Any,
    engine: EngineConfig,
    batch: StepBatch,
    wanted: tuple[np.ndarray, list[np.ndarray]],
) -> None:
    kind = CudaPooler if "Qwen3" in config["architectures"][0] else CudaEncoder
    loaded = kind.load(program_of(config, DType.F16), checkpoint, engine)
    found, rows = loaded.embed(batch), loaded.embed_tokens(batch)
    close(found, wanted[0])
    for one, other in zip(rows, wanted[1], strict=True):
        close(one, other)
    last = len(batch.slots) - 1
    alone = batch_of([batch.tokens[-batch.query_lens[last] :].tolist()], bool(batch.seconds))
    assert (loaded.embed(alone)[0] == found[last]).all(), "a text differs in company"
    assert (loaded.embed_tokens(alone)[0] == rows[last]).all(), "a text's tokens differ in company"
    loaded.embed(text_batch([[5] * 6]))
    graphs = loaded.stats()["rvllm:cuda_graphs"]
    loaded.embed(text_batch([[5] * 7]))  # of the same padded size
    assert loaded.stats()["rvllm:cuda_graphs"] == graphs
    loaded.close()


def held() -> bool:
    """Whether this process holds the device: its primary context is what all memory hangs on."""
    from cuda.bindings import driver

    driver.cuInit(0)
    error, _, active = driver.cuDevicePrimaryCtxGetState(0)
    assert int(error) == 0
    return bool(active)


@pytest.mark.gpu
@pytest.mark.alone
@needs_gpu
def test_a_second_llm_after_the_first(tmp_path: Path) -> None:
    """By `del llm`, by leaving `with`, by a start that fails; models that generate and that pool."""
    (tmp_path / "generates").mkdir()
    (tmp_path / "generates" / "config.json").write_text(json.dumps(QWEN))
    shared: dict[str, Any] = {
        "device": "cuda", "load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 128,
        "max_num_seqs": 4, "max_num_batched_tokens": 128, "dtype": "float16", "gpu_memory_utilization": 0.05,
    }  # fmt: skip
    prompt = {"prompt_token_ids": [5, 6, 7]}
    answers = []
    for round_ in range(3):
        llm = LLM(str(tmp_path / "generates"), **shared)
        outputs = llm.generate(prompt, SamplingParams(max_tokens=4, temperature=0), use_tqdm=False)
        answers.append(outputs[0].outputs[0].token_ids)
        assert held()
        del llm, outputs
        gc.collect()
        assert not held(), round_
    assert answers[0] == answers[1] == answers[2]
    with pytest.raises(UsageError, match="max-model-len"):
        LLM(str(tmp_path / "generates"), **(shared | {"max_model_len": 1 << 30}))
    assert not held()
    vectors = []
    for _ in range(2):
        with LLM(str(tmp_path / "generates"), runner="pooling", **shared) as pooler:
            vectors.append(pooler.embed(prompt, use_tqdm=False)[0].outputs.embedding)
            rows = pooler.encode(prompt, pooling_task="token_embed", use_tqdm=False)[0].outputs.data
            np.testing.assert_allclose(rows[-1], vectors[-1], atol=2e-3)
            assert held()
        assert not held()
    assert vectors[0] == vectors[1]
