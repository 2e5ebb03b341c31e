"""One request on its way through the engine."""

from __future__ import annotations

import itertools
import time
from array import array
from typing import TYPE_CHECKING

from rvllm.backends.base import TokenLogprobs
from rvllm.engine.blocks import ROOT, Digest, chain
from rvllm.engine.ipc.messages import Generate, Output, PrefillChunk

if TYPE_CHECKING:
    from rvllm.engine.matcher import Mask, Matcher
    from rvllm.engine.token_filter import TokenFilter

MAX_CHUNKS = 256  # of a prompt that are told; the rest of a longer one is not
Rank = tuple[float, int]
_arrivals = itertools.count()


class Sequence:
    """A request's tokens, its place in the cache and how far it has come.

    Counts of tokens, all from the start of the prompt:

        computed <= launched <= length <= max_length
                      len(tokens) <= length

    `tokens` are those the host knows. `length` counts in the ones that steps in flight will draw.
    `launched` is how many have their keys and values computed by steps launched so far, `computed` by
    steps already collected. A sequence with nothing in flight has length == len(tokens).
    """

    __slots__ = (
        "arrival", "block_size", "blocks", "borders", "cached_tokens", "capacity", "chunks", "client",
        "computed", "digests", "filter", "finish_reason", "first_scheduled", "group", "in_flight",
        "launched", "length", "matcher", "max_length", "min_length", "number", "priority", "prompt_len",
        "prompt_logprobs", "published", "rank", "request_id", "sampling", "slot", "stop_ids",
        "tokens", "wanted_prompt_logprobs",
    )  # fmt: skip

    def __init__(self, request: Generate, max_model_len: int, block_size: int) -> None:
        sampling = request.sampling
        self.request_id = request.request_id
        self.sampling = sampling
        self.tokens = array("i", request.prompt_token_ids)
        self.prompt_len = len(self.tokens)
        self.max_length = min(self.prompt_len + sampling.max_tokens, max_model_len)
        self.min_length = self.prompt_len + sampling.min_tokens
        self.stop_ids = frozenset(sampling.stop_token_ids)
        self.number = next(_arrivals)
        self.priority = request.priority
        self.client = request.client
        self.group = request.group
        self.rank: Rank = (0.0, self.number)  # the lower, the earlier it is served; the policy sets it
        self.arrival = request.arrival
        self.first_scheduled: float | None = None  # time.time() of the first step with a part of it
        self.finish_reason: str | None = None
        self.chunks: list[PrefillChunk] = []  # of its prompt, as they were computed
        self.matcher: Matcher | None = None  # where it is in its grammar, if it has one
        self.filter: TokenFilter | None = None  # of the tokens it may draw, if it has one

        self.slot = -1  # -1: waiting
        self.length = self.prompt_len
        self.launched = 0
        self.computed = 0
        self.in_flight = 0  # launched steps with a part of it, not yet collected
        self.cached_tokens = 0  # prompt tokens found in the prefix cache when it first ran

        self.block_size = block_size
        self.blocks: list[int] = []
        self.capacity = 0  # tokens its blocks hold
        self.published = 0  # blocks offered to the prefix cache
        self.digests: list[Digest] = []
        self.borders: list[int] = []  # positions to come at which its recurrent state is to be kept

        self.wanted_prompt_logprobs = self.prompt_len - 1 if sampling.prompt_logprobs is not None else 0
        self.prompt_logprobs: list[TokenLogprobs] = []

    @property
    def prompt_logprobs_left(self) -> int:
        """Rows still to be launched whose next token is a prompt token that wants its log-probability."""
        if len(self.prompt_logprobs) >= self.wanted_prompt_logprobs:
            return 0
        return max(0, self.wanted_prompt_logprobs - self.launched)

    @property
    def must_wait(self) -> bool:
        """Whether the mask of its next step is yet to be made, or the token before it yet to be drawn."""
        if self.filter is not None and self.filter.follows and self.length > len(self.tokens):
            return True
        return self.matcher is not None and (self.matcher.mask is None or self.length > len(self.tokens))

    @property
    def token_mask(self) -> Mask | None:
        """The tokens that may be drawn next, by its grammar and by its filter; None: any."""
        found = None if self.matcher is None else self.matcher.mask
        if self.filter is None:
            return found
        own = self.filter.mask(self.tokens[self.prompt_len :])
        return own if found is None else own & found

    def digest_chain(self, blocks: int) -> list[Digest]:
        """Content digests of its first `blocks` blocks, all of whose tokens are known."""
        size, known = self.block_size, len(self.digests)
        if known < blocks:
            parent = self.digests[-1] if known else ROOT
            self.digests += chain(parent, self.tokens[known * size : blocks * size], size)
        return self.digests[:blocks]

    def give_blocks(self, blocks: list[int]) -> None:
        """Appends blocks to its table."""
        self.blocks += blocks
        self.capacity = len(self.blocks) * self.block_size

    def lose_place(self) -> list[int]:
        """Back to nothing computed; returns the blocks it held, in order."""
        blocks, self.blocks = self.blocks, []
        self.slot = -1
        self.capacity = self.launched = self.computed = self.published = 0
        return blocks

    def accept(self, token: int) -> str | None:
        """Appends a drawn token; returns the finish reason when it was the last."""
        self.tokens.append(token)
        count = len(self.tokens)
        if token in self.stop_ids and count >= self.min_length:
            return "stop"
        return "length" if count >= self.max_length else None

    def computed_chunk(self, step: int, tokens: int, began: float) -> None:
        """Notes a part of the prompt that a step has computed; began: time.time() of the step's launch."""
        if len(self.chunks) < MAX_CHUNKS:
            self.chunks.append(PrefillChunk(step, tokens, began, time.time()))

    def queue_seconds(self) -> float:
        """Time from arrival to first scheduling."""
        if self.first_scheduled is None or not self.arrival:
            return 0.0
        return max(0.0, self.first_scheduled - self.arrival)

    def ending(self, reason: str, error: str | None = None) -> Output:
        """The last output of a request that ends without a new token."""
        return Output(
            self.request_id, [], cached_tokens=self.cached_tokens, finish_reason=reason, error=error
        )
