"""The engine's tokens become a choice's text: detokenised, cut at stop strings, with logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rvllm.backends.base import TokenLogprobs
from rvllm.engine.ipc.messages import Output
from rvllm.engine.sampling_params import SamplingParams
from rvllm.text.outputs import CompletionOutput, Logprob, PositionLogprobs
from rvllm.text.stop import StopFinder
from rvllm.text.tokenizers.detokenizer import Detokenizer, make_detokenizer
from rvllm.text.tokenizers.tokenizer import Tokenizer


@dataclass(slots=True)
class Delta:
    """What one engine Output adds to a choice.

    text may lag behind token_ids: half characters and possible starts of stop strings are held back.
    finish_reason is set once, on the last one; abort_needed: tell the engine to stop, it does not know.
    error: why the engine gave the request up, with finish_reason "error".
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    abort_needed: bool = False
    error: str | None = None


class Choice:
    """One output of a request, fed with the engine's Outputs for it.

    tokenizer: None gives no text. prompt_token_ids: what the output continues. index: which of `n`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        prompt_token_ids: Sequence[int] = (),
        index: int = 0,
    ) -> None:
        self.index = index
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] | None = [] if params.logprobs is not None else None
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        self.cumulative_logprob = 0.0
        self.cached_tokens = 0
        self.queue_seconds = 0.0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._params = params
        self._detokenizer: Detokenizer | None = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = make_detokenizer(tokenizer, params.skip_special_tokens, prompt_token_ids)
        self._stops = StopFinder(params.stop, params.include_stop_str_in_output)

    @property
    def finished(self) -> bool:
        """Whether the choice has its finish reason."""
        return self.finish_reason is not None

    def feed(self, output: Output) -> Delta:
        """Takes the next Output; after the choice is finished, everything is ignored.

        Stop strings are looked for from token `min_tokens` + 1 on, as vLLM does; the tokens end with the
        one that completes the stop string.
        """
        if self.finished:
            return Delta()
        self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
        self.queue_seconds = max(self.queue_seconds, output.queue_seconds)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        taken, text = self._take(output)
        delta = Delta(text=text, token_ids=output.token_ids[:taken], prompt_logprobs=output.prompt_logprobs)
        self.token_ids += delta.token_ids
        if self.logprobs is not None and output.logprobs is not None:
            delta.logprobs = output.logprobs[:taken]
            self.logprobs += delta.logprobs
            self.cumulative_logprob += sum(entry.logprob for entry in delta.logprobs)
        if self._stops.found is not None:
            delta.finish_reason, delta.stop_reason = "stop", self._stops.found
            delta.abort_needed = output.finish_reason is None
        elif output.finish_reason is not None:
            delta.finish_reason, delta.stop_reason = output.finish_reason, output.stop_reason
            if delta.stop_reason not in self._params.stop_token_ids:
                delta.stop_reason = None  # an end of the model's own, which only its tokenizer names
            delta.error = output.error
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        self.text += delta.text
        return delta

    def _take(self, output: Output) -> tuple[int, str]:
        """(tokens taken, text they let out), up to a stop string's last token."""
        if self._detokenizer is None:
            return len(output.token_ids), ""
        shown = len(output.token_ids)
        if output.finish_reason == "stop" and not self._params.include_stop_str_in_output:
            shown -= 1  # the stop token itself is not text
        pieces: list[str] = []
        for position, token in enumerate(output.token_ids[:shown]):
            text, count = self._detokenizer.feed((token,)), len(self.token_ids) + position + 1
            pieces.append(text if count <= self._params.min_tokens else self._stops.feed(text))
            if self._stops.found is not None:
                return position + 1, "".join(pieces)
        if output.finish_reason is not None:
            last = self._detokenizer.finish()
            pieces.append(self._stops.feed(last, final=True))
        return len(output.token_ids), "".join(pieces)

    def to_output(self, tokenizer: Tokenizer | None) -> CompletionOutput:
        """The choice as Python callers see it."""
        entries = None
        if self.logprobs is not None:
            entries = [
                position_logprobs(entry, self._params.logprobs or 0, tokenizer) for entry in self.logprobs
            ]
        return CompletionOutput(
            index=self.index,
            text=self.text,
            token_ids=list(self.token_ids),
            cumulative_logprob=None if self.logprobs is None else self.cumulative_logprob,
            logprobs=entries,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


def position_logprobs(entry: TokenLogprobs, count: int, tokenizer: Tokenizer | None) -> PositionLogprobs:
    """One position's logprobs by token id: the token's own first, then the `count` most likely ones.

    count -1: all that there are.
    """

    def text(token: int) -> str | None:
        return None if tokenizer is None else tokenizer.token_text(token)

    found = {entry.token_id: Logprob(entry.logprob, entry.rank, text(entry.token_id))}
    for rank, (token, value) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), start=1):
        if rank <= count or count == -1:
            found.setdefault(token, Logprob(value, rank, text(token)))
    return found
