"""What token masks cost behind a device of a given speed: the engine, a real vocabulary, a pretended device.

python scripts/bench_masks.py [--model qwen2.5-coder-0.5b] [--step-ms 5]

The device takes so long for every step, whatever is in it, and draws random allowed tokens. Prints for some
mixtures of constrained and free sequences how long steps took, what the masks took, and how long the device
waited for them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from rvllm.backends.base import LedgerLine, Limits, StepBatch, StepResult
from rvllm.config import EngineConfig, SourceConfig
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import Generate, ModelFacts, Sampling, Vocabulary
from rvllm.engine.sampling_params import StructuredOutputsParams
from rvllm.text.grammar.grammar import grammar_of, vocabulary_of
from rvllm.text.tokenizers.tokenizer import Tokenizer
from rvllm.weights.fetch.source import resolve

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.text.json_schemas import SCHEMAS

MIXTURES = ((1, 0), (1, 15), (8, 8), (32, 32), (128, 128))


class Device:
    """Steps of `seconds` each, one after the other."""

    name = "pretended"

    def __init__(self, seconds: float, limits: Limits) -> None:
        self.limits = limits
        self._seconds, self._free = seconds, 0.0
        self._dice = np.random.default_rng(0)

    def ledger(self) -> list[LedgerLine]:
        return []

    def stats(self) -> dict[str, float]:
        return {}

    def launch(self, batch: StepBatch) -> tuple[float, StepBatch]:
        self._free = max(time.perf_counter(), self._free) + self._seconds
        return self._free, batch

    def collect(self, handle: tuple[float, StepBatch]) -> StepResult:
        ready, batch = handle
        tokens = np.full(len(batch.slots), -1, dtype=np.int32)
        for s in np.flatnonzero(batch.sample).tolist():
            tokens[s] = self._draw(batch.masks.get(s))
        time.sleep(max(0.0, ready - time.perf_counter()))
        return StepResult(batch.step, tokens)

    def _draw(self, mask: Any) -> int:
        if mask is None:
            return 100
        word = int(self._dice.choice(np.flatnonzero(mask)))
        bits = [bit for bit in range(32) if int(mask[word]) >> bit & 1]
        return 32 * word + int(self._dice.choice(bits))

    def close(self) -> None:
        pass


def run(vocabulary: Vocabulary, size: int, eos: int, step: float, constrained: int, free: int) -> None:
    limits = Limits(256, 8192, 2048, 16, 40_000, 2)
    facts = ModelFacts(
        architecture="Pretended", model_path="", vocab_size=size, max_model_len=2048, eos_token_ids=[eos]
    )
    core = EngineCore(Device(step, limits), facts, EngineConfig())  # type: ignore[arg-type]
    core.grammars.set_vocabulary(vocabulary)
    dice = random.Random(0)
    for i in range(constrained):
        schema = {"type": "array", "minItems": 40, "items": dice.choice(SCHEMAS)}
        try:
            grammar = grammar_of(StructuredOutputsParams(json=json.dumps(schema)))
        except Exception:  # a schema whose references do not survive the nesting
            grammar = grammar_of(StructuredOutputsParams(json='{"type": "object"}'))
        core.add_request(Generate(f"c{i}", [1, 2, 3], Sampling(grammar=grammar, max_tokens=150)))
    while core.grammars:
        core.step()
    for i in range(free):
        core.add_request(Generate(f"f{i}", [1, 2, 3], Sampling(max_tokens=300)))
    steps, began, tokens = core.scheduler.steps, time.perf_counter(), 0
    while core.has_work():
        tokens += sum(len(output.token_ids) for output in core.step())
    each = (time.perf_counter() - began) / (core.scheduler.steps - steps)
    stats = core.stats()
    print(
        f"{constrained:4} constrained + {free:3} free: {1e3 * each:6.2f} ms a step; {stats.masks:6} masks, "
        f"p50 {1e3 * stats.mask_p50_seconds:6.3f} ms, p99 {1e3 * stats.mask_p99_seconds:6.3f} ms, "
        f"{stats.mask_seconds:.3f} s in all, device waited {stats.mask_exposed_seconds:.3f} s"
    )
    core.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--step-ms", type=float, default=5.0)
    args = parser.parse_args()
    tokenizer = Tokenizer.load(resolve(args.model, SourceConfig()))
    vocabulary = vocabulary_of(tokenizer)
    for constrained, free in MIXTURES:
        run(
            vocabulary,
            tokenizer.vocab_size,
            tokenizer.eos_token_id or 0,
            args.step_ms / 1e3,
            constrained,
            free,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
