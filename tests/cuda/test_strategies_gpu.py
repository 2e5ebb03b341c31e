"""Every --gemm-strategy on the GPU: tiny models against the CPU backend, and bits that are promised.

scripts/gpu/strategies_bench.py checks CUTLASS's kernels one by one, at the sizes of a 7B.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rvllm.backends.cpu.backend import CpuBackend
from rvllm.backends.cuda.backend import CudaBackend
from rvllm.backends.cuda.device.driver import Device
from rvllm.backends.cuda.ops.gemm.strategy import GemmStrategy
from rvllm.backends.cuda.tuning import candidates, check, measure, start
from rvllm.backends.cuda.tuning.cache import FILE, TuningCache
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


def spoilt(path: Path, text: str, whole: int) -> dict[str, tuple[Callable[[], object], int]]:
    """Ways to spoil a cache of times, each with how many of `whole` entries are wanted again."""
    lines = text.splitlines(keepends=True)
    groups = Counter(key.rsplit("|", 2)[0] for key in TuningCache.open(path.parent).entries)
    in_doubt = sum(count for count in groups.values() if count > 1)  # one kernel leaves no choice

    def others(name: str) -> None:
        """The times as those of another GPU, all with right digests."""
        cache = TuningCache.open(path.parent)
        cache.entries = {f"{name}|{key.partition('|')[2]}": us for key, us in cache.entries.items()}
        cache.save()

    def impossible(count: int) -> None:
        """So many times below what the weights' bytes take, with right digests."""
        cache = TuningCache.open(path.parent)
        cache.entries.update(dict.fromkeys(list(cache.entries)[-count:], 1e-4))
        cache.save()

    def plausible() -> None:
        """What any GPU could take, all of our kernels' too long, with right digests."""
        cache = TuningCache.open(path.parent)
        cache.entries = {key: us * 1000 if "|native " in key else us for key, us in cache.entries.items()}
        cache.save()

    return {
        "deleted": (path.unlink, whole),
        "cut": (lambda: path.write_text("".join(lines[:60]) + lines[60][:40]), whole - 60),
        "edited": (lambda: path.write_text(re.sub(r'"us": [0-9.e+-]+', '"us": 9.0', text)), whole),
        "impossible": (lambda: impossible(50), 50),
        "plausible": (plausible, in_doubt),
        "another GPU's": (lambda: others("NVIDIA B300"), whole),
    }


@pytest.mark.gpu
@pytest.mark.alone
@needs_gpu
def test_auto_measures_again_what_is_not_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setattr(candidates, "TOKENS", (1, 32, 256, 1024))
    monkeypatch.setattr(check, "APART", 10.0)  # kernels of a tiny model take 3 us, beside other tests
    monkeypatch.setattr(check, "CLOCKS", 20.0)
    program, device = program_of(MODELS["qwen2"].config, DType.BF16), Device()

    def timed() -> tuple[GemmStrategy, int]:
        strategy, told = start.tuned(program, device.facts(), lambda done, text: None)
        return strategy, sum(int(line.split()[0]) for line in told if "kernels timed" in line)

    first, whole = timed()
    assert first.tuned and whole > 60, "enough to cut, with CUTLASS's headers or without"
    assert Counted.opened == 1 and Counted.held == 0, "all is given back"
    assert timed() == (first, 0), "a second start times nothing"
    path = tmp_path / FILE
    text = path.read_text()
    for way, (spoil, again) in spoilt(path, text, whole).items():
        path.write_text(text)
        spoil()
        found, count = timed()
        assert (count, found.tuned.keys()) == (again, first.tuned.keys()), way
        assert timed() == (found, 0), way
    kept = TuningCache.open(tmp_path)
    assert len(kept.entries) == 2 * whole and not kept.damaged, "another GPU's times stay"
    device.close()
