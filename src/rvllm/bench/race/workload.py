"""What an engine is asked in a race: the same prompts and output lengths for all, from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from rvllm.bench.prompts import fixed
from rvllm.errors import UsageError

SETS = ("random", "fixed", "sharegpt", "long")
# Log-normal lengths in the shape of ShareGPT's conversations: most are short, a few fill the limit.
SHAREGPT_INPUT, SHAREGPT_OUTPUT = (4.7, 1.2), (5.1, 0.9)
SHAREGPT_LIMITS = 4, 1024
LONG_SHARES = (1.0, 0.5, 0.25)  # of --input-len, in turn


@dataclass(frozen=True)
class Workload:
    """A kind of prompts. input_len, output_len: tokens; of `sharegpt` the lengths are drawn instead.

    vocab_size: random ids lie below; the first thousand (special tokens, bytes) are left out.
    """

    kind: str
    input_len: int
    output_len: int
    vocab_size: int
    seed: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest request there can be, prompt and output."""
        if self.kind == "sharegpt":
            return 2 * SHAREGPT_LIMITS[1]
        return max(self.input_len, 128) + self.output_len  # the fixed texts have less than 128 tokens

    def requests(self, count: int, turn: int) -> list[Request]:
        """`count` requests; those of another turn are others, so that no cache has seen them."""
        source = random.Random(f"{self.seed} {turn} {count}")
        if self.kind == "fixed":
            return [
                Request(f"({turn}.{i}) {text}", [], self.output_len) for i, text in enumerate(fixed(count))
            ]
        return [self._random(source, i) for i in range(count)]

    def _random(self, source: random.Random, place: int) -> Request:
        prompt, output = self.input_len, self.output_len
        if self.kind == "long":
            prompt = max(1, int(prompt * LONG_SHARES[place % len(LONG_SHARES)]))
        elif self.kind == "sharegpt":
            low, high = SHAREGPT_LIMITS
            prompt, output = (
                max(low, min(high, int(source.lognormvariate(*shape))))
                for shape in (SHAREGPT_INPUT, SHAREGPT_OUTPUT)
            )
        first = min(1000, self.vocab_size // 2)
        return Request("", [source.randrange(first, self.vocab_size) for _ in range(prompt)], output)


@dataclass(frozen=True)
class Request:
    """A prompt, as text or as token ids, and the tokens that are to be written."""

    text: str
    ids: list[int]
    output_len: int

    def body(self, model: str, more: dict[str, Any]) -> dict[str, Any]:
        """The body for /v1/completions."""
        return {
            "model": model, "prompt": self.text or self.ids, "max_tokens": self.output_len, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True}, **more,
        }  # fmt: skip


def checked(kind: str, input_len: int, output_len: int, vocab_size: int, seed: int) -> Workload:
    """A workload. Raises UsageError for lengths that are none."""
    if kind not in SETS:
        raise UsageError(f"--prompts: {kind!r} is not one of {', '.join(SETS)}")
    for flag, value, least in (("--input-len", input_len, 1), ("--output-len", output_len, 2),
                               ("--vocab-size", vocab_size, 2)):  # fmt: skip
        if value < least:
            raise UsageError(f"{flag} must be at least {least}")
    return Workload(kind, input_len, output_len, vocab_size, seed)
