"""Every architecture on the GPU against the CPU backend: tiny random models, particulars on and off.

With RVLLM_TEST_EMULATE=1 they run on the emulator, where there is no GPU.
"""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pytest

from rvllm.backends.cpu.backend import CpuBackend, CpuEncoder
from rvllm.backends.cuda.backend import CudaBackend
from rvllm.backends.cuda.encoder import CudaEncoder
from rvllm.backends.load import load_backend
from rvllm.config import EngineConfig
from rvllm.models.registry import ARCHITECTURES
from rvllm.program.dtypes import DType
from support.kernels.gpu_engine import CONFIG, check_company, check_draws, core_of, needs_gpu, run
from support.models.arch_cases import (
    COSINE,
    DTYPES,
    ENCODERS,
    LENGTHS,
    MODELS,
    ROUTED,
    TOLERANCE,
    VOCAB,
    asked,
    program_of,
    scores,
    tensors_of,
    text_batch,
)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.value)
@pytest.mark.parametrize("name", MODELS)
def test_scores_and_greedy_tokens_agree_with_the_cpu(name: str, dtype: DType) -> None:
    model = MODELS[name]
    checkpoint, found = tensors_of(name, model.config, dtype), {}
    for device in ("cpu", "cuda"):
        engine = replace(CONFIG, device=device, cpu_kernels="numpy", max_model_len=192)
        kind = CpuBackend if device == "cpu" else CudaBackend
        program = program_of(model.config, DType.F32 if device == "cpu" else dtype)
        core = core_of(kind.load(program, checkpoint, engine), model.config, engine)
        found[device] = run(core, asked())
        core.close()
    cpu, gpu = scores(found["cpu"]), scores(found["cuda"])
    assert len(cpu) == len(gpu) == sum(LENGTHS) - len(LENGTHS)
    seen = np.isfinite(cpu)  # a hidden token's is minus infinity
    assert (np.isfinite(gpu) == seen).all()
    cpu, gpu = cpu[seen], gpu[seen]
    assert cpu.std() > 0.3, "the model tells tokens apart"
    apart, limit = np.abs(cpu - gpu) / (1 + np.abs(cpu) / 8), TOLERANCE[dtype]
    assert np.median(apart) < limit / 4, np.sort(apart)[:: len(apart) // 20]
    share = ROUTED[dtype] if model.routed else 0.99
    assert (apart < limit).mean() >= share, np.sort(apart)[-20:]
    if model.routed:
        return
    check_draws(found["cuda"], found["cpu"], 2 * limit, close=2 * limit)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "name", ["gemma2", "phi3small", "stablelm_parallel_d160", "cohere_qk_norm", "gpt_neox"]
)
def test_the_same_bits_alone_in_company_and_in_chunks(name: str) -> None:
    config = MODELS[name].config
    engine = replace(CONFIG, device="cuda", max_num_batched_tokens=48, max_model_len=192)
    loaded = CudaBackend.load(program_of(config, DType.BF16), tensors_of(name, config, DType.BF16), engine)
    core = core_of(loaded, config, engine)
    check_company(core, asked())
    core.close()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.value)
@pytest.mark.parametrize("name", ENCODERS)
def test_vectors_agree_with_the_cpu_and_do_not_know_their_company(name: str, dtype: DType) -> None:
    config = ENCODERS[name]
    checkpoint = tensors_of(name, config, dtype)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    texts = [rng.integers(4, VOCAB, n).tolist() for n in (1, 33, 150, 2, 64, 65, 17)]
    reference = CpuEncoder.load(program_of(config, DType.F32), checkpoint, EngineConfig(device="cpu"))
    wanted = reference.embed(text_batch(texts))
    reference.close()
    engine = EngineConfig(device="cuda", max_num_seqs=16, max_num_batched_tokens=512)
    loaded = CudaEncoder.load(program_of(config, dtype), checkpoint, engine)
    found = loaded.embed(text_batch(texts))
    assert found.shape == wanted.shape
    assert found.dtype == np.float32
    cosine = (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    assert (1 - cosine).max() < COSINE[dtype], cosine
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.linalg.norm(wanted, axis=1), rtol=0.02)
    for i in (0, 2, 5):
        assert (loaded.embed(text_batch([texts[i]]))[0] == found[i]).all(), "a text differs in company"
    assert (loaded.embed(text_batch(texts[::-1]))[::-1] == found).all()
    kernels = {kernel.kernel for kernel in loaded.last_kernels()}
    assert any("text_attn" in kernel for kernel in kernels)
    loaded.close()


def test_every_architecture_has_a_case() -> None:
    configs = [*(c.config for c in MODELS.values()), *ENCODERS.values()]
    assert {config["architectures"][0] for config in configs} == set(ARCHITECTURES)


@pytest.mark.gpu
@needs_gpu
def test_encoders_get_the_backend_for_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rvllm.backends.load.choose_device", lambda config: "cuda")
    config = EngineConfig(device="cuda", load_format="dummy", max_num_seqs=4, max_num_batched_tokens=256)
    loaded = load_backend(program_of(ENCODERS["bert_mean"], DType.F16), None, config)
    assert isinstance(loaded, CudaEncoder)
    vectors = loaded.embed(text_batch([[5, 6, 7], [8]]))
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-4)
    assert sum(line.nbytes for line in loaded.ledger() if line.name == "weights") > 0
    loaded.close()
