"""A prompt and SamplingParams become the engine's Generate messages, one for each choice."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from rvllm.backends.base import MAX_BIASES, MAX_STOPS
from rvllm.engine.ipc.messages import Generate, ModelFacts, Sampling
from rvllm.engine.sampling_params import SamplingParams
from rvllm.errors import UsageError
from rvllm.text.grammar.grammar import grammar_of
from rvllm.text.tokenizers.tokenizer import Tokenizer

Prompt = str | Mapping[str, Any] | Sequence[int]

_SEED_BITS = 64
_DEFAULTS = {  # generation_config.json's name: SamplingParams'
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


MAX_BAD_WORDS = 256
MAX_BAD_WORD = 1024  # characters
MAX_BAD_TOKENS = 8192  # of all of a request's words together, with and without a space before them


class RequestMaker:
    """Makes the engine's messages for one loaded model. Requests without a seed get one drawn from `seed`.

    tokenizer: its eos_token ends answers too, beside what the model's config and generation_config name.
    defaults: SamplingParams fields that the model's generation_config sets.
    """

    def __init__(self, facts: ModelFacts, seed: int = 0, tokenizer: Tokenizer | None = None) -> None:
        self.facts = facts
        eos = None if tokenizer is None else tokenizer.eos_token_id
        if eos is not None and eos not in facts.eos_token_ids and eos < facts.vocab_size:
            self.facts = msgspec.structs.replace(facts, eos_token_ids=[*facts.eos_token_ids, eos])
        self._tokenizer = tokenizer
        self.defaults = sampling_defaults(facts)
        self._seeds = random.Random(seed)

    def make(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        arrival: float | None = None,
        client: str = "",
    ) -> list[Generate]:
        """One Generate for each of `params.n` choices, named `request_id-index`, with seeds seed + index.

        arrival: seconds, `time.time()`; None: now. client: whose they are, for fair shares.
        Raises UsageError naming the parameter: an empty or too long prompt, ids out of the vocabulary.
        """
        self.facts.check_prompt(prompt_token_ids)
        sampling = to_sampling(params, len(prompt_token_ids), self.facts, self._tokenizer)
        seed = self._seeds.getrandbits(_SEED_BITS) if params.seed is None else params.seed
        return [
            Generate(
                request_id=f"{request_id}-{index}",
                prompt_token_ids=prompt_token_ids,
                sampling=msgspec.structs.replace(sampling, seed=(seed + index) % (1 << _SEED_BITS)),
                priority=priority,
                arrival=time.time() if arrival is None else arrival,
                client=client,
                group=request_id if params.n > 1 else "",
            )
            for index in range(params.n)
        ]


def sampling_defaults(facts: ModelFacts) -> dict[str, Any]:
    """SamplingParams fields that the model's generation_config sets, as vLLM takes them.

    Raises UsageError when the model's own values are out of range.
    """
    given = facts.generation_config
    found = {ours: given[theirs] for theirs, ours in _DEFAULTS.items() if given.get(theirs) is not None}
    try:
        SamplingParams(**found)
    except (UsageError, TypeError) as error:
        raise UsageError(f"generation_config: {error}; --generation-config none ignores it") from None
    return found


def prompt_tokens(prompt: Prompt, tokenizer: Tokenizer | None) -> tuple[str | None, list[int]]:
    """(text or None, token ids) of a prompt: text, `{"prompt": text}`, `{"prompt_token_ids": ids}` or ids.

    Raises UsageError when it is none of these, or text and there is no tokenizer.
    """
    if isinstance(prompt, Mapping):
        text = prompt.get("prompt")
        if prompt.get("prompt_token_ids") is not None:
            return (text if isinstance(text, str) else None), _token_list(prompt["prompt_token_ids"])
        if text is None:
            raise UsageError('prompt: an object must hold "prompt" or "prompt_token_ids"')
        prompt = text
    if isinstance(prompt, str):
        if tokenizer is None:
            raise UsageError("prompt is text, but skip_tokenizer_init leaves only token ids: give those")
        return prompt, tokenizer.encode(prompt)
    return None, _token_list(prompt)


def _token_list(value: Any) -> list[int]:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise UsageError(f"prompt must be text or a list of token ids, got {type(value).__name__}")
    if type(value) is list and set(map(type, value)) <= {int}:  # without a step of Python's for each token
        return value.copy()
    ids = [_whole(token) for token in value]
    if None in ids:
        raise UsageError("prompt: token ids must be whole numbers")
    return [token for token in ids if token is not None]


def _whole(value: Any) -> int | None:
    """An int, also out of a NumPy integer; None for anything else."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    return int(value.__index__())


