"""--gemm-strategy auto: what is chosen from times, and that no kept time is believed which is not right.

The times are made up by a formula; a GPU's own are in scripts/gpu/strategies_bench.py.
"""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.device.launches import Counts, MatrixMap
from rvllm.backends.cuda.layout.fusion import fuse
from rvllm.backends.cuda.layout.joining import joined
from rvllm.backends.cuda.ops.gemm.strategy import Choice, GemmStrategy, ProductShape
from rvllm.backends.cuda.step_planner import StepPlanner
from rvllm.backends.cuda.tuning import start
from rvllm.backends.cuda.tuning.cache import FILE, Conditions, TuningCache
from rvllm.backends.cuda.tuning.candidates import (
    Candidate,
    Places,
    candidates,
    launch_of,
    shapes_of,
    tokens_of,
)
from rvllm.backends.cuda.tuning.check import APART, CLOCKS, agree, drawn, forget_wrong
from rvllm.backends.cuda.tuning.choose import ROUNDS, Lookup, choose, known_times, told, tune
from rvllm.cli.main import main
from rvllm.cli.tuning import summary
from rvllm.config import EngineConfig
from rvllm.errors import UsageError
from rvllm.kernels.manifest import MANIFEST
from support.kernels.planned import GB80, H100, planner, program

CHIP = DeviceInfo(90, 132, 232448)
QKV, OUT, GATE_UP, DOWN, HEAD = shapes_of(fuse(joined(program(num_hidden_layers=2))))
LOOKUP = Lookup(
    Conditions("A GPU", 13000, "bf16"),
    CHIP,
    ("native", "cutlass", "cublas"),
    lambda shape, tokens, candidate: "c0de",
    4.8e12,
)


NOWHERE = Places(1 << 40, 1, 2, 3, 4)


class Timer:
    """Made-up times: above the floor, another for every kernel; counts what is measured, what is checked."""

    def __init__(self, fastest: str = "cutlass", clock: float = 1.0) -> None:
        self.fastest, self.clock, self.asked, self.checked = fastest, clock, 0, 0

    def __call__(
        self, shape: ProductShape, tokens: int, wanted: Sequence[Candidate], rounds: int
    ) -> Mapping[Candidate, float]:
        if rounds == ROUNDS:
            self.asked += len(wanted)
        else:
            self.checked += len(wanted)
        return {c: self.time(shape, tokens, c) for c in wanted}

    def time(self, shape: ProductShape, tokens: int, candidate: Candidate) -> float:
        slower = 1.0 if candidate.provider == self.fastest else 1.2
        return self.clock * LOOKUP.floor(shape) * slower * (2 + tokens / 100 + len(candidate.variant) / 100)


def tuned(
    folder: Path, timer: Timer, lookup: Lookup = LOOKUP, draw: int = 0
) -> Mapping[ProductShape, Choice]:
    cache = TuningCache.open(folder)
    forget_wrong([QKV, GATE_UP], lookup, cache, timer, draw)
    choices, _ = tune([QKV, GATE_UP], lookup, cache, timer, lambda done, text: None)
    cache.save()
    return choices


def test_shapes_are_those_of_a_7b() -> None:
    assert [str(s) for s in (QKV, OUT, GATE_UP, DOWN, HEAD)] == [
        "4608x3584 plain", "3584x3584 plain", "37888x3584 gated", "3584x18944 plain", "152064x3584 logits"
    ]  # fmt: skip
    assert tokens_of(HEAD)[-1] == 512 < tokens_of(QKV)[-1]


def test_every_strategy_has_candidates_and_each_can_be_launched() -> None:
    for shape in (QKV, GATE_UP, HEAD):
        for tokens in tokens_of(shape):
            found = candidates(shape, tokens, CHIP, LOOKUP.providers)
            whose = {c.provider for c in found}
            assert whose == ({"native", "cutlass"} if shape is GATE_UP else {"native", "cutlass", "cublas"})
            for candidate in found:
                planned = launch_of(shape, tokens, candidate, "bf16", CHIP, NOWHERE)
                assert candidate.provider == "cublas" or MANIFEST[planned.kernel].smem >= planned.smem
    ampere = replace(CHIP, capability=80)
    found = candidates(QKV, 8, ampere, ("native", "cutlass"))
    assert {c.provider for c in found} == {"native"} and {"sm80:8", "sm80_split:8"} <= {
        c.variant for c in found
    }
    for candidate in found:
        planned = launch_of(QKV, 8, candidate, "bf16", ampere, NOWHERE)
        assert (NOWHERE.partials in planned.parameters) == ("split" in candidate.variant)


