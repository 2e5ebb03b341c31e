"""How a profiled step is shown: each kernel's time, rates, floor and gap, beside an earlier profile."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rvllm.bench.files import json_text, write_whole
from rvllm.bench.stats import rate
from rvllm.errors import UsageError


@dataclass(frozen=True)
class Earlier:
    """A profile as a file holds it. seconds: of all launches of an op in a step; step: of the whole step."""

    seqs: int
    context: int
    step: float
    seconds: dict[str, float]


def profile_table(profile: Any, before: Sequence[Earlier] = ()) -> str:
    """A table of a `rvllm.backends.cuda.profile.Profile`.

    Microseconds, GB/s, TFLOP/s, floor and gap of each kernel, and the whole step last. With earlier profiles,
    the one of the same step tells beside every op how its time in the step has changed.
    """
    old = next((e for e in before if (e.seqs, e.context) == (profile.seqs, profile.context)), None)
    lines = [
        f"decode step, N={profile.seqs}, {profile.context} tokens of context; "
        f"plain read in this run {profile.bandwidth / 1e12:.2f} TB/s",
        f"{'op':34} {'kernel':30} {'x':>3} {'us':>7} {'GB/s':>6} {'TFLOP/s':>8} {'floor':>8} {'gap/step':>9}"
        + (f" {'before':>9} {'ratio':>7}" if before else ""),
    ]
    now = _by_op([(row.op, row.count, row.seconds) for row in profile.rows])
    told: set[str] = set()
    for row in profile.rows:
        floor = profile.floor(row.cost)
        beside = _beside(row.op, now, old, told) if before else ""
        lines.append(
            f"{row.op[:34]:34} {row.kernel[:30]:30} {row.count:3d} {row.seconds * 1e6:7.1f} "
            f"{rate(row.cost.nbytes, row.seconds) / 1e9:6.0f} "
            f"{rate(row.cost.flops, row.seconds) / 1e12:8.1f} "
            f"{floor * 1e6:8.1f} {(row.seconds - floor) * row.count * 1e6:9.0f}{beside}"
        )
    floor, kernels = profile.floor(profile.total), sum(r.seconds * r.count for r in profile.rows)
    lines.append(
        f"step {profile.step * 1e3:.3f} ms, its kernels {kernels * 1e3:.3f} ms, floor {floor * 1e3:.3f} ms: "
        f"{rate(floor, profile.step):.0%} of what the memory and the tensor cores allow"
    )
    if old is not None:
        lines.append(f"before {old.step * 1e3:.3f} ms: {rate(old.step, profile.step):.2f}x as fast now")
    elif before:
        lines.append("the earlier file has no profile of this step")
    return "\n".join(lines)


def _by_op(rows: Sequence[tuple[str, int, float]]) -> dict[str, float]:
    """Seconds a step of each op, of (op, launches, seconds of one)."""
    seconds: dict[str, float] = {}
    for op, count, each in rows:
        seconds[op] = seconds.get(op, 0.0) + count * each
    return seconds


def _beside(op: str, now: dict[str, float], old: Earlier | None, told: set[str]) -> str:
    """Microseconds a step before, and how many times faster it is now; on the first row of each op."""
    if old is None or op not in old.seconds or op in told:
        return f" {'-':>9} {'-':>7}"
    told.add(op)
    return f" {old.seconds[op] * 1e6:9.0f} {rate(old.seconds[op], now[op]):6.2f}x"


def write_profiles(path: Path, about: dict[str, Any], profiles: Sequence[Any]) -> None:
    """Writes profiles with their floors and what was measured. Raises UsageError when that cannot be."""
    rows = [
        {**asdict(p), "floor": p.floor(p.total), "floors": [p.floor(r.cost) for r in p.rows]}
        for p in profiles
    ]
    write_whole(path, json_text({**about, "profiles": rows}), "--json")


def read_profiles(path: Path) -> list[Earlier]:
    """What `write_profiles` wrote. Raises UsageError when the file is none of these."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["profiles"]
        return [
            Earlier(
                seqs=int(p["seqs"]),
                context=int(p["context"]),
                step=float(p["step"]),
                seconds=_by_op([(str(r["op"]), int(r["count"]), float(r["seconds"])) for r in p["rows"]]),
            )
            for p in found
        ]
    except OSError as error:
        raise UsageError(f"--compare: cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"--compare: {path} holds no profiles of rvllm benchmark --profile --json") from None
