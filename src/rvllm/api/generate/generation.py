"""From prompts and parameters to streams of text: what chat and plain completions share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from functools import cached_property
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from rvllm.api.generate.job import Clock, Job, Piece, Retry, checked_priority, client_of, merged
from rvllm.api.http.errors import ApiError, invalid, overloaded
from rvllm.api.http.exchange import check_model
from rvllm.api.schemas.requests import GenerationRequest
from rvllm.config import ServerConfig
from rvllm.engine.ipc.messages import Embed, Generate, ModelFacts, Output, Ready, State, Vocabulary
from rvllm.engine.sampling_params import SamplingParams
from rvllm.errors import UsageError
from rvllm.telemetry.metrics import Metrics
from rvllm.telemetry.stats import Stats
from rvllm.text.chat.reasoning import reasoning_format
from rvllm.text.chat.template import template_traits
from rvllm.text.grammar.grammar import vocabulary_of
from rvllm.text.processor import Choice
from rvllm.text.requests import RequestMaker, bad_word_tokens
from rvllm.text.tokenizers.tokenizer import Tokenizer
from rvllm.text.tools.choose import tool_format
from rvllm.text.worker import tasks
from rvllm.text.worker.work import InProcess, TextWork

LOOK_SECONDS = 1.0
IDLE_LOOKS = 2  # so often in a row nothing must run before the vocabulary for grammars is handed over
MAX_CHARS = 1_000_000  # of a text that is only to be tokenised: about a second and a gigabyte


class Engine(Protocol):
    """What the HTTP layer needs of the engine's client."""

    def generate(self, request: Generate) -> AsyncGenerator[Output, None]:
        """Outputs of one request; closing the generator aborts it."""

    async def embed(self, request: Embed) -> NDArray[np.float32]:
        """The vector of a text; being cancelled aborts the request."""

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Comes before the first request with a grammar."""

    async def stats(self) -> Stats:
        """The engine's figures."""

    async def state(self) -> State:
        """What the engine is doing, for people who watch."""

    @property
    def alive(self) -> bool:
        """Whether the engine process runs."""

    @property
    def status(self) -> str:
        """starting, ready, stalled or failed."""

    @property
    def sleep_level(self) -> int:
        """0: awake."""

    async def sleep(self, level: int, keep_kv: bool = False) -> float:
        """Gives the engine's memory back; 0 takes it again."""


