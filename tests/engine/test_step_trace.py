"""--trace-steps: what is written of each step, and what it adds up to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec.structs import replace as replaced

from rvllm.backends.base import Limits
from rvllm.bench.steps import periods, tables
from rvllm.cli.main import main
from rvllm.config import EngineConfig
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import Generate, Sampling
from rvllm.errors import UsageError
from rvllm.telemetry.step_trace import StepTrace, TracedStep, read_steps
from support.doubles.engine import PagedDouble, facts

LIMITS = Limits(
    max_num_seqs=8, max_num_batched_tokens=100, max_model_len=500, block_size=16, num_blocks=300,
    pipeline_depth=2,
)  # fmt: skip


def traced(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[TracedStep]:
    """Steps of two requests: 130 and 20 prompt tokens, 4 and 3 drawn."""
    backend = PagedDouble(LIMITS)
    monkeypatch.setattr("rvllm.engine.loading.load", lambda *args: (backend, facts(500)))
    core = EngineCore.from_config(replace(EngineConfig(), trace_steps=str(path)))
    core.add_request(Generate("long", [5] * 130, Sampling(max_tokens=4)))
    core.add_request(Generate("short", [6] * 20, Sampling(max_tokens=3)))
    while core.has_work():
        core.step()
    core.close()
    return read_steps(path)


def test_every_step_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = traced(tmp_path / "steps.jsonl", monkeypatch)
    assert [s.step for s in steps] == list(range(len(steps)))
    assert sum(s.prompt_tokens for s in steps) == 150 and sum(s.draws for s in steps) == 7
    assert sum(s.decodes for s in steps) == 5, "the first token of each is drawn from its prompt"
    assert (steps[0].kind, steps[0].tokens, steps[0].alone) == ("prompts", 100, True)
    assert steps[-1].kind == "decodes" and not steps[1].alone
    last = json.loads((tmp_path / "steps.jsonl").read_bytes().splitlines()[-1])
    assert last["keys"] == 133, "the longer one's last token attends to itself and all before it"
    assert all(s.schedule > 0 and s.launch > 0 for s in steps)


def test_a_file_that_cannot_be_written_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--trace-steps: cannot write"):
        EngineCore.from_config(replace(EngineConfig(), model="none", trace_steps=str(tmp_path)))


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "steps.jsonl"
    trace = StepTrace(path)
    both = TracedStep(step=0, launch=0.001, collect=0.01, decodes=2, draws=2, padded=8)
    for step in (
        replaced(both, began=1.0, decodes=0, prompts=2, prompt_tokens=90, device=0.03, alone=True),
        replaced(both, began=1.01, device=0.01, idle=0.002, capture=0.001),
        replaced(both, began=1.03, prompts=1, prompt_tokens=6, draws=3, device=0.009),
        replaced(both, began=9.0, device=0.01, alone=True, outside=7.9),
    ):
        trace.collected(step)
    trace.close()
    first, second = periods(read_steps(path))
    assert len(first) == 3 and len(second) == 1
    head = tables(first)[0]
    assert head.startswith("3 steps in 0.041 s: 7 tokens drawn") and head.endswith("96 prompt tokens")
    assert main(["trace", str(path)]) == 0
    out = capsys.readouterr().out
    assert "period 2 of 2" in out and "0.002 s idle" in out and "0.001 for graphs" in out
    assert next(line.split()[:2] for line in out.splitlines() if "mixed" in line) == ["mixed", "1"]


def test_another_file_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello\nworld\n")
    assert main(["trace", str(path)]) != 0
    error = capsys.readouterr().err
    assert "notes.txt holds no steps" in error and error.count("\n") == 1
    path.write_text("")
    assert main(["trace", str(path)]) == 0
