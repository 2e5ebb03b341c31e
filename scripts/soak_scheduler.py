"""Runs seeded scenarios of the scheduler by the million steps.

    python scripts/soak_scheduler.py --steps 2000000

A failure names its seed; `--seed N --scenarios 1` lives that one again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


def lives(first: int, count: int) -> tuple[int, Counter[int]]:
    """Lives `count` scenarios from seed `first` on; returns their steps and moves."""
    from support.doubles.soak import run

    steps, moves = 0, Counter[int]()
    for seed in range(first, first + count):
        try:
            more, moved = run(seed)
        except (AssertionError, RuntimeError) as error:
            raise SystemExit(f"seed {seed}: {error!r}") from error
        steps += more
        moves += moved
    return steps, moves


def main() -> int:
    """Runs until there were so many steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first scenario [0]")
    parser.add_argument("--scenarios", type=int, help="exactly so many, whatever their steps")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    began, seed, steps, moves = time.perf_counter(), args.seed, 0, Counter[int]()
    if args.scenarios:
        steps, moves = lives(seed, args.scenarios)
        seed += args.scenarios
    else:
        with ProcessPoolExecutor(args.jobs) as pool:
            while steps < args.steps:
                batch = [seed + 100 * k for k in range(4 * args.jobs)]
                seed = batch[-1] + 100
                for more, moved in pool.map(lives, batch, [100] * len(batch)):
                    steps += more
                    moves += moved
                print(f"{seed:,} scenarios, {steps:,} steps", flush=True)
    kinds = ", ".join(f"{moves[kind]:,} {name}" for kind, name in enumerate(("out", "in", "copied")))
    print(f"seeds {args.seed} to {seed - 1}: {steps:,} steps, blocks moved {kinds}, "
          f"{time.perf_counter() - began:.0f} s")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
