"""`rvllm serve`: loads a model and answers over HTTP until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import resource
import socket
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rvllm.config import EngineConfig, ServerConfig, SourceConfig, add_flags, build
from rvllm.errors import RvllmError, UsageError

if TYPE_CHECKING:
    from rvllm.api.http.listen import StopSignals
    from rvllm.engine.ipc.client import EngineClient
    from rvllm.telemetry.tracing import Tracer
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
    template = _template(server_config.chat_template)
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


def _template(file: str | None) -> str | None:
    """The text of `--chat-template`, which may be the template itself."""
    if file is None or "{{" in file or "{%" in file:
        return file
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UsageError(f"--chat-template: cannot read {file}: {reason}") from None


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

    work = _workers(config, server)
    try:
        engine, (tokenizer, _) = await start_engine(
            config, partial(_tokenizer, config, start), partial(_import_http, start)
        )
    except BaseException:
        if work is not None:
            work.close()
        raise
    if work is None:
        return engine, tokenizer, work
    from rvllm.text.worker.tasks import check_template, try_template

    # A template is somebody's code: it runs where it may be killed before it runs here.
    flag = "the model's chat template" if template is None else "--chat-template"
    try:
        if template is not None:
            await work.run(check_template, flag, len(template), template)
        await work.run(try_template, flag, 0, template, server.tool_call_parser)
    except RvllmError as error:
        work.close()
        await engine.close()
        raise UsageError(f"{flag}: {str(error).removeprefix(f'{flag}: ')}") from None
    return engine, tokenizer, work


def _workers(config: EngineConfig, server: ServerConfig) -> WorkerPool | None:
    """Processes for work on what clients send, which begin to load; None without a tokenizer."""
    from rvllm.text.worker.pool import WorkerPool, worker_count

    if config.skip_tokenizer_init:
        return None
    pool = WorkerPool(
        config.model,
        count=worker_count(server.workers),
        seconds=server.worker_timeout,
        memory=int(server.worker_memory_mb * 1e6),
    )
    pool.start()
    return pool


def _import_http(start: _Start) -> None:
    moment = time.perf_counter()
    import rvllm.api.app
    import rvllm.api.http.server  # noqa: F401

    start.http = time.perf_counter() - moment


def _tokenizer(config: EngineConfig, start: _Start) -> Tokenizer | None:
    """The model's tokenizer; None with --skip-tokenizer-init."""
    if config.skip_tokenizer_init:
        return None
    from rvllm.text.tokenizers.tokenizer import Tokenizer

    moment = time.perf_counter()
    tokenizer = Tokenizer.load(Path(config.tokenizer or config.model))
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
    from rvllm.api.generate.generation import Service
    from rvllm.api.http.exchange import Gate
    from rvllm.api.http.listen import url_of
    from rvllm.api.http.server import serve
    from rvllm.telemetry.metrics import Metrics
    from rvllm.text.requests import RequestMaker

    engine.stall_seconds = config.engine_stall_seconds
    engine.max_unread = config.max_unread_tokens
    ready = engine.ready
    names = config.served_model_name or engine_config.model
    name = names.partition("\n")[0]
    metrics = Metrics(
        name,
        {
            "block_size": str(ready.block_size),
            "num_gpu_blocks": str(ready.num_blocks),
            "enable_prefix_caching": str(engine_config.enable_prefix_caching),
            "gpu_memory_utilization": str(engine_config.gpu_memory_utilization),
        },
        _engine_info(engine_config, ready.backend, ready.facts.dtype),
    )
    service = Service(
        engine,
        ready,
        tokenizer,
        config,
        metrics,
        served_name=names,
        requests=RequestMaker(ready.facts, engine_config.seed, tokenizer),
        chat_template=template,
        work=work,
        shown_settings=_shown_settings(engine_config, ready.backend),
    )
    gate = Gate(config, metrics, tracer=_tracer(config.otlp_endpoint, name))
    gate.restarted.append(service.forget_vocabulary)
    if gate.tracer is not None:
        gate.closing.append(gate.tracer.close)

    def announce() -> None:
        kernels = _kernels(engine.ready.backend, engine_config)
        print("\n".join(_summary(engine, name, kernels, start, url_of(sock))), flush=True)

    warming = asyncio.ensure_future(service.warm_grammars())
    try:
        return await serve(build_app(service, gate), gate, sock, engine, stop, announce)
    finally:
        warming.cancel()
        await asyncio.gather(warming, return_exceptions=True)


def _tracer(endpoint: str | None, model: str) -> Tracer | None:
    from rvllm.telemetry.tracing import Tracer

    return None if endpoint is None else Tracer(endpoint, model)


def _shown_settings(config: EngineConfig, backend: str) -> dict[str, str]:
    """What the page shows of the settings: how matrices and decode steps are computed."""
    shown = {"prefix caching": "on" if config.enable_prefix_caching else "off"}
    if backend == "cpu":
        return {"CPU kernels": config.cpu_kernels, **shown}
    return {
        "decode path": config.decode_path,
        "GEMM strategy": config.gemm_strategy,
        "capture graphs": config.capture_graphs,
        **shown,
    }


def _engine_info(config: EngineConfig, backend: str, dtype: str) -> dict[str, str]:
    """What computes a step, as labels of a metric."""
    shared = {"device": backend, "dtype": dtype}
    if backend == "cpu":
        return {**shared, "decode_path": "cpu", "gemm_strategy": config.cpu_kernels}
    return {
        **shared,
        "decode_path": config.decode_path,
        "gemm_strategy": config.gemm_strategy,
        "capture_graphs": config.capture_graphs,
    }


def _kernels(backend: str, config: EngineConfig) -> str:
    """What computes: on the CPU which kernels there are for the processor, on a GPU what was chosen."""
    if backend != "cpu":
        return f"{config.gemm_strategy} products, {config.decode_path} decode"
    from rvllm.backends.cpu.compiled.library import in_use

    return in_use(config.cpu_kernels)


def _summary(engine: EngineClient, name: str, kernels: str, start: _Start, url: str) -> list[str]:
    """What an operator wants to know of a server that has just started."""
    from rvllm.cli.common.tables import human_bytes
    from rvllm.version import __version__

    ready, facts = engine.ready, engine.ready.facts
    memory = " · ".join(f"{line} {human_bytes(nbytes)}" for line, nbytes in ready.ledger)
    tokens = ready.num_blocks * ready.block_size
    return [
        f"rvLLM {__version__} · {name} · {facts.architecture} · {ready.backend}, {facts.dtype}",
        f"  kernels {kernels}",
        f"  memory  {memory}",
        f"  blocks  {ready.num_blocks:,} of {ready.block_size} tokens: {tokens:,} tokens for up to "
        f"{ready.max_num_seqs} sequences of at most {ready.max_model_len:,}",
        f"  start   {start.total():.2f} s: model found {start.resolve:.2f}, loaded {ready.load_seconds:.2f}; "
        f"beside it tokenizer {start.tokenizer:.2f}, HTTP {start.http:.2f}",
        f"  listening on {url}",
    ]
