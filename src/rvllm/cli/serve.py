"""`rvllm serve`: loads a model and answers over HTTP until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import resource
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rvllm.api.assembly import (
    build_gate,
    check_chat_template,
    load_tokenizer,
    service_of,
    start_workers,
    template_text,
)
from rvllm.cli.common.models import fetched, start_engine
from rvllm.cli.common.several import add_model_flags, engine_configs, rename, room_for_others
from rvllm.config import EngineConfig, ServerConfig
from rvllm.errors import RvllmError, UsageError
from rvllm.settings import add_flags, build, given_settings, settings_of

if TYPE_CHECKING:
    from rvllm.api.generate.generation import Service
    from rvllm.api.http.listen import StopSignals
    from rvllm.engine.ipc.client import EngineClient
    from rvllm.engine.ipc.switch import ModelSwitch
    from rvllm.text.tokenizers.tokenizer import Tokenizer
    from rvllm.text.worker.pool import WorkerPool

    _Wanted = tuple[EngineConfig, ServerConfig]


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("serve", help="serve a model over HTTP", allow_abbrev=False)
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help="the same as --model MODEL")
    add_model_flags(parser)
    others = [f.name for f, _ in settings_of(EngineConfig) if f.name != "model"]
    add_flags(parser, EngineConfig, "engine", others)
    add_flags(parser, ServerConfig, "server")


def main(args: argparse.Namespace) -> int:
    """Serves until a signal, the engine's death or a failed start; returns the exit code."""
    began = time.perf_counter()
    if args.model_tag is not None:
        if args.model not in (None, [args.model_tag]):
            given = " and ".join(args.model)
            raise UsageError(f"both MODEL ({args.model_tag}) and --model ({given}) are given: give one")
        args.model = [args.model_tag]
    configs = engine_configs(args)
    server_config = build(ServerConfig, vars(args))
    if configs[0].fairness == "api-key" and not (server_config.api_key or server_config.api_key_file):
        raise UsageError("--fairness api-key tells clients apart by their keys: set --api-key-file, too")
    template = template_text(server_config.chat_template)
    if server_config.otlp_endpoint is not None:
        from rvllm.telemetry.tracing import check_available

        check_available(server_config.otlp_endpoint)
    names = rename(configs, server_config)

    from rvllm.api.http.listen import bind
    from rvllm.telemetry.logs import set_up

    set_up(server_config.log_level)
    # Each client is an open file; shells often allow 1,024 of them where the system would allow more.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    sock = bind(server_config)
    with sock:
        configs = room_for_others([fetched(config) for config in configs])
        start = _Start(began, time.perf_counter() - began)
        servers = [dataclasses.replace(server_config, served_model_name=name) for name in names]

        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            wanted = list(zip(configs, servers, strict=True))
            return runner.run(_serve(wanted, template, sock, start))


