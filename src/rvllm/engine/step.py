"""One step: which sequences take part, and the flat batch the backend gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rvllm.backends.base import LAST_SAMPLED, Int32, SlotStart, StepBatch
from rvllm.engine.sequence import Sequence
from rvllm.telemetry.step_trace import TracedStep


@dataclass(slots=True)
class Step:
    """A launched step: `sequences[s]` is the sequence at index s of its batch.

    decodes: how many of them, the first ones, take part with one token. launched, launched_at: when it was
    launched, time.perf_counter() and time.time().
    """

    batch: StepBatch
    sequences: list[Sequence]
    decodes: int
    handle: Any = None
    launched: float = 0.0
    launched_at: float = 0.0
    traced: TracedStep | None = None  # with --trace-steps

    @property
    def decodes_only(self) -> bool:
        """Whether no part of a prompt is in it."""
        return self.decodes == len(self.sequences)

    def described(self) -> TracedStep:
        """What a trace tells of its batch."""
        batch = self.batch
        return TracedStep(
            step=batch.step,
            decodes=self.decodes,
            prompts=len(self.sequences) - self.decodes,
            prompt_tokens=batch.num_tokens - self.decodes,
            keys=int(batch.starts[: self.decodes].sum()) + self.decodes,
            draws=int(batch.sample.sum()),
        )


class StepPlan:
    """Collects a step's parts in the scheduler's order and lays out the batch at the end.

    Adding a part moves its sequence on: the tokens count as launched, the token it will draw as part of
    its length.
    """

    def __init__(self, number: int, budget: int, prompt_logprob_rows: int, max_chunk: int) -> None:
        self.number = number
        self.budget = budget  # tokens that may still be added
        self.max_chunk = max_chunk  # tokens of one prompt
        self.prompt_logprob_rows = prompt_logprob_rows  # rows with prompt logprobs that may still be added
        self.decodes: list[Sequence] = []
        self.prefills: list[Sequence] = []
        self.moves: list[tuple[int, int, int]] = []  # as StepBatch has them
        self.moves_after = -1
        self.moves_ahead = 0
        self._decode_tokens: list[int] = []
        self._chunks: list[tuple[int, int]] = []  # (start, length) of each prefill
        self._samples: list[bool] = []
        self._started: list[SlotStart] = []
        self._new_blocks: list[tuple[int, int, int]] = []
        self._prompt_logprobs: dict[int, int] = {}  # by index among the prefills

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)

    def add_decode(self, seq: Sequence) -> None:
        """One token, from which the next is drawn."""
        known = len(seq.tokens)
        self._decode_tokens.append(LAST_SAMPLED if seq.length > known else seq.tokens[known - 1])
        self.decodes.append(seq)
        seq.launched += 1
        seq.length += 1
        seq.in_flight += 1
        self.budget -= 1

    def add_prefill(self, seq: Sequence) -> None:
        """As much of what is known of a sequence as the budget allows; the last chunk draws a token."""
        count = min(seq.length - seq.launched, self.budget, self.max_chunk)
        if seq.borders:
            count = min(count, seq.borders[0] - seq.launched)
        if seq.prompt_logprobs_left:
            count = min(count, self.prompt_logprob_rows)
            if count == 0:
                return
            self.prompt_logprob_rows -= count
            self._prompt_logprobs[len(self.prefills)] = seq.sampling.prompt_logprobs or 0
        self._chunks.append((seq.launched, count))
        seq.launched += count
        last = seq.launched == seq.length
        self._samples.append(last)
        seq.length += last
        seq.in_flight += 1
        self.prefills.append(seq)
        self.budget -= count

    def start(self, seq: Sequence) -> None:
        """A sequence takes the slot and the blocks it holds."""
        tokens = np.array(seq.tokens, dtype=np.int32)
        self._started.append(SlotStart(seq.slot, seq.sampling, tokens, seq.prompt_len))
        self._new_blocks += [(seq.slot, index, block) for index, block in enumerate(seq.blocks)]

    def add_block(self, seq: Sequence, block: int) -> None:
        """A running sequence gets its next block."""
        self._new_blocks.append((seq.slot, len(seq.blocks), block))

    def finish(self) -> Step:
        """The step, with int32 arrays and token masks as `StepBatch` describes them."""
        decodes = len(self.decodes)
        sequences = self.decodes + self.prefills
        starts = [seq.launched - 1 for seq in self.decodes] + [start for start, _ in self._chunks]
        lengths = np.ones(len(sequences), dtype=np.int32)
        sample = np.ones(len(sequences), dtype=np.bool_)
        tokens = np.array(self._decode_tokens, dtype=np.int32)
        if self.prefills:
            lengths[decodes:] = [count for _, count in self._chunks]
            sample[decodes:] = self._samples
            pieces = [tokens]
            for seq, (start, count) in zip(self.prefills, self._chunks, strict=True):
                pieces.append(np.array(seq.tokens[start : start + count], dtype=np.int32))
            tokens = np.concatenate(pieces)
        limited = [s for s, seq in enumerate(sequences) if seq.matcher is not None or seq.filter is not None]
        batch = StepBatch(
            step=self.number,
            slots=np.array([seq.slot for seq in sequences], dtype=np.int32),
            query_lens=lengths,
            starts=np.array(starts, dtype=np.int32),
            tokens=tokens,
            sample=sample,
            started=self._started,
            new_blocks=_triples(self._new_blocks),
            moves=_triples(self.moves),
            moves_after=self.moves_after,
            moves_ahead=self.moves_ahead,
            prompt_logprobs={decodes + s: top for s, top in self._prompt_logprobs.items()},
            masks={s: mask for s in limited if sample[s] and (mask := sequences[s].token_mask) is not None},
        )
        return Step(batch, sequences, decodes)


def _triples(rows: list[tuple[int, int, int]]) -> Int32:
    return np.array(rows, dtype=np.int32) if rows else np.empty((0, 3), dtype=np.int32)
