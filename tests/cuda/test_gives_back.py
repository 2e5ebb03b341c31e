"""`del llm` gives everything back that the driver handed out; on the emulator, whose calls are counted."""

from __future__ import annotations

import gc
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rvllm import LLM, SamplingParams
from rvllm.backends import load
from rvllm.errors import UsageError
from support.emulator import needs_emulator
from support.emulator.driver import EmulatedDriver, emulated_driver
from support.models.arch_cases import MODELS

pytestmark = needs_emulator
PAIRS = {
    "cuMemAlloc": "cuMemFree", "cuMemHostAlloc": "cuMemFreeHost", "cuModuleLoadData": "cuModuleUnload",
    "cuStreamCreate": "cuStreamDestroy", "cuEventCreate": "cuEventDestroy",
    "cuGraphInstantiate": "cuGraphExecDestroy", "cuDevicePrimaryCtxRetain": "cuDevicePrimaryCtxRelease",
}  # fmt: skip


def counted(driver: EmulatedDriver) -> Counter[str]:
    """Counts what the driver hands out and takes back, from now on."""
    calls: Counter[str] = Counter()

    def count(name: str, own: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return own(*arguments)

        return call

    for name in (*PAIRS, *PAIRS.values()):
        setattr(driver, name, count(name, getattr(driver, name)))
    return calls


def settings(path: Path) -> dict[str, Any]:
    return {
        "model": str(path), "device": "cuda", "load_format": "dummy", "skip_tokenizer_init": True,
        "max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 64, "num_gpu_blocks": 8,
    }  # fmt: skip


@pytest.mark.parametrize("runner", ["generate", "pooling"])
@pytest.mark.parametrize("fault", ["length", "weights"])
def test_a_start_that_fails_keeps_nothing(
    runner: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "gpu_present", lambda: True)
    monkeypatch.setattr(load, "cuda_packages_present", lambda: True)
    config = {**MODELS["qwen3"].config, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    wrong = {"max_model_len": 1 << 30}
    if fault == "weights":

        def broken(*arguments: Any) -> None:
            raise UsageError("broken")

        wrong = {}
        monkeypatch.setattr("rvllm.backends.cuda.loaded_model.fill_dummy", broken)
    with emulated_driver() as driver:
        calls = counted(driver)
        with pytest.raises(UsageError, match=r"broken|max-model-len"):
            LLM(**(settings(tmp_path) | {"runner": runner} | wrong))
        assert calls["cuDevicePrimaryCtxRetain"] == calls["cuDevicePrimaryCtxRelease"] > 0
        assert calls["cuMemAlloc"] == calls["cuMemFree"] == (fault == "weights")


@pytest.mark.parametrize("runner", ["generate", "pooling"])
def test_one_model_after_another(runner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "gpu_present", lambda: True)
    monkeypatch.setattr(load, "cuda_packages_present", lambda: True)
    config = {**MODELS["qwen3"].config, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with emulated_driver() as driver:
        calls = counted(driver)
        for _ in range(2):
            before = calls.copy()
            llm = LLM(**settings(tmp_path), runner=runner)
            prompt = {"prompt_token_ids": [5, 6, 7]}
            if runner == "generate":
                llm.generate(prompt, SamplingParams(max_tokens=3, temperature=0), use_tqdm=False)
            else:
                llm.embed(prompt, use_tqdm=False)
            taken = {name: calls[name] - before[name] for name in PAIRS}
            assert min(taken.values()) > 0, taken
            del llm
            gc.collect()
            given = {name: calls[back] - before[back] for name, back in PAIRS.items()}
            assert given == taken