@dataclasses.dataclass
class _Start:
    """How long the parts of the start took, in seconds."""

    began: float  # time.perf_counter() at the start
    resolve: float
    beside: dict[str, float] = dataclasses.field(default_factory=dict)  # what is done while a model loads

    def timed(self, part: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        done = work()
        self.beside[part] = self.beside.get(part, 0.0) + time.perf_counter() - began
        return done


@dataclasses.dataclass
class _Loaded:
    """A model that is loaded, and the server's settings under its names."""

    config: EngineConfig
    server: ServerConfig
    engine: EngineClient
    tokenizer: Tokenizer | None
    work: WorkerPool | None

    async def close(self) -> None:
        if self.work is not None:
            self.work.close()
        await self.engine.close()


async def _serve(wanted: Sequence[_Wanted], template: str | None, sock: socket.socket, start: _Start) -> int:
    """Loads and serves; a signal while loading ends the start."""
    from rvllm.api.http.listen import StopSignals

    stop = StopSignals()
    stop.install()
    stopped = asyncio.ensure_future(stop.first.wait())
    loading = asyncio.ensure_future(_load_all(wanted, template, start))
    await asyncio.wait((loading, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not loading.done():
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        return stop.exit_code
    loaded = loading.result()
    try:
        return await _answer(loaded, template, sock, stop, start)
    finally:
        await asyncio.gather(*(model.close() for model in loaded))


async def _load_all(wanted: Sequence[_Wanted], template: str | None, start: _Start) -> list[_Loaded]:
    """Loads models one after the other; of several the first is awake at the end, and the others sleep."""
    loaded: list[_Loaded] = []
    try:
        for model in wanted:
            loaded.append(await _load(model, template, start))
            if len(wanted) > 1:
                await loaded[-1].engine.sleep(1)
        if len(wanted) > 1:
            await loaded[0].engine.sleep(0)
    except BaseException:
        for done in loaded:
            await done.close()
        raise
    return loaded


async def _load(wanted: _Wanted, template: str | None, start: _Start) -> _Loaded:
    """Starts the engine process; while it loads, this one loads the tokenizer, workers and the HTTP side."""

    from rvllm.engine.ipc.spawn import spawn

    config, server = wanted
    spawned = spawn()  # first, as it takes the longest
    work = start_workers(config, server)
    try:
        engine, (tokenizer, _) = await start_engine(
            config,
            partial(start.timed, "tokenizer", partial(load_tokenizer, config)),
            partial(start.timed, "HTTP", _import_http),
            spawned=spawned,
        )
    except BaseException:
        if work is not None:
            work.close()
        raise
    loaded = _Loaded(config, server, engine, tokenizer, work)
    if work is not None:
        try:
            await check_chat_template(work, template, server.tool_call_parser)
        except RvllmError:
            await loaded.close()
            raise
    return loaded


def _import_http() -> None:
    import rvllm.api.app
    import rvllm.api.http.server  # noqa: F401


async def _answer(
    loaded: Sequence[_Loaded],
    template: str | None,
    sock: socket.socket,
    stop: StopSignals,
    start: _Start,
) -> int:
    from rvllm.api.app import build_app
    from rvllm.api.http.listen import url_of
    from rvllm.api.http.server import serve

    config = loaded[0].server
    engine, services = _services(loaded, template)
    gate = build_gate(config, services)

    def announce() -> None:
        from rvllm.cli.common.tables import wrapped
        from rvllm.version import __version__

        lines = [f"rvLLM {__version__}"]
        for model, service in zip(loaded, services, strict=True):
            kernels = _kernels(model.engine.ready.backend, model.config)
            lines += _summary(model.engine, model.config, service.served_name, kernels)
        lines[:2] = [f"{lines[0]} · {lines[1]}"]
        lines += [_start_line([model.engine for model in loaded], start), f"  listening on {url_of(sock)}"]
        if sys.stdout.isatty():  # a terminal would break them within words; a log keeps them whole
            lines = [wrapped(line, 10) for line in lines]
        print("\n".join(lines), flush=True)

    warming = [asyncio.ensure_future(service.warm_grammars()) for service in services]
    try:
        return await serve(build_app(services[0], gate), gate, sock, engine, stop, announce)
    finally:
        for task in warming:
            task.cancel()
        await asyncio.gather(*warming, return_exceptions=True)
        if len(loaded) > 1:
            await engine.close()


def _services(
    loaded: Sequence[_Loaded], template: str | None
) -> tuple[EngineClient | ModelSwitch, list[Service]]:
    """The models as handlers see them, and what lives as long as they do."""
    from rvllm.engine.ipc.switch import ModelSwitch, SwitchedEngine

    server = loaded[0].server
    for model in loaded:
        model.engine.stall_seconds = server.engine_stall_seconds
        model.engine.max_unread = server.max_unread_tokens
    switch = ModelSwitch([m.engine for m in loaded], server.model_turn_seconds) if len(loaded) > 1 else None
    services = []
    for number, model in enumerate(loaded):
        engine = model.engine if switch is None else SwitchedEngine(switch, number)
        about = (model.engine.ready, model.config, model.server, model.tokenizer, model.work, template)
        services.append(service_of(engine, *about, number))
    return switch or loaded[0].engine, services


def _kernels(backend: str, config: EngineConfig) -> str:
    """What computes: on the CPU which kernels there are for the processor, on a GPU what was chosen."""
    if backend != "cpu":
        bits = ""
        if config.gemm_strategy != "native":
            from rvllm.backends.cuda.ops.gemm.strategy import USES_CUBLAS

            bits = " (bits depend on the batch)" if config.gemm_strategy in USES_CUBLAS else ""
        return f"{config.gemm_strategy} products{bits}, {config.decode_path} decode"
    from rvllm.backends.cpu.compiled.library import in_use

    return in_use(config.cpu_kernels, config.kv_cache_dtype == "fp8")


def _summary(engine: EngineClient, config: EngineConfig, name: str, kernels: str) -> list[str]:
    """What an operator wants to know of a model that has just been loaded."""
    from rvllm.cli.common.tables import human_bytes

    ready, facts, limits = engine.ready, engine.ready.facts, engine.ready.limits
    memory = " · ".join(f"{line.name} {human_bytes(line.nbytes)}" for line in ready.ledger)
    tokens = limits.num_blocks * limits.block_size
    given = " · ".join(
        f"{flag} {value}" for flag, value in given_settings(config).items() if flag != "--model"
    )
    return [
        f"{name} · {facts.architecture} · {ready.backend}, {facts.dtype}",
        f"  kernels {kernels}",
        *([f"  given   {given}"] if given else []),
        f"  memory  {memory}",
        f"  blocks  {limits.num_blocks:,} of {limits.block_size} tokens: {tokens:,} tokens for up to "
        f"{limits.max_num_seqs} sequences of at most {limits.max_model_len:,}",
        f"  steps   {limits.max_num_batched_tokens:,} tokens, where sequences decode "
        f"{limits.max_mixed_tokens or limits.max_num_batched_tokens:,}",
    ]


def _start_line(engines: Sequence[EngineClient], start: _Start) -> str:
    return (
        f"  start   {time.perf_counter() - start.began:.2f} s: model found {start.resolve:.2f}, "
        f"{', '.join(_loaded_line(engine) for engine in engines)}; "
        f"beside it tokenizer {start.beside['tokenizer']:.2f}, HTTP {start.beside['HTTP']:.2f}"
    )


def _loaded_line(engine: EngineClient) -> str:
    """How long a model took to load, and which parts of it took how long; the rest is Python's own start."""
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in engine.ready.phases if seconds >= 0.005)
    return f"loaded {engine.ready.load_seconds:.2f}" + (f" ({parts})" if parts else "")
