"""Tiny models' whole runs on the GPU, for compute-sanitizer: prompts, chunks, decodes, every sampler path.

    PYTHONPATH=src compute-sanitizer --tool memcheck python scripts/gpu/tiny_run.py [NAME ...]

By default one model of each family of kernels; names as in tests/cuda/test_archs_gpu.py.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from rvllm.engine.ipc.messages import Sampling
from rvllm.program.dtypes import DType
from support.kernels.gpu_engine import CONFIG, backend, core_of, run, tokens_of
from support.models.arch_cases import MODELS, VOCAB

FAMILIES = ("qwen2", "gemma2", "mixtral", "deepseek_v2_lite", "nemotron_h_moe", "phi3small")


def check(name: str) -> None:
    """Runs twelve requests and prints how many tokens came out."""
    config = MODELS[name].config
    engine = replace(CONFIG, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=320)
    core = core_of(backend(config, "cuda", DType.BF16, engine), config, engine)
    rng = np.random.default_rng(0)
    kinds = [
        Sampling(max_tokens=6),
        Sampling(max_tokens=6, temperature=1.0, top_k=20, top_p=0.9, min_p=0.01, seed=3),
        Sampling(
            max_tokens=6, repetition_penalty=1.3, presence_penalty=0.5, logit_bias=((3, 2.0),), logprobs=5
        ),
        Sampling(max_tokens=6, prompt_logprobs=2, min_tokens=3, stop_token_ids=(1, 2)),
    ]
    asked = [
        (rng.integers(0, VOCAB, n).tolist(), kinds[i % 4]) for i, n in enumerate([1, 5, 17, 63, 130, 300] * 2)
    ]
    outputs = run(core, asked)
    tokens, steps = sum(len(tokens_of(o)) for o in outputs), core.stats().steps
    print(f"{name}: {tokens} tokens, {steps} steps", flush=True)
    core.close()


def main() -> None:
    """Runs the named models, or one of each family."""
    for name in sys.argv[1:] or FAMILIES:
        check(name)


if __name__ == "__main__":
    main()
