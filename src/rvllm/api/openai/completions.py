"""`/v1/completions`: texts or token ids in, their continuations out."""

from __future__ import annotations

from contextlib import aclosing

from msgspec import UNSET

from rvllm.api.generate.generation import Service, too_long
from rvllm.api.generate.job import Job, Piece
from rvllm.api.generate.logprobs import CompletionLogprobsWriter, Names, prompt_logprobs
from rvllm.api.generate.sampling import completion_params, refuse_unsupported
from rvllm.api.generate.structured_outputs import answer_grammar
from rvllm.api.http.errors import invalid
from rvllm.api.http.exchange import Exchange
from rvllm.api.openai.streaming import stream
from rvllm.api.schemas.answers import CompletionAnswer, CompletionChoice, Rendered, now
from rvllm.api.schemas.requests import CompletionRequest
from rvllm.text.chat.fim import FillIn
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
        choices = [self._choice(i) for i in range(len(self._job.choices))]
        texts: list[list[str]] = [[] for _ in choices]
        async with aclosing(self._service.run(self._job)) as pieces:
            async for piece in pieces:
                texts[piece.index].append(self._add(choices[piece.index], piece))
        for choice, parts in zip(choices, texts, strict=True):
            choice.text = "".join(parts)
        answer = self._envelope(choices)
        answer.usage = self._job.usage()
        return answer

    async def stream(self, exchange: Exchange) -> None:
        def events(piece: Piece) -> list[CompletionAnswer]:
            part = self._choice(piece.index)
            part.text = self._add(part, piece)
            seen = part.text or part.logprobs or part.finish_reason or part.token_ids
            return [self._envelope([part])] if seen else []

        options = self._request.stream_options
        run = self._service.run(self._job)
        await stream(exchange, run, options, events, lambda: self._envelope([]), self._job.usage)

    def _choice(self, index: int) -> CompletionChoice:
        return CompletionChoice(index=index, text="", token_ids=[] if self._with_ids else UNSET)

    def _add(self, choice: CompletionChoice, piece: Piece) -> str:
        """Adds all but the text of a piece to its choice; the text, which begins with the echoed prompt."""
        delta, index = piece.delta, piece.index
        choice.finish_reason = delta.finish_reason
        # The stop that was asked for; an end of the model's own is none.
        own = isinstance(delta.stop_reason, int) and delta.stop_reason not in self._asked_stops
        choice.stop_reason = None if own else delta.stop_reason
        echoed = "" if self._started[index] else self._open(choice, piece)
        self._started[index] = True
        if self._only_echo:
            return echoed
        if self._request.logprobs is not None and delta.logprobs:
            choice.logprobs = self._writers[index].write(delta.logprobs, choice.logprobs)
        if choice.token_ids is not UNSET:
            choice.token_ids += delta.token_ids
        return echoed + delta.text

    def _open(self, choice: CompletionChoice, piece: Piece) -> str:
        """Adds what is said of the prompt; its text if it is echoed."""
        prompt, request = self._job.prompt_of(piece.index), self._request
        of_prompt = piece.delta.prompt_logprobs
        if self._with_ids:
            choice.prompt_token_ids = prompt
        if of_prompt is not None and request.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(of_prompt, self._tokenizer)
        if of_prompt is not None and request.echo and request.logprobs is not None:
            writer = self._writers[piece.index]
            choice.logprobs = writer.write(of_prompt, writer.unknown(prompt[0]))
        if not request.echo or self._tokenizer is None:
            return ""
        return self._tokenizer.decode(prompt, skip_special_tokens=request.skip_special_tokens is not False)

    def _envelope(self, choices: list[CompletionChoice]) -> CompletionAnswer:
        return CompletionAnswer(
            id=self._job.request_id, created=self._created, model=self._service.served_name, choices=choices
        )
