"""One fuzzer for as long as one likes; `tests/hostile/test_fuzz.py` runs a little of each.

    python scripts/fuzz.py KIND [--cases 10000] [--seed 0]

Prints what came out and how memory grew.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE / "tests"), str(HERE / "src")]

from support.clients import fuzz as clients  # noqa: E402
from support.weights import fuzz as files  # noqa: E402

KINDS = clients.KINDS | files.KINDS


def peak() -> int:
    """Megabytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main() -> None:
    """Runs one fuzzer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, before, began = random.Random(given.seed), peak(), time.monotonic()
    KINDS[given.kind](rng, min(200, given.cases // 10))
    warm = peak()
    seen = KINDS[given.kind](rng, given.cases)
    print(f"{given.kind}: {dict(seen)} in {time.monotonic() - began:.0f} s; peak memory {before} MB, "
          f"{warm} MB warm, {peak()} MB at the end")  # fmt: skip


if __name__ == "__main__":
    main()
