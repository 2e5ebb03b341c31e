"""A decode step of one sequence by every decode path: its time beside the floor, and whether bits are equal.

    PYTHONPATH=src python scripts/gpu/decode_paths.py [--only NAME,...] [--paths batched,gemv,...] [--profile]

Published sizes, random bfloat16 weights, a context of 44 tokens. The step's graph is replayed: median of 15.
Bits: the logits of one step after the same token, beside those of the first path. --profile times chains of
equal launches too. Names as in arch_bench.py. fp8 quantises the random weights, so its logits are others.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from arch_bench import CONTEXT, ENGINE, program_of, read_rate

from rvllm.backends.cuda.backend import CudaBackend
from rvllm.backends.cuda.device.driver import Pinned
from rvllm.backends.cuda.device.graphs import capture
from rvllm.backends.cuda.device.launches import Counts, kernel_names
from rvllm.backends.cuda.layout.metadata import BEST_ONLY
from rvllm.backends.cuda.profile import decode_batch, profile_launches, time_graph
from rvllm.errors import RvllmError
from rvllm.program.cost import StepShape, program_cost
from rvllm.program.dtypes import DType

MODELS = "Qwen2.5-7B,StableLM-2-1.6B,Qwen3-30B-A3B"
PATHS = "batched,gemv,fused,persistent,fp8"
ONE = Counts(1, 1, 1)


def measure(name: str, paths: list[str], profile: bool) -> None:
    """Prints a model's lines. Weights lie otherwise for fp8, so that is loaded by itself."""
    label, program = program_of(name, DType.BF16)
    for among in ([path for path in paths if path != "fp8"], [path for path in paths if path == "fp8"]):
        if among:
            backend = CudaBackend.load(program, None, replace(ENGINE, decode_path=among[0]))
            try:
                measure_paths(backend, label, among, profile)
            finally:
                backend.close()


def measure_paths(backend: CudaBackend, label: str, paths: list[str], profile: bool) -> None:
    """Prints the lines of those paths that share their weights."""
    program = backend._program
    floor = program_cost(program, StepShape(1, 1, CONTEXT)).nbytes / read_rate(backend)
    for _ in range(2):  # leaves the step's metadata, slots and buffers on the device
        backend.collect(backend.launch(decode_batch(1, CONTEXT, program.vocab_size)))
    at, stream = backend._planner.addresses, backend._stream
    token, logits = Pinned(4), Pinned(4 * program.vocab_size)
    stream.copy_to_host(token.address, at.last_tokens, 4)
    stream.sync()
    first: np.ndarray | None = None
    all_logits = at.metadata + 4 * BEST_ONLY
    for path in paths:
        planned = replace(backend._planner, path=path).decode(1)
        backend._catalog.require(kernel_names(planned))
        graph = capture(planned, backend._catalog, stream, ONE, True)
        same = 0
        for _ in range(3):
            stream.fill_bytes(at.logits, 0xFF, logits.array.nbytes)
            stream.fill_bytes(all_logits, 0, 4)  # of greedy rows batched leaves the best alone otherwise
            stream.copy_to_device(at.last_tokens, token.address, 4)
            graph.launch(stream)
            stream.copy_to_host(logits.address, at.logits, logits.array.nbytes)
            stream.sync()
            found = logits.array.view(np.uint32).copy()
            first = found if first is None else first
            same += int((found == first).sum())
        stream.fill_bytes(all_logits, 1, 1)  # as such a step is served
        seconds = time_graph(stream, graph)
        graph.close()
        speed = f"{1 / seconds:7.1f} tok/s, {seconds * 1e3:.3f} ms"
        share = f"{floor / seconds:.0%} of the floor {floor * 1e3:.3f}"
        print(
            f"{label:16} {path:11} {len(planned):4} launches {speed}, {share}; "
            f"equal logits {same} of {3 * len(first)}",
            flush=True,
        )
        if profile:
            rows, _ = profile_launches(planned, {}, backend._catalog, stream, ONE, True)
            for row in rows:
                print(
                    f"    {row.op[:70]:70} {row.kernel[5:]:30} {row.count:4} {row.seconds * 1e6:8.2f} us",
                    flush=True,
                )


def main() -> int:
    """Runs the models; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=MODELS, metavar="NAME,...")
    parser.add_argument("--paths", default=PATHS)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    for name in args.only.split(","):
        try:
            measure(name, args.paths.split(","), args.profile)
        except RvllmError as error:
            print(f"{name}: {error}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
