"""Every --gemm-strategy on the GPU: tiny models against the CPU backend, and bits that are promised.

scripts/gpu/strategies_bench.py checks CUTLASS's kernels one by one, at the sizes of a 7B.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rvllm.backends.cpu.backend import CpuBackend
from rvllm.backends.cuda.backend import CudaBackend
from rvllm.config import EngineConfig
from rvllm.engine.ipc.messages import Output, Sampling
from rvllm.errors import MissingKernelError
from rvllm.program.dtypes import DType
from support.kernels.gpu_engine import CONFIG, core_of, needs_gpu, run
from support.models.arch_cases import MODELS, TOLERANCE, VOCAB, asked, program_of, scores, tensors_of

Asked = list[tuple[list[int], Sampling]]
CASES = [
    *((strategy, "qwen2", DType.BF16) for strategy in ("cublas", "cutlass", "hybrid", "auto")),
    ("cutlass", "gemma2", DType.F16),
    ("hybrid", "gemma2", DType.BF16),
    ("auto", "mixtral", DType.BF16),
]  # fmt: skip


def answers(name: str, dtype: DType, engine: EngineConfig, requests: Asked) -> list[list[Output]]:
    """What a model says on the CPU or with a strategy; skips where an extra is absent."""
    model = MODELS[name]
    checkpoint = tensors_of(name, model.config, dtype)
    kind = CpuBackend if engine.device == "cpu" else CudaBackend
    program = program_of(model.config, DType.F32 if engine.device == "cpu" else dtype)
    try:
        loaded = kind.load(program, checkpoint, engine)
    except MissingKernelError as error:
        if "is not installed" in str(error) or "need its headers" in str(error):
            pytest.skip(str(error))
        raise
    core = core_of(loaded, model.config, engine)
    try:
        return run(core, requests)
    finally:
        core.close()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("strategy", "name", "dtype"), CASES)
def test_scores_agree_with_the_cpu(strategy: str, name: str, dtype: DType) -> None:
    engine = replace(CONFIG, device="cuda", gemm_strategy=strategy, max_model_len=192)
    gpu = scores(answers(name, dtype, engine, asked()))
    cpu = scores(answers(name, dtype, replace(engine, device="cpu", cpu_kernels="numpy"), asked()))
    assert len(cpu) == len(gpu) and np.isfinite(gpu).all() and cpu.std() > 0.3
    apart, limit = np.abs(cpu - gpu) / (1 + np.abs(cpu) / 8), TOLERANCE[dtype]
    assert np.median(apart) < limit / 4, np.sort(apart)[:: len(apart) // 20]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("strategy", ["native", "cutlass"])
def test_a_request_has_the_same_bits_alone_and_among_others(strategy: str) -> None:
    rng = np.random.default_rng(7)
    sampling = Sampling(max_tokens=8, logprobs=5)
    asked_for = [(rng.integers(0, VOCAB, n).tolist(), sampling) for n in (3, 40, 17, 90, 5, 5, 60, 33, 2)]
    engine = replace(CONFIG, device="cuda", gemm_strategy=strategy, max_model_len=192)
    together = answers("qwen2", DType.BF16, engine, asked_for)
    for request, among in zip(asked_for[:4], together, strict=False):
        (alone,) = answers("qwen2", DType.BF16, engine, [request])
        assert [(o.token_ids, o.logprobs) for o in among] == [(o.token_ids, o.logprobs) for o in alone]


@pytest.mark.gpu
@needs_gpu
def test_auto_measures_once_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rvllm.backends.cuda.device.driver import Device
    from rvllm.backends.cuda.tuning import measure, start
    from rvllm.backends.cuda.tuning.cache import FILE

    class Counted(measure.Arena):
        """What tuning takes of the device: other processes may take and give back at the same time."""

        opened, held = 0, 0

        def __init__(self, nbytes: int) -> None:
            super().__init__(nbytes)
            Counted.opened += 1
            Counted.held += nbytes

        def close(self) -> None:
            super().close()
            Counted.held -= self.nbytes

    monkeypatch.setattr(start, "tuning_dir", lambda: tmp_path)
    monkeypatch.setattr(measure, "Arena", Counted)
    program, device = program_of(MODELS["qwen2"].config, DType.BF16), Device()
    first, told = start.tuned(program, device.facts(), lambda done, text: None)
    assert first.tuned and any("kernels timed" in line for line in told)
    assert Counted.opened == 1 and Counted.held == 0, "all is given back"
    monkeypatch.setattr(start, "GemmTimer", None)  # a second start times nothing
    assert start.tuned(program, device.facts(), lambda done, text: None)[0] == first
    (tmp_path / FILE).write_text((tmp_path / FILE).read_text()[:500])
    monkeypatch.undo()
    monkeypatch.setattr(start, "tuning_dir", lambda: tmp_path)
    assert start.tuned(program, device.facts(), lambda done, text: None)[0].tuned.keys() == first.tuned.keys()
    device.close()
