"""What each switch of the scheduler does, on the CPU with a small made-up model.

    python scripts/bench_scheduling.py [delay | tiers | preemption | policies | sleep ...]

Prints one line for each setting. Steps are timed in this process, without HTTP.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from rvllm.config import EngineConfig
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import Generate, Sampling

MODEL = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 1024,
    "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4096,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": True, "eos_token_id": 2, "bos_token_id": 1, "torch_dtype": "float32",
}  # fmt: skip


def engine(folder: Path, **settings: Any) -> EngineCore:
    """The small model with random weights."""
    (folder / "config.json").write_text(json.dumps(MODEL))
    common = {"model": str(folder), "load_format": "dummy", "device": "cpu", "max_num_seqs": 64}
    return EngineCore.from_config(EngineConfig(**{**common, **settings}))


def ask(core: EngineCore, name: str, salt: int, prompt: int, output: int, **more: Any) -> None:
    """A request with a prompt of its own, by `salt`."""
    tokens = [(salt * 7919 + i * 31) % 4000 + 3 for i in range(prompt)]
    core.add_request(Generate(name, tokens, Sampling(max_tokens=output), arrival=time.time(), **more))


class Clock:
    """When each request's tokens came, in seconds."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}
        self.began = time.perf_counter()

    def run(self, core: EngineCore, until: Callable[[], bool] = lambda: False) -> float:
        """Steps until all is done; returns the seconds."""
        began = time.perf_counter()
        while core.has_work() and not until():
            outputs = core.step()
            now = time.perf_counter()
            for output in outputs:
                if output.token_ids:
                    self.times.setdefault(output.request_id, []).append(now)
        return time.perf_counter() - began


def delay(folder: Path) -> None:
    """16 streams decode; 4 prompts of 1,000 tokens arrive: what the streams' readers see."""
    for name, settings in (
        ("no bound", {}),
        ("--max-prefill-chunk 64", {"max_prefill_chunk": 64}),
        ("--max-prefill-delay-ms 100", {"max_prefill_delay_ms": 100.0}),
        ("--max-prefill-delay-ms 40", {"max_prefill_delay_ms": 40.0}),
    ):
        core = engine(folder, num_blocks=1500, **settings)
        for i in range(16):
            ask(core, f"s{i}", i, 32, 400)
        Clock().run(core, partial(stepped, core, 40))
        alone, beside = Clock(), Clock()
        alone.run(core, partial(stepped, core, 80))
        arrived = time.perf_counter()
        longs = [f"long{i}" for i in range(4)]
        for i, long in enumerate(longs):
            ask(core, long, 100 + i, 1000, 2)
        beside.run(core, partial(ended, core, longs))
        first = max(beside.times[long][0] for long in longs) - arrived
        for when, clock in (("alone", alone), ("beside prompts", beside)):
            gaps = sorted(
                1e3 * (y - x) for n, t in clock.times.items() if n[0] == "s" for x, y in pairwise(t)
            )
            p50, p99 = at(gaps, 0.5), at(gaps, 0.99)
            print(f"{name:26} {when:14} ITL ms p50 {p50:.0f} p99 {p99:.0f} max {gaps[-1]:.0f}")
        print(f"{name:26} all prompts have their first token after {first:.1f} s", flush=True)
        core.close()


def stepped(core: EngineCore, steps: int) -> bool:
    """Whether so many steps were launched."""
    return core.scheduler.steps >= steps


def ended(core: EngineCore, names: list[str]) -> bool:
    """Whether none of these requests lives."""
    return all(name not in core._alive for name in names)


