"""Token ids to text as they come, without ever showing half a character.

For byte-level and SentencePiece vocabularies the pieces joined are exactly `decode(all ids)` and each token
costs the same; other vocabularies (WordPiece and the like, which no generating model uses) go through a
sliding window of `decode`.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol

from rvllm.text.tokenizers.spelling import byte_piece
from rvllm.text.tokenizers.tokenizer import Tokenizer


class Detokenizer(Protocol):
    """Turns one sequence's tokens into text."""

    def feed(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete; what may still grow into a character is held back."""

    def finish(self) -> str:
        """What was held back; called once, at the end."""


def make_detokenizer(
    tokenizer: Tokenizer, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()
) -> Detokenizer:
    """A fresh detokenizer of the kind the vocabulary needs.

    prompt_token_ids: what the tokens continue; a text that SentencePiece continues keeps its leading space,
    which `decode` drops at the very beginning of a text.
    """
    hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
    if tokenizer.spelling.kind == "bytes":
        return ByteDetokenizer(tokenizer, hidden)
    if tokenizer.spelling.kind == "pieces":
        begins = all(i in hidden for i in prompt_token_ids)
        return PieceDetokenizer(tokenizer, hidden, tokenizer.spelling.strip_left and begins)
    return WindowDetokenizer(tokenizer, hidden, prompt_token_ids[-WindowDetokenizer.CONTEXT :])


class ByteDetokenizer:
    """Byte-level BPE: tokens are bytes, the text is their UTF-8 with U+FFFD for what is not."""

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int]) -> None:
        self._bytes = tokenizer.token_bytes
        self._hidden = hidden
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_ids: Iterable[int]) -> str:
        return self._decoder.decode(b"".join(self._bytes(i) for i in token_ids if i not in self._hidden))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class PieceDetokenizer:
    """SentencePiece: ▁ is a space, a run of byte tokens is its UTF-8 or, if broken, U+FFFD for each byte.

    A run of byte tokens is held back until it ends, since one bad byte changes how all of it reads.
    """

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int], strip_left: bool) -> None:
        self._token = tokenizer.backend.id_to_token
        self._hidden = hidden
        self._run = bytearray()
        self._at_start = strip_left

    def feed(self, token_ids: Iterable[int]) -> str:
        text = []
        for token_id in token_ids:
            token = None if token_id in self._hidden else self._token(token_id)
            if token is None:
                continue
            byte = byte_piece(token)
            if byte is not None:
                self._run.append(byte)
            else:
                text += [self._end_run(), token.replace("▁", " ")]
        return self._without_lead("".join(text))

    def finish(self) -> str:
        return self._without_lead(self._end_run())

    def _end_run(self) -> str:
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _without_lead(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ")
        return text


class WindowDetokenizer:
    """Any vocabulary: decodes the last few tokens with and without the new one and takes the difference."""

    CONTEXT = 6  # tokens before the new ones that may change how these read
    PATIENCE = 8  # tokens after which a broken character at the end will not become whole any more

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int], before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._window = [i for i in before if i not in hidden]
        self._shown = len(self._window)  # tokens of the window whose text has been given out

    def feed(self, token_ids: Iterable[int]) -> str:
        self._window += [i for i in token_ids if i not in self._hidden]
        return self._advance(final=False)

    def finish(self) -> str:
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before = self._tokenizer.decode(self._window[: self._shown])
        after = self._tokenizer.decode(self._window)
        unfinished = after.endswith("\ufffd") and len(self._window) - self._shown <= self.PATIENCE
        if len(after) <= len(before) or (unfinished and not final):
            return ""
        self._window = self._window[max(0, self._shown - self.CONTEXT) :]
        self._shown = len(self._window)
        return after[len(before) :]
