"""An engine whose backend draws random allowed tokens, and requests with grammars for it."""

from __future__ import annotations

from rvllm.backends.base import Limits
from rvllm.config import EngineConfig
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import Generate, ModelFacts, Output, Sampling
from rvllm.engine.sampling_params import StructuredOutputsParams
from rvllm.text.grammar.grammar import grammar_of, vocabulary_of
from support.doubles.grammar import RandomDouble
from support.text.tiny_tokenizers import byte_level

TOKENIZER = byte_level()
EOS = TOKENIZER.eos_token_id
VOCAB = TOKENIZER.vocab_size + 27  # logits are often padded beyond the tokenizer
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "ages": {"type": "array", "maxItems": 3, "items": {"type": "integer", "minimum": 0, "maximum": 120}},
    },
    "required": ["name", "ages"],
    "additionalProperties": False,
}  # fmt: skip


def core_of(depth: int = 2, seqs: int = 8, blocks: int = 400, vocabulary: bool = True) -> EngineCore:
    limits = Limits(seqs, 64, 600, 16, blocks, depth)
    facts = ModelFacts(
        architecture="Double", model_path="", vocab_size=VOCAB, max_model_len=600, eos_token_ids=[EOS]
    )
    core = EngineCore(RandomDouble(limits, VOCAB), facts, EngineConfig())
    if vocabulary:
        core.grammars.set_vocabulary(vocabulary_of(TOKENIZER))
    return core


def request(name: str, grammar: str | None, **sampling: object) -> Generate:
    values = {
        "temperature": 1.0,
        "max_tokens": 500,
        "stop_token_ids": (EOS,),
        "seed": hash_of(name),
        **sampling,
    }
    return Generate(name, [1, 2, 3], Sampling(grammar=grammar, **values))  # type: ignore[arg-type]


def hash_of(name: str) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate(name)) % 100_000


def run(core: EngineCore, requests: list[Generate]) -> dict[str, tuple[list[int], Output]]:
    """Tokens and the last Output of each request."""
    for each in requests:
        core.add_request(each)
    tokens: dict[str, list[int]] = {each.request_id: [] for each in requests}
    last: dict[str, Output] = {}
    steps = 0
    while core.has_work():
        steps += 1
        assert steps < 20_000
        for output in core.step():
            assert output.request_id not in last, "an output after the end"
            tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                last[output.request_id] = output
    assert not core.scheduler.blocks.used
    return {name: (tokens[name], last[name]) for name in tokens}


def text_of(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens, skip_special_tokens=True)


def grammar(**form: object) -> str:
    found = grammar_of(StructuredOutputsParams(**form))  # type: ignore[arg-type]
    assert found is not None
    return found