@pytest.mark.parametrize("strategy", ["native", "cutlass", "cublas"])
def test_what_is_timed_is_launched_as_steps_launch_it(strategy: str) -> None:
    planned = planner(program(num_hidden_layers=1), H100, EngineConfig(gemm_strategy=strategy)).decode(16)
    (launched,) = (p for p in planned if p.op.endswith("qkv"))
    known = [c for c in candidates(QKV, 16, CHIP, LOOKUP.providers) if c.provider == strategy]
    found = [launch_of(QKV, 16, candidate, "bf16", CHIP, NOWHERE) for candidate in known]
    (timed,) = (p for p in found if p.kernel == launched.kernel)
    assert timed.grid(Counts(16, 16, 16)) == launched.grid(Counts(16, 16, 16))
    assert (timed.block, timed.smem, timed.cluster) == (launched.block, launched.smem, launched.cluster)
    if strategy == "cublas":
        (ours,), (theirs,) = timed.parameters, launched.parameters
        assert (ours.tokens, ours.rows, ours.width, ours.pitch, ours.bf16) == (
            theirs.tokens, theirs.rows, theirs.width, theirs.pitch, theirs.bf16
        )  # fmt: skip
        return
    assert len(timed.parameters) == len(launched.parameters)
    for ours, theirs in zip(timed.parameters, launched.parameters, strict=True):
        if isinstance(theirs, ctypes.c_int | ctypes.c_float):
            assert type(ours) is type(theirs) and ours.value == theirs.value
        elif isinstance(theirs, MatrixMap):
            assert (ours.width, ours.box_rows, ours.box_width) == (theirs.width, theirs.box_rows, 64)


def test_the_fastest_is_chosen_and_a_second_start_times_nothing(tmp_path: Path) -> None:
    first = Timer()
    choices = tuned(tmp_path, first)
    assert first.asked > 200
    assert {choice.provider for choice in choices.values()} == {"cutlass"}
    assert re.search(r"cutlass; native \+2\d %, cublas \+2\d %", choices[QKV].why), choices[QKV].why
    second = Timer(clock=1.3)  # a hot GPU: all is slower, and nothing is chosen differently
    assert tuned(tmp_path, second) == choices and second.asked == 0
    assert first.checked == 0 < second.checked < first.asked / 2
    third = Timer("native")
    assert {c.provider for c in tuned(tmp_path, third).values()} == {"native"}
    assert third.asked == first.asked, "another GPU of the same name"


@pytest.mark.parametrize(
    ("wrong", "wanted"),
    [
        (lambda c, t: t * 3, "all"),
        (lambda c, t: t / 1.9, "all"),
        (lambda c, t: 900.0, "all"),
        (lambda c, t: t * (1.3 if c.provider == "cutlass" else 1.0), "all"),  # cuBLASLt would win
        (lambda c, t: t / (1.5 if c.provider == "native" else 1.0), "all"),
        (lambda c, t: t, "none"),
    ],
    ids=["slow", "fast", "equal", "winner slow", "loser fast", "right"],
)
def test_plausible_wrong_times_with_right_digests_are_measured_again(
    tmp_path: Path, wrong: Callable[[Candidate, float], float], wanted: str
) -> None:
    choices, first = tuned(tmp_path, whole := Timer()), {}
    cache = TuningCache.open(tmp_path)
    for shape in (QKV, GATE_UP):
        for tokens, times in known_times(shape, LOOKUP, cache)[0].items():
            for candidate, microseconds in times.items():
                cache.put(LOOKUP.key(shape, tokens, candidate), wrong(candidate, microseconds))
                first[shape, tokens, candidate] = microseconds
    cache.save()
    timer = Timer()
    assert tuned(tmp_path, timer) == choices
    assert timer.asked == (whole.asked if wanted == "all" else 0)
    cache = TuningCache.open(tmp_path)
    for (shape, tokens, candidate), microseconds in first.items():
        assert cache.entries[str(LOOKUP.key(shape, tokens, candidate))] == microseconds


def test_a_kernel_with_too_long_a_time_is_found_within_as_many_starts_as_there_are_kernels(
    tmp_path: Path,
) -> None:
    """It is never among the best, so nothing but its turn finds it."""
    tuned(tmp_path, Timer())
    (times,) = (
        t for tokens, t in known_times(QKV, LOOKUP, TuningCache.open(tmp_path))[0].items() if tokens == 64
    )
    best = min(times, key=times.__getitem__)
    cache = TuningCache.open(tmp_path)
    cache.put(LOOKUP.key(QKV, 64, best), times[best] * 1.5)
    cache.save()
    repaired = 0
    for draw in range(len(times)):
        timer = Timer()
        tuned(tmp_path, timer, draw=draw)
        repaired += timer.asked
    assert repaired == len(times)
    assert TuningCache.open(tmp_path).entries[str(LOOKUP.key(QKV, 64, best))] == times[best]


