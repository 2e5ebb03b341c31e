"""`rvllm serve`: loads a model and answers over HTTP until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import resource
import socket
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from rvllm.api.assembly import (
    build_service,
    check_chat_template,
    load_tokenizer,
    start_workers,
    template_text,
)
from rvllm.config import EngineConfig, ServerConfig, SourceConfig
from rvllm.errors import RvllmError, UsageError
from rvllm.settings import add_flags, build, given_settings

if TYPE_CHECKING:
    from rvllm.api.http.listen import StopSignals
    from rvllm.engine.ipc.client import EngineClient
    from rvllm.text.tokenizers.tokenizer import Tokenizer
    from rvllm.text.worker.pool import WorkerPool


def add_parser(subparsers: Any) -> None:
    """Declares `serve`."""
    parser = subparsers.add_parser("serve", help="serve a model over HTTP", allow_abbrev=False)
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help="the same as --model MODEL")
    add_flags(parser, EngineConfig, "engine")
    add_flags(parser, ServerConfig, "server")


def main(args: argparse.Namespace) -> int:
    """Serves until a signal, the engine's death or a failed start; returns the exit code."""
    began = time.perf_counter()
    if args.model_tag is not None:
        if args.model not in (None, args.model_tag):
            raise UsageError(f"both MODEL ({args.model_tag}) and --model ({args.model}) are given: give one")
        args.model = args.model_tag
    engine_config = build(EngineConfig, vars(args))
    server_config = build(ServerConfig, vars(args))
    if engine_config.fairness == "api-key" and not (server_config.api_key or server_config.api_key_file):
        raise UsageError("--fairness api-key tells clients apart by their keys: set --api-key-file, too")
    template = template_text(server_config.chat_template)
    if server_config.otlp_endpoint is not None:
        from rvllm.telemetry.tracing import check_available

        check_available(server_config.otlp_endpoint)

    from rvllm.api.http.listen import bind
    from rvllm.telemetry.logs import set_up
    from rvllm.weights.fetch.progress import ProgressBar
    from rvllm.weights.fetch.source import resolve

    set_up(server_config.log_level)
    _allow_many_connections()
    sock = bind(server_config)
    with sock:
        with ProgressBar() as progress:
            path = resolve(engine_config.model, build(SourceConfig, {}), progress)
        start = _Start(began, time.perf_counter() - began)
        if engine_config.tokenizer is not None:
            tokenizer = resolve(engine_config.tokenizer, build(SourceConfig, {}))
            engine_config = dataclasses.replace(engine_config, tokenizer=str(tokenizer))
        engine_config, name = dataclasses.replace(engine_config, model=str(path)), engine_config.model
        config = dataclasses.replace(server_config, served_model_name=server_config.served_model_name or name)

        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(engine_config, config, template, sock, start))


def _allow_many_connections() -> None:
    """Each client is an open file; shells often allow 1,024 of them where the system would allow more."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@dataclasses.dataclass
class _Start:
    """How long the parts of the start took, in seconds."""

    began: float  # time.perf_counter() at the start
    resolve: float
    tokenizer: float = 0.0
    http: float = 0.0

    def total(self) -> float:
        return time.perf_counter() - self.began


async def _serve(
    engine_config: EngineConfig,
    config: ServerConfig,
    template: str | None,
    sock: socket.socket,
    start: _Start,
) -> int:
    """Loads and serves; a signal while loading ends the start."""
    from rvllm.api.http.listen import StopSignals

    stop = StopSignals()
    stop.install()
    stopped = asyncio.ensure_future(stop.first.wait())
    loading = asyncio.ensure_future(_load(engine_config, config, template, start))
    await asyncio.wait((loading, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not loading.done():
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        return stop.exit_code
    engine, tokenizer, work = loading.result()
    try:
        return await _answer(engine, tokenizer, work, config, engine_config, template, sock, stop, start)
    finally:
        if work is not None:
            work.close()
        await engine.close()


async def _load(
    config: EngineConfig, server: ServerConfig, template: str | None, start: _Start
) -> tuple[EngineClient, Tokenizer | None, WorkerPool | None]:
    """Starts the engine process; while it loads, this one loads the tokenizer, workers and the HTTP side."""
    from rvllm.cli.common.starting import start_engine

    work = start_workers(config, server)
    try:
        engine, (tokenizer, _) = await start_engine(
            config, partial(_tokenizer, config, start), partial(_import_http, start)
        )
    except BaseException:
        if work is not None:
            work.close()
        raise
    if work is not None:
        try:
            await check_chat_template(work, template, server.tool_call_parser)
        except RvllmError:
            work.close()
            await engine.close()
            raise
    return engine, tokenizer, work


def _import_http(start: _Start) -> None:
    moment = time.perf_counter()
    import rvllm.api.app
    import rvllm.api.http.server  # noqa: F401

    start.http = time.perf_counter() - moment


def _tokenizer(config: EngineConfig, start: _Start) -> Tokenizer | None:
    """The model's tokenizer; None with --skip-tokenizer-init."""
    moment = time.perf_counter()
    tokenizer = load_tokenizer(config)
    start.tokenizer = time.perf_counter() - moment
    return tokenizer


