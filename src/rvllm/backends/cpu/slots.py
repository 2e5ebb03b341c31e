"""What each slot carries from step to step: block table, last token, history for the sampler."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.base import KV_BLOCK, LAST_SAMPLED, Limits, StepBatch
from rvllm.backends.cpu.reference.attention import SPLIT_BLOCKS
from rvllm.backends.cpu.reference.sampler import History
from rvllm.backends.cpu.step import Step, flat_step


class Slots:
    """State of all slots 0 .. max_num_seqs - 1."""

    def __init__(self, limits: Limits, vocab: int) -> None:
        splits = -(-limits.max_model_len // (KV_BLOCK * SPLIT_BLOCKS))
        self.vocab = vocab
        self.zeros = limits.num_blocks  # a block behind those handed out, which nothing is written to
        self.tables = np.full((limits.max_num_seqs, splits * SPLIT_BLOCKS), self.zeros, dtype=np.int32)
        self.last = np.zeros(limits.max_num_seqs, dtype=np.int32)
        self.histories: dict[int, History] = {}
        self.given: dict[int, NDArray[np.int32]] = {}

    def drew(self, slot: int, token: int) -> None:
        self.last[slot] = token
        self.histories[slot].append(token)

    def update(self, batch: StepBatch) -> NDArray[np.int32]:
        """Applies starts and new blocks; returns the blocks that hold nothing of their sequence yet."""
        for entry in batch.started:
            slot, tokens = entry.slot, entry.tokens
            self.tables[slot] = self.zeros
            self.histories[slot] = History.begin(entry.sampling, tokens, entry.prompt_len, self.vocab)
            self.given[slot] = tokens
        slots, index, block = batch.new_blocks.T
        self.tables[slots, index] = block
        first = np.full(len(self.tables), np.iinfo(np.int32).max)
        first[batch.slots] = batch.starts
        fresh: NDArray[np.int32] = block[index * KV_BLOCK >= first[slots]]
        return fresh

    def step(self, batch: StepBatch, rows: NDArray[np.int64]) -> Step:
        """The batch's flat arrays, each LAST_SAMPLED replaced by its slot's last token."""
        tokens = batch.tokens
        if (tokens == LAST_SAMPLED).any():
            own = np.repeat(self.last[batch.slots], batch.query_lens)
            tokens = np.where(tokens == LAST_SAMPLED, own, tokens)
        return flat_step(tokens, batch.query_lens, batch.starts, self.tables[batch.slots], rows, batch.slots)

    def next_tokens(self, slot: int, start: int, count: int) -> NDArray[np.int32]:
        """The tokens that follow positions start .. start + count - 1, as far as the SlotStart gave them."""
        return self.given[slot][start + 1 : start + 1 + count]


def text_tables(lengths: NDArray[np.int32], zeros: int) -> NDArray[np.int32]:
    """Block tables of texts that share a step, each with its own blocks, padded with the block of zeros."""
    counts = -(-lengths // KV_BLOCK)
    width = -(-int(counts.max(initial=0)) // SPLIT_BLOCKS) * SPLIT_BLOCKS
    index = np.arange(width, dtype=np.int32)
    firsts = (np.cumsum(counts) - counts).astype(np.int32)
    return np.where(index < counts[:, None], firsts[:, None] + index, zeros).astype(np.int32)
