"""One packed buffer of int32 words per step: everything the kernels need to know of a batch.

The host fills a pinned image and copies it to the device in one go before the step's graph. A layout is
fixed by its capacities, so that a graph captured for one padded batch size keeps its addresses.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.base import StepBatch
from rvllm.kernels.constants import constants

HEADER_WORDS = 16
LINE_WORDS = 32  # 128 bytes: every array behind the header takes whole cache lines
NUM_TOKENS, NUM_SEQS, NUM_SAMPLES, NUM_BLOCK_UPDATES, NUM_DECODES, NUM_TILES = range(6)
HOST_TOKENS = 8  # of two words
_KNOWN = constants("common/slot.cuh")  # to the head's epilogue
BEST_ONLY, SLOTS, SAMPLE_SLOTS = _KNOWN["BEST_ONLY"], _KNOWN["SLOTS"], _KNOWN["SAMPLE_SLOTS"]
assert _KNOWN["NUM_SAMPLES"] == NUM_SAMPLES


@dataclass(frozen=True)
class Sampling:
    """How a step's tokens are drawn, and where they go.

    best_only: what the head leaves: 0 logits, FIND_BEST or DRAW (kernels/common/slot.cuh). slots: the
    device's address of the slots' parameters. host_tokens: its address of host memory, int32 [samples].
    """

    best_only: int = 0
    slots: int = 0
    host_tokens: int = 0


@dataclass(frozen=True)
class Layout:
    """Word offsets of each array for steps of up to `tokens` tokens, `seqs` sequences and `samples` rows.

    header [16]: token, sequence, sample, block-update, decode and tile counts; what the head leaves; the
    address in mapped host memory that the drawn tokens go to, that of the slots' parameters, the offset of
    sample_slots.
    token_ids, positions, token_slots [tokens]: per row of the flat batch; id -1 is the slot's last sample.
    seq_slots, kv_lens [seqs], query_offsets [seqs + 1]: per sequence; kv_len counts this step's tokens too.
    kinds [tokens]: where rows have no slot (encoders), 1 for those of a pair's second text, in their place.
    sample_rows, sample_slots, mask_rows [samples]: the rows whose logits are wanted, the slot that draws from
    each (-1: none does) and the row of its token mask (-1: none).
    tiles [tiles, 2]: the blocks of prefill attention, (-1, 0) where there is none.
    block_updates [updates, 3]: (slot, index, block) to write into the block tables first; always last, so
    that only the used part is copied.
    """

    tokens: int
    seqs: int
    samples: int
    tiles: int
    updates: int

    token_ids: int = field(init=False)
    positions: int = field(init=False)
    token_slots: int = field(init=False)
    kinds: int = field(init=False)
    seq_slots: int = field(init=False)
    kv_lens: int = field(init=False)
    query_offsets: int = field(init=False)
    sample_rows: int = field(init=False)
    sample_slots: int = field(init=False)
    mask_rows: int = field(init=False)
    tile_list: int = field(init=False)
    block_updates: int = field(init=False)
    nbytes: int = field(init=False)  # of the whole buffer

    def __post_init__(self) -> None:
        sizes = {
            "token_ids": self.tokens, "positions": self.tokens, "token_slots": self.tokens,
            "seq_slots": self.seqs, "kv_lens": self.seqs, "query_offsets": self.seqs + 1,
            "sample_rows": self.samples, "sample_slots": self.samples, "mask_rows": self.samples,
            "tile_list": 2 * self.tiles, "block_updates": 3 * self.updates,
        }  # fmt: skip
        offset = HEADER_WORDS
        for name, words in sizes.items():
            object.__setattr__(self, name, offset)
            offset += -(-words // LINE_WORDS) * LINE_WORDS
        object.__setattr__(self, "kinds", self.token_slots)
        object.__setattr__(self, "nbytes", 4 * offset)

    def pack(
        self,
        batch: StepBatch,
        updates: NDArray[np.int32],
        rows: SampledRows,
        tiles: NDArray[np.int32],
        out: NDArray[np.int32],
        sampling: Sampling = Sampling(),
    ) -> int:
        """Writes a batch into `out` (int32 words) and returns how many bytes of it are used.

        updates: the batch's new blocks, less those already sent. tiles: int32 [n, 2], see
        `attention.prefill_tiles`.
        """
        tokens, seqs, samples = batch.num_tokens, len(batch.slots), len(rows.rows)
        header = out[:HEADER_WORDS]
        header[:] = 0
        header[NUM_TOKENS], header[NUM_SEQS], header[NUM_SAMPLES] = tokens, seqs, samples
        header[NUM_BLOCK_UPDATES] = len(updates)
        header[NUM_DECODES], header[NUM_TILES] = leading_decodes(batch.query_lens), len(tiles)
        header[BEST_ONLY], header[SAMPLE_SLOTS] = sampling.best_only, self.sample_slots
        header[HOST_TOKENS : HOST_TOKENS + 2].view(np.int64)[0] = sampling.host_tokens
        header[SLOTS : SLOTS + 2].view(np.int64)[0] = sampling.slots
        _put(out, self.token_ids, batch.tokens)
        offsets = out[self.query_offsets : self.query_offsets + seqs + 1]
        offsets[0] = 0
        np.cumsum(batch.query_lens, out=offsets[1:])
        if tokens == seqs:  # decodes only: one row each
            _put(out, self.positions, batch.starts)
            _put(out, self.token_slots, batch.slots)
        else:
            within = np.arange(tokens, dtype=np.int32) - np.repeat(offsets[:-1], batch.query_lens)
            _put(out, self.positions, within + np.repeat(batch.starts, batch.query_lens))
            _put(out, self.token_slots, np.repeat(batch.slots, batch.query_lens))
        _put(out, self.seq_slots, batch.slots)
        _put(out, self.kv_lens, batch.starts + batch.query_lens)
        _put(out, self.sample_rows, rows.rows)
        _put(out, self.sample_slots, rows.slots)
        _put(out, self.mask_rows, rows.masks)
        listed = out[self.tile_list : self.tile_list + 2 * self.tiles].reshape(-1, 2)
        listed[: len(tiles)] = tiles
        listed[len(tiles) :] = (-1, 0)
        _put(out, self.block_updates, updates.reshape(-1))
        return 4 * (self.block_updates + 3 * len(updates))

    def pack_kinds(self, batch: StepBatch, out: NDArray[np.int32], several: bool) -> None:
        """Writes kinds over a packed batch's token slots. several: whether the model has more than one."""
        kinds = out[self.kinds : self.kinds + batch.num_tokens]
        kinds[:] = 0
        ends = np.cumsum(batch.query_lens)
        for s, second in batch.seconds.items() if several else ():
            kinds[ends[s] - batch.query_lens[s] + second : ends[s]] = 1


