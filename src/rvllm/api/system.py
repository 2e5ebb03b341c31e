"""The small endpoints: models, tokenize, detokenize, tokenizer_info, health, metrics, version."""

from __future__ import annotations

from rvllm.api.generate.conversation import rendered
from rvllm.api.generate.generation import MAX_CHARS, Service, by_name
from rvllm.api.http.errors import ApiError, blaming, invalid
from rvllm.api.http.exchange import Exchange, Gate
from rvllm.api.http.pagination import Query
from rvllm.api.schemas.answers import ModelCard, ModelList, Text, TokenizerInfo, Tokens
from rvllm.api.schemas.requests import DetokenizeRequest, TokenizeRequest
from rvllm.errors import RvllmError
from rvllm.telemetry.metrics import CONTENT_TYPE, metrics_page
from rvllm.telemetry.stats import Stats
from rvllm.text.tokenizers.tokenizer import Tokenizer
from rvllm.text.worker import tasks
from rvllm.version import __version__
from rvllm.vllm.flags import check_wake_up_tags


def _card(service: Service, name: str) -> ModelCard:
    ready = service.ready
    return ModelCard(
        id=name,
        created=service.started,
        root=service.served_name,
        max_model_len=ready.limits.max_model_len,
        context_length=ready.limits.max_model_len,
        capabilities=_capabilities(service),
    )


def _capabilities(service: Service) -> dict[str, bool]:
    """What requests may ask of the model."""
    facts = service.ready.facts
    generates = facts.embedding_size is None
    texts = service.has_tokenizer
    chat = generates and texts and service.template is not None
    return {
        "chat": chat,
        "completions": generates,
        "responses": chat,
        "messages": chat,
        "embeddings": not generates and facts.labels is None,
        "rerank": not generates and (facts.labels is None or len(facts.labels) == 1),
        "classify": facts.labels is not None,
        "tools": chat and service.tools is not None and service.places_tools,
        "reasoning": chat and service.reasoning is not None,
        "structured_outputs": generates and texts and service.tokenizer.spelling.kind != "other",
        "fim": generates and texts and service.tokenizer.fill_in is not None,
        "logprobs": generates,
        "vision": False,
        "audio": False,
    }


async def list_models(service: Service, exchange: Exchange, request: None) -> None:
    """`/v1/models`: what is served, under each of its names."""
    cards = [_card(one, name) for one in service.siblings for name in one.served_names]
    await exchange.json(ModelList(cards))


async def get_model(service: Service, exchange: Exchange, request: None) -> None:
    name = exchange.scope["path_params"]["name"]
    await exchange.json(_card(by_name(service, name), name))


async def tokenize(service: Service, exchange: Exchange, request: TokenizeRequest) -> None:
    """`/tokenize`: the token ids of a text or a conversation."""
    if (request.prompt is None) == (request.messages is None):
        raise invalid("give either prompt or messages", "prompt")
    if request.prompt is not None:
        tokens = await service.encode_any(request.prompt, request.add_special_tokens is not False, "prompt")
    else:
        text = await rendered(service, request, exchange.body_bytes)
        tokens = await service.encode_any(text, bool(request.add_special_tokens), "messages")
    names = None
    if request.return_token_strs:
        names = await service.work.run(tasks.token_texts, "prompt", len(tokens), tokens)
    await exchange.json(Tokens(len(tokens), service.ready.limits.max_model_len, tokens, names))


async def tokenizer_info(service: Service, exchange: Exchange, request: None) -> None:
    """`/tokenizer_info`: what programs need that tokenise through this server (lm-eval does)."""
    tokenizer = service.tokenizer
    info = TokenizerInfo(
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.special_tokens.get("pad_token"),
        chat_template=service.template,
        model_max_length=service.ready.limits.max_model_len,
    )
    await exchange.json(info)


async def detokenize(service: Service, exchange: Exchange, request: DetokenizeRequest) -> None:
    """`/detokenize`: the text of token ids."""
    if len(request.tokens) > MAX_CHARS:
        raise ApiError(413, f"tokens: at most {MAX_CHARS} are taken at once", param="tokens")
    service.ready.facts.check_tokens("tokens", request.tokens)
    text = await service.work.run(Tokenizer.decode, "tokens", len(request.tokens), request.tokens)
    await exchange.json(Text(text))


