"""OpenTelemetry spans of requests, made when a request is over, sent by OTLP over HTTP (the extra otel)."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

from rvllm.errors import UsageError
from rvllm.extras import install_command
from rvllm.telemetry.timing import ChoiceTiming, RequestTiming
from rvllm.version import __version__

EXPORT_SECONDS = 2.0  # a collector that takes longer loses spans; the server does not wait for it
_OVER_ALL = ("detokenize", "stream")  # spent token by token, shown as one span from the first token on


def check_available(endpoint: str) -> None:
    """Raises UsageError when the extra otel is not installed, or `endpoint` is no address of HTTP."""
    if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", endpoint):
        raise UsageError(f"--otlp-endpoint: expected something like http://127.0.0.1:4318, got {endpoint!r}")
    try:
        found = importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise UsageError(f"--otlp-endpoint needs OpenTelemetry: {install_command('otel')}")


class Tracer:
    """Sends finished requests to a collector, in a thread of the SDK's."""

    def __init__(self, endpoint: str, model: str) -> None:
        """endpoint: the collector's base address (http://127.0.0.1:4318), or its address for traces."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        url = endpoint if endpoint.endswith("/v1/traces") else f"{endpoint.rstrip('/')}/v1/traces"
        about = {"service.name": "rvllm", "service.version": __version__}
        self._provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(endpoint=url, timeout=EXPORT_SECONDS))
        )
        self._tracer = self._provider.get_tracer("rvllm", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._model = model

    def record(self, timing: RequestTiming) -> None:
        """Makes the spans of a finished request, below the caller's own span if it sent one."""
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.status import Status, StatusCode

        carrier = {"traceparent": timing.traceparent, "tracestate": timing.tracestate}
        span = self._tracer.start_span(
            "llm_request",
            context=self._propagator.extract({name: value for name, value in carrier.items() if value}),
            kind=SpanKind.SERVER,
            start_time=timing.arrived,
            attributes={
                "gen_ai.request.model": self._model,
                "gen_ai.request.id": timing.id,
                "gen_ai.usage.input_tokens": sum(c.prompt_tokens for c in timing.choices),
                "gen_ai.usage.output_tokens": sum(c.output_tokens for c in timing.choices),
                "gen_ai.response.finish_reasons": [c.finish_reason for c in timing.choices],
                "http.route": timing.path,
                "http.response.status_code": timing.status,
            },
        )
        if timing.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        context = set_span_in_context(span)
        for choice in timing.choices:
            self._phases(timing, choice, context)
        span.end(timing.arrived + _nanoseconds(timing.seconds))

    def _phases(self, timing: RequestTiming, choice: ChoiceTiming, context: Any) -> None:
        from opentelemetry.trace import set_span_in_context

        begins = {"queue": 0.0, "prefill": choice.queued}
        for name, seconds in choice.phases().items():
            begin = begins.get(name, choice.first)
            start = timing.arrived + _nanoseconds(begin)
            attributes: dict[str, str | int | bool] = {"rvllm.choice": choice.id}
            if name == "prefill":
                attributes |= {
                    "rvllm.prompt_tokens": choice.prompt_tokens, "rvllm.cached_tokens": choice.cached_tokens
                }  # fmt: skip
            if name in _OVER_ALL:
                attributes["rvllm.summed"] = True
            span = self._tracer.start_span(name, context=context, start_time=start, attributes=attributes)
            if name == "prefill":
                self._chunks(timing, choice, set_span_in_context(span))
            span.end(start + _nanoseconds(seconds))

    def _chunks(self, timing: RequestTiming, choice: ChoiceTiming, context: Any) -> None:
        """One span a step that computed a part of the prompt, below the span of the whole prefill."""
        for chunk in choice.chunks:
            start = timing.arrived + _nanoseconds(chunk.began)
            about = {"rvllm.step": chunk.step, "rvllm.tokens": chunk.tokens}
            span = self._tracer.start_span(
                "prefill chunk", context=context, start_time=start, attributes=about
            )
            span.end(start + _nanoseconds(chunk.seconds))

    def close(self) -> None:
        """Sends what is left, for at most a few seconds."""
        self._provider.force_flush(int(1e3 * EXPORT_SECONDS))
        self._provider.shutdown()


def _nanoseconds(seconds: float) -> int:
    return round(1e9 * seconds)
