"""vLLM's `/generate`, text in and out, and `/inference/v1/generate`, token ids in and out."""

from __future__ import annotations

from contextlib import aclosing

import msgspec

from rvllm.api.generate.generation import Service
from rvllm.api.generate.job import Job, Piece
from rvllm.api.generate.logprobs import Names, chat_logprobs, prompt_logprobs
from rvllm.api.http.body import wrong_field
from rvllm.api.http.errors import invalid
from rvllm.api.http.exchange import Exchange
from rvllm.api.openai.completions import completion_job
from rvllm.api.openai.streaming import stream
from rvllm.api.schemas.answers import GeneratedChoice, GeneratedTexts, GeneratedTokens
from rvllm.api.schemas.requests import CompletionRequest, TokenRequest


async def generate(service: Service, exchange: Exchange, request: CompletionRequest) -> None:
    """Answers with the prompt and what follows it, by choice; as a stream, with a line for each step."""
    prompt = request.prompt
    if not isinstance(prompt, str):
        raise invalid("prompt must be a text here; /v1/completions takes lists and token ids", "prompt")
    job = await completion_job(service, f"gen-{exchange.request_id}", request)
    texts = [prompt] * len(job.choices)
    async with aclosing(service.run(job)) as pieces:
        async for piece in pieces:
            texts[piece.index] += piece.delta.text
            if request.stream:
                if not exchange.streaming:
                    await exchange.open_stream(lines=True)
                await exchange.event(GeneratedTexts(texts))
    if request.stream:
        await exchange.close_stream()
    else:
        await exchange.json(GeneratedTexts(texts))


async def generate_tokens(service: Service, exchange: Exchange, asked: TokenRequest) -> None:
    """Answers with token ids, whole or as a stream; nothing is decoded."""
    if asked.features:
        raise invalid("features: models take text alone", "features", "unsupported_parameter")
    request = _completion(asked)
    name = asked.request_id or f"gen-{exchange.request_id}"
    job = await completion_job(service, f"gen-{exchange.request_id}", request, text=bool(request.stop))
    if asked.stream:
        await stream(
            exchange, service.run(job), asked.stream_options,
            lambda piece: [
                GeneratedTokens(name, [_added(GeneratedChoice(index=piece.index), request, piece)])
            ],
            lambda: GeneratedTokens(name, []), job.usage,
        )  # fmt: skip
    else:
        await exchange.json(await _whole(service, job, request, name))


def _completion(asked: TokenRequest) -> CompletionRequest:
    """The same request to `/v1/completions`."""
    fields = {"model": asked.model, "prompt": asked.token_ids, "priority": asked.priority,
              "cache_salt": asked.cache_salt, "kv_transfer_params": asked.kv_transfer_params}  # fmt: skip
    try:
        return msgspec.convert({**asked.sampling_params, **fields}, CompletionRequest)
    except msgspec.ValidationError as error:
        raise wrong_field(str(error), "sampling_params") from None


async def _whole(service: Service, job: Job, request: CompletionRequest, name: str) -> GeneratedTokens:
    choices = [GeneratedChoice(index=i) for i in range(len(job.choices))]
    answer = GeneratedTokens(name, choices)
    async with aclosing(service.run(job)) as pieces:
        async for piece in pieces:
            _added(choices[piece.index], request, piece)
            if piece.delta.prompt_logprobs is not None and request.prompt_logprobs is not None:
                answer.prompt_logprobs = prompt_logprobs(piece.delta.prompt_logprobs, None)
    answer.usage = job.usage()
    return answer


def _added(choice: GeneratedChoice, request: CompletionRequest, piece: Piece) -> GeneratedChoice:
    """The choice, to which a piece has been added."""
    delta = piece.delta
    if request.logprobs is not None and delta.logprobs:
        choice.logprobs = chat_logprobs(delta.logprobs, request.logprobs, Names(None, True), choice.logprobs)
    choice.token_ids += delta.token_ids
    choice.finish_reason = delta.finish_reason
    return choice