def test_what_is_checked_are_the_best_of_each_provider_and_another_in_turn() -> None:
    natives = [Candidate("native", name) for name in "abcd"]
    library = Candidate("cublas", "heuristic")
    known = {natives[0]: 4.0, natives[1]: 3.0, library: 9.0, natives[2]: 5.0, natives[3]: 6.0}
    seen = [drawn(known, draw) for draw in range(3)]
    assert all(found[:2] == [natives[1], library] for found in seen)
    assert {found[2] for found in seen} == {natives[0], natives[2], natives[3]}
    assert drawn({library: 1.0}, 5) == [library]


def test_new_times_stand_beside_old_ones_only_if_the_clocks_are_alike() -> None:
    a, b = Candidate("native", "a"), Candidate("cublas", "heuristic")
    kept = {a: 10.0, b: 20.0}
    hot = {c: t * (1 + CLOCKS) / 2 for c, t in kept.items()}
    assert agree(kept, hot, whole=True) and not agree(kept, hot, whole=False)
    near = {c: t * (1 + APART) / 2 for c, t in kept.items()}
    assert agree(kept, near, whole=False)
    assert not agree(kept, {c: t * CLOCKS * 1.1 for c, t in kept.items()}, whole=True)
    assert not agree(kept, {a: 10.0, b: 20.0 * 1.2}, whole=True)


def test_one_provider_has_a_shape_for_all_numbers_of_tokens() -> None:
    """Else an output's bits would depend on the batch, even among kernels that keep them."""
    a, b = Candidate("native", "walk:8"), Candidate("cutlass", "r64:n8")
    chosen = choose({1: {a: 10.0, b: 12.0}, 512: {a: 100.0, b: 60.0}})
    assert chosen.provider == "cutlass" and set(chosen.variants) == {1, 512}
    assert choose({1: {a: 10.0, b: 9.95}}).provider == "native"  # noise is no reason
    c = Candidate("cublas", "heuristic")
    library = choose({1: {a: 10.0, c: 5.0}, 8: {a: 10.0, c: 5.0}})
    assert library.provider == "cublas" and not library.variants
    assert "bits depend on the batch" in told(GemmStrategy("auto", {QKV: library}))[-1]
    assert told(GemmStrategy("auto", {QKV: chosen}))[-1] == "the same bits in any batch"


def lines_of(folder: Path) -> list[str]:
    return (folder / FILE).read_text().splitlines()


@pytest.mark.parametrize("way", ["deleted", "cut", "garbage", "edited", "impossible", "not utf-8"])
def test_a_cache_that_is_not_right_is_measured_again_entry_by_entry(tmp_path: Path, way: str) -> None:
    choices = tuned(tmp_path, Timer())
    path, lines = tmp_path / FILE, lines_of(tmp_path)
    whole = len(lines)
    match way:
        case "deleted":
            path.unlink()
            again = whole
        case "cut":
            path.write_text("\n".join(lines[:100]) + "\n" + lines[100][:40])
            again = whole - 100
        case "garbage":
            path.write_text("\n".join(["[" * 2000, "{}", "null", '{"key": 3}', *lines[4:]]))
            again = 4
        case "edited":  # wrong times, that would change every choice
            wrong = [re.sub(r'"us": [0-9.e+]+', '"us": 900.0', line) for line in lines[:50]]
            path.write_text("\n".join([*wrong, *lines[50:]]))
            again = 50
        case "impossible":  # well-formed, but faster than the memory
            cache = TuningCache.open(tmp_path)
            for key in list(cache.entries)[:20]:
                cache.entries[key] = 0.001
            cache.save()
            again = 20
        case _:
            path.write_bytes(b"\xff\xfe\n" + "\n".join(lines[1:]).encode())
            again = 1
    timer = Timer()
    assert tuned(tmp_path, timer) == choices
    assert timer.asked == again
    last = Timer()
    assert tuned(tmp_path, last) == choices and last.asked == 0


