"""Whether a candidate may take a baseline's place: its figures beside the baseline's, judged by their noise.

A figure is worse when its median is worse by more than the tolerance: the larger of a floor (a share that
nobody minds) and the noise, which is how far equal measurements lay apart in these very runs. Where the noise
is so large that a real loss could hide in it, the answer is neither yes nor no.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rvllm.bench.stats import median
from rvllm.errors import UsageError

ROLL_OUT = 0
ROLL_BACK = 3  # 1 and 2 are errors: nothing was judged
UNCLEAR = 4
MIN_SAMPLES = 3


@dataclass(frozen=True)
class Figure:
    """Equal measurements of one quantity, of the baseline and of the candidate."""

    name: str
    baseline: Sequence[float]
    candidate: Sequence[float]
    higher_is_better: bool


@dataclass(frozen=True)
class Limits:
    """floor: shares of change up to this are never a loss. noise: shares above this tell nothing."""

    floor: float = 0.05
    noise: float = 0.5


@dataclass(frozen=True)
class Check:
    """One figure judged. worse_by: share by which the candidate's median is worse, negative where better."""

    name: str
    before: float
    after: float
    worse_by: float
    tolerance: float
    verdict: str  # pass, worse, unclear


def spread(samples: Sequence[float]) -> float:
    """How far equal measurements lie apart: (largest - smallest) / median; inf around a median of 0."""
    apart, middle = max(samples) - min(samples), median(samples)
    return (apart / middle if middle else math.inf) if apart else 0.0


def judge(figure: Figure, limits: Limits) -> Check:
    """Judges one figure. Raises UsageError for fewer than three measurements of either side."""
    fewest = min(len(figure.baseline), len(figure.candidate))
    if fewest < MIN_SAMPLES:
        raise UsageError(f"{figure.name}: a gate needs {MIN_SAMPLES} runs to know the noise, got {fewest}")
    before, after = median(figure.baseline), median(figure.candidate)
    noise = math.hypot(spread(figure.baseline), spread(figure.candidate))
    tolerance = max(limits.floor, noise)
    better, worse = (after, before) if figure.higher_is_better else (before, after)
    worse_by = worse / better - 1 if better else math.inf
    if worse_by > tolerance:
        verdict = "worse"
    elif noise > limits.noise:
        verdict = "unclear"
    else:
        verdict = "pass"
    return Check(figure.name, before, after, worse_by, tolerance, verdict)


def judge_all(figures: Sequence[Figure], limits: Limits) -> tuple[list[Check], int]:
    """(each figure judged, the exit code): one loss is enough to roll back, one doubt to measure again.

    Raises UsageError when there is nothing to judge.
    """
    known = []
    for figure in figures:
        had, has = (all(map(math.isfinite, side)) for side in (figure.baseline, figure.candidate))
        if had != has:
            raise UsageError(f"{figure.name}: the {'candidate' if had else 'baseline'} was not measured")
        if had:
            known.append(figure)
    if not known:
        raise UsageError("the gate found no figure that both sides have")
    checks = [judge(figure, limits) for figure in known]
    verdicts = {check.verdict for check in checks}
    code = ROLL_BACK if "worse" in verdicts else UNCLEAR if "unclear" in verdicts else ROLL_OUT
    return checks, code


def page(checks: Sequence[Check], code: int) -> str:
    """The checks as a table, and the decision in the last line."""
    width = max(len(check.name) for check in checks)
    lines = [f"{'gate':{width}} {'before':>10} {'after':>10} {'worse by':>9} {'tolerance':>9}"]
    for check in checks:
        lines.append(
            f"{check.name:{width}} {check.before:10.4g} {check.after:10.4g} {check.worse_by:+9.1%} "
            f"{check.tolerance:9.1%}  {check.verdict}"
        )
    said = {
        ROLL_OUT: "roll out: nothing is worse beyond its tolerance",
        ROLL_BACK: "roll back: something is worse beyond its tolerance",
        UNCLEAR: "unclear: the noise is too large to tell; repeat with more runs or less else on the machine",
    }
    return "\n".join([*lines, f"{said[code]} (exit code {code})"])
