"""Checkpoints that are expanded on the GPU: the same draws as a plain model of the same numbers."""

from pathlib import Path

import numpy as np
import pytest

from rvllm.config import EngineConfig
from rvllm.engine.ipc.messages import Sampling
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.dtypes import DType
from rvllm.weights.open import open_checkpoint
from support.kernels.gpu_engine import CONFIG, core_of, model, needs_gpu, run
from support.models import archs_tiny
from support.models.tiny import weights_of
from support.weights.quantisers import AWQ, GPTQ, awq, gptq, in_layers, save_quantised

pytestmark = [pytest.mark.gpu, needs_gpu]

METHODS = {
    "gptq": (GPTQ | {"bits": 4, "group_size": 8, "desc_act": True}, gptq(4, 8, desc_act=True)),
    "awq": (AWQ | {"group_size": 8}, awq(8)),
}


@pytest.mark.parametrize("method", METHODS)
def test_draws_are_those_of_the_same_numbers(method: str, tmp_path: Path) -> None:
    from rvllm.backends.cuda.backend import CudaBackend

    quantisation, quantise = METHODS[method]
    config = model(num_hidden_layers=1, hidden_size=64, intermediate_size=88, num_attention_heads=2)
    folders = [tmp_path / "plain", tmp_path / "quantised"]
    numbers = weights_of(build_program(ModelConfig(config, "tiny"), DType.F32))
    archs_tiny.save(
        folders[0], config, save_quantised(folders[1], config, numbers, quantisation, quantise, in_layers)
    )
    assert sum(in_layers(*entry) for entry in numbers.items()) == 7
    rng = np.random.default_rng(1)
    asked = [(rng.integers(0, 515, n).tolist(), Sampling(max_tokens=8, logprobs=2)) for n in (3, 40)]
    found = []
    for folder in folders:
        checkpoint = open_checkpoint(folder)
        program = build_program(ModelConfig(checkpoint.config, "tiny"), DType.BF16)
        engine = EngineConfig(**{**CONFIG.__dict__, "device": "cuda"})
        core = core_of(CudaBackend.load(program, checkpoint, engine), config)
        outputs = run(core, asked)
        found.append([(o.token_ids, o.logprobs) for request in outputs for o in request])
        core.close()
    assert found[0] == found[1]
