"""Device time of steps by their padded size: decodes alone, prompts alone, and prompts beside decodes.

    PYTHONPATH=src python scripts/gpu/step_costs.py CONFIG_DIR [--decodes 0,63] [--context 2100]
        [--prompt 2048] [--sizes 128,256,...] [--kernels 0x1024,63x1985] [--json FILE]

A step of `tokens` tokens has so many decodes of `context` tokens each, and prompts of `prompt` tokens for
the rest. Two steps are always under way, as in a served run. --kernels times every kernel of a step
(decodes x prompt tokens). The JSON holds [decodes, tokens, padded, ms] for `mixed_simulate.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import Any

import numpy as np

from rvllm import LLM
from rvllm.backends.base import SamplingSpec, SlotStart, StepBatch
from rvllm.backends.cuda.backend import CudaBackend
from rvllm.backends.cuda.buckets import bucket_of
from rvllm.backends.cuda.device.launches import Counts
from rvllm.backends.cuda.profile import profile_launches

SIZES = [128, 192, *range(256, 513, 64), *range(640, 2817, 128), 3072, 3328, 3584, 4096, 5120, 6144, 8192]


def step_of(decodes: int, context: int, tokens: int, prompt: int, vocab: int) -> StepBatch:
    """A step of `decodes` sequences with `context` tokens, and of prompts, the last one shorter."""
    prompts = [prompt] * (tokens // prompt) + ([tokens % prompt] if tokens % prompt else [])
    lengths = [1] * decodes + prompts
    held = [-(-context // 16)] * decodes + [-(-n // 16) for n in prompts]
    slots = np.arange(len(lengths), dtype=np.int32)
    table = [np.repeat(slots, held), np.concatenate([np.arange(n) for n in held]), np.arange(sum(held))]
    rng = np.random.default_rng(tokens)
    return StepBatch(
        step=0,
        slots=slots,
        query_lens=np.array(lengths, dtype=np.int32),
        starts=np.array([context - 1] * decodes + [0] * len(prompts), dtype=np.int32),
        tokens=rng.integers(0, vocab, decodes + tokens).astype(np.int32),
        sample=np.ones(len(lengths), dtype=np.bool_),
        started=[SlotStart(s, SamplingSpec(), np.zeros(1, dtype=np.int32), 1) for s in slots.tolist()],
        new_blocks=np.stack(table, axis=1).astype(np.int32),
    )


def milliseconds(backend: CudaBackend, batch: StepBatch, rounds: int) -> float:
    """Median device time of a step with another one queued behind it."""
    again = StepBatch(1, batch.slots, batch.query_lens, batch.starts, batch.tokens, batch.sample)
    handles, times = [backend.launch(batch), backend.launch(again)], []
    for turn in range(rounds + 1):
        times.append(backend.collect(handles.pop(0)).device_seconds)
        if turn < rounds - 1:
            handles.append(backend.launch(again))
    return 1e3 * median(times[1:])


def kernels(backend: CudaBackend, decodes: int, context: int, tokens: int, prompt: int, vocab: int) -> None:
    """Prints every kernel of a step's body."""
    batch = step_of(decodes, context, tokens, prompt, vocab)
    for _ in range(2):  # leaves the step's metadata and slots on the device
        backend.collect(backend.launch(batch))
    size = bucket_of(backend._planner.token_sizes(), batch.num_tokens)
    rows, step = profile_launches(
        backend._planner.body(size), {}, backend._catalog, backend._stream,
        Counts(size, backend._shape.seqs, 0), pdl=True,
    )  # fmt: skip
    total = sum(r.count * r.seconds for r in rows)
    print(
        f"--- {decodes} decodes and {tokens} prompt tokens, padded to {size}: "
        f"replayed {1e3 * step:.2f} ms, kernels {1e3 * total:.2f}"
    )
    for r in rows:
        all_of_them = 1e3 * r.count * r.seconds
        print(f"{r.op:>24} {r.kernel:<36} {r.count:4} x {1e6 * r.seconds:7.1f} us, {all_of_them:6.2f} ms")


def first_tokens(llm: LLM, backend: CudaBackend, length: int) -> None:
    """Prints what lies between a prompt and its first token: wall time, the step, and what is around it."""
    from rvllm import SamplingParams

    rng, rounds = np.random.default_rng(length), []
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    collect, seen = backend.collect, list[float]()

    def watched(handle: Any) -> Any:
        result = collect(handle)
        seen.append(result.device_seconds)
        return result

    backend.collect = watched  # type: ignore[method-assign]
    for _ in range(12):
        prompt = {"prompt_token_ids": rng.integers(1000, 100000, length).tolist()}
        began = time.perf_counter()
        llm.generate([prompt], params, use_tqdm=False)
        rounds.append((time.perf_counter() - began, seen[-1]))
        time.sleep(0.03)
    backend.collect = collect  # type: ignore[method-assign]
    wall, device = (1e3 * median(pair[i] for pair in rounds[2:]) for i in (0, 1))
    print(
        f"one prompt of {length}: {wall:.2f} ms, its step {device:.2f}, around it {wall - device:.2f}",
        flush=True,
    )


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--decodes", default="0,63")
    parser.add_argument("--context", type=int, default=2100)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--alone", default="1,16,32,48,64,96,128,192,256", help="decodes of steps of decodes")
    parser.add_argument("--kernels", default="", help="DECODESxTOKENS,...")
    parser.add_argument("--first", default="", help="lengths of single prompts, to their first token")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json")
    parser.add_argument("--trace", help="--trace-steps of the engine, for single prompts")
    args = parser.parse_args()
    llm = LLM(
        model=args.config, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", device="cuda",
        gpu_memory_utilization=0.9, max_model_len=4096, max_num_seqs=512, trace_steps=args.trace,
    )  # fmt: skip
    backend, vocab = llm.engine.backend, llm.engine.facts.vocab_size
    assert isinstance(backend, CudaBackend)
    backend.capture_all()
    for length in args.first.split(",") if args.first else []:
        first_tokens(llm, backend, int(length))
    costs = []
    for decodes in map(int, args.decodes.split(",")):
        for tokens in map(int, args.sizes.split(",")):
            batch = step_of(decodes, args.context, max(1, tokens - decodes), args.prompt, vocab)
            ms = milliseconds(backend, batch, args.rounds)
            costs.append(
                (decodes, batch.num_tokens, bucket_of(backend._planner.token_sizes(), batch.num_tokens), ms)
            )
            print(
                f"{decodes:4} decodes, {tokens:5} tokens: {ms:7.2f} ms, {1e3 * ms / tokens:6.1f} us a token",
                flush=True,
            )
    for decodes in map(int, args.alone.split(",") if args.alone else []):
        batch = step_of(decodes, args.context, 0, args.prompt, vocab)
        ms = milliseconds(backend, batch, 8)
        costs.append((decodes, decodes, backend._graphs.decode_size(decodes), ms))
        print(f"{decodes:4} decodes alone: {ms:7.3f} ms", flush=True)
    for pair in args.kernels.split(",") if args.kernels else []:
        decodes, tokens = map(int, pair.split("x"))
        kernels(backend, decodes, args.context, tokens, args.prompt, vocab)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(costs, file)


if __name__ == "__main__":
    main()
