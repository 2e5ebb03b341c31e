"""Grammars on their way through the engine: which tokens may come next, as bitmasks for the backend.

A request's grammar is a text in llguidance's own form (`text/grammar/grammar.py` makes it). It is compiled
beside the engine's thread; the request joins the queue when that is done. llguidance is imported with the
first grammar, and the vocabulary must have come before it (`Grammars.set_vocabulary`).

Most masks take some hundredths of a millisecond. A few of them are made in the engine's thread, while the
step before runs on the device; more are made together on all cores, for which the engine waits a moment. A
sequence whose last mask took long is followed in a thread of its own. Sequences whose masks are late sit out
the steps that are launched meanwhile; nobody else waits for them.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Sequence as Seq
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import TYPE_CHECKING, Any

import numpy as np

from rvllm.engine.ipc.messages import Vocabulary
from rvllm.engine.matcher import COSTLY, Mask, Matcher
from rvllm.errors import RvllmError
from rvllm.telemetry.stats import Stats

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

    from rvllm.engine.sequence import Sequence

    Compiled = tuple[LLMatcher, "Matcher", float]
    Followed = tuple[str | None, "Mask | None", float]
    Filled = tuple["Mask", float]

KEPT = 128  # compiled grammars kept for requests that bring the same again
KEPT_LENGTH = 1 << 16  # characters of the longest grammar that is kept
MAX_STATES = 50_000  # of a grammar's lexer, some 2 kB each
MAX_ITEMS = 30_000  # of a grammar at one place: the branches of a union, the keys of an object
TIMED = 4096  # mask times kept for the percentiles
ALONE = 4  # up to so many masks of a step are computed one after the other
BESIDE_THREADS = 4
POLL_SECONDS = 0.01  # how long an otherwise idle engine waits for a grammar before it looks at messages


class Grammars:
    """Compiles grammars and computes masks; belongs to the engine's thread."""

    def __init__(self, vocab_size: int, eos_token_ids: Seq[int], counted: Stats) -> None:
        """counted: where masks and their seconds are added up."""
        self._vocab_size, self._counted = vocab_size, counted
        self._eos = list(eos_token_ids)
        self._vocabulary: Future[LLTokenizer] | None = None
        self._words = -(-vocab_size // 32)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="grammar")  # its threads start with its work
        self._compiling: dict[str, tuple[Sequence, Future[Compiled]]] = {}  # by request id
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._wanted: dict[str, Sequence] = {}  # whose next mask is to be made, by request id
        self._beside: dict[str, tuple[Sequence, Future[Followed]]] = {}  # followed in threads of their own
        self._together: list[tuple[list[Sequence], Future[Filled]]] = []  # whose masks are made together
        self._beside_pool = ThreadPoolExecutor(BESIDE_THREADS, thread_name_prefix="mask")
        self._executor: LLExecutor | None = None
        self._times: deque[float] = deque(maxlen=TIMED)

    def __len__(self) -> int:
        """How many requests wait for their grammars."""
        return len(self._compiling)

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """What the token ids stand for; must come before the first grammar. A second one is ignored."""
        if self._vocabulary is None:
            self._vocabulary = self._pool.submit(self._build, vocabulary)

    def _build(self, vocabulary: Vocabulary) -> LLTokenizer:
        from llguidance import LLTokenizer

        eos = list(dict.fromkeys([*self._eos, *vocabulary.eos_token_ids]))
        return LLTokenizer(vocabulary.tokenizer, n_vocab=self._vocab_size, eos_token=eos)

    def begin(self, seq: Sequence, grammar: str) -> None:
        """Compiles a sequence's grammar and makes its first mask; `ready` hands the sequence back."""
        kept = self._compiled.get(grammar)
        if kept is not None:
            self._compiled.move_to_end(grammar)
        self._compiling[seq.request_id] = (seq, self._pool.submit(self._start, grammar, kept))

    def _start(self, grammar: str, kept: LLMatcher | None) -> Compiled:
        """(what may be kept, the matcher of a sequence with its first mask, the seconds that took)."""
        fresh = kept or self._compile(grammar)
        matcher = Matcher(fresh.deep_copy())
        row, seconds = matcher.next_mask(self._words)
        if matcher.too_complex is not None:
            raise RvllmError(matcher.too_complex)
        matcher.filled(row, seconds)
        return fresh, matcher, seconds

    def _compile(self, grammar: str) -> LLMatcher:
        """The grammar's matcher before its first token. Raises RvllmError with the reason."""
        from llguidance import LLMatcher, LLParserLimits

        if self._vocabulary is None:
            raise RvllmError("a grammar came before the vocabulary")
        try:
            tokenizer = self._vocabulary.result()
        except Exception as error:
            raise RvllmError(f"structured outputs do not work with this tokenizer: {error}") from None
        limits = LLParserLimits(max_lexer_states=MAX_STATES, max_items_in_row=MAX_ITEMS, verbose_errors=False)
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise RvllmError(f"grammar: {str(matcher.get_error()).strip()}")
        return matcher

    def forget(self, seq: Sequence) -> bool:
        """Nothing more is to be made for a sequence; whether it still waited for its grammar."""
        self._wanted.pop(seq.request_id, None)
        self._beside.pop(seq.request_id, None)
        return self._compiling.pop(seq.request_id, None) is not None

    def ready(self) -> list[tuple[Sequence, Matcher | str]]:
        """Sequences whose grammar is done, with the matcher or what is wrong with it; `forget` them then."""
        return [self._outcome(seq, done) for seq, done in self._compiling.values() if done.done()]

    def _outcome(self, seq: Sequence, done: Future[Compiled]) -> tuple[Sequence, Matcher | str]:
        error = done.exception()
        if error is not None:
            return seq, str(error)
        (fresh, matcher, seconds), grammar = done.result(), seq.sampling.grammar or ""
        self._count(seconds)
        if len(grammar) <= KEPT_LENGTH:
            self._compiled[grammar] = fresh
        if len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)
        return seq, matcher

    def accept(self, seq: Sequence, token: int) -> str | None:
        """Moves a sequence on by its last token; returns what is wrong when the grammar does not allow it."""
        assert seq.matcher is not None
        error = seq.matcher.accept(token)
        if error is None and not seq.matcher.ended:
            self._wanted[seq.request_id] = seq
        return error

    def accept_beside(self, seq: Sequence, token: int) -> None:
        """The same for a costly sequence, in a thread of its own; `settle` tells how it went."""
        assert seq.matcher is not None
        seq.matcher.mask = None
        self._beside[seq.request_id] = seq, self._beside_pool.submit(self._follow, seq.matcher, token)

    def _follow(self, matcher: Matcher, token: int) -> Followed:
        """(what is wrong, mask, seconds that it took); no mask where nothing can follow."""
        error = matcher.accept(token)
        if error is not None or matcher.ended:
            return error, None, 0.0
        row, seconds = matcher.next_mask(self._words)
        return matcher.too_complex, row, seconds

    def settle(self, device_busy: bool) -> list[tuple[Sequence, str | None]]:
        """Makes the masks that are wanted. Returns the sequences accepted beside that are done, and those
        for which no mask could be made, with what is wrong with each.

        A matcher that has exceeded its limits allows EOS wherever it is; its sequence must go no further.
        device_busy: whether a step runs meanwhile.
        """
        filled: list[Sequence] = []
        if self._wanted:
            began = time.perf_counter()
            filled += self._fill(list(self._wanted.values()))
            self._wanted.clear()
            self._counted.mask_exposed_seconds += 0.0 if device_busy else time.perf_counter() - began
        filled += self._take_filled()
        settled: list[tuple[Sequence, str | None]] = []
        for seq in filled:
            error = seq.matcher.too_complex if seq.matcher is not None else None
            if error is not None and seq.finish_reason is None:
                settled.append((seq, error))
        for name, (seq, done) in list(self._beside.items()):
            if done.done():
                del self._beside[name]
                error, row, seconds = done.result()
                if row is not None:
                    self._count(seconds)
                if row is not None and error is None and seq.matcher is not None:
                    seq.matcher.filled(row, seconds)
                settled.append((seq, error))
        return settled

    def wait(self) -> bool:
        """Sleeps until a grammar or a mask is done, for a moment at most; False when none is being made."""
        awaited: list[Future[Any]] = [done for _, done in self._compiling.values()]
        awaited += [done for _, done in self._beside.values()]
        awaited += [done for _, done in self._together]
        if not awaited:
            return False
        began = time.perf_counter()
        wait_for(awaited, POLL_SECONDS, FIRST_COMPLETED)
        if self._beside or self._together:
            self._counted.mask_exposed_seconds += time.perf_counter() - began
        return True

    def _fill(self, sequences: list[Sequence]) -> list[Sequence]:
        """Makes masks; returns the sequences that have theirs already."""
        matchers = [seq.matcher for seq in sequences if seq.matcher is not None]
        if len(matchers) <= ALONE:
            for matcher in matchers:
                row, seconds = matcher.next_mask(self._words)
                matcher.filled(row, seconds)
                self._count(seconds)
            return sequences
        done = self._beside_pool.submit(self._fill_together, matchers)
        self._together.append((sequences, done))
        wait_for([done], COSTLY)
        return []

    def _take_filled(self) -> list[Sequence]:
        """Hands out the masks that have been made together; returns whose they are."""
        late, ready = [], []
        for sequences, done in self._together:
            if not done.done():
                late.append((sequences, done))
                continue
            rows, seconds = done.result()
            for row, seq in zip(rows, sequences, strict=True):
                if seq.matcher is not None:
                    seq.matcher.filled(row, seconds / len(sequences))
            self._count(seconds, len(sequences))
            ready += sequences
        self._together = late
        return ready

    def _count(self, seconds: float, masks: int = 1) -> None:
        """Books masks that took so long, together when there are several."""
        self._counted.masks += masks
        self._counted.mask_seconds += seconds
        self._times.extend([seconds] * masks)

    def _fill_together(self, matchers: list[Matcher]) -> Filled:
        """(masks [len(matchers), ceil(vocab / 32)], seconds), made on all cores."""
        began = time.perf_counter()
        rows = np.zeros((len(matchers), self._words), dtype=np.uint32)
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor()
        natives = [(matcher.native, row) for row, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(natives, rows.ctypes.data, rows.shape[1] * 4, len(rows))
        return rows, time.perf_counter() - began

    def percentile(self, share: float) -> float:
        """Seconds that so large a share of the last tokens waited at most for their masks; 0 before any.

        Masks of a step that are computed together count with the time of all of them.
        """
        ordered = sorted(self._times)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

    def close(self) -> None:
        for pool in (self._pool, self._beside_pool):
            pool.shutdown(wait=False, cancel_futures=True)
