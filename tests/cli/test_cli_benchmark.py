"""`rvllm benchmark` on a small random model, and its results."""

import json
import math
from pathlib import Path

import pytest

from rvllm.backends.cuda.profile import Profile, Row
from rvllm.bench.profile import profile_table, read_profiles, write_profiles
from rvllm.bench.prompts import fixed, random_tokens
from rvllm.bench.report import Run, read_json, summarise, table, write_json
from rvllm.bench.stats import median, percentile, rate
from rvllm.cli.main import main
from rvllm.errors import UsageError
from rvllm.program.cost import Cost
from support.models.tiny_llm import CONFIG

DUMMY = ["benchmark", "--load-format", "dummy", "--device", "cpu", "--kv-cache-memory-gb", "0.01"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": 256}))
    return folder


def test_a_run_is_measured_written_and_compared(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.json"
    lengths = ["--input-len", "20", "--output-len", "10"]
    flags = [*DUMMY, "--model", str(model), "--n", "1,3", "--runs", "2", *lengths]
    assert main([*flags, "--json", str(file)]) == 0
    assert "TTFT ms" in capsys.readouterr().out
    results = read_json(file)
    assert [(r.n, r.prompt_tokens, r.output_tokens) for r in results] == [(1, 20, 10), (3, 60, 30)]
    for result in results:
        assert result.tokens_per_s == pytest.approx(result.output_tokens / result.seconds, rel=0.5)
        assert 0 < result.ttft_ms < 1e3 * result.seconds
        assert 0 < result.itl_ms <= result.itl_p99_ms
    about = json.loads(file.read_text())
    assert about["engine"]["enable_prefix_caching"] is False
    assert main([*flags, "--compare", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "ratio" in lines[-3]
    assert lines[-1].endswith("x")
    assert "measured otherwise" not in "".join(lines)
    assert main([*flags, "--threads", "1", "--runs", "1", "--compare", str(file)]) == 0
    assert f"{file} was measured otherwise: runs 2, now 1; --threads None, now 1" in capsys.readouterr().out


def test_what_cannot_run_at_once_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*DUMMY, "--model", str(model)]
    for more, says in (
        (["--n", "3", "--max-num-seqs", "2"], "--max-num-seqs 2"),
        (["--input-len", "250", "--output-len", "10"], "--max-model-len"),
        (["--profile"], "--profile times GPU kernels"),
        (["--json", "/no/such/folder/x.json"], "--json: cannot write /no/such/folder/x.json"),
        (["--n", "9", "--kv-cache-memory-gb", "0.00007", "--input-len", "40"], "KV blocks"),
    ):
        assert main([*flags, *more]) == 2
        assert says in capsys.readouterr().err


def test_percentiles_and_rates() -> None:
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([1.0, 2.0]) == 1.5
    assert percentile([0.0, 10.0], 99) == pytest.approx(9.9)
    assert math.isnan(median([]))
    assert rate(10, 0) == 0.0


def test_medians_are_of_runs_and_gaps_may_be_missing(tmp_path: Path) -> None:
    runs = [Run(10, 2, seconds, [seconds / 2, seconds], []) for seconds in (1.0, 4.0, 2.0)]
    result = summarise(2, runs)
    assert (result.seconds, result.tokens_per_s, result.prefill_tokens_per_s) == (2.0, 1.0, 5.0)
    assert math.isnan(result.itl_ms)
    write_json(tmp_path / "x.json", {}, [result])
    assert "null" in (tmp_path / "x.json").read_text()
    (again,) = read_json(tmp_path / "x.json")
    assert again.seconds == 2.0
    assert table([again], [result]).splitlines()[1].endswith("1.00x")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"results": [{"n": "x"}]}', '{"results": 3}'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UsageError, match="holds no results"):
        read_json(tmp_path / "x.json")


def test_prompts_differ_so_that_none_is_another_ones_prefix() -> None:
    assert len(set(fixed(50))) == 50
    tokens = random_tokens(3, 7, 100, seed=1)
    assert tokens == random_tokens(3, 7, 100, seed=1) != random_tokens(3, 7, 100, seed=2)
    assert all(0 <= token < 100 for prompt in tokens for token in prompt)


def a_profile(seqs: int, microseconds: float) -> Profile:
    rows = [
        Row("qkv", "sm90_gemm", (1, 1, 1), 2, microseconds * 1e-6, Cost(weight_bytes=4_000_000, flops=10**6)),
        Row("attn", "sm80_split", (1, 1, 1), 2, 3e-6, Cost()),
        Row("attn", "sm80_join", (1, 1, 1), 2, 2e-6, Cost(kv_bytes=1000)),
    ]
    return Profile(seqs, 96, rows, step=1e-4, bandwidth=4e12)


def test_a_profile_is_written_and_compared_with_a_later_one(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    write_profiles(file, {"model": "m"}, [a_profile(1, 8.0), a_profile(8, 9.0)])
    assert json.loads(file.read_text())["model"] == "m"
    lines = profile_table(a_profile(8, 4.5), read_profiles(file)).splitlines()
    assert lines[2].split() == ["qkv", "sm90_gemm", "2", "4.5", "889", "0.2", "1.0", "7", "18", "2.00x"]
    assert lines[3].split()[-2:] == ["10", "1.00x"]  # both kernels of the op together, told once
    assert lines[4].split()[-2:] == ["-", "-"]
    assert lines[-1] == "before 0.100 ms: 1.00x as fast now"
    other = profile_table(a_profile(4, 4.5), read_profiles(file))
    assert other.endswith("the earlier file has no profile of this step")
    assert "ratio" not in profile_table(a_profile(8, 4.5))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"results": []}', '{"profiles": [{"seqs": 1}]}'])
def test_a_file_without_profiles_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UsageError, match="holds no profiles"):
        read_profiles(tmp_path / "x.json")
    with pytest.raises(UsageError, match="cannot write"):
        write_profiles(tmp_path / "no" / "x.json", {}, [])
