"""--gemm-strategy auto from the first start to an answer, on the emulator (compute capability 8.0)."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rvllm import LLM, SamplingParams
from rvllm.backends import load
from rvllm.backends.cuda.tuning import candidates, check, choose, measure
from rvllm.backends.cuda.tuning.cache import TuningCache
from rvllm.backends.cuda.tuning.candidates import Candidate
from rvllm.cli.main import main
from support.emulator import needs_emulator
from support.emulator.driver import emulated_driver
from support.models.arch_cases import MODELS

pytestmark = needs_emulator
TAKEN = {
    "cuMemAlloc": "cuMemFree", "cuModuleLoadData": "cuModuleUnload", "cuStreamCreate": "cuStreamDestroy",
    "cuEventCreate": "cuEventDestroy", "cuGraphInstantiate": "cuGraphExecDestroy",
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model's folder, few and small measurements, no other library."""
    monkeypatch.setenv("RVLLM_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("gpu_present", "cuda_packages_present"):
        monkeypatch.setattr(load, name, lambda: True)
    monkeypatch.setattr(candidates, "TOKENS", (1, 20))
    monkeypatch.setattr(candidates, "MAX_WAYS", 1)  # an emulator's times are not there to be compared
    monkeypatch.setattr(measure, "PASSED_OVER", 1 << 16)
    monkeypatch.setattr(choose, "ROUNDS", 1)
    monkeypatch.setattr("rvllm.backends.cuda.ops.gemm.cublas._candidates", lambda: iter(()))
    monkeypatch.setattr("rvllm.kernels.external.find_spec", lambda name: None)
    (tmp_path / "config.json").write_text(json.dumps({**MODELS["qwen3"].config, "num_hidden_layers": 1}))
    return tmp_path


def answer(folder: Path, strategy: str) -> list[int]:
    llm = LLM(
        str(folder), device="cuda", load_format="dummy", skip_tokenizer_init=True, gemm_strategy=strategy,
        max_model_len=64, max_num_seqs=2, max_num_batched_tokens=64, num_gpu_blocks=8,
    )  # fmt: skip
    (output,) = llm.generate(
        [{"prompt_token_ids": [5, 6, 7]}], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False
    )
    return list(output.outputs[0].token_ids)


def test_the_first_start_measures_and_the_second_knows(
    model: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: Counter[str] = Counter()

    def counting(name: str, own: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return own(*arguments)

        return call

    with emulated_driver() as driver:
        native = answer(model, "native")
        for name in (*TAKEN, *TAKEN.values()):
            setattr(driver, name, counting(name, getattr(driver, name)))
        first = answer(model, "auto")
        assert first == native
        said = caplog.text
        assert "without cutlass: kernels built from CUTLASS run on compute capability 9.0" in said
        assert "without cublas: cuBLAS is not installed: pip install" in said
        assert re.search(r"\d+ kernels timed, kept in .*gemm\.jsonl", said)
        assert "native alone" in said and "the same bits in any batch" in said
        kept = (model / "cache" / "autotune" / "gemm.jsonl").read_text()
        caplog.clear()
        measured = calls["cuGraphInstantiate"]
        assert answer(model, "auto") == native
        assert "kernels timed" not in caplog.text and "native alone" in caplog.text
        assert calls["cuGraphInstantiate"] - measured < measured
        for taken, given in TAKEN.items():
            assert calls[taken] == calls[given] > 0, (taken, calls)
        assert (model / "cache" / "autotune" / "gemm.jsonl").read_text() == kept
        assert main(["kernels", "tune", "--model", str(model)]) == 0
        out = capsys.readouterr().out
        assert re.search(r"\d+ kernels timed", out) and re.search(r"\d+x\d+ gated: native alone", out)
    assert main(["kernels", "show-tuning"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"native sm80(?:_split)?:(?:8|16|32)", out)) == 10


def test_wrong_times_with_right_digests_are_found_at_the_start(
    model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = [Candidate("native", "sm80:16"), Candidate("native", "sm80:64")]
    monkeypatch.setattr(choose, "candidates", lambda shape, tokens, chip, providers: ways)
    monkeypatch.setattr(candidates, "TOKENS", (20,))
    monkeypatch.setattr(check, "APART", 8.0)  # this machine emulates, and does other things beside it
    monkeypatch.setattr(check, "CLOCKS", 15.0)
    monkeypatch.setattr("rvllm.backends.cuda.tuning.cache.SLOWEST", 1e12)
    with emulated_driver():
        first = answer(model, "auto")
        cache = TuningCache.open(model / "cache" / "autotune")
        assert len(cache.entries) == 10
        wrong = {key: us * 1000.0 for key, us in list(cache.entries.items())[:4]}
        cache.entries.update(wrong)
        cache.save()
        assert answer(model, "auto") == first
    assert "4 times in" in caplog.text and "are not what this GPU shows now: measured again" in caplog.text
    assert "4 kernels timed" in caplog.text
    again = TuningCache.open(cache.path.parent).entries
    assert all(again[key] < us / 10 for key, us in wrong.items())
    assert {key: us for key, us in again.items() if key not in wrong}.items() <= cache.entries.items()
