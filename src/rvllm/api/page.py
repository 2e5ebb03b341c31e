"""The page at `/`, and `/rvllm/state`: what the engine is doing, once or as a stream of events."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import time
from typing import Any

import msgspec
from starlette.routing import Route

from rvllm.api.generate.generation import Service, awake
from rvllm.api.http.body import parse
from rvllm.api.http.errors import ApiError, invalid
from rvllm.api.http.exchange import Endpoint, Exchange, Gate
from rvllm.api.http.pagination import Query
from rvllm.backends.base import LedgerLine
from rvllm.engine.ipc.messages import SequenceState, State
from rvllm.telemetry.stats import StepKernel
from rvllm.telemetry.timing import KEPT, RequestTiming
from rvllm.version import __version__
from rvllm.web.files import CODE_CSS, INDEX, WebFile, code_css, read_files
from rvllm.web.markdown import MAX_CHARS, render

FRESH_SECONDS = 0.2  # a state this young is shown to everyone who asks
DRAIN_SECONDS = 0.25  # how soon a stream notices that the server shuts down
MIN_INTERVAL, MAX_INTERVAL = 0.2, 60.0
_MATRIX = re.compile(r"(^|[_ ])(gemm|gemv|linear|logits|experts)")
# Nothing but our own files may run or be loaded, whatever a model writes.
_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
)


class KernelItem(StepKernel):
    """One kernel of the last step, and whose it is.

    strategy: for products with a matrix of weights, whose kernel it is: native, cublas, cutlass; on the CPU
    compiled or numpy. Empty for all else.
    """

    strategy: str = ""


class EngineView(msgspec.Struct, kw_only=True):
    """All that the page shows. Times in seconds, memory in bytes, counters since the start.

    Fields of the names that ModelFacts, Ready and State have are theirs.
    """

    time: float  # time.time() of the answer
    uptime: float
    version: str
    model: str
    architecture: str
    dtype: str
    backend: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    pipeline_depth: int
    load_seconds: float
    settings: dict[str, str]
    ledger: list[LedgerLine]
    stats: dict[str, Any]  # of telemetry.stats.Stats
    sequences: list[SequenceState]
    cached_blocks: list[int]
    cut: bool
    kernels: list[KernelItem]
    floor_seconds: float | None  # of one decode step of what runs now
    floor_ratio: float | None  # the least time of the last decode steps over the time they took


def strategy_of(kernel: str) -> str:
    """Whose matrix kernel it is, by its name; empty for other kernels."""
    for library in ("cublas", "cutlass"):
        if library in kernel:
            return library
    if not _MATRIX.search(kernel) or "_pack" in kernel:
        return ""
    first = kernel.partition(" ")[0]
    return first if first in ("compiled", "numpy") else "native"


class StateFeed:
    """The engine's state for all who watch: asked for when wanted, at most every FRESH_SECONDS."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._asking: asyncio.Task[EngineView] | None = None
        self._asked = 0.0

    async def view(self) -> EngineView:
        """The state, at most FRESH_SECONDS old. Raises EngineDeadError."""
        now = time.monotonic()
        if self._asking is None or (self._asking.done() and now - self._asked > FRESH_SECONDS):
            self._asked = now
            self._asking = asyncio.ensure_future(self._ask())
        return await asyncio.shield(self._asking)

    async def _ask(self) -> EngineView:
        service = awake(self._service)
        return view_of(service, await service.engine.state())


def view_of(service: Service, state: State) -> EngineView:
    now, names = time.time(), EngineView.__struct_fields__
    sources: tuple[msgspec.Struct, ...] = (service.ready.facts, service.ready, state)
    shown = {n: getattr(source, n) for source in sources for n in source.__struct_fields__ if n in names}
    shown |= {n: value for n, value in dataclasses.asdict(service.ready.limits).items() if n in names}
    shown |= {
        "time": now,
        "uptime": max(0.0, now - service.started),
        "version": __version__,
        "model": service.served_name,
        "settings": dict(service.shown_settings),
        "stats": msgspec.structs.asdict(state.stats),
        "kernels": [KernelItem(k.op, k.kernel, k.count, k.why, strategy_of(k.kernel)) for k in state.kernels],
        "floor_ratio": state.stats.floor_ratio,
    }
    return EngineView(**shown)


