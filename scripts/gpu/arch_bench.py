"""Every architecture at a published size with random weights: decoding one sequence, beside its floor.

    PYTHONPATH=src python scripts/gpu/arch_bench.py [--only NAME,...] [--profile] [--dry-run] [--json FILE]

A generating model decodes 64 tokens after a prompt of 12, alone, through the engine and its graphs; the
median of three runs. The floor is the bytes of a step (of experts those that are hit) over the rate of a
plain read of the same weights in the same process. An encoder's line gives texts a second, of 128 tokens in
full steps, and the time of one short text. A model that fails gets a line that says why, and the others go
on.

--profile times every kernel of a step too. --dry-run plans on any machine, with the facts of an H200.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from rvllm.backends.base import StepBatch
from rvllm.backends.cuda.device.driver import DeviceFacts
from rvllm.backends.cuda.layout.memory import Budget
from rvllm.backends.cuda.profile import MATMUL_RATE, READ_KERNEL, stream_rate
from rvllm.backends.cuda.step_planner import StepPlanner
from rvllm.bench.profile import profile_table
from rvllm.config import EngineConfig
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import Generate, ModelFacts, Sampling
from rvllm.models.config import ModelConfig
from rvllm.models.registry import build_program
from rvllm.program.cost import StepShape, program_cost
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program
from rvllm.program.ops.encoder import embedding_size
from support.models.real_configs import CONFIGS, on_one_card

PROMPT, TOKENS, RUNS = 12, 64, 3
CONTEXT = PROMPT + TOKENS // 2
TEXT, SHORT_TEXT = 128, 16
ENGINE = EngineConfig(
    device="cuda", max_num_seqs=4, max_num_batched_tokens=256, max_model_len=512, num_gpu_blocks=64,
    enable_prefix_caching=False, gpu_memory_utilization=0.97,
)  # fmt: skip
ENCODER = EngineConfig(device="cuda", max_num_seqs=128, max_num_batched_tokens=128 * TEXT)
H200 = DeviceFacts("NVIDIA H200 (planned)", 90, 132, 141 << 30, 232448)


@dataclass(frozen=True)
class Line:
    """What was measured of one model. Times in milliseconds; share: floor over step."""

    model: str
    weights_gb: float
    launches: int
    load_s: float
    step_ms: float
    floor_ms: float
    read_tb_s: float
    texts_s: float = 0.0

    @property
    def share(self) -> float:
        """How near to its floor it is."""
        return self.floor_ms / self.step_ms

    def __str__(self) -> str:
        front = f"{self.model:38} {self.weights_gb:6.1f} {self.launches:8d} {self.load_s:7.2f}"
        if self.texts_s:
            return f"{front} {self.texts_s:9.0f} {self.step_ms:8.3f} {self.floor_ms:8.3f} {self.share:6.0%} *"
        return f"{front} {1e3 / self.step_ms:9.1f} {self.step_ms:8.3f} {self.floor_ms:8.3f} {self.share:6.0%}"


HEAD = (
    f"{'model':38} {'GB':>6} {'launches':>8} {'load s':>7} {'tokens/s':>9} {'ms':>8} {'floor':>8} "
    f"{'share':>6}"
)
NOTE = (
    "* an encoder: texts/s of 128 tokens in full steps; ms of such a step beside the floor of its arithmetic"
)


def program_of(name: str, dtype: DType) -> tuple[str, Program]:
    """The model's label and program."""
    label, config = on_one_card(name)
    return label, build_program(ModelConfig(config, name), dtype)


def dry_run(name: str, dtype: DType) -> Line:
    """The plan alone: launches and floor at an H200's plain read rate."""
    from rvllm.backends.cuda.encoder_plan import EncoderPlan

    label, program = program_of(name, dtype)
    budget = Budget(141 << 30, 1 << 30, 136 << 30)
    if embedding_size(program) is not None:
        plan = EncoderPlan.make(program, ENCODER, H200, budget)
        launches = len(plan.launches(ENCODER.max_num_seqs * TEXT))
        floor = encoder_floor(program, 4.2e12)
        return Line(label, plan.lines["weights"] / 1e9, launches, 0.0, float("nan"), 1e3 * floor, 4.2, 1.0)
    planner, _ = StepPlanner.plan(program, ENGINE, H200, budget)
    planner.kernels()
    cost = program_cost(program, StepShape(1, 1, CONTEXT))
    return Line(
        label, planner.memory.lines["weights"] / 1e9, len(planner.decode(1)), 0.0, float("nan"),
        1e3 * cost.nbytes / 4.2e12, 4.2,
    )  # fmt: skip


def encoder_floor(program: Program, read: float) -> float:
    """Seconds below which a full step of texts cannot go."""
    shape = StepShape(ENCODER.max_num_seqs, TEXT, TEXT)
    return program_cost(program, shape).floor_seconds(read, MATMUL_RATE)


def read_rate(backend: Any) -> float:
    """Bytes a second of a plain read of the weights, at most 16 GB of them."""
    arena = backend._gpu.arena
    nbytes = min(backend._planner.memory.lines["weights"], 16 << 30) // 4096 * 4096
    backend._catalog.require([READ_KERNEL])
    sink, blocks = backend._at.bests, 4 * backend._facts.sm_count
    return stream_rate(backend._catalog, backend._stream, arena.base, nbytes, sink, blocks)


