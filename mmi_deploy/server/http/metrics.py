"""Prometheus metrics: a registry of the server's own, whose labels come from fixed sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

# Upper bounds in seconds.
SHORT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
LONG = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)

ENDPOINTS = (
    "responses",
    "chat",
    "completions",
    "images",
    "models",
    "tokens",
    "pictures",
    "health",
    "metrics",
    "page",
    "other",
)
REASONS = ("end", "stop", "max_tokens", "max_images", "context", "cancelled", "deadline", "error")


class Metrics:
    """All metrics that the front counts itself, and `engines`, which it asks."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter(
            "mmi_requests", "Answered requests.", ["endpoint", "code"], registry=r
        )
        self.finished = Counter(
            "mmi_finished", "Documents by the reason of their end.", ["reason"], registry=r
        )
        self.rejected = Counter(
            "mmi_rejected", "Documents that were not taken.", ["reason"], registry=r
        )
        self.cancelled = Counter(
            "mmi_cancelled", "Documents that were cancelled, by cause.", ["where"], registry=r
        )
        self.images = Counter("mmi_images", "Pictures of documents.", ["kind"], registry=r)
        self.tokens = Counter("mmi_tokens", "Tokens of documents.", ["kind"], registry=r)
        self.queue = _histogram("mmi_queue_seconds", "Time in the queue.", LONG, r)
        self.first_token = _histogram(
            "mmi_time_to_first_token_seconds", "From the request to its first text.", LONG, r
        )
        self.first_image = _histogram(
            "mmi_time_to_first_image_seconds", "From the request to its first picture.", LONG, r
        )
        self.image_interval = _histogram(
            "mmi_image_interval_seconds", "Between two pictures of a document.", LONG, r
        )
        self.text_gap = _histogram(
            "mmi_text_gap_seconds", "Between two texts without a picture between them.", SHORT, r
        )
        self.picture_stall = _histogram(
            "mmi_picture_stall_seconds", "Between two texts with a picture between them.", LONG, r
        )
        self.seconds = _histogram("mmi_request_seconds", "Of a document, to its end.", LONG, r)
        self.restarts = Counter("mmi_worker_restarts", "Restarts of engine processes.", registry=r)
        self.bundle_changed = Gauge(
            "mmi_bundle_changed", "1 if the bundle has changed on disk since the start.", registry=r
        )
        self.pictures = Gauge(
            "mmi_kept_picture_bytes", "Bytes of pictures kept under URLs.", registry=r
        )
        self.build = Gauge(
            "mmi_build_info", "Always 1.", ["version", "target", "fingerprint"], registry=r
        )
        self.engines = EngineCollector()
        r.register(self.engines)
        for reason in REASONS:
            self.finished.labels(reason)

    def text(self) -> bytes:
        """The metrics in Prometheus' format."""
        return generate_latest(self.registry)


def _histogram(
    name: str, help: str, buckets: tuple[float, ...], registry: CollectorRegistry
) -> Histogram:
    return Histogram(name, help, buckets=buckets, registry=registry)


class EngineCollector:
    """Metrics of the engine processes, from their last statistics."""

    def __init__(self) -> None:
        # Of each engine by its number: fields of `EngineStats`; None while it does not answer.
        self.stats: Mapping[int, Mapping[str, Any] | None] = {}

    def collect(self) -> Iterable[Metric]:
        """Metric families of all engines."""
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        up = gauge("mmi_engine_up", "1 if the engine process answers.", labels=["engine"])
        running = gauge("mmi_running", "Documents that run.", labels=["engine"])
        waiting = gauge("mmi_waiting", "Documents that wait for a slot.", labels=["engine"])
        slots = gauge("mmi_slots", "Slots of the KV cache.", labels=["engine", "state"])
        bound = gauge(
            "mmi_text_gap_bound_seconds",
            "Most that a running text should wait for its next token.",
            labels=["engine"],
        )
        kept = gauge("mmi_cached_images", "Encoded images kept.", labels=["engine"])
        stage = ["engine", "stage"]
        seconds = counter("mmi_stage_seconds", "Time of the runs of a stage.", labels=stage)
        rows = counter("mmi_stage_rows", "Rows of the runs of a stage.", labels=stage)
        runs = counter("mmi_stage_runs", "Runs of a stage.", labels=stage)
        cache = ["engine", "cache"]
        hits = counter("mmi_cache_hits", "Found in a cache: tokens, images.", labels=cache)
        misses = counter("mmi_cache_misses", "Not found in it: tokens, images.", labels=cache)
        evictions = counter("mmi_cache_evictions", "Dropped images.", labels=cache)
        for number, stats in self.stats.items():
            name = str(number)
            up.add_metric([name], float(stats is not None))
            if stats is None:
                continue
            running.add_metric([name], stats["running"])
            waiting.add_metric([name], stats["waiting"])
            slots.add_metric([name, "used"], stats["running"])
            slots.add_metric([name, "free"], stats["slots"] - stats["running"])
            if stats["text_gap_bound"] is not None:
                bound.add_metric([name], stats["text_gap_bound"])
            kept.add_metric([name], stats["images"])
            for family, field in ((seconds, "seconds"), (rows, "rows"), (runs, "runs")):
                for kind, value in stats[field].items():
                    family.add_metric([name, kind], value)
            hits.add_metric([name, "prefix"], stats["cached_tokens"])
            misses.add_metric([name, "prefix"], stats["given_tokens"] - stats["cached_tokens"])
            hits.add_metric([name, "image"], stats["image_hits"])
            misses.add_metric([name, "image"], stats["rows"].get("encode", 0))
            evictions.add_metric([name, "image"], stats["image_evictions"])
        return (
            up,
            running,
            waiting,
            slots,
            bound,
            kept,
            seconds,
            rows,
            runs,
            hits,
            misses,
            evictions,
        )
