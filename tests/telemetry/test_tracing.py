"""Spans as a collector receives them: a plain HTTP server, with the real SDK and exporter."""

from __future__ import annotations

import http.server
import importlib.util
import sys
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from rvllm.cli.main import main
from rvllm.telemetry.timing import KEPT, ChunkTiming, RecentTimings, RequestTiming
from rvllm.telemetry.tracing import Tracer

try:
    HAVE = importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is not None
except ModuleNotFoundError:
    HAVE = False
otel = pytest.mark.skipif(not HAVE, reason="the extra otel is not installed")
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def finished(id: str = "r1") -> RequestTiming:
    timing = RequestTiming(id, "/v1/chat/completions", f"00-{TRACE}-{PARENT}-01", "vendor=x")
    choice = timing.choice(f"chatcmpl-{id}-0-0", 100)
    choice.queued, choice.first, choice.last = 0.1, 0.3, 1.3
    choice.detokenize, choice.stream = 0.02, 0.05
    choice.output_tokens, choice.cached_tokens, choice.finish_reason = 11, 64, "stop"
    choice.chunks = [ChunkTiming(7, 64, 0.11, 0.09), ChunkTiming(8, 32, 0.2, 0.09)]
    timing.status, timing.seconds = 200, 1.4
    return timing


class Collector(http.server.BaseHTTPRequestHandler):
    bodies: ClassVar[list[bytes]] = []

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        self.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    Collector.bodies.clear()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def exported(endpoint: str, timing: RequestTiming) -> dict[str, Any]:
    """The spans that arrive, by name; of several with one name the last."""
    tracer = Tracer(endpoint, "m")
    tracer.record(timing)
    tracer.close()
    return {span.name: span for span in every()}


def every() -> list[Any]:
    import gzip

    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans: list[Any] = []
    for body in Collector.bodies:
        data = gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
        for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
            for scope in resource.scope_spans:
                spans += scope.spans
    return spans


@otel
@pytest.mark.parametrize("path", ["", "/", "/v1/traces"])
def test_spans_reach_the_collector(collector: str, path: str) -> None:
    timing = finished()
    spans = exported(collector + path, timing)
    names = {"llm_request", "queue", "prefill", "prefill chunk", "decode", "detokenize", "stream"}
    assert set(spans) == names
    root = spans["llm_request"]
    assert (
        root.trace_id.hex() == TRACE
        and root.parent_span_id.hex() == PARENT
        and root.trace_state == "vendor=x"
    )
    values = {a.key: a.value for a in root.attributes}
    assert values["gen_ai.usage.input_tokens"].int_value == 100
    assert values["gen_ai.usage.output_tokens"].int_value == 11
    assert values["http.response.status_code"].int_value == 200
    assert root.end_time_unix_nano - root.start_time_unix_nano == 1_400_000_000
    for name, begin, end in (("queue", 0, 100), ("prefill", 100, 300), ("decode", 300, 1300)):
        span = spans[name]
        assert span.parent_span_id == root.span_id and span.trace_id == root.trace_id
        assert span.start_time_unix_nano == timing.arrived + begin * 1_000_000
        assert span.end_time_unix_nano == timing.arrived + end * 1_000_000
    chunks = [span for span in every() if span.name == "prefill chunk"]
    assert [span.parent_span_id for span in chunks] == [spans["prefill"].span_id] * 2
    about = [{a.key: a.value.int_value for a in span.attributes} for span in chunks]
    assert about == [{"rvllm.step": 7, "rvllm.tokens": 64}, {"rvllm.step": 8, "rvllm.tokens": 32}]
    moments = [(s.start_time_unix_nano, s.end_time_unix_nano) for s in chunks]
    assert [(a - timing.arrived, b - timing.arrived) for a, b in moments] == [
        (110_000_000, 200_000_000),
        (200_000_000, 290_000_000),
    ]


@otel
def test_a_broken_parent_starts_a_trace_of_its_own(collector: str) -> None:
    timing = finished()
    timing.traceparent = "00-nonsense"
    assert exported(collector, timing)["llm_request"].parent_span_id == b""


@otel
def test_an_absent_collector_does_not_hold_up_the_end() -> None:
    import time

    tracer = Tracer("http://127.0.0.1:9", "m")
    tracer.record(finished())
    began = time.monotonic()
    tracer.close()
    assert time.monotonic() - began < 40  # the SDK tries for a minute


def test_without_the_extra_the_start_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    for name in [name for name in sys.modules if name.startswith("opentelemetry.")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["serve", "--otlp-endpoint", "http://127.0.0.1:4318"]) != 0
    assert "OpenTelemetry: pip install " in capsys.readouterr().err


def test_an_address_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--otlp-endpoint", "localhost:4317"]) != 0
    assert "--otlp-endpoint: expected something like" in capsys.readouterr().err


def test_phases_and_the_header_line() -> None:
    timing = finished()
    assert timing.choices[0].phases() == pytest.approx(
        {"queue": 0.1, "prefill": 0.2, "decode": 1.0, "detokenize": 0.02, "stream": 0.05}
    )
    assert timing.line().startswith("queue;dur=100.000, prefill;dur=200.000, decode;dur=1000.000")
    assert timing.line().endswith("total;dur=1400.000")
    assert RequestTiming("x", "/").choice("c", 1).phases() == {}


def test_what_an_answered_request_left_behind_is_not_counted_in() -> None:
    timing = finished()
    timing.choice("later", 5)
    assert len(timing.choices) == 1


def test_finished_requests_are_found_by_any_of_their_ids_and_bounded() -> None:
    recent = RecentTimings()
    for number in range(KEPT + 3):
        recent.add(finished(f"r{number}"))
    assert recent.find("r2") is None and recent.find("r3") is not None
    for id in ("r77", "chatcmpl-r77", "chatcmpl-r77-0-0"):
        found = recent.find(id)
        assert found is not None and found.id == "r77"
    assert recent.find("chatcmpl") is None
