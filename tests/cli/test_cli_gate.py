"""`rvllm benchmark --gate`: slower is stopped, what is not goes on, and what cannot be told says so."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from rvllm.bench.files import json_text, write_whole
from rvllm.bench.gate import ROLL_BACK, ROLL_OUT, UNCLEAR, Figure, Limits, judge, judge_all, page
from rvllm.cli.main import main
from rvllm.errors import UsageError
from support.models.tiny_llm import CONFIG


@pytest.mark.parametrize(
    ("before", "after", "higher", "verdict"),
    [
        ([100, 101, 99], [99, 98, 100], True, "pass"),  # within the floor
        ([100, 101, 99], [90, 91, 89], True, "worse"),
        ([100, 101, 99], [120, 121, 119], True, "pass"),  # better is no loss
        ([10, 10.1, 9.9], [11, 11.1, 10.9], False, "worse"),  # a latency
        ([10, 10.1, 9.9], [8, 8.1, 7.9], False, "pass"),
        ([100, 115, 88], [90, 100, 80], True, "pass"),  # less than the noise
        ([100, 150, 80], [95, 140, 75], True, "unclear"),
        ([100, 150, 80], [30, 35, 28], True, "worse"),  # so much that no noise explains it
    ],
)
def test_figures_are_judged_by_their_noise(
    before: list[float], after: list[float], higher: bool, verdict: str
) -> None:
    assert judge(Figure("x", before, after, higher), Limits()).verdict == verdict


def test_one_loss_rolls_back_and_one_doubt_measures_again() -> None:
    good = Figure("good", [1, 1, 1], [1, 1, 1], True)
    noisy = Figure("noisy", [1, 2, 1.5], [1, 2, 1.5], True)
    bad = Figure("bad", [2, 2, 2], [1, 1, 1], True)
    absent = Figure("absent", [float("nan")] * 3, [float("nan")] * 3, True)
    for figures, code in (
        ([good, absent], ROLL_OUT), ([good, noisy], UNCLEAR), ([noisy, bad, good], ROLL_BACK)
    ):  # fmt: skip
        checks, found = judge_all(figures, Limits())
        assert found == code
        assert page(checks, found).endswith(f"(exit code {code})")
    for nothing in ([], [absent]):
        with pytest.raises(UsageError, match="no figure"):
            judge_all(nothing, Limits())
    for before, after, whose in (
        ([1, 1, 1], [1, 1, math.nan], "candidate"),
        ([math.inf] * 3, [1] * 3, "baseline"),
    ):
        with pytest.raises(UsageError, match=f"x: the {whose} was not measured"):
            judge_all([good, Figure("x", before, after, True)], Limits())
    with pytest.raises(UsageError, match="needs 3 runs"):
        judge(Figure("x", [1, 1], [1, 1, 1], True), Limits())


@pytest.mark.parametrize(("slower", "least", "most"), [(1.0, 0.0, 0.02), (1.3, 0.98, 1.0)])
def test_few_false_alarms_and_few_misses(slower: float, least: float, most: float) -> None:
    """Five runs with 4 % of noise, 2,000 times: a loss of 30 % is seen, none is rarely invented."""
    source = random.Random(1)

    def runs(scale: float) -> list[float]:
        return [scale * source.gauss(1, 0.04) for _ in range(5)]

    stopped = [judge(Figure("t", runs(1), runs(slower), False), Limits()).verdict for _ in range(2000)]
    assert least <= stopped.count("worse") / len(stopped) <= most


def test_a_benchmark_is_gated_by_an_earlier_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    base = tmp_path / "base.json"
    flags = ["benchmark", "--load-format", "dummy", "--device", "cpu", "--num-blocks", "16",
             "--model", str(tmp_path), "--n", "1", "--input-len", "8", "--output-len", "8",
             "--threads", "1"]  # fmt: skip
    assert main([*flags, "--json", str(base)]) == 0
    written = json.loads(base.read_text())
    assert len(written["results"][0]["samples"]["tokens_per_s"]) == 3

    def with_rates(scale: float) -> list[str]:
        rows = json.loads(json.dumps(written))
        for name, values in rows["results"][0]["samples"].items():
            more = scale if name == "tokens_per_s" else 1 / scale
            rows["results"][0]["samples"][name] = [value * more for value in values]
        (tmp_path / "b.json").write_text(json.dumps(rows))
        return [*flags, "--gate", str(tmp_path / "b.json"), "--gate-noise", "99"]

    # The baseline was a thousand times as fast; its file is overwritten, and judged as it was.
    assert main([*with_rates(1000), "--json", str(tmp_path / "b.json")]) == ROLL_BACK
    assert "N=1 tokens_per_s" in capsys.readouterr().out
    assert (
        json.loads((tmp_path / "b.json").read_text())["results"][0]["samples"]
        != written["results"][0]["samples"]
    )
    assert main(with_rates(0.001)) == ROLL_OUT
    capsys.readouterr()
    for more, said in (
        (["--output-len", "9"], "no run of N=1, 8 tokens in, 9 out"),
        (["--runs", "2"], "runs 3, now 2"),
        (["--max-num-seqs", "7"], "measured otherwise"),
        (["--gate-tolerance", "2"], "--gate-tolerance"),
        (["--compare", str(base)], "--compare"),
    ):
        assert main([*flags, "--gate", str(base), *more]) == 2
        assert said in capsys.readouterr().err
    written["results"][0]["samples"]["tokens_per_s"] = "fast"
    base.write_text(json.dumps(written))
    assert main([*flags, "--gate", str(base)]) == 2
    assert "measure it again" in capsys.readouterr().err
    base.write_text("[" * 100_000)
    assert main([*flags, "--gate", str(base)]) == 2
    assert f"--gate: {base} holds no results" in capsys.readouterr().err


def test_results_are_files_that_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "NaN.json"
    path.write_text("before")
    write_whole(path, json_text({"model": "NaN-7B", "x": [math.nan, 1.5, (math.inf,)]}), "--json")
    assert json.loads(path.read_text()) == {"model": "NaN-7B", "x": [None, 1.5, [None]]}
    with pytest.raises(UsageError, match=r"--json: cannot write .*: No such file"):
        write_whole(tmp_path / "no" / "x", "text", "--json")
    write_whole(Path("/dev/null"), "text", "--json")
    assert [each.name for each in tmp_path.iterdir()] == ["NaN.json"] and Path("/dev/null").is_char_device()
