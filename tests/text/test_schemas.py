"""Random tokens through the masks of 200 schemas: what comes out is always an instance."""

from __future__ import annotations

import json
import random

import jsonschema
import numpy as np
import pytest

from rvllm.backends.base import Limits
from rvllm.config import EngineConfig
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import Generate, ModelFacts, Sampling
from rvllm.engine.sampling_params import StructuredOutputsParams
from rvllm.text.grammar.grammar import grammar_of, vocabulary_of
from rvllm.text.tokenizers.tokenizer import Tokenizer
from support.doubles.grammar import RandomDouble
from support.models.fetched import model_path
from support.text.json_schemas import SCHEMAS
from support.text.tiny_tokenizers import byte_level

MAX_TOKENS = 400


def engine(tokenizer: Tokenizer) -> EngineCore:
    """A model that wants any token, and closing quotes and brackets a little more."""
    vocab = tokenizer.vocab_size + 13
    bias = np.zeros(vocab)
    for token in range(tokenizer.vocab_size):
        text = tokenizer.token_bytes(token)
        bias[token] = 14.0 * bool(text) * (text[:1] in b'"}]' or text[-1:] in b'"}]') - 3.0 * text.isspace()
    double = RandomDouble(Limits(16, 64, 600, 16, 1000, 2), vocab, bias)
    eos = [tokenizer.eos_token_id or 0]
    bias[eos] = 14.0
    facts = ModelFacts(
        architecture="Double", model_path="", vocab_size=vocab, max_model_len=600, eos_token_ids=eos
    )
    core = EngineCore(double, facts, EngineConfig())
    core.grammars.set_vocabulary(vocabulary_of(tokenizer))
    return core


def generated(
    tokenizer: Tokenizer, rounds: int, every: int = 1
) -> tuple[dict[int, list[str]], EngineCore, int]:
    """Finished outputs by the schema's number, and how many outputs max_tokens cut."""
    core, dice = engine(tokenizer), random.Random(0)
    stops = (tokenizer.eos_token_id or 0,)
    tokens: dict[str, list[int]] = {}
    for number in range(0, len(SCHEMAS), every):
        schema = SCHEMAS[number]
        grammar = grammar_of(StructuredOutputsParams(json=json.dumps(schema)))
        for i in range(rounds):
            sampling = Sampling(
                temperature=dice.choice([0.0, 0.3, 0.7, 1.0, 1.5, 3.0]), seed=dice.getrandbits(32),
                max_tokens=MAX_TOKENS, stop_token_ids=stops, grammar=grammar,
            )  # fmt: skip
            core.add_request(Generate(f"{number}-{i}", [1], sampling))
            tokens[f"{number}-{i}"] = []
    finished: dict[int, list[str]] = {}
    cut = 0
    while core.has_work():
        for output in core.step():
            name = output.request_id
            tokens[name] += output.token_ids
            assert output.finish_reason != "error", (SCHEMAS[int(name.partition("-")[0])], output.error)
            if output.finish_reason == "stop":
                text = tokenizer.decode(tokens[name], skip_special_tokens=True)
                finished.setdefault(int(name.partition("-")[0]), []).append(text)
            cut += output.finish_reason == "length"
    return finished, core, cut


def check(finished: dict[int, list[str]], cut: int, asked: int) -> None:
    """asked: how many outputs there were to be."""
    for number, texts in finished.items():
        schema = SCHEMAS[number]
        validator = jsonschema.Draft202012Validator(
            schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
        for text in texts:
            validator.validate(json.loads(text))
    done = sum(len(texts) for texts in finished.values())
    assert done + cut == asked
    assert cut <= 0.05 * asked


def test_there_are_enough_and_they_are_schemas() -> None:
    texts = {json.dumps(schema, sort_keys=True) for schema in SCHEMAS}
    assert len(texts) == len(SCHEMAS) >= 200
    for schema in SCHEMAS:
        jsonschema.Draft202012Validator.check_schema(schema)


def test_random_tokens_become_instances() -> None:
    finished, core, cut = generated(byte_level(), 3)
    check(finished, cut, 3 * len(SCHEMAS))
    assert len(finished) == len(SCHEMAS), [s for i, s in enumerate(SCHEMAS) if i not in finished]
    assert core.stats().masks > 5000


@pytest.mark.models
def test_random_tokens_of_a_large_vocabulary_become_instances() -> None:
    tokenizer = Tokenizer.load(model_path("qwen2.5-coder-0.5b"))
    finished, core, cut = generated(tokenizer, 1, every=5)
    check(finished, cut, len(SCHEMAS[::5]))
    stats = core.stats()
    p50, p99 = stats.mask_p50_seconds * 1e6, stats.mask_p99_seconds * 1e6
    print(f"\n{stats.masks} masks of {tokenizer.vocab_size} tokens: p50 {p50:.0f} us, p99 {p99:.0f} us")
    assert stats.mask_p50_seconds < 0.05
