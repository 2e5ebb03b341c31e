"""Prompts with a gap: the marks of each family of models, and where they stand."""

from __future__ import annotations

from typing import Any

import pytest

from rvllm.text.chat.fim import FillIn
from rvllm.text.tokenizers.gguf import from_metadata
from rvllm.text.tokenizers.tokenizer import Tokenizer
from support.text.tiny_tokenizers import byte_level_metadata, sentencepiece_metadata

KEY = "tokenizer.ggml."


def with_tokens(metadata: dict[str, Any], *tokens: str, **roles: str) -> Tokenizer:
    """A tokenizer with more control tokens; roles: GGUF keys that name one of them."""
    known = [*metadata[KEY + "tokens"], *tokens]
    metadata = metadata | {
        KEY + "tokens": known,
        KEY + "token_type": [*metadata[KEY + "token_type"], *[3] * len(tokens)],
    }
    if KEY + "scores" in metadata:
        metadata[KEY + "scores"] = [*metadata[KEY + "scores"], *[0.0] * len(tokens)]
    metadata |= {f"{KEY}{role}_token_id": known.index(token) for role, token in roles.items()}
    return Tokenizer(from_metadata(metadata, "tiny.gguf"))


def marks(tokenizer: Tokenizer) -> FillIn:
    assert tokenizer.fill_in is not None
    return tokenizer.fill_in


@pytest.mark.parametrize(
    ("before", "after", "gap"),
    [
        ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
        ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ],
)
def test_the_gap_comes_last(before: str, after: str, gap: str) -> None:
    tokenizer = with_tokens(byte_level_metadata(), gap, before, after, "<|fim_pad|>")
    ids = tokenizer.encode_around(tokenizer.encode("def f(", False), "):\n")
    assert tokenizer.decode(ids) == f"{before}def f({after}):\n{gap}"
    ends = {tokenizer.convert_tokens_to_ids(t) for t in (before, after, gap, "<|fim_pad|>", "<|endoftext|>")}
    assert marks(tokenizer).ends == ends


def test_without_a_mark_of_the_gap_what_stands_behind_comes_first() -> None:
    tokenizer = with_tokens(byte_level_metadata(), "[PREFIX]", "[SUFFIX]")
    ids = tokenizer.encode_around(tokenizer.encode("hello", False), "world")
    assert tokenizer.decode(ids) == "[SUFFIX]world[PREFIX]hello"


def test_codellama_has_no_space_before_what_stands_behind() -> None:
    names = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
    tokenizer = with_tokens(sentencepiece_metadata(), *names)
    ids = tokenizer.encode_around(tokenizer.encode("hello", False), "world")
    spelled = tokenizer.convert_ids_to_tokens(ids)
    assert spelled[0] == "<s>" and spelled[1] == "▁<PRE>" and spelled[-1] == "▁<MID>"
    behind = spelled[spelled.index("▁<SUF>") + 1 : -1]
    assert "".join(filter(None, behind)) == "world"
    assert spelled[2] == "▁hello"
    assert tokenizer.convert_tokens_to_ids("▁<EOT>") in marks(tokenizer).ends
    bare = tokenizer.encode_around(tokenizer.encode("hello", False), "world", False)
    assert bare == ids[1:]


@pytest.mark.parametrize("names", [("fim_pre", "fim_suf", "fim_mid"), ("prefix", "suffix", "middle")])
def test_a_gguf_file_may_tell_which_tokens_mark_the_gap(names: tuple[str, str, str]) -> None:
    tokens = ("<A>", "<B>", "<C>", "<D>")
    roles = dict(zip((*names, "fim_pad"), tokens, strict=True))
    tokenizer = with_tokens(byte_level_metadata(), *tokens, **roles)
    ids = tokenizer.encode_around(tokenizer.encode("x", False), "y")
    assert tokenizer.decode(ids) == "<A>x<B>y<C>"
    assert tokenizer.convert_tokens_to_ids("<D>") in marks(tokenizer).ends


def test_other_vocabularies_have_none() -> None:
    assert with_tokens(byte_level_metadata()).fill_in is None
    assert with_tokens(byte_level_metadata(), "<fim_prefix>", "<fim_middle>").fill_in is None
    broken = byte_level_metadata() | {KEY + "fim_pre_token_id": 10**6, KEY + "fim_suf_token_id": -1}
    assert Tokenizer(from_metadata(broken, "tiny.gguf")).fill_in is None
