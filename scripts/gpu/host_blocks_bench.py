"""KV blocks between device and pinned host memory: rates, a restored prefix, and what others see of it.

    PYTHONPATH=src python scripts/gpu/host_blocks_bench.py CONFIG_DIR

First the copies alone, caches as the model has them: one strided copy a block as served, beside one plain
copy of as many bytes, which is the most that the link gives. Then the engine with random weights: the first
token of a prompt of 1,024 tokens cold, found on the device and found in host memory; and the time between
steps of 32 running streams while such prompts come, found on the device or in host memory.
"""

from __future__ import annotations

import argparse
import random
import time
from statistics import median

import numpy as np

from rvllm import LLM
from rvllm.backends.base import MOVE_IN, MOVE_OUT
from rvllm.backends.cuda.backend import CudaBackend
from rvllm.backends.cuda.device.driver import Event, Stream
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import Generate, Sampling

PROMPT, STREAMS, DEVICE, HOST = 1025, 32, 2200, 8192  # tokens, sequences, blocks


def copies(backend: CudaBackend) -> None:
    """Prints what blocks take to move, alone."""
    host = backend._host
    assert host is not None
    stream, began, ended = Stream(), Event(), Event()
    caches = host._runs
    nbytes = host.block_bytes
    print(
        f"a block: {nbytes / 1e6:.2f} MB in {sum(run.rows for run in caches)} rows of {caches[0].width} bytes"
    )
    for kind, name in ((MOVE_OUT, "to the host"), (MOVE_IN, "to the device")):
        for count, apart in ((1, 1), (64, 7), (64, 1), (1024, 7), (1024, 1)):
            moves = np.array([(kind, (apart * i) % DEVICE, i) for i in range(count)], dtype=np.int32)
            seconds, queued = [], []
            for _ in range(5):
                began.record(host._stream)
                at = time.perf_counter()
                host.move(moves, 0, None, stream)
                queued.append(time.perf_counter() - at)
                ended.record(host._stream)
                ended.wait()
                seconds.append(ended.seconds_since(began))
            took = median(seconds)
            how = "scattered" if apart > 1 else "neighbouring"
            print(
                f"{count:5} {how} blocks {name}: {1e3 * took:.3f} ms, "
                f"{count * nbytes / took / 1e9:.1f} GB/s, queued in {1e3 * median(queued):.3f} ms"
            )
    device = caches[0].base
    for name in ("to the host", "to the device"):
        seconds = []
        for _ in range(5):
            began.record(stream)
            if name == "to the host":
                stream.copy_to_host(host._memory.address, device, 64 * nbytes)
            else:
                stream.copy_to_device(device, host._memory.address, 64 * nbytes)
            ended.record(stream)
            ended.wait()
            seconds.append(ended.seconds_since(began))
        print(
            f"one plain copy of 64 blocks {name}: {64 * nbytes / median(seconds) / 1e9:.1f} GB/s", flush=True
        )
    stream.close()


class Engine:
    """Prompts by number, and how they are served."""

    def __init__(self, core: EngineCore) -> None:
        self.core, self.count = core, 0

    def ask(self, prompt: int, output: int, length: int = PROMPT) -> str:
        """Queues the prompt of this number."""
        rng = random.Random(prompt)
        self.count += 1
        name = f"{self.count}"
        tokens = [rng.randrange(1000, 100000) for _ in range(length)]
        self.core.add_request(Generate(name, tokens, Sampling(max_tokens=output)))
        return name

    def first_token(self, prompt: int) -> tuple[float, int]:
        """Seconds to the first token, alone, and the prompt tokens that were found cached."""
        self.ask(prompt, 1)
        began, outputs = time.perf_counter(), []
        while self.core.has_work():
            outputs += self.core.step()
        return time.perf_counter() - began, outputs[0].cached_tokens

    def answer(self, prompt: int) -> list[int]:
        """The first 8 tokens, alone."""
        self.ask(prompt, 8)
        outputs = []
        while self.core.has_work():
            outputs += self.core.step()
        return [token for output in outputs for token in output.token_ids]

    def beside(self, prompts: list[int]) -> tuple[float, float, float, int]:
        """Seconds a step of STREAMS running streams while these prompts come, every 8th step one of them.

        Returns the median and mean time between steps, the longest, and the blocks that came from the host.
        """
        for i in range(STREAMS):
            self.ask(1_000_000 + i, 8 * len(prompts) + 40, 64)
        for _ in range(20):
            self.core.step()
        moved = self.core.scheduler.blocks.moved_in
        waiting, times, at = list(prompts), list[float](), time.perf_counter()
        for step in range(8 * len(prompts)):
            if step % 8 == 0:
                self.ask(waiting.pop(), 1)
            self.core.step()
            now = time.perf_counter()
            times.append(now - at)
            at = now
        while self.core.has_work():
            self.core.step()
        return median(times), sum(times) / len(times), max(times), self.core.scheduler.blocks.moved_in - moved


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    args = parser.parse_args()
    llm = LLM(
        model=args.config, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", device="cuda",
        gpu_memory_utilization=0.9, max_model_len=4096, max_num_seqs=64, num_gpu_blocks=DEVICE,
        num_cpu_blocks=HOST, preemption_mode="swap",
    )  # fmt: skip
    core = llm.engine
    backend = core.backend
    assert isinstance(backend, CudaBackend)
    copies(backend)
    backend.capture_all()
    engine = Engine(core)
    engine.first_token(1)
    cold = [engine.first_token(p)[0] for p in range(100, 112)]  # 65 blocks each
    here = [engine.first_token(p) for p in range(104, 112)]
    answers = [engine.answer(p) for p in range(104, 112)]
    for p in range(200, 232):  # the device forgets what came before them
        engine.first_token(p)
    there = [engine.first_token(p) for p in range(104, 112)]
    for p in range(200, 232):
        engine.first_token(p)
    same = [engine.answer(p) for p in range(104, 112)] == answers
    print(
        f"first token of {PROMPT} tokens: cold {1e3 * median(cold):.2f} ms; found on the device "
        f"{1e3 * median(t for t, _ in here):.2f} ms ({here[0][1]} tokens); in host memory "
        f"{1e3 * median(t for t, _ in there):.2f} ms ({there[0][1]} tokens); "
        f"answers {'equal' if same else 'DIFFER'}",
        flush=True,
    )
    for name, before in (("device", False), ("host", True), ("device", False), ("host", True)):
        prompts = list(range(300, 308))
        for p in prompts:
            engine.first_token(p)
        if before:
            for p in range(400, 432):
                engine.first_token(p)
        middle, mean, most, moved = engine.beside(prompts)
        print(
            f"{STREAMS} streams, a prompt found in {name} memory every 8th step: between steps "
            f"{1e3 * middle:.3f} ms median, {1e3 * mean:.3f} mean, {1e3 * most:.3f} at most; "
            f"{moved} blocks came back",
            flush=True,
        )
    llm.close()


if __name__ == "__main__":
    main()
