"""Behind the last attention only rows whose logits are wanted are computed, and they are what they were."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rvllm.backends.cpu.backend import CpuBackend
from rvllm.backends.cuda.layout.fusion import fuse
from rvllm.backends.cuda.layout.last_rows import gathered_early
from rvllm.engine.ipc.messages import Sampling
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import GatherRows, Program
from support.kernels.gpu_engine import CONFIG, core_of, run
from support.models.arch_cases import MODELS, VOCAB, program_of, scores, tensors_of
from support.models.real_configs import CONFIGS


def program(name: str) -> Program:
    return build_program(ModelConfig({**CONFIGS[name], "num_hidden_layers": 2}, name), DType.BF16)


@pytest.mark.parametrize("name", ["Qwen2.5-7B", "Gemma-2-9B", "Pythia-6.9b", "Phi-3-small"])
def test_the_last_layer_gathers_behind_its_attention(name: str) -> None:
    given = program(name)
    ops = gathered_early(given).ops
    at = [i for i, op in enumerate(ops) if isinstance(op, GatherRows)]
    assert "attention" in ops[at[0] - 1].kind
    assert at == [at[0], at[0] + 1] or at == [at[0], at[0] + 1, at[0] + 2]
    rest = ops[at[-1] + 1 :]
    assert {b.rows for op in rest for b in (*op.reads, *op.writes)} == {"samples"}
    assert [op.weights for op in ops if op.weights] == [op.weights for op in given.ops if op.weights]
    assert len(ops) == len(given.ops) + len(at) - 1
    stages = [stage for stage in fuse(gathered_early(given)) if isinstance(stage.ops[0], GatherRows)]
    assert len(stages) == -(-len(at) // 2)  # one launch for two buffers


def test_experts_keep_their_rows() -> None:
    given = program("Qwen3-30B-A3B")
    assert gathered_early(given) is given


@pytest.mark.parametrize("name", ["gemma2", "phi3small", "stablelm_qk_norm"])
def test_tokens_and_scores_are_the_same(name: str) -> None:
    config = {**MODELS[name].config, "num_hidden_layers": 2}
    checkpoint, rng = tensors_of(name, config, DType.F16), np.random.default_rng(3)
    vocab = [t for t in range(VOCAB) if t not in config.get("dummy_token_indices", ())]
    prompts = [rng.choice(vocab, n).tolist() for n in (3, 50, 17)]
    asked = [
        (p, Sampling(max_tokens=2, prompt_logprobs=k)) for p, k in zip(prompts, (None, 1, None), strict=True)
    ]
    engine = replace(
        CONFIG, max_model_len=128, max_num_seqs=3, max_num_batched_tokens=24, cpu_kernels="numpy"
    )
    found = []
    for changed in (False, True):
        made = program_of(config, DType.F32)
        core = core_of(
            CpuBackend.load(gathered_early(made) if changed else made, checkpoint, engine), config, engine
        )
        outputs = run(core, asked)
        core.close()
        found.append(([o.token_ids for out in outputs for o in out], scores(outputs[1:2])))
    assert found[0][0] == found[1][0]
    np.testing.assert_array_equal(found[0][1], found[1][1])
