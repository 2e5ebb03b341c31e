"""vLLM's `AsyncLLM`: an engine process of its own, and requests as asynchronous generators."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from rvllm.config import SourceConfig
from rvllm.engine.ipc.client import EngineClient
from rvllm.engine.sampling_params import RequestOutputKind, SamplingParams
from rvllm.errors import UsageError
from rvllm.offline.arguments import engine_config
from rvllm.settings import build
from rvllm.text.grammar.grammar import check_tokenizer, vocabulary_of
from rvllm.text.outputs import RequestMetrics, RequestOutput
from rvllm.text.pending import PendingRequest
from rvllm.text.processor import Choice
from rvllm.text.requests import Prompt, RequestMaker, prompt_tokens
from rvllm.text.tokenizers.tokenizer import Tokenizer
from rvllm.vllm.engine_args import AsyncEngineArgs


class AsyncLLM:
    """A model in an engine process; it loads with the first request, on that request's event loop."""

    def __init__(self, engine_args: AsyncEngineArgs) -> None:
        given = dataclasses.asdict(engine_args)
        self.config = engine_config(given.pop("model"), given.pop("revision"), given)
        self._loading: asyncio.Task[EngineClient] | None = None
        self._tokenizer: Tokenizer | None = None
        self._grammars_ready = False

    @classmethod
    def from_engine_args(cls, engine_args: AsyncEngineArgs, **_: Any) -> AsyncLLM:
        """An engine of these arguments. Raises UsageError for what we do not do."""
        return cls(engine_args)

    async def _engine(self) -> EngineClient:
        if self._loading is None:
            self._loading = asyncio.create_task(self._load())
        return await asyncio.shield(self._loading)

    async def _load(self) -> EngineClient:
        from rvllm.weights.fetch.source import resolve

        source = build(SourceConfig, {})
        path = await asyncio.to_thread(resolve, self.config.model, source)
        config = dataclasses.replace(self.config, model=str(path))
        starting = asyncio.create_task(EngineClient.start(config, lambda fraction, text: None))
        if not config.skip_tokenizer_init:
            words = path if config.tokenizer is None else resolve(config.tokenizer, source)
            self._tokenizer = await asyncio.to_thread(Tokenizer.load, words)
        engine = await starting
        self._requests = RequestMaker(engine.ready.facts, config.seed, self._tokenizer)
        return engine

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        lora_request: None = None,
        priority: int = 0,
        **_: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs as they grow: all so far, what is new (DELTA), or the last alone, by `output_kind`.

        Closing the generator aborts the request. Raises UsageError naming what is wrong with it.
        """
        if lora_request is not None:
            raise UsageError("lora_request is not supported: merge adapters into the model first")
        if sampling_params.n != 1:
            raise UsageError("n must be 1 here: ask several times")
        engine = await self._engine()
        text, ids = prompt_tokens(prompt, self._tokenizer)
        (message,) = made = self._requests.make(request_id, ids, sampling_params, priority=priority)
        if message.sampling.grammar is not None and not self._grammars_ready:
            check_tokenizer(self._tokenizer)
            engine.set_vocabulary(await asyncio.to_thread(vocabulary_of, await self.get_tokenizer()))
            self._grammars_ready = True
        choices = {message.request_id: Choice(self._tokenizer, sampling_params, ids)}
        metrics = RequestMetrics(time.time())
        request = PendingRequest(request_id, text, ids, sampling_params, made, choices, metrics)
        seen = 0, 0
        async with aclosing(engine.generate(message)) as outputs:
            async for output in outputs:
                request.feed(output)
                if sampling_params.output_kind is RequestOutputKind.FINAL_ONLY and not request.finished:
                    continue
                found = request.to_output(self._tokenizer)
                if sampling_params.output_kind is RequestOutputKind.DELTA:
                    seen = _cut(found, seen)
                yield found
                if request.finished:
                    return

    async def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises UsageError after skip_tokenizer_init."""
        await self._engine()
        if self._tokenizer is None:
            raise UsageError("there is no tokenizer: the model was loaded with skip_tokenizer_init")
        return self._tokenizer

    def shutdown(self) -> None:
        """Ends the engine process, on the running event loop or on one of its own."""
        loading, self._loading = self._loading, None
        if loading is None or not loading.done() or loading.cancelled() or loading.exception():
            return
        closing = loading.result().close()
        try:
            self._closing = asyncio.get_running_loop().create_task(closing)
        except RuntimeError:
            asyncio.run(closing)


def _cut(found: RequestOutput, seen: tuple[int, int]) -> tuple[int, int]:
    """Leaves what is new in an output; (characters, tokens) seen then."""
    (output,) = found.outputs
    total = len(output.text), len(output.token_ids)
    output.text, output.token_ids = output.text[seen[0] :], output.token_ids[seen[1] :]
    if output.logprobs is not None:
        output.logprobs = output.logprobs[seen[1] :]
    return total
