"""The curve of N: tokens a second of N requests at once, and each N that falls behind a smaller one.

    PYTHONPATH=src python scripts/gpu/curve.py CONFIG_DIR [--sizes 1,2,4] [--input 12] [--output 64]
    PYTHONPATH=src python scripts/gpu/curve.py CONFIG_DIR --contexts 16,100,500,1000,4000,16000 --sizes 1,8,32

Random weights of the configuration, random prompts, greedy, `ignore_eos`, no detokenising, all requests
submitted at once to the in-process engine; the median of 3. Exits with 1 when a size gives more than
`--tolerance` fewer tokens a second than a smaller one.

With --contexts, a decode step of each size and context as its graph is replayed, beside its floor: bytes over
the plain read rate of the same process. Exits with 1 when the share of the floor at a context lies more than
`--tolerance` under those of both neighbours.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence

from rvllm import LLM, SamplingParams
from rvllm.backends.cuda.backend import CudaBackend
from rvllm.backends.cuda.profile import MATMUL_RATE, READ_KERNEL, decode_batch, stream_rate, time_graph
from rvllm.bench.cliffs import cliffs, dips
from rvllm.program.cost import StepShape, program_cost

SIZES = "1,2,3,4,5,6,7,8,10,12,16,20,24,28,32,40,48,64,80,96,112,128,160,192,256,320,384,512"


def seconds(llm: LLM, size: int, prompt: int, output: int, seed: int) -> float:
    """Wall time of `size` requests."""
    rng = random.Random(seed)
    prompts = [{"prompt_token_ids": [rng.randrange(100, 30000) for _ in range(prompt)]} for _ in range(size)]
    params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - started


def read_rate(backend: CudaBackend) -> float:
    """Bytes a second of a plain read of the weights, at most 16 GB of them."""
    nbytes = min(backend._planner.memory.lines["weights"], 16 << 30) // 4096 * 4096
    backend._catalog.require([READ_KERNEL])
    sink, blocks = backend._at.bests, 4 * backend._facts.sm_count
    return stream_rate(backend._catalog, backend._stream, backend._gpu.arena.base, nbytes, sink, blocks)


def steps(backend: CudaBackend, size: int, contexts: Sequence[int]) -> Iterator[tuple[int, float, float]]:
    """(context, seconds of a decode step of `size` sequences, its floor), for contexts that fit."""
    read, vocab = read_rate(backend), backend._program.vocab_size
    limits = backend.limits
    for context in contexts:
        blocks = size * -(-context // limits.block_size)
        if context > limits.max_model_len or blocks > limits.num_blocks:
            continue
        for _ in range(2):  # leaves the step's metadata, slots and buffers on the device
            backend.collect(backend.launch(decode_batch(size, context, vocab)))
        found = time_graph(backend._stream, backend._graphs.decode(backend._graphs.decode_size(size)))
        cost = program_cost(backend._program, StepShape(size, 1, context))
        yield context, found, cost.floor_seconds(read, MATMUL_RATE)


def print_contexts(llm: LLM, sizes: Sequence[int], contexts: Sequence[int], tolerance: float) -> bool:
    """Prints steps beside their floors; whether a share falls below both neighbours'."""
    backend = llm.engine.backend
    assert isinstance(backend, CudaBackend)
    fallen = False
    for size in sizes:
        shares: dict[int, float] = {}
        for context, found, floor in steps(backend, size, contexts):
            shares[context] = floor / found
            print(
                f"N {size:4} context {context:6} {1e3 * found:8.3f} ms, floor {1e3 * floor:8.3f}: "
                f"{shares[context]:4.0%}",
                flush=True,
            )
        for context, shortfall in dips(shares, tolerance):
            fallen = True
            print(f"N {size}, context {context}: {shortfall:.1%} under both neighbours")
    return fallen


def print_sizes(llm: LLM, sizes: Sequence[int], prompt: int, output: int, tolerance: float) -> bool:
    """Prints the curve of N; whether it falls."""
    rates: dict[int, float] = {}
    for size in sizes:
        seconds(llm, size, prompt, min(output, 8), 1)  # captures the graphs
        wall = statistics.median(seconds(llm, size, prompt, output, seed) for seed in (2, 3, 4))
        rates[size] = size * output / wall
        print(f"N {size:4} {rates[size]:9.1f} tok/s", flush=True)
    fallen = cliffs(rates, tolerance)
    for size, shortfall in fallen:
        print(f"N {size}: {shortfall:.1%} fewer tokens a second than a smaller batch")
    return bool(fallen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--input", type=int, default=12)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--contexts", metavar="TOKENS,...", help="time steps of these contexts instead")
    parser.add_argument("--tolerance", type=float, default=0.1)
    args = parser.parse_args()
    sizes = [int(size) for size in args.sizes.split(",")]
    contexts = [int(context) for context in (args.contexts or "").split(",") if context]
    llm = LLM(
        model=args.config,
        load_format="dummy",
        skip_tokenizer_init=True,
        device="cuda",
        gpu_memory_utilization=0.9,
        max_model_len=max(1024, 2 * (args.input + args.output), *contexts),
        max_num_seqs=max(sizes),
    )
    if contexts:
        sys.exit(print_contexts(llm, sizes, contexts, args.tolerance))
    sys.exit(print_sizes(llm, sizes, args.input, args.output, args.tolerance))


if __name__ == "__main__":
    main()
