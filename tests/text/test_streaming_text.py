"""Text as it streams: whole characters only, joined to exactly the decoded text; stop strings cut exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rvllm.text.stop import StopFinder
from rvllm.text.tokenizers.detokenizer import WindowDetokenizer, make_detokenizer
from rvllm.text.tokenizers.tokenizer import Tokenizer
from support.text import tiny_tokenizers as tiny

BYTES = tiny.byte_level()
PIECES = tiny.sentencepiece()
EMOJI = [3 + byte for byte in "😀é".encode()]  # as byte tokens of PIECES


def stream(
    tokenizer: Tokenizer, ids: list[int], skip: bool = False, sizes: tuple[int, ...] = (1,)
) -> list[str]:
    detokenizer = make_detokenizer(tokenizer, skip)
    pieces, at, turn = [], 0, 0
    while at < len(ids):
        size = sizes[turn % len(sizes)]
        pieces.append(detokenizer.feed(ids[at : at + size]))
        at, turn = at + size, turn + 1
    return [*pieces, detokenizer.finish()]


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from([(1,), (3,), (2, 1, 5)]))
@example("😀👍🏽👨‍👩‍👧‍👦🇩🇪 日本語 é", (1,))
@example("\ufffd \ufffd", (1,))
def test_no_broken_character_and_the_whole_text(text: str, sizes: tuple[int, ...]) -> None:
    for tokenizer in (BYTES, PIECES):
        ids = tokenizer.encode(text, add_special_tokens=False)
        pieces = stream(tokenizer, ids, sizes=sizes)
        readable = text.replace("▁", " ") if tokenizer is PIECES else text  # ▁ is how it spells a space
        assert "".join(pieces) == tokenizer.decode(ids) == readable
        assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, BYTES.vocab_size + 3), max_size=40), st.booleans())
def test_any_tokens_of_a_byte_vocabulary_join_to_the_decoded_text(ids: list[int], skip: bool) -> None:
    assert "".join(stream(BYTES, ids, skip)) == BYTES.decode(ids, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, PIECES.vocab_size + 3), st.sampled_from(EMOJI)), max_size=40),
    st.booleans(),
)
def test_any_tokens_of_a_piece_vocabulary_join_to_the_decoded_text(ids: list[int], skip: bool) -> None:
    assert "".join(stream(PIECES, ids, skip)) == PIECES.decode(ids, skip_special_tokens=skip)


def test_characters_come_as_soon_as_they_are_whole() -> None:
    ids = [BYTES.convert_tokens_to_ids(c) for c in ["ð", "Ł", "ĺ", "Ģ", "a"]]  # 😀 byte by byte, then a
    assert stream(BYTES, [i for i in ids if i is not None]) == ["", "", "", "😀", "a", ""]
    assert stream(BYTES, [i for i in ids if i is not None][:2]) == ["", "", "\ufffd"]


def test_a_text_that_goes_on_keeps_its_space() -> None:
    ids = PIECES.encode("hello world", add_special_tokens=False)
    assert make_detokenizer(PIECES).feed(ids) == "hello world"
    assert make_detokenizer(PIECES, prompt_token_ids=[1]).feed(ids) == "hello world"  # only <s> before it
    assert make_detokenizer(PIECES, prompt_token_ids=[1, ids[0]]).feed(ids[1:]) == " world"


def test_other_vocabularies_go_through_a_bounded_window() -> None:
    tokenizer = tiny.wordpiece()
    ids = [
        tokenizer.convert_tokens_to_ids(t) for t in ["hello", "un", "##believ", "##able", ",", "world"] * 20
    ]
    known = [i for i in ids if i is not None]
    detokenizer = make_detokenizer(tokenizer)
    assert isinstance(detokenizer, WindowDetokenizer)
    text = "".join(detokenizer.feed([i]) for i in known) + detokenizer.finish()
    assert text == tokenizer.decode(known)
    assert len(detokenizer._window) <= WindowDetokenizer.CONTEXT + 1


def first_stop(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """(end, start, stop) of the stop string that is complete first, reading character by character."""
    for end in range(1, len(text) + 1):
        starts = [(end - len(s), s) for s in stops if text[:end].endswith(s)]
        if starts:
            return (end, *min(starts))
    return None


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.text("ab ", max_size=4), max_size=12),
    st.lists(st.text("ab ", min_size=1, max_size=5), max_size=3),
    st.booleans(),
)
def test_stops_do_not_depend_on_the_pieces(pieces: list[str], stops: list[str], include: bool) -> None:
    text = "".join(pieces)
    finder = StopFinder(stops, include)
    shown = ""
    for number, piece in enumerate(pieces):
        shown += finder.feed(piece)
        if finder.found is None:
            held = "".join(pieces[: number + 1])[len(shown) :]
            assert (shown + held) == "".join(pieces[: number + 1])
            assert held == "" or any(s.startswith(held) and s != held for s in stops)
    shown += finder.feed("", final=True)
    expected = first_stop(text, stops)
    if expected is None:
        assert (shown, finder.found) == (text, None)
    else:
        end, start, stop = expected
        assert (shown, finder.found) == (text[: end if include else start], stop)


def test_nothing_follows_a_stop() -> None:
    finder = StopFinder(["\n\n"])
    assert finder.feed("a\n") == "a"
    assert finder.feed("b\n") == "\nb"
    assert finder.feed("\nc") == ""
    assert finder.found == "\n\n"
    assert finder.feed("more") == ""
    assert finder.feed("", final=True) == ""


@pytest.mark.parametrize("length", [2000])
def test_long_streams_cost_the_same_per_token(length: int) -> None:
    """A stop string of one letter repeated is the worst case; it must not turn quadratic."""
    finder = StopFinder(["a" * 50 + "b"])
    shown = sum(len(finder.feed("a")) for _ in range(length))
    assert shown == length - 50
    assert len(finder.feed("", final=True)) == 50


def test_bytes_that_never_become_a_character_come_out_in_the_end() -> None:
    """Nine tokens without a whole character at their end will not become one: a character has four bytes."""

    class Broken:
        def decode(self, token_ids: Sequence[int]) -> str:
            return "\ufffd" * len(token_ids)

    detokenizer = WindowDetokenizer(cast(Tokenizer, Broken()), frozenset(), [])
    shown = [detokenizer.feed([1]) for _ in range(9)]
    assert shown == [""] * 8 + ["\ufffd" * 9]