def decode_seconds(core: EngineCore, prompt: list[int], number: int) -> float:
    """Seconds a token, from the first drawn to the last."""
    core.add_request(Generate(str(number), prompt, Sampling(max_tokens=TOKENS)))
    stamps: list[float] = []
    while core.has_work():
        for output in core.step():
            if output.finish_reason == "error":
                raise RuntimeError(output.error)
            stamps += [time.perf_counter()] * len(output.token_ids)
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1)


def generate(label: str, program: Program, profile: bool) -> Line:
    """Loads a generating model with random weights and measures it."""
    from rvllm.backends.cuda.backend import CudaBackend

    began = time.perf_counter()
    backend = CudaBackend.load(program, None, ENGINE)
    load = time.perf_counter() - began
    facts = ModelFacts(
        architecture=program.architecture, model_path=label, vocab_size=program.vocab_size,
        max_model_len=backend.limits.max_model_len, eos_token_ids=[], bos_token_id=None,
    )  # fmt: skip
    core = EngineCore(backend, facts, ENGINE)
    try:
        if profile:
            print(f"{label}\n{profile_table(backend.profile(1, CONTEXT))}", flush=True)
        rng = np.random.default_rng(0)
        prompts = rng.integers(0, program.vocab_size, (RUNS + 1, PROMPT)).tolist()
        times = [decode_seconds(core, prompt, i) for i, prompt in enumerate(prompts)][1:]
        read = read_rate(backend)
        launches = len(backend._planner.decode(1))
        weights = backend._planner.memory.lines["weights"] / 1e9
    finally:
        core.close()
    floor = program_cost(program, StepShape(1, 1, CONTEXT)).nbytes / read
    return Line(label, weights, launches, load, 1e3 * median(times), 1e3 * floor, read / 1e12)


def text_batch(rng: np.random.Generator, count: int, length: int, vocab: int) -> StepBatch:
    """A step of `count` texts of one length."""
    nothing = np.zeros(count, np.int32)
    tokens = rng.integers(0, vocab, count * length).astype(np.int32)
    return StepBatch(
        0, np.arange(count, dtype=np.int32), nothing + length, nothing, tokens, nothing.astype(np.bool_)
    )


def encode(label: str, program: Program) -> Line:
    """Loads an encoder with random weights and measures it."""
    from rvllm.backends.cuda.encoder import CudaEncoder

    began = time.perf_counter()
    encoder = CudaEncoder.load(program, None, ENCODER)
    load = time.perf_counter() - began
    try:
        rng = np.random.default_rng(0)
        timed: dict[int, float] = {}
        for count, length in ((ENCODER.max_num_seqs, TEXT), (1, SHORT_TEXT)):
            batch = text_batch(rng, count, length, program.vocab_size)
            times = []
            for _ in range(12):
                start = time.perf_counter()
                vectors = encoder.embed(batch)
                times.append(time.perf_counter() - start)
            if not np.isfinite(vectors).all():
                raise RuntimeError("vectors that are no numbers")
            timed[count] = median(times[2:])
        launches = len(encoder._plan.launches(ENCODER.max_num_seqs * TEXT, encoder._at))
        weights = encoder._plan.lines["weights"] / 1e9
    finally:
        encoder.close()
    print(f"{label}: one text of {SHORT_TEXT} tokens in {1e3 * timed[1]:.3f} ms")
    step, floor = timed[ENCODER.max_num_seqs], encoder_floor(program, 4.2e12)
    return Line(
        label, weights, launches, load, 1e3 * step, 1e3 * floor, 0.0, texts_s=ENCODER.max_num_seqs / step
    )  # fmt: skip


def lines(args: argparse.Namespace) -> Iterator[Line]:
    """One line a model, as they are measured."""
    names = list(CONFIGS) if args.only is None else args.only.split(",")
    unknown = [name for name in names if name not in CONFIGS]
    if unknown:
        raise SystemExit(f"no model {', '.join(unknown)}; there are {', '.join(CONFIGS)}")
    dtype = DType.parse(args.dtype)
    for name in names:
        try:
            if args.dry_run:
                yield dry_run(name, dtype)
                continue
            label, program = program_of(name, dtype)
            if embedding_size(program) is None:
                yield generate(label, program, args.profile)
            else:
                yield encode(label, program)
        except Exception as error:  # a table of what works is wanted even when one model does not
            print(f"{name:38} {type(error).__name__}: {error}", flush=True)
        gc.collect()


def main() -> int:
    """Prints the table; 1 when a model failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME,...", help="these models")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--profile", action="store_true", help="time every kernel of a step too")
    parser.add_argument("--dry-run", action="store_true", help="plan, without a GPU")
    parser.add_argument("--json", metavar="FILE", help="write the lines to FILE")
    args = parser.parse_args()
    began = time.perf_counter()
    print(HEAD, flush=True)
    found = []
    for line in lines(args):
        print(line, flush=True)
        found.append({**asdict(line), "share": line.share})
        if args.json:
            Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    print(f"{NOTE}\n{len(found)} models in {time.perf_counter() - began:.0f} s")
    wanted = len(CONFIGS) if args.only is None else len(args.only.split(","))
    return 0 if len(found) == wanted else 1


if __name__ == "__main__":
    raise SystemExit(main())
