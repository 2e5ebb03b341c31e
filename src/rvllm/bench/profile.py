"""How a profiled step is shown: each kernel's time, rates, floor and gap."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any


def profile_table(profile: Any) -> str:
    """A table of a `rvllm.backends.cuda.profile.Profile`.

    Microseconds, GB/s, TFLOP/s, floor and gap of each kernel, and the whole step last.
    """
    lines = [
        f"decode step, N={profile.seqs}, {profile.context} tokens of context; "
        f"plain read in this run {profile.bandwidth / 1e12:.2f} TB/s",
        f"{'op':34} {'kernel':30} {'x':>3} {'us':>7} {'GB/s':>6} {'TFLOP/s':>8} {'floor':>8} {'gap/step':>9}",
    ]
    for row in profile.rows:
        floor = profile.floor(row.cost)
        lines.append(
            f"{row.op[:34]:34} {row.kernel[:30]:30} {row.count:3d} {row.seconds * 1e6:7.1f} "
            f"{row.cost.nbytes / row.seconds / 1e9:6.0f} {row.cost.flops / row.seconds / 1e12:8.1f} "
            f"{floor * 1e6:8.1f} {(row.seconds - floor) * row.count * 1e6:9.0f}"
        )
    floor, kernels = profile.floor(profile.total), sum(r.seconds * r.count for r in profile.rows)
    lines.append(
        f"step {profile.step * 1e3:.3f} ms, its kernels {kernels * 1e3:.3f} ms, floor {floor * 1e3:.3f} ms: "
        f"{floor / profile.step:.0%} of what the memory and the tensor cores allow"
    )
    return "\n".join(lines)


def as_json(profiles: Sequence[Any]) -> str:
    """The profiles with their floors, for later comparison."""
    return json.dumps(
        [
            {**asdict(p), "floor": p.floor(p.total), "floors": [p.floor(r.cost) for r in p.rows]}
            for p in profiles
        ],
        indent=1,
    )