def bad_word_tokens(tokenizer: Tokenizer | None, words: Sequence[str]) -> list[list[int]]:
    """The token sequences of words, as vLLM has them: alone, and behind a space where that is one more word.

    Raises UsageError without a tokenizer, or for more or longer words than a request may have.
    """
    if not words:
        return []
    if tokenizer is None:
        raise UsageError("bad_words needs a tokenizer: the model was loaded with skip_tokenizer_init")
    if len(words) > MAX_BAD_WORDS or max(map(len, words)) > MAX_BAD_WORD:
        raise UsageError(f"bad_words takes at most {MAX_BAD_WORDS} texts of {MAX_BAD_WORD} characters")
    found: list[list[int]] = []
    count = 0
    for word in words:
        plain, spaced = (
            tokenizer.encode(before + word.lstrip(), add_special_tokens=False) for before in ("", " ")
        )
        if not plain:
            raise UsageError(f"bad_words: {word[:40]!r} has no tokens")
        new = [plain]
        if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
            new.append(spaced)
        count += sum(map(len, new))
        if count > MAX_BAD_TOKENS:
            raise UsageError(f"bad_words have more than {MAX_BAD_TOKENS} tokens together")
        found += new
    return found


def _logprobs(name: str, count: int | None, facts: ModelFacts) -> int | None:
    """How many log-probabilities are wanted, all of them as a number. Raises UsageError."""
    if count is None:
        return None
    if facts.max_logprobs != -1 and not 0 <= count <= facts.max_logprobs:
        raise UsageError(
            f"{name} must be in [0, {facts.max_logprobs}], got {count}; --max-logprobs allows more"
        )
    return facts.vocab_size if count == -1 else min(count, facts.vocab_size)


def to_sampling(
    params: SamplingParams, prompt_len: int, facts: ModelFacts, tokenizer: Tokenizer | None = None
) -> Sampling:
    """The engine's share of the parameters, with lengths cut to what the context holds.

    tokenizer: for bad_words. Raises UsageError naming the parameter.
    """
    params.validate()
    room = facts.max_model_len - prompt_len
    max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
    stops = list(dict.fromkeys(_in_vocabulary("stop_token_ids", params.stop_token_ids, facts)))
    if not params.ignore_eos:
        stops += [token for token in facts.eos_token_ids if token not in stops]
    if params.min_tokens and len(stops) > MAX_STOPS:
        raise UsageError(f"stop_token_ids: min_tokens holds back at most {MAX_STOPS} ids, got {len(stops)}")
    bias = params.logit_bias or {}
    if len(bias) > MAX_BIASES:
        raise UsageError(f"logit_bias takes at most {MAX_BIASES} tokens, got {len(bias)}")
    biased = _in_vocabulary("logit_bias", list(bias), facts)
    for value in bias.values():
        if not -100 <= value <= 100:
            raise UsageError(f"logit_bias must be in [-100, 100], got {value}")
    allowed = _in_vocabulary("allowed_token_ids", list(params.allowed_token_ids or ()), facts)
    words = params.bad_word_ids
    if words is None:
        words = bad_word_tokens(tokenizer, params.bad_words or ())
    bad = tuple(dict.fromkeys(map(tuple, words)))
    if allowed and set(allowed) <= {word[0] for word in bad if len(word) == 1}:
        raise UsageError("allowed_token_ids must not all be bad_words")
    return Sampling(
        temperature=float(params.temperature),
        top_k=params.top_k,
        top_p=float(params.top_p),
        min_p=float(params.min_p),
        repetition_penalty=float(params.repetition_penalty),
        presence_penalty=float(params.presence_penalty),
        frequency_penalty=float(params.frequency_penalty),
        logit_bias=tuple(zip(biased, (float(v) for v in bias.values()), strict=True)),
        stop_token_ids=tuple(stops),
        min_tokens=min(params.min_tokens, max_tokens),
        max_tokens=max_tokens,
        logprobs=_logprobs("logprobs", params.logprobs, facts),
        prompt_logprobs=_logprobs("prompt_logprobs", params.prompt_logprobs, facts),
        grammar=params.grammar or grammar_of(params.structured_outputs),
        allowed_token_ids=tuple(allowed),
        bad_words=bad,
    )


def _in_vocabulary(name: str, tokens: list[int], facts: ModelFacts) -> list[int]:
    """The token ids as ints. Raises UsageError when one is not of the vocabulary."""
    found = [int(token) for token in map(_whole, tokens) if token is not None]
    if len(found) < len(tokens):
        raise UsageError(f"{name}: token ids must be whole numbers")
    facts.check_tokens(name, found)
    return found
