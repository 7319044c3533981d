"""Spans of requests, kept in memory by OpenTelemetry's own exporter."""

from __future__ import annotations

import pytest

from mmi_deploy.server.http.tracing import NoTracing, OpenTelemetryTracing

memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")

TRACE = "0af7651916cd43dd8448eb211c80319c"


def test_a_request_is_a_span_of_the_clients_trace() -> None:
    exporter = memory.InMemorySpanExporter()
    tracing = OpenTelemetryTracing(exporter)
    span = tracing.begin("POST", "chat", f"00-{TRACE}-b7ad6b7169203331-01")
    span.end(200, {"request_id": "req-1", "tokens": 12, "reason": "end", "other": "left out"})
    tracing.begin("GET", "models", "not a trace").end(503, {})
    tracing.close()
    chat, models = exporter.get_finished_spans()
    assert (chat.name, f"{chat.context.trace_id:032x}") == ("POST chat", TRACE)
    assert chat.parent is not None and f"{chat.parent.span_id:016x}" == "b7ad6b7169203331"
    assert dict(chat.attributes or {}) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "gen_ai.usage.output_tokens": 12,
        "gen_ai.response.finish_reasons": "end",
        "mmi.request_id": "req-1",
    }
    assert models.parent is None
    assert not models.status.is_ok and chat.status.is_ok


def test_no_tracing_takes_the_same_calls() -> None:
    tracing = NoTracing()
    tracing.begin("GET", "models", "").end(200, {})
    tracing.close()
