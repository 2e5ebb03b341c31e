"""vLLM's `LLMEngine`: add requests, call `step`, and take what is finished or under way."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rvllm.engine.sampling_params import SamplingParams
from rvllm.errors import UsageError
from rvllm.offline.llm import LLM
from rvllm.text.outputs import RequestOutput
from rvllm.text.pending import PendingRequest
from rvllm.text.requests import Prompt
from rvllm.vllm.engine_args import EngineArgs


class LLMEngine:
    """The engine of an `LLM`, driven step by step."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._requests: dict[str, PendingRequest] = {}  # by the caller's id
        self._running: dict[str, PendingRequest] = {}  # by the engine's ids of their choices

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, **_: Any) -> LLMEngine:
        """Loads the model that the arguments name. Raises the errors of `LLM`."""
        return cls(LLM(**dataclasses.asdict(engine_args)))

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        arrival_time: float | None = None,
        lora_request: None = None,
        tokenization_kwargs: None = None,
        trace_headers: Any = None,
        priority: int = 0,
    ) -> str:
        """Queues a request and returns its id. Raises UsageError naming what is wrong with it."""
        if request_id in self._requests:
            raise UsageError(f"request_id {request_id!r} is in use by a request that has not ended")
        if lora_request is not None:
            raise UsageError("lora_request is not supported: merge adapters into the model first")
        request = self._llm.pending(prompt, params, priority)
        request.request_id = request_id
        for message in request.messages:
            self._llm.engine.add_request(message)
            self._running[message.request_id] = request
        self._requests[request_id] = request
        return request_id

    def step(self) -> list[RequestOutput]:
        """Computes a step; one output for each request that it brought forward, with all tokens so far."""
        touched = {request.request_id: request for request, _ in self._llm.step(self._running)}
        for name, request in touched.items():
            if request.finished:
                del self._requests[name]
        return [request.to_output(self._llm.tokenizer) for request in touched.values()]

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def get_num_unfinished_requests(self) -> int:
        return len(self._requests)

    def abort_request(self, request_ids: str | Sequence[str]) -> None:
        """Ends requests; nothing more comes of them."""
        for name in [request_ids] if isinstance(request_ids, str) else request_ids:
            request = self._requests.pop(name, None)
            if request is not None:
                self._llm.engine.abort(list(request.choices))
                for inner in request.choices:
                    self._running.pop(inner, None)

    def get_tokenizer(self) -> Any:
        return self._llm.get_tokenizer()

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        return self._llm.reset_prefix_cache(reset_running_requests, reset_connector)