def timing_view(timing: RequestTiming) -> dict[str, Any]:
    """What `rvllm trace` shows of a request: when it came (time.time()), and its seconds and its parts'."""
    choices = [
        {
            "id": c.id,
            "prompt_tokens": c.prompt_tokens,
            "cached_tokens": c.cached_tokens,
            "output_tokens": c.output_tokens,
            "finish_reason": c.finish_reason,
            "phases": c.phases(),
            "chunks": c.chunks,
        }
        for c in timing.choices
    ]
    return {
        "id": timing.id,
        "path": timing.path,
        "status": timing.status,
        "arrived": timing.arrived / 1e9,
        "seconds": timing.seconds,
        "choices": choices,
    }


class MarkdownRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A text in Markdown."""

    text: str


def page_routes(service: Service, gate: Gate) -> list[Route]:
    """`/`, its files under `/web/`, and what the page asks for. The files need no key; all else does."""
    page = Page(service, gate)
    return [
        Endpoint(gate, "/", page.index, open=True).route("GET"),
        Endpoint(gate, "/web/{name}", page.file, open=True).route("GET"),
        Endpoint(gate, "/rvllm/state", page.state).route("GET"),
        Endpoint(gate, "/rvllm/markdown", page.markdown).route("POST"),
        Endpoint(gate, "/rvllm/requests/{id}", page.request).route("GET"),
    ]


class Page:
    def __init__(self, service: Service, gate: Gate) -> None:
        self._service, self._gate, self._files, self._feed = service, gate, read_files(), StateFeed(service)

    async def index(self, exchange: Exchange, body: bytes) -> None:
        await _send(exchange, self._files[INDEX])

    async def file(self, exchange: Exchange, body: bytes) -> None:
        name = exchange.scope["path_params"]["name"]
        if name == CODE_CSS:  # made by a library that the start does without
            await _send(exchange, await asyncio.to_thread(code_css))
            return
        if name not in self._files:
            raise ApiError(404, f"the page has no file {name[:100]!r}")
        await _send(exchange, self._files[name])

    async def request(self, exchange: Exchange, body: bytes) -> None:
        """`GET /rvllm/requests/{id}`: where the time of a finished request went."""
        timing = self._gate.timings.find(exchange.scope["path_params"]["id"])
        if timing is None:
            raise ApiError(404, f"no finished request of that id is among the last {KEPT}")
        await exchange.json(timing_view(timing), headers=((b"cache-control", b"no-store"),))

    async def markdown(self, exchange: Exchange, body: bytes) -> None:
        """`POST /rvllm/markdown`: a text in Markdown as HTML that is safe to show."""
        text = parse(body, MarkdownRequest).text
        if len(text) > MAX_CHARS:
            raise ApiError(413, f"text: at most {MAX_CHARS} characters are rendered at once", param="text")
        html = await self._service.work.run(render, "text", len(text), text)
        await exchange.json({"html": html})

    async def state(self, exchange: Exchange, body: bytes) -> None:
        """`GET /rvllm/state`: one JSON object, or with `Accept: text/event-stream` one event every `interval`
        seconds."""
        interval, gate, feed = _interval(exchange), self._gate, self._feed
        if b"text/event-stream" not in (exchange.header(b"accept") or b""):
            await exchange.json(await feed.view(), headers=((b"cache-control", b"no-store"),))
            return
        view = await feed.view()
        await exchange.open_stream()
        if exchange.scope["method"] == "HEAD":  # events have no end, and none would be sent
            await exchange.end_stream()
            return
        while True:
            await exchange.event(view)
            until = time.monotonic() + interval
            while not gate.draining and time.monotonic() < until:
                await asyncio.sleep(min(DRAIN_SECONDS, interval))
            if gate.draining:
                await exchange.close_stream()
                return
            view = await feed.view()


async def _send(exchange: Exchange, file: WebFile) -> None:
    headers = (*_HEADERS, (b"etag", file.etag))
    if exchange.header(b"if-none-match") == file.etag:
        await exchange.respond(b"", file.content_type, 304, headers)
    else:
        await exchange.respond(file.body, file.content_type, headers=headers)


def _interval(exchange: Exchange) -> float:
    given = Query(exchange).text("interval") or "1"
    try:
        interval = float(given)
    except ValueError:
        interval = float("nan")
    if not MIN_INTERVAL <= interval <= MAX_INTERVAL:
        raise invalid(
            f"interval must be {MIN_INTERVAL:g} to {MAX_INTERVAL:g} seconds, got {given[:40]!r}",
            "interval",
        )
    return interval
