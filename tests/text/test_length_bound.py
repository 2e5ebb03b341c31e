"""The bound on a text's tokens never exceeds their number, and is there for most language models."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from rvllm.text.tokenizers.length_bound import length_bound
from rvllm.text.tokenizers.spelling import spelling_of
from support.text.tiny_tokenizers import byte_level, sentencepiece, wordpiece

MODELS = {"bytes": byte_level(), "pieces": sentencepiece(add_prefix=True)}
TEXTS = st.text(max_size=200) | st.text("hello wrd\n\té日😀한▁", max_size=400)


@pytest.mark.parametrize("kind", MODELS)
@given(text=TEXTS)
@settings(max_examples=60, deadline=None)
def test_no_text_has_fewer_tokens(kind: str, text: str) -> None:
    tokenizer = MODELS[kind]
    bound = length_bound(tokenizer.backend, tokenizer.spelling)
    assert bound is not None
    assert bound.fewest_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))


def test_the_bound_is_worth_having() -> None:
    tokenizer = MODELS["bytes"]
    assert tokenizer.surely_reaches("x" * 100_000, 1000)
    assert not tokenizer.surely_reaches("x" * 999, 1000)
    assert not tokenizer.surely_reaches("hello " * 10, 60)


def test_composing_letters_is_allowed_for() -> None:
    backend = byte_level().backend
    backend.normalizer = normalizers.NFC()
    bound = length_bound(backend, spelling_of(backend))
    assert bound is not None
    hangul = "\u1112\u1161\u11ab" * 50  # nine bytes a syllable, three when composed
    assert bound.fewest_tokens(hangul) <= len(backend.encode(hangul).ids)


def test_bytes_that_the_vocabulary_lacks_do_not_count() -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    bound = length_bound(backend, spelling_of(backend))
    assert bound is not None
    text = "ab" * 10 + "z" * 1000
    assert bound.fewest_tokens(text) == len(backend.encode(text).ids) == 10


def test_no_bound_where_text_can_vanish() -> None:
    pieces = wordpiece()
    assert length_bound(pieces.backend, pieces.spelling) is None  # any long word is one [UNK]
    assert not pieces.surely_reaches("x" * 100_000, 10)
    for change in ("swallow", "fold", "cut"):
        backend = byte_level().backend
        if change == "swallow":
            backend.add_tokens([AddedToken("<fill>", rstrip=True)])
        elif change == "fold":
            backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.StripAccents()])
        else:
            backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        assert length_bound(backend, spelling_of(backend)) is None, change
