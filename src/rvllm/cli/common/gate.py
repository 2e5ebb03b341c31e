"""The flags of a gate, the same for every command that has one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rvllm.errors import UsageError

if TYPE_CHECKING:
    from rvllm.bench.gate import Limits


def add_gate(group: Any, metavar: str | None, text: str) -> None:
    """Adds `--gate` (with a value, or without: metavar None) and how it judges."""
    said = f"{text}: exit code 0 to roll out, 3 to roll back, 4 when the noise is too large to tell"
    group.add_argument("--gate", help=said, **({"metavar": metavar} if metavar else {"action": "store_true"}))
    group.add_argument(
        "--gate-tolerance", type=float, default=0.05, metavar="SHARE",
        help="a change that is never a loss; the noise of the runs counts where it is larger [0.05]",
    )  # fmt: skip
    group.add_argument(
        "--gate-noise", type=float, default=0.5, metavar="SHARE",
        help="noise above which the gate says neither yes nor no [0.5]",
    )  # fmt: skip


def gate_limits(args: argparse.Namespace) -> Limits:
    """How `--gate` judges. Raises UsageError."""
    from rvllm.bench.gate import Limits

    if not 0 <= args.gate_tolerance < args.gate_noise:
        raise UsageError("--gate-tolerance must be at least 0 and below --gate-noise")
    return Limits(args.gate_tolerance, args.gate_noise)
