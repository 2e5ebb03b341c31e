"""`rvllm plan` and `rvllm info` on a directory that holds nothing but a config."""

import json
from pathlib import Path

import pytest

from rvllm.backends.cpu.compiled.library import missing
from rvllm.cli.common.matrices import kept_as, matrices
from rvllm.cli.common.ops import folded
from rvllm.cli.main import main
from support.models import tiny

QUICK = ["--bandwidth", "100", "--tflops", "1"]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RVLLM_DEVICE", "cpu")
    (tmp_path / "config.json").write_text(json.dumps(tiny.CASES["llama"] | {"eos_token_id": 2}))
    return str(tmp_path)


def test_plan_prints_every_op_and_totals(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--batch", "2", "--context", "64", "--buffers", "--all", *QUICK]
    assert main(["plan", "--model", model, *flags]) == 0
    out = capsys.readouterr().out
    for op in tiny.program_of(tiny.CASES["llama"]).ops:
        assert f"\n{op.name} " in out
    assert "[2, 48] → [2, 80]" in out
    assert "workspace" in out and "floor" in out
    assert "layers.0.qkv.out" in out


def test_plan_folds_equal_layers_and_fits_80_columns(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", model, *QUICK]) == 0
    out = capsys.readouterr().out
    lines, layers = out.splitlines(), tiny.CASES["llama"]["num_hidden_layers"]
    assert max(map(len, lines)) <= 80
    assert out.index("\ntotal\n") < out.index("\nmemory\n") < out.index(f"\nlayers.0-{layers - 1}.qkv ")
    per_layer = [op for op in tiny.program_of(tiny.CASES["llama"]).ops if op.name.startswith("layers.0.")]
    assert sum(line.startswith("layers.") for line in lines) == len(per_layer)
    assert "limit" in out and "tokens/s" in out


def test_layers_that_differ_are_not_folded() -> None:
    rows = [{"op": f"layers.{i}.qkv", "bytes": str(i // 2)} for i in range(5)] + [
        {"op": "head", "bytes": "2"}
    ]
    assert [(first, last) for first, last, _ in folded(rows)] == [(0, 1), (2, 3), (4, 4), (-1, -1)]


def test_info_tells_what_differs_first(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", model, "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("memory plan (cpu)\n") and "3  (--seed)" in out
    assert "max_num_seqs  " not in out.partition("\nsettings\n")[2] and "--all shows them" in out
    assert main(["info", "--model", model, "--seed", "3", "--all"]) == 0
    assert "max_num_batched_tokens  derived  (default)" in capsys.readouterr().out


def test_plan_json_adds_up(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", model, "--prefill", "32", "--json", *QUICK]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["step"] == {"batch": 1, "query_len": 32, "context": 32}
    for field in ("weight_bytes", "activation_bytes", "kv_bytes", "flops"):
        assert plan["total"][field] == sum(op[field] for op in plan["ops"])
    assert plan["total"]["floor_seconds"] == pytest.approx(sum(op["floor_seconds"] for op in plan["ops"]))
    assert plan["workspace_bytes"] == max(b["offset"] + b["nbytes"] for b in plan["buffers"].values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch", "0"], "--batch"),
        (["--context", "129"], "--context: must be in [1, 128], got 129"),
        (["--prefill", "20", "--context", "10"], "--context 10 cannot be less than --prefill 20"),
        (["--bandwidth", "0"], "--bandwidth"),
        (["--batch", "many"], "--batch"),
    ],
)
def test_plan_refuses_in_one_line(
    model: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", model, *flags]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_plan_measures_the_cpu_when_no_rates_are_given(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", model, "--json", "--cpu-kernels", "numpy"]) == 0
    rates = json.loads(capsys.readouterr().out)["rates"]
    assert 1e8 < rates["bandwidth"] < 1e13
    assert 1e8 < rates["flops"] < 1e15


def test_what_compiled_kernels_keep_is_told(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    program = tiny.program_of(tiny.CASES["llama"])
    weight = next(w for w in program.weights if w.name == "layers.0.qkv")
    assert kept_as(weight, program, None, {weight.name: weight.nbytes(4)}) == "float32"
    assert kept_as(weight, program, None, {weight.name: 5}) == "random"  # as it is stored
    assert any(said.endswith("kept random, 5 B") for _, said in matrices(program, None, {weight.name: 5}))
    if missing():
        return
    assert main(["plan", "--model", model, "--json", "--cpu-kernels", "compiled"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["rates"]["flops"] is None
    moved = sum(plan["total"][f"{what}_bytes"] for what in ("weight", "activation", "kv"))
    assert plan["total"]["floor_seconds"] == pytest.approx(moved / plan["rates"]["bandwidth"])


def test_info_shows_settings_with_their_origin(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RVLLM_MAX_NUM_SEQS", "7")
    monkeypatch.setenv("RVLLM_API_KEY", "do-not-print")
    assert main(["info", "--model", model, "--seed", "3", "--num-blocks", "4", "--json"]) == 0
    out = capsys.readouterr().out
    assert "do-not-print" not in out
    info = json.loads(out)
    assert info["engine settings"]["max_num_seqs"] == "7  (RVLLM_MAX_NUM_SEQS)"
    assert info["engine settings"]["seed"] == "3  (--seed)"
    assert info["engine settings"]["dtype"] == "auto  (default)"
    assert info["server settings"]["api_key"] == "(set)  (RVLLM_API_KEY)"
    assert info["model"]["architecture"] == "LlamaForCausalLM"
    assert info["model"]["end of sequence"] == "2"
    assert info["memory plan (cpu)"]["max_model_len"] == "64"


def test_info_without_a_model_names_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "cores" in out and "cuda extra" in out
    assert "memory plan" not in out


def test_info_of_what_does_not_fit_shows_the_rest_and_then_says_so(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", "--model", model, "--num-blocks", "999999999", "--json"]) == 2
    found = capsys.readouterr()
    shown = json.loads(found.out)
    assert shown["model"]["architecture"] == "LlamaForCausalLM" and "memory plan (cpu)" not in shown
    assert found.err.startswith("rvllm: --num-blocks 999999999: ") and found.err.count("\n") == 1
