"""What each kind of launch costs within a decode step: the step's time less the time without that kind.

    PYTHONPATH=src python scripts/gpu/marginal.py --only NAME,... [--context N] [--seqs 1,8,128]

`--profile` times chains of one kind alone. In a step, a launch overlaps its neighbours: weights are fetched
while a predecessor ends, or a wait is longer than it need be. Here the step's graph is captured again without
all launches of one kind, and also without each kind and the next, as neighbours that overlap hide each other.
The others do the same work on what memory holds; a router stays, since experts must exist. Names as in
arch_bench.py.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from arch_bench import CONTEXT, ENGINE, program_of

from rvllm.backends.cuda.backend import CudaBackend
from rvllm.backends.cuda.device.launches import Counts, Planned
from rvllm.backends.cuda.profile import capture, decode_batch, make_of, time_graph
from rvllm.program.dtypes import DType


def measure(name: str, context: int, sizes: list[int]) -> None:
    """Prints the tables of one model."""
    label, program = program_of(name, DType.BF16)
    blocks = max(ENGINE.num_blocks or 0, max(sizes) * (context // 16 + 2))
    engine = replace(ENGINE, max_num_seqs=max(ENGINE.max_num_seqs, *sizes), num_blocks=blocks)
    backend = CudaBackend.load(program, None, engine)
    for seqs in sizes:
        table(backend, f"{label}, {seqs} sequences", seqs, context, program.vocab_size)
    backend.close()


def table(backend: CudaBackend, label: str, seqs: int, context: int, vocab_size: int) -> None:
    """Prints what each kind of launch costs in a step of so many sequences."""
    for _ in range(2):  # leaves the step's metadata, slots and buffers on the device
        backend.collect(backend.launch(decode_batch(seqs, context, vocab_size)))
    planned = backend._planner.decode(seqs)
    kinds: dict[str, list[Planned]] = {}
    for launch in planned:
        kinds.setdefault(make_of(launch), []).append(launch)

    def seconds(without: set[str]) -> float:
        kept = [p for p in planned if make_of(p) not in without]
        graph = capture(kept, backend._catalog, backend._stream, Counts(seqs, seqs, seqs), True)
        found = time_graph(backend._stream, graph)
        graph.close()
        return found

    step = seconds(set())
    print(f"{label}: step {step * 1e6:.0f} us, {len(planned)} launches")
    print(f"{'kind':48} {'x':>4} {'us each':>8} {'with next':>10}")
    names = list(kinds)
    for i, kind in enumerate(names):
        if "_route" in kind:
            continue
        count = len(kinds[kind])
        one = (step - seconds({kind})) / count
        after = names[i + 1] if i + 1 < len(names) and "_route" not in names[i + 1] else kind
        pair = (step - seconds({kind, after})) / count
        print(
            f"{kind.replace('|sm', ' sm')[:62]:62} {count:4} {one * 1e6:8.2f} {pair * 1e6:10.2f}", flush=True
        )


def main() -> int:
    """Runs the models; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", required=True, metavar="NAME,...")
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--seqs", default="1")
    args = parser.parse_args()
    for name in args.only.split(","):
        measure(name, args.context, [int(n) for n in args.seqs.split(",")])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
