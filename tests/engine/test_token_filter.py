"""allowed_token_ids, bad_words and all log-probabilities: masks, and what comes of them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rvllm import LLM, SamplingParams, StructuredOutputsParams
from rvllm.engine.token_filter import TokenFilter
from rvllm.errors import UsageError
from rvllm.text.requests import bad_word_tokens
from support.models.tiny_llm import CONFIG, SETTINGS, directory
from support.text import tiny_tokenizers as tiny

VOCAB = 70


def bits(mask: np.ndarray) -> set[int]:
    return {i for i in range(len(mask) * 32) if mask[i >> 5] >> np.uint32(i & 31) & np.uint32(1)}


def test_masks_follow_the_rule() -> None:
    source = random.Random(4)
    for _ in range(200):
        allowed = source.sample(range(VOCAB), source.choice([0, 5, 40]))
        bad = [
            [source.randrange(6) for _ in range(source.randint(1, 3))] for _ in range(source.randint(0, 5))
        ]
        output = [source.randrange(6) for _ in range(source.randint(0, 5))]
        wanted = set(allowed or range(VOCAB))
        for word in bad:
            if [*output, word[-1]][-len(word) :] == word:
                wanted.discard(word[-1])
        found = TokenFilter(VOCAB, allowed, bad)
        assert bits(found.mask(output)) == wanted
        assert bits(found.mask(output)) == wanted, "a mask given out is not changed by the next"
        assert found.follows == any(len(word) > 1 for word in bad)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directory(tmp_path_factory.mktemp("models") / "tiny")


def drawn(llm: LLM, **params: Any) -> list[list[int]]:
    given = SamplingParams(**{"max_tokens": 24, "temperature": 2.0, "seed": 3, "ignore_eos": True, **params})
    outputs = llm.generate(["hello world", "def main"], given, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_only_allowed_tokens_are_drawn(model: Path) -> None:
    with LLM(str(model), **SETTINGS) as llm:
        allowed = [7, 100, 301, 302]
        found = drawn(llm, allowed_token_ids=allowed)
        assert all(set(tokens) <= set(allowed) for tokens in found) and any(len(set(t)) > 1 for t in found)
        with pytest.raises(UsageError, match="allowed_token_ids: token id 512 is not in the vocabulary"):
            drawn(llm, allowed_token_ids=[512])


def test_bad_words_are_not_written(model: Path) -> None:
    with LLM(str(model), **SETTINGS) as llm:
        allowed = [[llm.get_tokenizer().encode(c)[0] for c in "abcd"]] * 2
        free = drawn(llm, allowed_token_ids=allowed[0])
        texts = [llm.get_tokenizer().decode(tokens) for tokens in free]
        bad = [texts[0][3:5], texts[1][7:10], texts[0][11]]
        assert all(any(word in text for text in texts) for word in bad)
        kept = drawn(llm, allowed_token_ids=allowed[0], bad_words=bad)
        for tokens in kept:
            assert not any(word in llm.get_tokenizer().decode(tokens) for word in bad)
            assert len(tokens) == 24
        form = StructuredOutputsParams(regex="[ab]{6}")
        shaped = drawn(llm, structured_outputs=form, bad_words=["aa", "bb"], max_tokens=9)
        assert {llm.get_tokenizer().decode(t) for t in shaped} <= {"ababab", "bababa"}


def test_words_become_tokens_as_vllm_makes_them() -> None:
    tokenizer = tiny.byte_level()
    encode = tokenizer.encode
    assert bad_word_tokens(tokenizer, ["hello"]) == [
        encode(t) for t in ("hello", " hello") if len(encode(t)) == len(encode("hello"))
    ]
    assert bad_word_tokens(tokenizer, [" world"])[0] == encode("world")
    with pytest.raises(UsageError, match="bad_words needs a tokenizer"):
        bad_word_tokens(None, ["a"])
    with pytest.raises(UsageError, match="at most 256 texts"):
        bad_word_tokens(tokenizer, ["a"] * 257)


def test_all_logprobs(model: Path) -> None:
    with LLM(str(model), **SETTINGS, max_logprobs=-1) as llm:
        params = SamplingParams(temperature=0, max_tokens=3, logprobs=-1, prompt_logprobs=-1)
        (output,) = llm.generate("hello", params, use_tqdm=False)
        for position in [*(output.outputs[0].logprobs or []), *(output.prompt_logprobs or [])[1:]]:
            assert position is not None and len(position) == CONFIG["vocab_size"]
            assert sum(np.exp(entry.logprob) for entry in position.values()) == pytest.approx(1, abs=1e-4)
    said = pytest.raises(UsageError, match=r"logprobs must be in \[0, 20\], got -1; --max-logprobs")
    with LLM(str(model), **SETTINGS) as llm, said:
        llm.generate("hello", SamplingParams(logprobs=-1))
