"""Where the time of prompts goes: each kernel of a step of prompts, the whole step, and the engine around it.

    PYTHONPATH=src python scripts/gpu/prefill_account.py CONFIG_DIR [--cases 8x1024,1x1024,1x7000]

A case is `prompts x tokens`, submitted at once to the in-process engine with random weights; one token is
drawn for each. First the engine: wall time, the device's time in steps and idle between them. Then every
kernel of the last step, in the order of first use, timed as a graph of its launches in all layers, beside
its floor.
"""

from __future__ import annotations

import argparse
import random
import time

from mixed_account import Account

from rvllm import LLM, SamplingParams
from rvllm.backends.cuda.backend import CudaBackend
from rvllm.backends.cuda.buckets import bucket_of
from rvllm.backends.cuda.device.launches import Counts
from rvllm.backends.cuda.profile import MATMUL_RATE, profile_launches, stage_cost
from rvllm.program.cost import StepShape

ROUNDS = 5
READ_RATE = 4.25e12  # bytes a second: a plain read on an H200


def generate(llm: LLM, rng: random.Random, count: int, length: int) -> float:
    """Seconds from the submission of fresh prompts to the last of their first tokens."""
    prompts = [
        {"prompt_token_ids": [rng.randrange(1000, 100000) for _ in range(length)]} for _ in range(count)
    ]
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    began = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - began


def engine(llm: LLM, account: Account, count: int, length: int) -> None:
    """Prints where the wall time of prompts goes, of the median round."""
    rng, rounds = random.Random(count * length), []
    for _ in range(ROUNDS + 1):
        account.done.clear()
        account._before = None
        wall = generate(llm, rng, count, length)
        steps = list(account.done)
        rounds.append((wall, sum(s.device for s in steps), sum(s.idle for s in steps), len(steps)))
    wall, device, idle, number = sorted(rounds[1:])[ROUNDS // 2]
    print(
        f"\n{count} x {length}: {count * length / wall:.0f} tok/s, {1e3 * wall:.2f} ms: {number} steps "
        f"{1e3 * device:.2f}, idle between them {1e3 * idle:.2f}, before and after "
        f"{1e3 * (wall - device - idle):.2f}",
        flush=True,
    )


def kernels(backend: CudaBackend, count: int, length: int) -> None:
    """Prints every kernel of the step that was launched last."""
    planner, limit = backend._planner, backend.limits.max_num_batched_tokens
    length = min(length, limit)
    seqs = min(count, limit // length)
    size = bucket_of(planner.token_sizes(), seqs * length)
    heads = bucket_of(planner.sample_sizes(), seqs)
    costs = {s.name: stage_cost(backend._program, s, StepShape(seqs, length, length)) for s in planner.stages}
    total = 0.0
    for title, planned, counts in (
        (f"body of {size} tokens", planner.body(size), Counts(size, planner.memory.shape.seqs, 0)),
        (f"head of {heads} rows", planner.head(heads), Counts(0, 0, heads)),
    ):
        rows, step = profile_launches(planned, costs, backend._catalog, backend._stream, counts, pdl=True)
        print(
            f"{'op':30} {'kernel':28} {'x':>3} {'us':>8} {'ms':>7} {'TFLOP/s':>8} {'GB/s':>6} {'floor us':>8}"
        )
        for r in rows:
            floor = r.cost.floor_seconds(READ_RATE, MATMUL_RATE)
            print(
                f"{r.op[:30]:30} {r.kernel[:28]:28} {r.count:3} {1e6 * r.seconds:8.1f} "
                f"{1e3 * r.count * r.seconds:7.2f} {r.cost.flops / r.seconds / 1e12:8.0f} "
                f"{r.cost.nbytes / r.seconds / 1e9:6.0f} {1e6 * floor:8.1f}"
            )
        kernels = sum(r.count * r.seconds for r in rows)
        total += step
        print(f"{title}: {1e3 * step:.2f} ms, its kernels {1e3 * kernels:.2f} ms", flush=True)
    print(f"together {1e3 * total:.2f} ms: {seqs * length / total:.0f} tok/s")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--cases", default="8x1024,1x1024,1x7000")
    parser.add_argument("--gemm-strategy", default="native")
    args = parser.parse_args()
    llm = LLM(
        model=args.config, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", device="cuda",
        gpu_memory_utilization=0.9, max_model_len=32768, max_num_seqs=512, gemm_strategy=args.gemm_strategy,
    )  # fmt: skip
    backend = llm.engine.backend
    assert isinstance(backend, CudaBackend)
    account = Account(backend)
    for case in args.cases.split(","):
        count, length = map(int, case.split("x"))
        engine(llm, account, count, length)
        kernels(backend, count, length)


if __name__ == "__main__":
    main()
