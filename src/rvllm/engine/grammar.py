"""Grammars on their way through the engine: which tokens may come next, as bitmasks for the backend.

A request's grammar is a text in llguidance's own form (`text/grammar.py` makes it). It is compiled beside
the engine's thread; the request joins the queue when that is done. llguidance is imported with the first
grammar, and the vocabulary must have come before it (`EngineCore.set_vocabulary`).
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Sequence as Seq
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rvllm.engine.messages import Vocabulary
from rvllm.errors import RvllmError

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

    from rvllm.engine.sequence import Sequence

KEPT = 128  # compiled grammars kept for requests that bring the same again
KEPT_LENGTH = 1 << 16  # characters of the longest grammar that is kept
MOST_STATES = 50_000  # of a grammar's lexer, some 2 kB each
TIMED = 4096  # mask times kept for the percentiles
ALONE = 4  # up to so many masks of a step are computed one after the other
ALLOWANCE = 2.0  # seconds that following a grammar may cost, and seconds more for each token
ALLOWANCE_PER_TOKEN = 0.01
POLL_SECONDS = 0.01  # how long an otherwise idle engine waits for a grammar before it looks at messages


class Matcher:
    """One sequence's place in its grammar.

    seconds: what following it has cost so far. An ambiguous grammar can cost ever more with each token;
    one that exceeds its allowance ends its request, so that it does not stall the others.
    """

    __slots__ = ("_matcher", "_tokens", "seconds")

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._tokens = 0
        self.seconds = 0.0

    @property
    def native(self) -> LLMatcher:
        """llguidance's own object."""
        return self._matcher

    @property
    def ended(self) -> bool:
        """Whether nothing can follow: the text is complete."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def accept(self, token: int) -> str | None:
        """Moves on by a drawn token; returns what is wrong when the grammar does not allow it."""
        began = time.perf_counter()
        accepted = self._matcher.consume_token(token)
        self._tokens += 1
        self.seconds += time.perf_counter() - began
        if self.seconds > ALLOWANCE + ALLOWANCE_PER_TOKEN * self._tokens:
            return f"the grammar is too costly to follow: {self.seconds:.1f} s for {self._tokens} tokens"
        if accepted:
            return None
        reason = str(self._matcher.get_error()).partition("\n")[0]
        return f"no token fits both the grammar and min_tokens, stop_token_ids or logit_bias: {reason}"

    def fill(self, row: NDArray[np.uint32]) -> None:
        """Writes the mask of tokens that may come next, uint32 [ceil(vocab / 32)], lowest bit first."""
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)


class Grammars:
    """Compiles grammars and computes masks; belongs to the engine's thread."""

    def __init__(self, vocab_size: int, eos_token_ids: Seq[int]) -> None:
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self._vocabulary: Future[LLTokenizer] | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._compiling: dict[str, tuple[Sequence, Future[LLMatcher]]] = {}  # by request id
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._executor: LLExecutor | None = None
        self._times: deque[float] = deque(maxlen=TIMED)
        self.masks_computed = 0
        self.mask_seconds = 0.0

    def __len__(self) -> int:
        """How many requests wait for their grammars."""
        return len(self._compiling)

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """What the token ids stand for; must come before the first grammar. A second one is ignored."""
        if self._vocabulary is None:
            self._vocabulary = self._threads().submit(self._build, vocabulary)

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        return self._pool

    def _build(self, vocabulary: Vocabulary) -> LLTokenizer:
        from llguidance import LLTokenizer

        eos = self._eos or vocabulary.eos_token_ids
        return LLTokenizer(vocabulary.tokenizer, n_vocab=self._vocab_size, eos_token=eos)

    def begin(self, seq: Sequence, grammar: str) -> None:
        """Compiles a sequence's grammar; `ready` hands the sequence back."""
        kept = self._compiled.get(grammar)
        if kept is not None:
            self._compiled.move_to_end(grammar)
            done: Future[LLMatcher] = Future()
            done.set_result(kept)
        else:
            done = self._threads().submit(self._compile, grammar)
        self._compiling[seq.request_id] = (seq, done)

    def _compile(self, grammar: str) -> LLMatcher:
        """The grammar's matcher before its first token. Raises RvllmError with the reason."""
        from llguidance import LLMatcher, LLParserLimits

        if self._vocabulary is None:
            raise RvllmError("a grammar came before the vocabulary")
        try:
            tokenizer = self._vocabulary.result()
        except Exception as error:
            raise RvllmError(f"structured outputs do not work with this tokenizer: {error}") from None
        limits = LLParserLimits(max_lexer_states=MOST_STATES, verbose_errors=False)
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise RvllmError(f"grammar: {str(matcher.get_error()).strip()}")
        return matcher

    def forget(self, seq: Sequence) -> bool:
        """A sequence does not wait for its grammar any more; False when it did not."""
        return self._compiling.pop(seq.request_id, None) is not None

    def ready(self, wait: bool) -> list[tuple[Sequence, Matcher | str]]:
        """Sequences whose grammar is done, with the matcher or what is wrong with it; `forget` them then.

        wait: nothing else is to be done, so sleep a moment if none is done yet.
        """
        if wait:
            wait_for([done for _, done in self._compiling.values()], POLL_SECONDS, FIRST_COMPLETED)
        return [self._outcome(seq, done) for seq, done in self._compiling.values() if done.done()]

    def _outcome(self, seq: Sequence, done: Future[LLMatcher]) -> tuple[Sequence, Matcher | str]:
        error = done.exception()
        if error is not None:
            return seq, str(error)
        fresh, grammar = done.result(), seq.sampling.grammar or ""
        if len(grammar) <= KEPT_LENGTH:
            self._compiled[grammar] = fresh
        if len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)
        return seq, Matcher(fresh.deep_copy())

    def masks(self, wanted: dict[int, Matcher]) -> dict[int, NDArray[np.uint32]]:
        """The masks of a step, by the same keys: uint32 [ceil(vocab / 32)] each."""
        if not wanted:
            return {}
        words = -(-self._vocab_size // 32)
        rows = np.zeros((len(wanted), words), dtype=np.uint32)
        began = time.perf_counter()
        if len(wanted) <= ALONE:
            for row, matcher in zip(rows, wanted.values(), strict=True):
                started = time.perf_counter()
                matcher.fill(row)
                matcher.seconds += time.perf_counter() - started
                self._times.append(time.perf_counter() - started)
        else:
            self._fill_together(rows, list(wanted.values()))
            waited = time.perf_counter() - began
            self._times.extend([waited] * len(wanted))
            for matcher in wanted.values():
                matcher.seconds += waited / len(wanted)
        self.mask_seconds += time.perf_counter() - began
        self.masks_computed += len(wanted)
        return dict(zip(wanted, rows, strict=True))

    def _fill_together(self, rows: NDArray[np.uint32], matchers: list[Matcher]) -> None:
        """Many masks on all cores."""
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor()
        natives = [(matcher.native, row) for row, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(natives, rows.ctypes.data, rows.shape[1] * 4, len(rows))

    def percentile(self, share: float) -> float:
        """Seconds that so large a share of the last tokens waited at most for their masks; 0 before any.

        Masks of a step that are computed together count with the time of all of them.
        """
        ordered = sorted(self._times)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

    def close(self) -> None:
        """Ends the compiling thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
