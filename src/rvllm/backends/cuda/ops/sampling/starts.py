"""Slots taken by sequences: their parameters, token counts and block tables onto the device."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.base import SlotStart
from rvllm.backends.cuda.device.catalog import Catalog
from rvllm.backends.cuda.device.driver import Event, Launch, Pinned, Stream
from rvllm.backends.cuda.device.launches import ints
from rvllm.backends.cuda.layout.addresses import Addresses, Shape
from rvllm.backends.cuda.layout.metadata import HEADER_WORDS, NUM_BLOCK_UPDATES
from rvllm.backends.cuda.ops.sampling.slots import START_WORDS, pack_starts

KERNEL = "sm80_slot_start"
BEGIN_KERNEL = "sm80_begin_step"


class Starter:
    """Sends what starting sequences need through one pinned buffer of `words` int32 words."""

    def __init__(self, catalog: Catalog, stream: Stream, at: Addresses, shape: Shape, words: int) -> None:
        self._stream = stream
        self._vocab = shape.vocab
        self._words = words - shape.seqs * START_WORDS
        self._staging = Pinned(4 * words)
        self._sent = Event()
        self._target = at.starts
        self._words_at = 4 * shape.seqs * START_WORDS
        self._launch = Launch(
            catalog[KERNEL],
            1024,
            0,
            [
                at.parameters,
                at.histories,
                at.bias_ids,
                at.biases,
                at.stops,
                self._target,
                self._target + self._words_at,
                *ints(shape.vocab, shape.history_stride),
            ],
            pdl=False,
        )
        self._begin = Launch(
            catalog[BEGIN_KERNEL],
            256,
            0,
            [
                self._target,
                self._target + 4 * HEADER_WORDS,
                at.tables,
                ctypes.c_int(shape.table_stride),
            ],
            pdl=False,
        )

    def start(self, started: Sequence[SlotStart]) -> None:
        """Queues the slots' parameters and token counts."""
        for entries, words in self._batches(started):
            self._sent.wait()
            image = self._staging.array.view(np.int32)
            image[: entries.size] = entries.reshape(-1)
            first = self._words_at // 4
            image[first : first + len(words)] = words
            self._stream.copy_to_device(self._target, self._staging.address, entries.nbytes)
            if len(words):
                source = self._staging.address + self._words_at
                self._stream.copy_to_device(self._target + self._words_at, source, words.nbytes)
            self._launch.run(self._stream, (len(entries), 1, 1))
            self._sent.record(self._stream)

    def early_updates(self, updates: NDArray[np.int32], most: int) -> NDArray[np.int32]:
        """Sends block-table entries beyond the `most` that a step's metadata holds; returns the others."""
        room = min(most, (self._staging.nbytes // 4 - HEADER_WORDS) // 3)
        while len(updates) > most:
            batch, updates = updates[:room], updates[room:]
            self._sent.wait()
            image = self._staging.array.view(np.int32)
            image[:HEADER_WORDS] = 0
            image[NUM_BLOCK_UPDATES] = len(batch)
            image[HEADER_WORDS : HEADER_WORDS + batch.size] = batch.reshape(-1)
            self._stream.copy_to_device(self._target, self._staging.address, 4 * (HEADER_WORDS + batch.size))
            self._begin.run(self._stream, (64, 1, 1))
            self._sent.record(self._stream)
        return updates

    def close(self) -> None:
        """Frees the pinned buffer."""
        self._staging.close()
        self._sent.close()

    def _batches(self, started: Sequence[SlotStart]) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """Packed starts in groups that fit the buffer; all of them in one unless prompts are counted."""
        if not started:
            return
        entries, words = pack_starts(started, self._vocab)
        if len(words) <= self._words:
            yield entries, words
            return
        half = len(started) // 2
        if not half:  # one sequence's tokens always fit: the buffer holds max_model_len and every list
            raise ValueError("a sequence exceeds the buffer for starting slots")
        yield from self._batches(started[:half])
        yield from self._batches(started[half:])