def at(ordered: list[float], share: float) -> float:
    """The value at a share of a sorted list."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def tiers(folder: Path) -> None:
    """12 prompts of 1,000 tokens, asked three times in turn; the pool holds five of them."""
    for host in (0, 1000):
        core, clock = engine(folder, num_blocks=350, num_cpu_blocks=host, max_model_len=2000), Clock()
        firsts = []
        for turn in range(3):
            for i in range(12):
                ask(core, f"{turn}-{i}", i, 1000, 4)
                began = time.perf_counter()
                clock.run(core)
                firsts.append(clock.times[f"{turn}-{i}"][0] - began)
        stats = core.stats()
        copies = stats.blocks_moved_out + stats.blocks_moved_in
        each = 1e6 * stats.backend["rvllm:kv_block_move_seconds_total"] / max(1, copies)
        cold, again = (1e3 * statistics.median(t) for t in (firsts[:12], firsts[12:]))
        hits = (
            f"{stats.cached_prompt_tokens} of {stats.prefix_queries} tokens cached, {stats.host_hits} in host"
        )
        print(f"--num-cpu-blocks {host:4}: first token cold {cold:.0f} ms, again {again:.0f} ms; {hits}; "
              f"{copies} copies of {each:.0f} us", flush=True)  # fmt: skip
        core.close()


def preemption(folder: Path) -> None:
    """24 requests of 200 tokens and 200 more; the pool holds eight of them at their end."""
    found = []
    for mode, host in (("recompute", 0), ("recompute", 1000), ("swap", 1000), ("auto", 1000)):
        core = engine(folder, num_blocks=200, num_cpu_blocks=host, preemption_mode=mode, max_model_len=2000)
        for i in range(24):
            ask(core, f"{i}", i, 200, 200)
        answers: dict[str, list[int]] = {}
        began = time.perf_counter()
        while core.has_work():
            for output in core.step():
                answers.setdefault(output.request_id, []).extend(output.token_ids)
        seconds, stats = time.perf_counter() - began, core.stats()
        found.append(answers)
        print(
            f"--preemption-mode {mode:9} --num-cpu-blocks {host:4}: {seconds:.1f} s, "
            f"{stats.preemptions} preempted, {stats.step_tokens} tokens computed, "
            f"{stats.blocks_moved_in} blocks came back, same tokens {answers == found[0]}",
            flush=True,
        )
        core.close()


def policies(folder: Path) -> None:
    """Six long requests and twelve short ones behind them, four at a time; then a flood beside a few."""
    for policy in ("fcfs", "sjf"):
        core, clock = engine(folder, max_num_seqs=4, scheduling_policy=policy, num_blocks=800), Clock()
        began = time.perf_counter()
        for i in range(6):
            ask(core, f"long{i}", i, 300, 120)
        for i in range(12):
            ask(core, f"short{i}", 50 + i, 30, 10)
        clock.run(core)
        ends = {name: times[-1] - began for name, times in clock.times.items()}
        short, long = (
            statistics.mean(t for n, t in ends.items() if n.startswith(k)) for k in ("short", "long")
        )
        print(f"--scheduling-policy {policy:5}: mean latency short {short:.2f} s, long {long:.2f} s")
        core.close()
    for fairness in ("none", "user"):
        core, clock = engine(folder, max_num_seqs=4, fairness=fairness, num_blocks=800), Clock()
        began = time.perf_counter()
        for i in range(60):
            ask(core, f"flood{i}", i, 60, 20, client="flood")
        for i in range(4):
            ask(core, f"few{i}", 100 + i, 60, 20, client="few")
        few = [f"few{i}" for i in range(4)]
        clock.run(core, partial(ended, core, few))
        done = max(clock.times[n][-1] for n in few) - began
        print(f"--fairness {fairness}: four requests behind a flood of sixty are answered after {done:.2f} s")
        core.close()


def sleep(folder: Path) -> None:
    """A server's memory and the time it takes to sleep and to wake up, by level."""
    core = engine(folder, num_blocks=1500)
    for level in (1, 2):
        ask(core, f"{level}", level, 4000, 2)
        Clock().run(core)
        full, began = resident(), time.perf_counter()
        core.sleep(level)
        slept, less = time.perf_counter() - began, full - resident()
        core.wake_up()
        woken = time.perf_counter() - began - slept
        print(f"level {level}: {full:.0f} MB in memory, {less:.0f} MB given back in {1e3 * slept:.1f} ms, "
              f"awake after {1e3 * woken:.1f} ms", flush=True)  # fmt: skip
    core.close()


def resident() -> float:
    """MB of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


PARTS = {"delay": delay, "tiers": tiers, "preemption": preemption, "policies": policies, "sleep": sleep}


def main() -> int:
    """Runs the parts named, or all."""
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or PARTS:
            print(f"# {name}: {(PARTS[name].__doc__ or '').strip()}", flush=True)
            PARTS[name](Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
