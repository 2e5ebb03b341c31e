"""A backend that draws random allowed tokens: what a grammar lets through when the model wants anything."""

from __future__ import annotations

from collections import deque

import numpy as np

from rvllm.backends.base import LedgerLine, Limits, SlotStart, StepBatch, StepResult
from rvllm.telemetry.stats import StepKernel


class RandomDouble:
    """Draws from random logits among the tokens that the mask allows; stop tokens not before min_tokens.

    The logits of a sequence depend on its seed and the output index alone.
    """

    name = "random"

    def __init__(self, limits: Limits, vocab: int, bias: np.ndarray | None = None) -> None:
        self.limits, self.vocab = limits, vocab
        self.bias = np.zeros(vocab) if bias is None else bias
        self.starts: dict[int, SlotStart] = {}
        self.drawn: dict[int, int] = {}
        self.masked_rows = 0
        self._pending: deque[StepResult] = deque()

    def ledger(self) -> list[LedgerLine]:
        return []

    def stats(self) -> dict[str, float]:
        return {}

    def launch(self, batch: StepBatch) -> StepResult:
        for start in batch.started:
            self.starts[start.slot] = start
            self.drawn[start.slot] = len(start.tokens) - start.prompt_len
        result = StepResult(batch.step, np.full(len(batch.slots), -1, dtype=np.int32))
        for s, slot in enumerate(batch.slots.tolist()):
            if batch.sample[s]:
                result.tokens[s] = self._draw(slot, batch.masks.get(s))
                self.drawn[slot] += 1
        self._pending.append(result)
        return result

    def _draw(self, slot: int, mask: np.ndarray | None) -> int:
        spec, index = self.starts[slot].sampling, self.drawn[slot]
        rng = np.random.default_rng([spec.seed, index])
        allowed = np.ones(self.vocab, dtype=bool)
        if mask is not None:
            self.masked_rows += 1
            assert mask.dtype == np.uint32 and mask.shape == (-(-self.vocab // 32),)
            allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: self.vocab].astype(bool)
        if index < spec.min_tokens:
            allowed[list(spec.stop_token_ids)] = False
        logits = np.where(allowed, rng.standard_normal(self.vocab) * 4 + self.bias, -np.inf)
        if not allowed.any():
            return 0
        if spec.temperature == 0:
            return int(np.argmax(logits))
        return int(np.argmax(logits / spec.temperature + rng.gumbel(size=self.vocab)))

    def collect(self, handle: StepResult) -> StepResult:
        assert handle is self._pending.popleft()
        return handle

    def decode_floor(self, seqs: int, context: int) -> float | None:
        return None

    def last_kernels(self) -> list[StepKernel]:
        return []

    def close(self) -> None:
        pass