async def _answer(
    engine: EngineClient,
    tokenizer: Tokenizer | None,
    work: WorkerPool | None,
    config: ServerConfig,
    engine_config: EngineConfig,
    template: str | None,
    sock: socket.socket,
    stop: StopSignals,
    start: _Start,
) -> int:
    """Serves a loaded model."""
    from rvllm.api.app import build_app
    from rvllm.api.http.listen import url_of
    from rvllm.api.http.server import serve

    engine.stall_seconds = config.engine_stall_seconds
    engine.max_unread = config.max_unread_tokens
    service, gate = build_service(engine, engine.ready, engine_config, config, tokenizer, work, template)

    def announce() -> None:
        from rvllm.cli.common.tables import wrapped

        kernels = _kernels(engine.ready.backend, engine_config)
        lines = _summary(engine, engine_config, service.served_name, kernels, start, url_of(sock))
        if sys.stdout.isatty():  # a terminal would break them within words; a log keeps them whole
            lines = [wrapped(line, 10) for line in lines]
        print("\n".join(lines), flush=True)

    warming = asyncio.ensure_future(service.warm_grammars())
    try:
        return await serve(build_app(service, gate), gate, sock, engine, stop, announce)
    finally:
        warming.cancel()
        await asyncio.gather(warming, return_exceptions=True)


def _bits(config: EngineConfig) -> str:
    """What a strategy of products does to bits, where it does something."""
    from rvllm.backends.cuda.ops.gemm.strategy import USES_CUBLAS

    return " (bits depend on the batch)" if config.gemm_strategy in USES_CUBLAS else ""


def _kernels(backend: str, config: EngineConfig) -> str:
    """What computes: on the CPU which kernels there are for the processor, on a GPU what was chosen."""
    if backend != "cpu":
        bits = "" if config.gemm_strategy == "native" else _bits(config)
        return f"{config.gemm_strategy} products{bits}, {config.decode_path} decode"
    from rvllm.backends.cpu.compiled.library import in_use

    return in_use(config.cpu_kernels, config.kv_cache_dtype == "fp8")


def _summary(
    engine: EngineClient, config: EngineConfig, name: str, kernels: str, start: _Start, url: str
) -> list[str]:
    """What an operator wants to know of a server that has just started."""
    from rvllm.cli.common.tables import human_bytes
    from rvllm.version import __version__

    ready, facts = engine.ready, engine.ready.facts
    memory = " · ".join(f"{line} {human_bytes(nbytes)}" for line, nbytes in ready.ledger)
    tokens = ready.num_blocks * ready.block_size
    given = " · ".join(
        f"{flag} {value}" for flag, value in given_settings(config).items() if flag != "--model"
    )
    return [
        f"rvLLM {__version__} · {name} · {facts.architecture} · {ready.backend}, {facts.dtype}",
        f"  kernels {kernels}",
        *([f"  given   {given}"] if given else []),
        f"  memory  {memory}",
        f"  blocks  {ready.num_blocks:,} of {ready.block_size} tokens: {tokens:,} tokens for up to "
        f"{ready.max_num_seqs} sequences of at most {ready.max_model_len:,}",
        f"  start   {start.total():.2f} s: model found {start.resolve:.2f}, loaded {ready.load_seconds:.2f}; "
        f"beside it tokenizer {start.tokenizer:.2f}, HTTP {start.http:.2f}",
        f"  listening on {url}",
    ]
