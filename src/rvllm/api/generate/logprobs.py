"""Log-probabilities in the shapes of the two completion endpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rvllm.api.schemas.answers import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from rvllm.backends.base import TokenLogprobs
from rvllm.text.tokenizers.tokenizer import Tokenizer


class Names:
    """What tokens are called in answers: their text, or `token_id:N` on request or without a tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None, as_ids: bool) -> None:
        self._tokenizer = None if as_ids else tokenizer

    def name(self, token_id: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        return self._tokenizer.token_text(token_id)

    def utf8(self, token_id: int) -> list[int] | None:
        """The token's bytes; None where it is named by its id."""
        return None if self._tokenizer is None else list(self._tokenizer.token_bytes(token_id))


def chat_logprobs(
    positions: Sequence[TokenLogprobs], top: int, names: Names, before: ChatLogprobs | None = None
) -> ChatLogprobs:
    """One entry a token with the `top` likeliest candidates. before: what they are added to."""
    found = before or ChatLogprobs([])
    for at in positions:
        likeliest = zip(at.top_ids[:top], at.top_logprobs[:top], strict=True)
        found.content.append(
            TokenLogprob(
                names.name(at.token_id),
                _finite(at.logprob),
                names.utf8(at.token_id),
                [TopLogprob(names.name(i), _finite(value), names.utf8(i)) for i, value in likeliest],
            )
        )
    return found


class CompletionLogprobsWriter:
    """Writes plain completions' logprobs piece by piece; text offsets go on from piece to piece."""

    def __init__(self, top: int, names: Names) -> None:
        self._top, self._names, self._offset = top, names, 0

    def unknown(self, token_id: int) -> CompletionLogprobs:
        """The first token of an echoed prompt, which nothing predicts."""
        token = self._names.name(token_id)
        found = CompletionLogprobs([self._offset], [None], [token], [None])
        self._offset += len(token)
        return found

    def write(
        self, positions: Sequence[TokenLogprobs], before: CompletionLogprobs | None = None
    ) -> CompletionLogprobs:
        """The positions' tokens, values and candidates, which include a position's own token.

        before: what they are added to; None begins anew.
        """
        found = before or CompletionLogprobs()
        for at in positions:
            token = self._names.name(at.token_id)
            found.tokens.append(token)
            found.token_logprobs.append(_finite(at.logprob))
            found.text_offset.append(self._offset)
            self._offset += len(token)
            top = {
                self._names.name(i): _finite(value)
                for i, value in zip(at.top_ids[: self._top], at.top_logprobs[: self._top], strict=True)
            }
            top.setdefault(token, _finite(at.logprob))
            found.top_logprobs.append(top)
        return found


def prompt_logprobs(positions: Sequence[TokenLogprobs], tokenizer: Tokenizer | None) -> PromptLogprobs:
    """vLLM's `prompt_logprobs`: null for the first token, then a dict of candidates by token id."""
    found: PromptLogprobs = [None]
    for at in positions:
        candidates: Mapping[int, tuple[float, int]] = {
            at.token_id: (at.logprob, at.rank),
            **{
                i: (value, rank)
                for rank, (i, value) in enumerate(zip(at.top_ids, at.top_logprobs, strict=True), 1)
            },
        }
        found.append(
            {
                str(i): PromptLogprob(_finite(value), rank, tokenizer.token_text(i) if tokenizer else None)
                for i, (value, rank) in candidates.items()
            }
        )
    return found


def _finite(value: float) -> float:
    """JSON has no infinity; vLLM and OpenAI report an impossible token as -9999."""
    return max(value, -9999.0)