class Health:
    """The endpoints that tell whether requests are answered."""

    def __init__(self, gate: Gate, service: Service) -> None:
        self._gate, self._service = gate, service

    def _check(self) -> None:
        """Raises a 503 that says why, unless requests are answered."""
        status = self._service.engine.status
        if status == "ready" and self._gate.draining:
            status = "draining"
        if status != "ready":
            said = {"failed": "the engine has died", "stalled": "the engine does not answer",
                    "starting": "the engine starts again",
                    "draining": "the server is shutting down"}  # fmt: skip
            code = "engine_dead" if status == "failed" else status
            raise ApiError(503, said[status], code=code)

    async def health(self, exchange: Exchange, request: None) -> None:
        """`/health`: 200 while requests are answered, else 503; `status` says which it is."""
        self._check()
        await exchange.json({"status": "ready"})

    async def ready(self, exchange: Exchange, request: None) -> None:
        """`/v2/health/ready` of the open inference protocol: as `/health`."""
        self._check()
        await exchange.json({"ready": True})

    async def live(self, exchange: Exchange, request: None) -> None:
        """`/v2/health/live` of the open inference protocol: that this process answers."""
        await exchange.json({"live": True})


async def metrics(service: Service, exchange: Exchange, request: None) -> None:
    """`/metrics`: Prometheus' text format; without the engine's figures when it is gone."""
    found = [(one.metrics, await _stats(one)) for one in service.siblings]
    await exchange.respond(metrics_page(found), CONTENT_TYPE.encode())


async def _stats(service: Service) -> Stats | None:
    """The engine's figures; None when it is gone."""
    try:
        return await service.engine.stats() if service.engine.alive else None
    except RvllmError:
        return None


async def version(service: Service, exchange: Exchange, request: None) -> None:
    await exchange.json({"version": __version__})


async def load(service: Service, exchange: Exchange, request: None) -> None:
    """`/load`: how many choices run or wait, as vLLM tells balancers."""
    await exchange.json({"server_load": sum(one.in_flight for one in service.siblings)})


async def is_sleeping(service: Service, exchange: Exchange, request: None) -> None:
    await exchange.json({"is_sleeping": all(one.engine.sleep_level > 0 for one in service.siblings)})


async def sleep(service: Service, exchange: Exchange, request: None) -> None:
    """`/sleep?level=1&kv_cache=drop`: gives memory back; requests wait until the server is woken up."""
    _check_sleep_mode(service)
    level = Query(exchange).number("level", 1, 1, 2)
    keep = Query(exchange).choice("kv_cache", "drop", ("drop", "keep")) == "keep"
    if keep and level > 1:
        raise invalid("kv_cache=keep is for level 1: at level 2 nothing of a model stays", "kv_cache")
    seconds = await service.engine.sleep(level, keep)
    await exchange.json({"is_sleeping": True, "seconds": round(seconds, 4)})


async def wake_up(service: Service, exchange: Exchange, request: None) -> None:
    """`/wake_up`: takes the memory again, all of it; requests that waited go on."""
    _check_sleep_mode(service)
    with blaming("tags"):
        check_wake_up_tags(Query(exchange).texts("tags"))
    seconds = await service.engine.sleep(0)
    await exchange.json({"is_sleeping": False, "seconds": round(seconds, 4)})


def _check_sleep_mode(service: Service) -> None:
    if not service.ready.sleep_mode:
        raise invalid("this server runs without --enable-sleep-mode")


async def server_info(service: Service, exchange: Exchange, request: None) -> None:
    """`/server_info`: what is served, and how; the settings are under vLLM's name for them."""
    ready, facts = service.ready, service.ready.facts
    settings = {
        "model": service.served_name,
        "architecture": facts.architecture,
        "dtype": facts.dtype,
        "device": ready.backend,
        "max_model_len": facts.max_model_len,
        "max_num_seqs": ready.limits.max_num_seqs,
        "max_num_batched_tokens": ready.limits.max_num_batched_tokens,
        "block_size": ready.limits.block_size,
        "num_gpu_blocks": ready.limits.num_blocks,
        **service.shown_settings,
    }
    await exchange.json({"vllm_config": settings, "system_env": {"rvllm": __version__}})
