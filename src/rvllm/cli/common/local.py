"""An engine process of our own to talk to."""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing
from functools import partial
from itertools import count
from pathlib import Path

from rvllm.cli.chat import Answer, Conversation, Sampling
from rvllm.cli.common.models import fetched, start_engine
from rvllm.config import EngineConfig
from rvllm.engine.sampling_params import SamplingParams
from rvllm.errors import RvllmError, UsageError
from rvllm.text.processor import Choice
from rvllm.text.requests import RequestMaker
from rvllm.text.tokenizers.tokenizer import Tokenizer


class LocalTalker:
    """Loads the model in an engine process and talks to it."""

    def __init__(self, config: EngineConfig) -> None:
        if config.skip_tokenizer_init:
            raise UsageError("--skip-tokenizer-init: a conversation needs the tokenizer")
        found = fetched(config)
        self._runner = asyncio.Runner()
        self._ids = count()
        try:
            words = Path(found.tokenizer or found.model)
            self._engine, (self._tokenizer,) = self._runner.run(
                start_engine(found, partial(Tokenizer.load, words))
            )
        except BaseException:
            self._runner.close()
            raise
        self._requests = RequestMaker(self._engine.ready.facts, config.seed, self._tokenizer)
        ready = self._engine.ready
        print(f"{config.model} on {ready.backend}, loaded in {ready.load_seconds:.1f} s", file=sys.stderr)

    def answer(self, conversation: Conversation, sampling: Sampling, answer: Answer) -> None:
        """Streams the next message into `answer`; KeyboardInterrupt aborts the request."""
        self._runner.run(self._answer(conversation, sampling, answer))

    async def _answer(self, conversation: Conversation, sampling: Sampling, answer: Answer) -> None:
        prompt = self._tokenizer.apply_chat_template(conversation, add_generation_prompt=True)
        assert isinstance(prompt, list)
        params = SamplingParams(**{"max_tokens": None, **self._requests.defaults, **sampling.given()})
        (request,) = self._requests.make(f"chat-{next(self._ids)}", prompt, params)
        choice = Choice(self._tokenizer, params, prompt)
        async with aclosing(self._engine.generate(request)) as outputs:
            async for output in outputs:
                delta = choice.feed(output)
                if delta.error:
                    raise RvllmError(delta.error)
                answer.add(delta.text, len(delta.token_ids))
                if delta.finish_reason is not None:
                    return

    def close(self) -> None:
        self._runner.run(self._engine.close())
        self._runner.close()
