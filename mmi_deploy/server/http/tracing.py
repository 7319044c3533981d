"""Spans of requests, for OpenTelemetry; nothing without it.

The exporter is OpenTelemetry's own, set by its own variables (`OTEL_EXPORTER_OTLP_ENDPOINT`, ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Span(Protocol):
    """One request."""

    def end(self, status: int, facts: Mapping[str, Any]) -> None:
        """End the span. facts: fields of the request's line in the log."""


class Tracing(Protocol):
    """Maker of spans."""

    def begin(self, method: str, endpoint: str, traceparent: str) -> Span:
        """Begin the span of a request. traceparent: its header, or empty."""

    def close(self) -> None:
        """Send what is left."""


class _NoSpan:
    def end(self, status: int, facts: Mapping[str, Any]) -> None:
        return None


class NoTracing:
    """No spans."""

    _span = _NoSpan()

    def begin(self, method: str, endpoint: str, traceparent: str) -> Span:
        """Begin nothing."""
        return self._span

    def close(self) -> None:
        """Nothing is left."""


# Attribute of a span by the field of the log, in OpenTelemetry's conventions.
ATTRIBUTES = {
    "reason": "gen_ai.response.finish_reasons",
    "tokens": "gen_ai.usage.output_tokens",
    "images": "mmi.images",
    "request_id": "mmi.request_id",
}


class OpenTelemetryTracing:
    """Spans by OpenTelemetry. Imports its SDK; raises `ModuleNotFoundError` without it."""

    def __init__(self, exporter: Any = None) -> None:
        """exporter: of spans; None for OTLP over HTTP."""
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter()
        resource = Resource.create({SERVICE_NAME: "mmi-serve"})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("mmi_deploy.server")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, method: str, endpoint: str, traceparent: str) -> Span:
        """Begin the span of a request, a child of the client's."""
        from opentelemetry.trace import SpanKind

        context = self._propagator.extract({"traceparent": traceparent})
        name = f"{method} {endpoint}"
        span = self._tracer.start_span(name, context=context, kind=SpanKind.SERVER)
        span.set_attribute("http.request.method", method)
        return _OpenTelemetrySpan(span)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


class _OpenTelemetrySpan:
    def __init__(self, span: Any) -> None:
        self._span = span

    def end(self, status: int, facts: Mapping[str, Any]) -> None:
        self._span.set_attribute("http.response.status_code", status)
        for field, attribute in ATTRIBUTES.items():
            if field in facts:
                self._span.set_attribute(attribute, facts[field])
        if status >= 500:
            from opentelemetry.trace import StatusCode

            self._span.set_status(StatusCode.ERROR)
        self._span.end()
