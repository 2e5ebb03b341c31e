"""A request between its prompt and its RequestOutput, for callers that drive the engine themselves."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rvllm.engine.ipc.messages import Generate, Output
from rvllm.engine.sampling_params import SamplingParams
from rvllm.errors import RvllmError
from rvllm.text.outputs import PositionLogprobs, RequestMetrics, RequestOutput
from rvllm.text.processor import Choice, Delta, position_logprobs
from rvllm.text.tokenizers.tokenizer import Tokenizer


@dataclass
class PendingRequest:
    """A prompt on its way through the engine, collecting what comes back.

    messages: what goes to the engine, one a choice. choices: by the engine's request id.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    messages: list[Generate]
    choices: dict[str, Choice]
    metrics: RequestMetrics

    @property
    def finished(self) -> bool:
        """Whether all choices have ended."""
        return all(choice.finished for choice in self.choices.values())

    def feed(self, output: Output) -> Delta:
        """Takes an engine output. Raises RvllmError when the engine failed the request."""
        choice = self.choices[output.request_id]
        delta = choice.feed(output)
        if delta.finish_reason == "error":
            raise RvllmError(f"request {self.request_id}: {delta.error or 'the engine gave up on it'}")
        if self.metrics.first_token_time is None and delta.token_ids:
            self.metrics.first_token_time = time.time()
            self.metrics.time_in_queue = choice.queue_seconds
        if delta.finish_reason is not None and self.finished:
            self.metrics.finished_time = time.time()
        return delta

    def to_output(self, tokenizer: Tokenizer | None) -> RequestOutput:
        """The request as the caller sees it."""
        choices = list(self.choices.values())
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[choice.to_output(tokenizer) for choice in choices],
            finished=self.finished,
            prompt_logprobs=self._prompt_logprobs(choices[0], tokenizer),
            num_cached_tokens=choices[0].cached_tokens,
            metrics=self.metrics,
        )

    def _prompt_logprobs(
        self, choice: Choice, tokenizer: Tokenizer | None
    ) -> list[PositionLogprobs | None] | None:
        count = self.params.prompt_logprobs
        if count is None:
            return None
        return [None, *(position_logprobs(entry, count, tokenizer) for entry in choice.prompt_logprobs or ())]
