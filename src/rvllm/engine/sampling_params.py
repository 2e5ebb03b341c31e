"""Sampling parameters of a request, under vLLM's names and with its meanings."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from rvllm.errors import UsageError


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, `low` itself only without `above`."""

    low: float
    high: float
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        return f"{'(' if self.above else '['}{self.low}, {self.high}]"


# What a parameter may be; checked by `SamplingParams.validate`, told by the OpenAPI document.
RANGES = {
    "n": Range(1, 1 << 20),
    "temperature": Range(0, 100),
    "top_p": Range(0, 1, above=True),
    "top_k": Range(0, 1 << 31),
    "min_p": Range(0, 1),
    "repetition_penalty": Range(0, 100, above=True),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "max_tokens": Range(1, 1 << 31),
    "min_tokens": Range(0, 1 << 31),
    "logprobs": Range(0, 20),  # unless --max-logprobs says otherwise
    "prompt_logprobs": Range(0, 20),
}


@dataclass(slots=True)
class StructuredOutputsParams:
    """The form an output must have, under vLLM's names: exactly one of the first six.

    json: a JSON schema, as an object or its text. json_object: any JSON object. regex: what the whole output
    matches. choice: one of these strings. grammar: a Lark grammar, or GBNF (`root ::= ...`).
    structural_tag: free text in which triggers begin JSON (an object with `triggers` and `structures`).
    disable_any_whitespace: JSON without spaces; whitespace_pattern: a regex for what may stand between its
    tokens. Raises UsageError when several forms are given.
    """

    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        forms = self._forms()
        if len(forms) > 1:
            raise UsageError(f"structured_outputs takes one form, got {' and '.join(forms)}")

    def _forms(self) -> dict[str, Any]:
        names = ("json", "regex", "choice", "grammar", "structural_tag")
        found = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {**found, "json_object": True} if self.json_object else found

    def given(self) -> tuple[str, Any] | None:
        """The form's name and value; None when there is none."""
        return next(iter(self._forms().items()), None)


class RequestOutputKind(Enum):
    """What each output of a running request holds: all so far, what is new, or nothing before the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(slots=True)
class BeamSearchParams:
    """A beam search, under vLLM's names. Raises UsageError for widths that the engine has no ranks for."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.beam_width <= 10:
            raise UsageError(f"beam_width must be in [1, 10], got {self.beam_width}")
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens must be at least 1, got {self.max_tokens}")


# Parameters of vLLM's that are not served, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "truncate_prompt_tokens": (None,),
    "logits_processors": (None, []),
    "best_of": (None, 1),
    "use_beam_search": (None, False),
}


@dataclass(slots=True)
class SamplingParams:
    """How a request draws its tokens and when it stops.

    logprobs, prompt_logprobs: how many log-probabilities for each token, up to --max-logprobs; -1: all.
    bad_words: texts that the output must not contain, as the tokenizer writes them with and without a space
    before them. allowed_token_ids: the only tokens that may be drawn, an end token among them or none.

    Raises UsageError from `validate` with the parameter's name; the HTTP layer turns it into a 400.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: as many as the context holds
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None
    grammar: str | None = None  # in llguidance's form, already checked; comes before structured_outputs
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    extra_args: dict[str, Any] | None = None  # for plug-ins; there are none
    bad_words: list[str] | None = None
    bad_word_ids: list[list[int]] | None = None  # bad_words already tokenised; see `bad_word_tokens`
    allowed_token_ids: list[int] | None = None
    truncate_prompt_tokens: int | None = None
    logits_processors: Any = None
    best_of: int | None = None
    use_beam_search: bool | None = None

    @staticmethod
    def from_optional(**given: Any) -> SamplingParams:
        """Parameters of which those that are None have their defaults."""
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})

    def clone(self) -> SamplingParams:
        """A copy that shares nothing with this one."""
        return copy.deepcopy(self)

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        elif self.stop is None:
            self.stop = []
        if self.stop_token_ids is None:
            self.stop_token_ids = []
        if self.top_k == -1:
            self.top_k = 0
        self.validate()

    def validate(self) -> None:
        """Raises UsageError naming the first parameter out of range."""
        for name, neutral in _NEUTRAL.items():
            if getattr(self, name) not in neutral:
                raise UsageError(f"{name} is not supported")
        for name, allowed in RANGES.items():
            value = getattr(self, name)
            if name in ("logprobs", "prompt_logprobs"):  # how many depends on --max-logprobs
                allowed = Range(-1, 1 << 31)
            if value is not None and value not in allowed:
                raise UsageError(f"{name} must be in {allowed}, got {value}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UsageError(
                f"min_tokens must not exceed max_tokens, got {self.min_tokens} > {self.max_tokens}"
            )
        if not all(self.stop):
            raise UsageError("stop must not hold an empty string")
        if not all(isinstance(word, str) and word.strip() for word in self.bad_words or ()):
            raise UsageError("bad_words must hold texts that are not empty")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise UsageError("allowed_token_ids must not be empty")
