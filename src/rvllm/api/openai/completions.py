"""`/v1/completions`: texts or token ids in, their continuations out."""

from __future__ import annotations

from contextlib import aclosing

import msgspec
from msgspec import UNSET

from rvllm.api.generate.generation import Service, too_long
from rvllm.api.generate.job import Job, Piece
from rvllm.api.generate.logprobs import CompletionLogprobsWriter, Names, joined, prompt_logprobs
from rvllm.api.generate.sampling import completion_params, refuse_unsupported
from rvllm.api.generate.structured_outputs import answer_grammar
from rvllm.api.http.errors import invalid
from rvllm.api.http.exchange import Exchange
from rvllm.api.openai.streaming import stream
from rvllm.api.schemas.answers import CompletionAnswer, CompletionChoice, CompletionLogprobs, Rendered, now
from rvllm.api.schemas.requests import CompletionRequest
from rvllm.text.chat.fim import FillIn
from rvllm.text.processor import Delta
from rvllm.text.worker import tasks


async def completions(service: Service, exchange: Exchange, request: CompletionRequest) -> None:
    job = await completion_job(service, f"cmpl-{exchange.request_id}", request)
    answer = _Completion(service, request, job)
    if request.stream:
        await answer.stream(exchange)
    else:
        await exchange.json(await answer.whole())


async def render_completion(service: Service, exchange: Exchange, request: CompletionRequest) -> None:
    """The prompts of a completion, in order; a list for one too."""
    name = f"cmpl-{exchange.request_id}"
    prompts = await prompts_of(service, request)
    await exchange.json(
        [Rendered(f"{name}-{i}", service.served_name, tokens) for i, tokens in enumerate(prompts)]
    )


async def completion_job(service: Service, name: str, request: CompletionRequest, text: bool = True) -> Job:
    """A request's work. text: False asks for token ids alone. Raises a 400."""
    refuse_unsupported(request)
    params = completion_params(request, service.defaults)
    params.detokenize = text and service.has_tokenizer
    params.grammar = await answer_grammar(service, request)
    await service.tokenise_bad_words(params)
    prompts = await prompts_of(service, request)
    fill_in = _fill_in(service, request)
    if fill_in is not None and not params.ignore_eos:
        params.stop_token_ids = [*params.stop_token_ids, *sorted(fill_in.ends)]
    return service.job(name, prompts, params, request, "prompt")


async def prompts_of(service: Service, request: CompletionRequest) -> list[list[int]]:
    """The token ids of each prompt, as the engine gets them. Raises a 400."""
    fill_in = _fill_in(service, request)
    prompts = await _prompts(service, request, framed=fill_in is None)
    if fill_in is None:
        return prompts
    return [await _around_gap(service, request, prompt) for prompt in prompts]


def _fill_in(service: Service, request: CompletionRequest) -> FillIn | None:
    """How to write before a suffix; None when there is none. Raises a 400 when the model cannot."""
    if not request.suffix:
        return None
    if request.echo:
        raise invalid("suffix and echo exclude each other", "suffix")
    found = service.tokenizer.fill_in
    if found is None:
        raise invalid(
            f"suffix: {service.served_name} cannot fill in, its vocabulary has no tokens that mark a gap",
            "suffix",
            "unsupported_parameter",
        )
    return found


async def _around_gap(service: Service, request: CompletionRequest, before: list[int]) -> list[int]:
    after = request.suffix or ""
    special = request.add_special_tokens is not False
    facts = service.ready.facts
    found = await service.work.run(
        tasks.fill_in, "suffix", len(after), before, after, special, facts.max_model_len
    )
    if found is None:
        raise too_long("suffix", f"{len(after)} characters", facts)
    return found


async def _prompts(service: Service, request: CompletionRequest, framed: bool) -> list[list[int]]:
    """The prompts as token ids. One list of numbers is one prompt.

    framed: with what the model puts around a text, unless the request asks for none.
    """
    given, special = request.prompt, framed and request.add_special_tokens is not False
    if isinstance(given, str):
        return [await service.encode_prompt(given, special, "prompt")]
    if not given:
        raise invalid("prompt must not be empty", "prompt")
    if isinstance(given[0], int):
        service.check_length(len(given), "prompt")
        if all(isinstance(item, int) for item in given):
            return [[item for item in given if isinstance(item, int)]]
    elif len(given) > service.config.max_choices:
        raise invalid(
            f"prompt: at most {service.config.max_choices} prompts in one request (--max-choices)", "prompt"
        )
    prompts = []
    for item in given:
        if isinstance(item, int):
            raise invalid(
                "prompt must be a text, token ids, a list of texts or a list of token ids", "prompt"
            )
        if isinstance(item, str):
            item = await service.encode_prompt(item, special, "prompt")
        prompts.append(item)
    return prompts


