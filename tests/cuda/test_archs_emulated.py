"""A few architectures whole on the emulator: what only they use, through plans, loading, graphs and sampling.

All of them run with RVLLM_TEST_EMULATE=1 (test_archs_gpu.py), which takes minutes.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from rvllm.backends.cpu.backend import CpuBackend, CpuEncoder
from rvllm.backends.cuda.backend import CudaBackend
from rvllm.backends.cuda.encoder import CudaEncoder
from rvllm.config import EngineConfig
from rvllm.engine.ipc.messages import Sampling
from rvllm.engine.state import complete
from rvllm.program.dtypes import DType
from support.emulator import EMULATED
from support.emulator.driver import emulated_driver
from support.kernels.gpu_engine import CONFIG, core_of, run
from support.models.arch_cases import (
    ENCODERS,
    MODELS,
    TOLERANCE,
    VOCAB,
    program_of,
    scores,
    tensors_of,
    text_batch,
)

pytestmark = EMULATED


@pytest.mark.parametrize("name", ["gemma2", "phi3small", "stablelm_qk_norm"])
def test_scores_agree_with_the_cpu(name: str) -> None:
    config = {**MODELS[name].config, "num_hidden_layers": 2}
    checkpoint, rng = tensors_of(name, config, DType.F16), np.random.default_rng(7)
    vocab = [t for t in range(VOCAB) if t not in config.get("dummy_token_indices", ())]
    asked = [(rng.choice(vocab, n).tolist(), Sampling(max_tokens=3, prompt_logprobs=1)) for n in (3, 70)]
    engine = replace(
        CONFIG, max_model_len=128, max_num_seqs=2, max_num_batched_tokens=40, cpu_kernels="numpy"
    )
    core = core_of(CpuBackend.load(program_of(config, DType.F32), checkpoint, engine), config, engine)
    wanted = scores(run(core, asked))
    core.close()
    with emulated_driver():
        loaded = CudaBackend.load(program_of(config, DType.F16), checkpoint, engine)
        core = core_of(loaded, config, engine)
        found = run(core, asked)
        (alone,) = run(core, asked[:1])
        stats = complete(core, core.stats())
        core.close()
    np.testing.assert_allclose(scores(found), wanted, atol=2 * TOLERANCE[DType.F16])
    assert [o.token_ids for o in alone] == [o.token_ids for o in found[0]]
    graphs = [key for key in stats.backend if key.startswith("rvllm:cuda_graph_captured{")]
    assert len(graphs) == stats.backend["rvllm:cuda_graphs"] > 0
    assert any('kind="decode"' in key for key in graphs)
    assert any("gemm" in kernel.kernel for kernel in stats.kernels)
    hidden = set(config.get("dummy_token_indices", ()))
    assert not hidden & {t for out in found for o in out for t in o.token_ids}


def test_vectors_agree_with_the_cpu() -> None:
    config = {**ENCODERS["roberta_last"], "num_hidden_layers": 2}
    checkpoint, rng = tensors_of("roberta_last", config, DType.F16), np.random.default_rng(8)
    texts = [rng.integers(4, VOCAB, n).tolist() for n in (1, 33, 70)]
    reference = CpuEncoder.load(program_of(config, DType.F32), checkpoint, EngineConfig(device="cpu"))
    wanted = reference.embed(text_batch(texts))
    reference.close()
    with emulated_driver():
        engine = EngineConfig(device="cuda", max_num_seqs=4, max_num_batched_tokens=192)
        loaded = CudaEncoder.load(program_of(config, DType.F16), checkpoint, engine)
        found = loaded.embed(text_batch(texts))
        assert (loaded.embed(text_batch(texts[2:]))[0] == found[2]).all(), "a text differs in company"
        loaded.close()
    assert (1 - (found * wanted).sum(1)).max() < 1e-4


def test_masks_and_more_logprobs_than_the_kernel_reports() -> None:
    config = {**MODELS["qwen3"].config, "num_hidden_layers": 1}
    checkpoint = tensors_of("qwen3", config, DType.F16)
    sampling = Sampling(
        temperature=1.0, seed=4, max_tokens=4, logprobs=50, prompt_logprobs=50, bad_words=((9, 9),),
        allowed_token_ids=(8, 9),
    )  # fmt: skip
    engine = replace(CONFIG, max_model_len=64, max_num_seqs=2, max_num_batched_tokens=32)
    with emulated_driver():
        loaded = CudaBackend.load(program_of(config, DType.F16), checkpoint, engine)
        core = core_of(loaded, config, engine)
        (found,) = run(core, [([5, 6, 7], sampling)])
        core.close()
    tokens = [output.token_ids[0] for output in found]
    assert len(tokens) == 4 and set(tokens) <= {8, 9} and (9, 9) not in itertools.pairwise(tokens)
    rows = [row for output in found for row in output.logprobs or []] + (found[0].prompt_logprobs or [])
    assert len(rows) == 6
    for row in rows:
        assert len(row.top_ids) == 50 == len(set(row.top_ids))
        assert row.top_logprobs == sorted(row.top_logprobs, reverse=True)
        place = row.top_ids.index(row.token_id) if row.token_id in row.top_ids else None
        if place is not None:
            assert abs(row.top_logprobs[place] - row.logprob) < 1e-4
