"""Log-probabilities of drawn tokens and of prompts: what to ask the kernel for, and what it answered."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.base import SlotStart, StepResult, TokenLogprobs
from rvllm.backends.cuda.device.catalog import Catalog
from rvllm.backends.cuda.device.driver import Launch, Pinned, Stream
from rvllm.backends.cuda.device.launches import ints
from rvllm.backends.cuda.in_flight import InFlightStep
from rvllm.backends.cuda.layout.addresses import Addresses, Shape
from rvllm.backends.cuda.ops.sampling.arrays import LogprobArrays
from rvllm.backends.cuda.ops.sampling.slots import MAX_TOP, PICK_THREADS
from rvllm.backends.logprobs import top_logprobs

KERNEL = "sm80_logprobs"


class Scorer:
    """Knows which slots want logprobs and what their prompts go on with."""

    def __init__(self, catalog: Catalog, stream: Stream, at: Addresses, shape: Shape) -> None:
        self._stream = stream
        self._tops: dict[int, int] = {}
        self._given: dict[int, NDArray[np.int32]] = {}
        rows = shape.samples
        self._vocab, self._logits, self._pitch = shape.vocab, at.logits, shape.logits_stride
        self._arrays = arrays = LogprobArrays(rows, at.scores)
        self._launch = Launch(
            catalog[KERNEL],
            PICK_THREADS,
            0,
            [
                arrays.token,
                arrays.ranks,
                arrays.top_ids,
                arrays.top,
                at.logits,
                arrays.entries,
                arrays.entries + 4 * rows,
                arrays.entries + 8 * rows,
                at.tokens,
                arrays.entries + 12 * rows,
                *ints(shape.vocab, shape.logits_stride),
            ],
            pdl=False,
        )

    def start(self, entry: SlotStart) -> None:
        """A sequence takes a slot."""
        self._given[entry.slot] = entry.tokens
        self._tops.pop(entry.slot, None)
        if entry.sampling.logprobs is not None:
            self._tops[entry.slot] = entry.sampling.logprobs

    def launch(self, flight: InFlightStep) -> None:
        """Queues the kernel for the rows of this step that want logprobs, and the copy of its answers."""
        flight.asked = []
        if not self._tops and not flight.batch.prompt_logprobs:
            return
        entries = self._ask(flight)
        count = len(entries)
        if not count:
            return
        arrays = self._arrays
        words = flight.entries.array.view(np.int32).reshape(4, arrays.rows)
        words[:3, :count] = np.array(entries, dtype=np.int32).T
        words[3, 0] = count
        self._stream.copy_to_device(arrays.entries, flight.entries.address, flight.entries.nbytes)
        self._launch.run(self._stream, (count, 1, 1))
        self._stream.copy_to_host(flight.scores.address, arrays.token, arrays.result_bytes)
        self._fetch_rows(flight, entries)

    def _fetch_rows(self, flight: InFlightStep, entries: list[tuple[int, int, int]]) -> None:
        """Queues copies of the rows of which more is wanted than the kernel reports; the host ranks those."""
        wide = [row for row, _, top in entries if top > MAX_TOP]
        nbytes = 4 * self._vocab
        if wide and (flight.wide is None or flight.wide.nbytes < len(wide) * nbytes):
            if flight.wide is not None:
                flight.wide.close()
            flight.wide = Pinned(len(wide) * nbytes)
        for place, row in enumerate(wide):
            assert flight.wide is not None
            source = self._logits + 4 * self._pitch * row
            self._stream.copy_to_host(flight.wide.address + place * nbytes, source, nbytes)

    def _ask(self, flight: InFlightStep) -> list[tuple[int, int, int]]:
        """(row, target token or -1 for the drawn one, top tokens wanted) of each entry."""
        batch, rows = flight.batch, flight.rows
        ends = np.cumsum(batch.query_lens)
        entries: list[tuple[int, int, int]] = []
        for row, (slot, s) in enumerate(zip(rows.slots.tolist(), rows.seqs.tolist(), strict=True)):
            if slot >= 0:
                top = self._tops.get(slot)
                if top is not None:
                    entries.append((row, -1, top))
                    flight.asked.append((s, -1, top))
                continue
            within = int(rows.rows[row]) - int(ends[s] - batch.query_lens[s])
            following = int(batch.starts[s]) + within + 1
            given = self._given[int(batch.slots[s])]
            if following < len(given):
                top = batch.prompt_logprobs[s]
                token = int(given[following])
                entries.append((row, token, top))
                flight.asked.append((s, token, top))
        return entries

    def read(self, flight: InFlightStep, result: StepResult) -> None:
        """Puts the kernel's answers into the step's result."""
        for s in flight.batch.prompt_logprobs:
            result.prompt_logprobs[s] = []
        if not flight.asked:
            return
        rows, raw = self._arrays.rows, flight.scores.array
        token = raw[: 4 * rows].view(np.float32)
        ranks = raw[4 * rows : 8 * rows].view(np.int32)
        ids = raw[8 * rows : (8 + 4 * MAX_TOP) * rows].view(np.int32).reshape(rows, MAX_TOP)
        top = raw[(8 + 4 * MAX_TOP) * rows :].view(np.float32).reshape(rows, MAX_TOP)
        place = 0
        for i, (s, given, count) in enumerate(flight.asked):
            scored = TokenLogprobs(
                token_id=int(result.tokens[s]) if given < 0 else given,
                logprob=float(token[i]),
                rank=int(ranks[i]),
                top_ids=ids[i, :count].tolist(),
                top_logprobs=top[i, :count].tolist(),
            )
            if count > MAX_TOP and flight.wide is not None:
                row = flight.wide.array.view(np.float32)[place * self._vocab : (place + 1) * self._vocab]
                ranked = top_logprobs(row, 0, count)
                scored.top_ids, scored.top_logprobs = ranked.top_ids, ranked.top_logprobs
                place += 1
            if given >= 0:
                result.prompt_logprobs[s].append(scored)
            else:
                result.logprobs[s] = scored
