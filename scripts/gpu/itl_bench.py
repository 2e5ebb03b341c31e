"""32 running streams while 8 prompts of 16k tokens arrive: time between tokens, with and without bounds.

    PYTHONPATH=src python scripts/gpu/itl_bench.py CONFIG_DIR [--prompts 8 --length 16000 --streams 32]
    PYTHONPATH=src python scripts/gpu/itl_bench.py --simulate

Settings in turns: no bound on steps with decodes, the default (--max-mixed-tokens 2048), and
--max-prefill-delay-ms. --simulate runs the scheduler over steps that take what was measured on an H200 with
a 7B (5 ms and 22 us a prompt token), in no time and without a GPU.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from rvllm import LLM
from rvllm.config import EngineConfig
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import Generate, Sampling

SETTINGS: dict[str, dict[str, float]] = {
    "steps of 8,192 tokens": {"max_mixed_tokens": 8192},
    "default (--max-mixed-tokens 2048)": {},
    "--max-mixed-tokens 512": {"max_mixed_tokens": 512},
    "--max-prefill-delay-ms 20": {"max_prefill_delay_ms": 20.0},
    "--max-prefill-delay-ms 5": {"max_prefill_delay_ms": 5.0},
}
STEP_SECONDS, TOKEN_SECONDS = 5e-3, 22e-6  # simulated


class Clock:
    """The time, or what the simulated steps have taken."""

    def __init__(self, simulated: bool) -> None:
        self.simulated, self.at = simulated, 0.0

    def now(self) -> float:
        """Seconds."""
        return self.at if self.simulated else time.perf_counter()


def simulated_core(clock: Clock, settings: dict[str, float]) -> EngineCore:
    """An engine whose steps take a made-up time, and which draws the same token for ever."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from rvllm.backends.base import Limits, StepBatch, StepResult
    from support.doubles.engine import PagedDouble, facts

    class Timed(PagedDouble):
        """Counts time and computes nothing."""

        def launch(self, batch: StepBatch) -> StepResult:
            """Takes its time at once."""
            prompts = batch.num_tokens - int((batch.query_lens == 1).sum())
            seconds = STEP_SECONDS + TOKEN_SECONDS * prompts
            clock.at += seconds
            return StepResult(
                batch.step, np.where(batch.sample, 1, -1).astype(np.int32), device_seconds=seconds
            )

        def collect(self, handle: StepResult) -> StepResult:
            """The result of the step."""
            return handle

    mixed = int(settings.get("max_mixed_tokens", 2048))
    limits = Limits(64, 8192, 20_000, 16, 16_000, 2, max_mixed_tokens=mixed)
    config = EngineConfig(max_prefill_delay_ms=settings.get("max_prefill_delay_ms", 0.0))
    return EngineCore(Timed(limits), facts(20_000), config)


def measure(core: EngineCore, clock: Clock, streams: int, prompts: int, length: int) -> str:
    """Percentiles of the time between a stream's tokens, alone and beside the prompts."""
    rng = random.Random(5)

    def ask(name: str, tokens: int, output: int) -> None:
        prompt = [rng.randrange(60) for _ in range(tokens)]
        core.add_request(Generate(name, prompt, Sampling(max_tokens=output)))

    for i in range(streams):
        ask(f"s{i}", 64, 10_000)
    last: dict[str, float] = {}
    gaps: list[float] = []
    first: list[float] = []

    def step() -> None:
        for output in core.step():
            now = clock.now()
            if output.request_id.startswith("p"):
                first.append(now - arrived)
            elif output.token_ids:
                if output.request_id in last:
                    gaps.append(now - last[output.request_id])
                last[output.request_id] = now

    def told() -> str:
        p50, p99, most = 1e3 * np.percentile(gaps, [50, 99, 100])
        return f"{p50:.1f} / {p99:.1f} / {most:.1f}"

    arrived = clock.now()
    for _ in range(60):
        step()
    gaps.clear()
    for _ in range(100):
        step()
    alone = told()
    gaps.clear()
    arrived = clock.now()
    for i in range(prompts):
        ask(f"p{i}", length, 1)
    while len(first) < prompts:
        step()
    beside = told()
    core.abort([f"s{i}" for i in range(streams)])
    while core.has_work():
        core.step()
    return f"{alone} | {beside} | {first[0]:.2f} / {first[-1]:.2f} s"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="?")
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=16_000)
    parser.add_argument("--only", default="", help="settings by their numbers from 0 on: 0,1,3")
    args = parser.parse_args()
    if (args.config is None) != args.simulate:
        parser.error("give CONFIG_DIR, or --simulate")
    clock = Clock(args.simulate)
    print(f"{args.streams} streams, {args.prompts} prompts of {args.length} tokens; ms between tokens")
    print("setting | alone p50 / p99 / most | beside prompts | first, last prompt's first token", flush=True)
    chosen = [int(n) for n in args.only.split(",") if n] or range(len(SETTINGS))
    for name, settings in (list(SETTINGS.items())[n] for n in chosen):
        llm = None if args.simulate else loaded(args.config, args.device, args.length, settings)
        core = simulated_core(clock, settings) if llm is None else llm.engine
        print(f"{name} | {measure(core, clock, args.streams, args.prompts, args.length)}", flush=True)
        if llm is not None:
            llm.close()


def loaded(config: str, device: str, length: int, settings: dict[str, Any]) -> LLM:
    """The engine with random weights of a configuration."""
    llm = LLM(
        model=config, load_format="dummy", skip_tokenizer_init=True, device=device,
        max_model_len=max(length, 10_064) + 64, max_num_seqs=64, enable_prefix_caching=False, **settings,
    )  # fmt: skip
    core = llm.engine
    for tokens in (1, 3000):  # graphs, and what a prompt token costs
        core.add_request(Generate("w", [7] * tokens, Sampling(max_tokens=4)))
        while core.has_work():
            core.step()
    return llm


if __name__ == "__main__":
    main()