@dataclass(frozen=True)
class SampledRows:
    """The rows of the flat batch whose logits a step wants, each int32 [R].

    slots: the slot that draws from the row, -1 for a row that is only scored. masks: the row of its mask
    among the step's masks, -1 for none. seqs: the sequence of the batch it belongs to.
    """

    rows: NDArray[np.int32]
    slots: NDArray[np.int32]
    masks: NDArray[np.int32]
    seqs: NDArray[np.int32]

    @staticmethod
    def of(batch: StepBatch) -> SampledRows:
        """Sampled rows first, in the batch's order, then the rows of sequences with prompt logprobs."""
        ends = np.cumsum(batch.query_lens, dtype=np.int32)
        seqs = np.flatnonzero(batch.sample).astype(np.int32)
        rows, slots = (ends - 1)[seqs], batch.slots[seqs]
        masks = np.full(len(seqs), -1, dtype=np.int32)
        for row, s in enumerate(sorted(batch.masks)):
            masks[np.searchsorted(seqs, s)] = row
        for s in sorted(batch.prompt_logprobs):
            scored = np.arange(ends[s] - batch.query_lens[s], ends[s], dtype=np.int32)
            none = np.full(len(scored), -1, dtype=np.int32)
            rows, slots = np.concatenate([rows, scored]), np.concatenate([slots, none])
            masks, seqs = np.concatenate([masks, none]), np.concatenate([seqs, none + 1 + s])
        return SampledRows(rows, slots, masks, seqs)


def leading_decodes(query_lens: NDArray[np.int32]) -> int:
    """How many sequences at the front compute one token: what the decode attention kernel takes."""
    longer = np.flatnonzero(query_lens != 1)
    return int(longer[0]) if len(longer) else len(query_lens)


def _put(out: NDArray[np.int32], offset: int, values: NDArray[np.int32]) -> None:
    out[offset : offset + len(values)] = values