class Service:
    """The loaded model as the HTTP handlers see it."""

    def __init__(
        self,
        engine: Engine,
        ready: Ready,
        tokenizer: Tokenizer | None,
        config: ServerConfig,
        metrics: Metrics,
        *,
        served_name: str,
        requests: RequestMaker,
        chat_template: str | None = None,
        work: TextWork | None = None,
        shown_settings: Mapping[str, str] | None = None,
    ) -> None:
        """work: who renders, tokenises and compiles what clients send; None: this process."""
        self.engine, self.ready, self.config, self.metrics = engine, ready, config, metrics
        self.served_names = tuple(served_name.split("\n"))
        self.served_name = self.served_names[0]  # what answers say
        self.chat_template = chat_template
        self.shown_settings = shown_settings or {}  # what the page tells of the engine's settings
        self.started = int(time.time())
        self.siblings: tuple[Service, ...] = (self,)  # the models behind one address, this one among them
        self._tokenizer = tokenizer
        self._work = InProcess(tokenizer) if work is None and tokenizer is not None else work
        self._requests = requests
        self.in_flight = 0  # choices and texts that run or wait
        self._retry = Retry()
        self._vocabulary: asyncio.Task[None] | None = None  # hands the vocabulary to the engine
        self.template = template = _template_of(tokenizer, chat_template)  # of conversations with tools
        self.tools = tool_format(config.tool_call_parser, template)
        self.reasoning = reasoning_format(config.reasoning_parser, template)
        # Sampling defaults of the model, under SamplingParams' names.
        self.defaults: Mapping[str, Any] = requests.defaults

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises a 400 when the server runs without one."""
        if self._tokenizer is None:
            raise invalid(
                "this server runs without a tokenizer (--skip-tokenizer-init): send token ids", "prompt"
            )
        return self._tokenizer

    @property
    def work(self) -> TextWork:
        """Who works on texts. Raises a 400 when the server runs without a tokenizer."""
        if self._work is None:
            _ = self.tokenizer
        assert self._work is not None
        return self._work

    @property
    def has_tokenizer(self) -> bool:
        """Whether texts can be taken and given."""
        return self._tokenizer is not None

    @cached_property
    def places_tools(self) -> bool:
        """Whether the chat template shows the model the tools that it is offered."""
        if self.template is None:
            return False
        try:
            return template_traits(self.template).places_tools
        except UsageError:  # rendering will say what is wrong
            return True

    async def prepare_grammars(self) -> None:
        """Returns when the engine can follow grammars; the vocabulary goes to it with the first one."""
        if self._vocabulary is None or (self._vocabulary.done() and self._vocabulary.exception()):
            self._vocabulary = asyncio.create_task(self._send_vocabulary())
        await asyncio.shield(self._vocabulary)

    def forget_vocabulary(self) -> None:
        """A new engine has no vocabulary."""
        self._vocabulary = None

    async def warm_grammars(self) -> None:
        """Returns when the engine has the vocabulary: after the first idle moment, or the first grammar.

        Reading it keeps the engine busy for up to a second, which nobody notices while nothing runs.
        """
        tokenizer = self._tokenizer
        if tokenizer is None or tokenizer.spelling.kind == "other" or self.ready.facts.embedding_size:
            return
        idle = 0
        while self._vocabulary is None and idle < IDLE_LOOKS:
            await asyncio.sleep(LOOK_SECONDS)
            idle = 0 if self.in_flight else idle + 1
        await self.prepare_grammars()

    async def _send_vocabulary(self) -> None:
        self.engine.set_vocabulary(await asyncio.to_thread(vocabulary_of, self.tokenizer))

    async def encode_any(self, text: str, add_special_tokens: bool, param: str) -> list[int]:
        """Token ids of a text that need not fit into the context. Raises a 413 beyond MAX_CHARS."""
        if len(text) > MAX_CHARS:
            raise ApiError(
                413,
                f"{param} has {len(text)} characters, at most {MAX_CHARS} are tokenised at once",
                param=param,
            )
        found = await self.work.run(tasks.encode, param, len(text), text, add_special_tokens, None)
        return found or []

    async def tokenise_bad_words(self, params: SamplingParams) -> None:
        """Does so in a worker: hundreds of long words take most of a second. Raises UsageError."""
        if params.bad_words and self._tokenizer is not None:
            params.validate()
            size = sum(map(len, params.bad_words))
            found = await self.work.run(bad_word_tokens, "bad_words", size, params.bad_words)
            params.bad_word_ids = found

    async def encode_prompt(self, text: str, add_special_tokens: bool, param: str) -> list[int]:
        """Token ids of a prompt. Raises a 400 for a text that is too large for the context at sight.

        Tokenising megabytes takes seconds and gigabytes, all for nothing.
        """
        limit = self.ready.facts.max_model_len
        found = await self.work.run(tasks.encode, param, len(text), text, add_special_tokens, limit)
        if found is None:
            raise too_long(param, f"{len(text)} characters", self.ready.facts)
        return found

    def job(
        self,
        request_id: str,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        request: GenerationRequest,
        param: str,
    ) -> Job:
        """Checks a request against the limits and makes the engine's messages.

        param: the request's field that holds the prompt, for errors.
        Raises ApiError: 400 for too many choices or an unfit prompt, 429 when the queue is full.
        """
        if params.stop and self._tokenizer is None:
            raise invalid(
                "stop needs a tokenizer, and this server runs without one: use stop_token_ids", "stop"
            )
        count = len(prompts) * params.n
        if count > self.config.max_choices:
            raise invalid(f"n times the number of prompts is {count}; this server answers at most "
                          f"{self.config.max_choices} (--max-choices)", "n")  # fmt: skip
        self._check_room(count)
        urgency = checked_priority(request.priority, self.ready.scheduling_policy)
        client = client_of(self.ready.fairness, request.user)
        generates: list[Generate] = []
        choices: list[Choice] = []
        for number, prompt in enumerate(prompts):
            self.check_length(len(prompt), param)
            made = self._requests.make(
                f"{request_id}-{number}", prompt, params, priority=urgency, client=client
            )
            generates += made
            choices += [Choice(self._tokenizer, params, prompt, i) for i in range(len(made))]
        return Job(request_id, list(prompts), params, generates, choices, time.perf_counter())

    def _check_room(self, count: int) -> None:
        excess = self.in_flight + count - self.ready.limits.max_num_seqs - self.config.max_queue
        if excess > 0:
            raise overloaded(
                f"{self.in_flight} requests are running or waiting, no more are taken (--max-queue)",
                self._retry.seconds(excess),
            )

    @contextmanager
    def admitted(self, count: int) -> Generator[None, None, None]:
        """Counts so many requests as running. Raises ApiError 429 when the queue is full."""
        self._check_room(count)
        self.in_flight += count
        try:
            yield
        finally:
            self.in_flight -= count

    def check_length(self, tokens: int, param: str) -> None:
        """Raises a 400 for a prompt of so many tokens when the context has no room for an answer."""
        if tokens >= self.ready.facts.max_model_len:
            raise too_long(param, f"{tokens} tokens", self.ready.facts)

    async def run(self, job: Job) -> AsyncGenerator[Piece, None]:
        """The pieces of all choices as they come. Closing it aborts what still runs.

        Raises ApiError when the engine ends a choice with an error, EngineDeadError when it dies.
        """
        self.in_flight += len(job.choices)
        try:
            streams = [self._choice(job, i) for i in range(len(job.choices))]
            async with aclosing(streams[0] if len(streams) == 1 else merged(streams)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            self.in_flight -= len(job.choices)
            for first in range(0, len(job.choices), job.params.n):
                of_prompt = job.choices[first : first + job.params.n]
                longest = max(len(choice.token_ids) for choice in of_prompt)
                self.metrics.observe(request_max_num_generation_tokens=longest)

    async def _choice(self, job: Job, index: int) -> AsyncGenerator[Piece, None]:
        choice, request = job.choices[index], job.generates[index]
        clock, reason = Clock(self.metrics, job, request), "abort"
        try:
            async with aclosing(self.engine.generate(request)) as outputs:
                async for output in outputs:
                    began = time.perf_counter()
                    delta = choice.feed(output)
                    clock.timing.detokenize += time.perf_counter() - began
                    clock.read(output)
                    reason = delta.finish_reason or reason
                    if output.waited_too_long:
                        queued = self.in_flight - self.ready.limits.max_num_seqs
                        raise overloaded(delta.error or "", self._retry.seconds(max(1, queued)))
                    if reason == "error":
                        # What of a checked request cannot be followed is its grammar, which the model's
                        # vocabulary may have no tokens for.
                        status = 500 if request.sampling.grammar is None else 400
                        raise ApiError(status, delta.error or "the engine could not answer")
                    clock.tokens(len(delta.token_ids), output.queue_seconds)
                    job.completion_tokens += len(delta.token_ids)
                    if index % job.params.n == 0:
                        job.cached_tokens[index // job.params.n] = output.cached_tokens
                    began = time.perf_counter()
                    yield Piece(index, delta)
                    clock.timing.stream += time.perf_counter() - began
                    if delta.finish_reason is not None:
                        return
        finally:
            self._retry.ended()
            clock.finished(reason)


def too_long(param: str, what: str, facts: ModelFacts) -> ApiError:
    """A 400 for a prompt that does not fit into the context."""
    return invalid(f"{param}: {facts.prompt_too_long(what)}", param, "context_length_exceeded")


def _template_of(tokenizer: Tokenizer | None, given: str | None) -> str | None:
    """The source of the chat template in use, if there is one."""
    if given is not None or tokenizer is None:
        return given if tokenizer is None else tokenizer.chat_templates.get(given or "", given)
    try:
        return tokenizer.get_chat_template(tools=True)
    except UsageError:
        return None


def by_name(service: Service, name: str | None) -> Service:
    """The model of this name among those behind one address, for None `service` itself.

    Raises ApiError 404 that names them all.
    """
    if name is None:
        return service
    check_model(name, [known for one in service.siblings for known in one.served_names])
    return next(one for one in service.siblings if name in one.served_names)


class _Named(msgspec.Struct):
    """What of a body tells whom it is for."""

    model: str | None = None


def by_body(service: Service, body: bytes) -> Service:
    """The model that a request's body names; the first where it names none, or is no JSON object.

    Raises ApiError 404 for a model that is not served.
    """
    if len(service.siblings) == 1:
        return service
    try:
        return by_name(service, msgspec.json.decode(body, type=_Named).model)
    except msgspec.DecodeError:  # whoever parses all of it will say what is wrong
        return service


def awake(service: Service) -> Service:
    """The model that has the device, of those behind one address."""
    return next((one for one in service.siblings if not one.engine.sleep_level), service)


def refuse_encoder(service: Service) -> None:
    """Raises a 400 when the model pools texts and generates nothing."""
    facts = service.ready.facts
    if facts.labels is not None:
        raise invalid(f"{facts.architecture} gives classes and generates no text: use /classify")
    if facts.embedding_size is not None:
        raise invalid(f"{facts.architecture} gives embeddings and generates no text: use /v1/embeddings")