@pytest.mark.parametrize(
    "lookup",
    [
        replace(LOOKUP, conditions=Conditions("Another GPU", 13000, "bf16")),
        replace(LOOKUP, conditions=Conditions("A GPU", 13010, "bf16")),
        replace(LOOKUP, conditions=Conditions("A GPU", 13000, "f16")),
        replace(LOOKUP, code=lambda shape, tokens, candidate: "0ther"),
    ],
    ids=["gpu", "driver", "dtype", "kernels"],
)
def test_entries_of_other_conditions_are_not_used_and_stay(tmp_path: Path, lookup: Lookup) -> None:
    first = Timer()
    tuned(tmp_path, first)
    other = Timer("native")
    assert {c.provider for c in tuned(tmp_path, other, lookup).values()} == {"native"}
    assert other.asked == first.asked
    assert len(lines_of(tmp_path)) == 2 * first.asked
    back = Timer()
    assert {c.provider for c in tuned(tmp_path, back).values()} == {"cutlass"} and back.asked == 0


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"times cannot be kept in .*RVLLM_CACHE_DIR"):
        TuningCache(tmp_path / "file" / FILE).save()


def test_planning_follows_the_choices_and_the_bits_do_not_follow_the_batch(tmp_path: Path) -> None:
    choices = tuned(tmp_path, Timer())
    strategy = GemmStrategy("auto", choices)
    config = EngineConfig(gemm_strategy="auto")
    given = StepPlanner.plan(program(num_hidden_layers=1), config, H100, GB80, strategy)[0]
    for seqs in (1, 16, 100, 128, 512):
        kernels = [p.kernel for p in given.decode(seqs) if re.search("cutlass|gemm|cublas", p.kernel)]
        assert ["cutlass" in name for name in kernels] == [True, False, True, False, False]
    assert "cuBLAS workspace" not in given.memory.lines
    why = next(p.why for p in given.decode(16) if "cutlass" in p.kernel)
    assert why.startswith("auto: cutlass; native +2")
    library = GemmStrategy("auto", {DOWN: Choice("cublas")})
    given = StepPlanner.plan(program(num_hidden_layers=1), config, H100, GB80, library)[0]
    assert given.memory.lines["cuBLAS workspace"] == 32 << 20
    assert sum(p.kernel == "cublaslt" for p in given.decode(16)) == 1


def test_before_anything_is_measured_auto_plans_ours_and_says_so() -> None:
    given = planner(program(num_hidden_layers=1), H100, EngineConfig(gemm_strategy="auto"))
    whys = {p.why for p in given.decode(16) if "gemm" in p.kernel}
    assert not any("cutlass" in name or "cublas" in name for name in given.kernels()) and whys


def test_every_candidate_is_among_the_kernels_that_are_loaded() -> None:
    for capability in (80, 90):
        chip = replace(CHIP, capability=capability)
        loaded = set(start.kernels_of("bf16", capability, LOOKUP.providers))
        for shape in (QKV, OUT, GATE_UP, DOWN, HEAD):
            for tokens in tokens_of(shape):
                found = candidates(shape, tokens, chip, ("native", "cutlass"))
                assert {launch_of(shape, tokens, c, "bf16", chip, NOWHERE).kernel for c in found} <= loaded
        assert all(MANIFEST[name].runs_on(capability) for name in loaded)


def test_strategies_that_are_not_auto_measure_nothing() -> None:
    for name in ("native", "cublas", "cutlass", "hybrid"):
        config = EngineConfig(gemm_strategy=name)
        assert start.strategy_for(program(num_hidden_layers=1), config, H100, print) == GemmStrategy(name)
    assert [n for n in ("native", "cublas", "cutlass", "hybrid") if GemmStrategy(n).keeps_bits] == [
        "native",
        "cutlass",
    ]


def test_show_tuning_prints_the_winner_and_whose_is_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RVLLM_CACHE_DIR", str(tmp_path))
    assert main(["kernels", "show-tuning"]) == 0
    assert capsys.readouterr().out.startswith("0 times in ")
    tuned(tmp_path / "autotune", Timer())
    with (tmp_path / "autotune" / FILE).open("a") as file:
        file.write(json.dumps({"key": "x", "us": 1.0, "sum": "wrong"}) + "\n")
    assert main(["kernels", "show-tuning"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"A GPU +bf16 +4608x3584 plain +128 +cutlass r\d+:n\d+ .*native \w+:\d+ \+\d+ %", out), (
        out
    )
    assert out.rstrip().endswith("1 damaged lines")
    rows = summary(TuningCache.open(tmp_path / "autotune"))
    assert len(rows) == len(tokens_of(QKV)) + len(tokens_of(GATE_UP))
    assert main(["kernels", "tune"]) == 2
    assert "--model names the model" in capsys.readouterr().err