class _Completion:
    """Turns the pieces of a job into OpenAI's objects."""

    def __init__(self, service: Service, request: CompletionRequest, job: Job) -> None:
        self._service, self._request, self._job = service, request, job
        self._created = now()
        self._tokenizer = service.tokenizer if service.has_tokenizer else None
        self._with_ids = bool(request.return_token_ids) or self._tokenizer is None  # else nothing is said
        names = Names(self._tokenizer, bool(request.return_tokens_as_token_ids))
        self._writers = [CompletionLogprobsWriter(request.logprobs or 0, names) for _ in job.choices]
        self._started = [False] * len(job.choices)
        self._asked_stops = request.stop_token_ids or ()
        self._only_echo = bool(request.echo) and request.max_tokens == 0
        if self._only_echo:  # the token that each choice has to draw is not part of the answer
            job.completion_tokens = -len(job.choices)

    async def whole(self) -> CompletionAnswer:
        parts: list[list[CompletionChoice]] = [[] for _ in self._job.choices]
        async with aclosing(self._service.run(self._job)) as pieces:
            async for piece in pieces:
                parts[piece.index].append(self._part(piece))
        answer = self._envelope([_whole(part) for part in parts])
        answer.usage = self._job.usage()
        return answer

    async def stream(self, exchange: Exchange) -> None:
        def events(piece: Piece) -> list[CompletionAnswer]:
            part = self._part(piece)
            seen = part.text or part.logprobs or part.finish_reason or part.token_ids
            return [self._envelope([part])] if seen else []

        options = self._request.stream_options
        run = self._service.run(self._job)
        await stream(exchange, run, options, events, lambda: self._envelope([]), self._job.usage)

    def _part(self, piece: Piece) -> CompletionChoice:
        """What a piece adds to its choice; the first one carries the echoed prompt."""
        delta, index = piece.delta, piece.index
        part = CompletionChoice(
            index=index, text="", finish_reason=delta.finish_reason, stop_reason=self._stop_reason(delta)
        )
        logprobs: list[CompletionLogprobs] = []
        if not self._started[index]:
            self._started[index] = True
            self._open(part, piece, logprobs)
        if not self._only_echo:
            part.text += delta.text
            if self._request.logprobs is not None and piece.delta.logprobs:
                logprobs.append(self._writers[index].write(piece.delta.logprobs))
        if self._with_ids:
            part.token_ids = [] if self._only_echo else delta.token_ids
        if logprobs:
            part.logprobs = joined(logprobs)
        return part

    def _stop_reason(self, delta: Delta) -> int | str | None:
        """The stop that was asked for; an end of the model's own is none."""
        own = isinstance(delta.stop_reason, int) and delta.stop_reason not in self._asked_stops
        return None if own else delta.stop_reason

    def _open(self, part: CompletionChoice, piece: Piece, logprobs: list[CompletionLogprobs]) -> None:
        prompt, request = self._job.prompt_of(piece.index), self._request
        of_prompt = piece.delta.prompt_logprobs
        if self._with_ids:
            part.prompt_token_ids = prompt
        if request.echo and self._tokenizer is not None:
            part.text = self._tokenizer.decode(
                prompt, skip_special_tokens=request.skip_special_tokens is not False
            )
        if of_prompt is None:
            return
        if request.prompt_logprobs is not None:
            part.prompt_logprobs = prompt_logprobs(of_prompt, self._tokenizer)
        if request.echo and request.logprobs is not None:
            writer = self._writers[piece.index]
            logprobs += [writer.unknown(prompt[0]), writer.write(of_prompt)]

    def _envelope(self, choices: list[CompletionChoice]) -> CompletionAnswer:
        return CompletionAnswer(
            id=self._job.request_id, created=self._created, model=self._service.served_name, choices=choices
        )


def _whole(parts: list[CompletionChoice]) -> CompletionChoice:
    """All parts of a choice as one."""
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    ids = [part.token_ids for part in parts if part.token_ids is not UNSET]
    return msgspec.structs.replace(
        parts[0],
        text="".join(part.text for part in parts),
        logprobs=joined(logprobs) if logprobs else None,
        finish_reason=parts[-1].finish_reason,
        stop_reason=parts[-1].stop_reason,
        token_ids=[i for some in ids for i in some] if ids else UNSET,
    )
