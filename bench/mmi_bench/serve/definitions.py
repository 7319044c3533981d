"""Words of the serving benchmark, each defined once: reports and docs take them from here.

t0 is the time at which a request was due (open loop, trace) or sent (closed loop, offline). A reply
has text events at times a(i) and pictures j that start at s(j) and are whole at d(j).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log
from typing import Literal

# Tools whose words are translated.
TOOLS = ("AIPerf", "GuideLLM", "vllm bench serve")

# Fraction with which the largest value of a sample is beyond the percentile (MLPerf's 0.99).
PERCENTILE_CONFIDENCE = 0.99

# Percentiles of reports; each is blank unless the sample carries it (`least_sample`).
PERCENTILES = (50, 90, 95, 99)

# Confidence of intervals.
INTERVAL = 0.95

# Coefficient of variation of run means: below the first it is good, above the second no comparison.
GOOD_CV, WORST_CV = 0.05, 0.20

# A run is client-bound if the 99th percentile of the send lag is above so many seconds, or above
# this fraction of the mean interval between requests.
LAG_SECONDS, LAG_FRACTION = 0.010, 0.05

# Requests of a steady window, as a multiple of those in flight.
STEADY_REQUESTS = 5

# Warm-up: so many windows in a row whose medians agree within this fraction, and at least so many
# requests as a multiple of those in flight.
WARM_WINDOWS, WARM_AGREEMENT, WARM_REQUESTS = 3, 0.05, 2

# One in so many requests is compared with its reference output.
CHECK_EVERY = 20

# Largest difference of a picture from its reference, in levels of 255.
PICTURE_BAND = 1

# Exit codes of `mmi bench serve` and `mmi bench compare` besides 0 and 2.
EXIT_INVALID, EXIT_WORSE, EXIT_OVER_SATURATED = 3, 4, 5

Kind = Literal["latency", "rate"]


@dataclass(frozen=True)
class Measure:
    """One measure. key: in JSON and CSV. name: in reports. definition: in terms of t0, a, s, d.
    kind: latencies, in seconds, are better if smaller; rates, per second, if larger. others: name
    of the nearest measure of each of `TOOLS`, and the difference; absent where there is none."""

    key: str
    name: str
    definition: str
    kind: Kind = "latency"
    others: Mapping[str, str] | None = None


MEASURES: Sequence[Measure] = (
    Measure(
        "first_token",
        "time to first token",
        "a(1) - t0",
        others={
            "AIPerf": "time_to_first_token, from the send time",
            "GuideLLM": "time_to_first_token_ms, from the send time",
            "vllm bench serve": "ttft, from the send time",
        },
    ),
    Measure("first_image", "time to first image", "d(1) - t0"),
    Measure("first_preview", "time to first preview", "first partial picture - t0"),
    Measure("first_output", "time to first output", "the earlier of first token and first image"),
    Measure(
        "text_gap",
        "text gap",
        "a(i+1) - a(i) where no picture lies between: the inter-token latency that a reader sees",
        others={
            "AIPerf": "inter_chunk_latency, whose values contain picture stalls",
            "vllm bench serve": "itl, whose values contain picture stalls",
        },
    ),
    Measure(
        "picture_stall",
        "picture stall",
        "a(k) - a(i) across one or more pictures; never part of the text gap",
    ),
    Measure(
        "time_per_token",
        "time per token",
        "sum of text gaps / (text tokens - 1 - picture stalls)",
        others={
            "AIPerf": "inter_token_latency = (latency - TTFT) / (tokens - 1): pictures included",
            "GuideLLM": "inter_token_latency_ms = (last - first token) / (tokens - 1): pictures "
            "included",
            "vllm bench serve": "tpot = (latency - TTFT) / (tokens - 1): pictures included",
        },
    ),
    Measure("image_interval", "image interval", "d(j+1) - d(j)"),
    Measure("drawing", "drawing", "d(j) - s(j)"),
    Measure("step", "denoising step", "time between two progress events of one picture"),
    Measure(
        "end_to_end",
        "end to end",
        "last event - t0",
        others={
            "AIPerf": "request_latency, from the send time",
            "GuideLLM": "request_latency, from the send time",
            "vllm bench serve": "e2el, from the send time",
        },
    ),
    Measure("queue", "queue", "seconds in the queue of the server, from its `mmi` field"),
    Measure("send_lag", "send lag", "send time - due time: of this client, not of the server"),
    Measure(
        "requests_per_second",
        "requests/s",
        "successes that end in the measured window / its seconds",
        "rate",
        {
            "AIPerf": "request_throughput",
            "GuideLLM": "requests_per_second",
            "vllm bench serve": "request_throughput",
        },
    ),
    Measure(
        "tokens_per_second",
        "tokens/s",
        "text tokens of these successes / its seconds",
        "rate",
        {
            "AIPerf": "output_token_throughput, visual tokens included",
            "GuideLLM": "output_tokens_per_second, visual tokens included",
            "vllm bench serve": "output_throughput, visual tokens included",
        },
    ),
    Measure(
        "images_per_second",
        "images/s",
        "pictures drawn by these successes / its seconds; AIPerf's num_images counts given ones",
        "rate",
    ),
    Measure(
        "goodput",
        "goodput",
        "successes that meet every limit of --goodput / its seconds",
        "rate",
        {"AIPerf": "goodput", "vllm bench serve": "request_goodput"},
    ),
)

BY_KEY: Mapping[str, Measure] = {measure.key: measure for measure in MEASURES}

# Measures of a request, and rates of a window.
LATENCIES = tuple(measure.key for measure in MEASURES if measure.kind == "latency")
RATES = tuple(measure.key for measure in MEASURES if measure.kind == "rate")


def least_sample(percentile: float) -> int:
    """Smallest sample whose largest value is, with `PERCENTILE_CONFIDENCE`, beyond the percentile:
    44 for the 90th, 90 for the 95th, 459 for the 99th."""
    return ceil(log(1 - PERCENTILE_CONFIDENCE) / log(percentile / 100))


def definitions_table() -> list[str]:
    """Markdown table of the measures."""
    rows = [f"| {m.name} | `{m.key}` | {m.definition} |" for m in MEASURES]
    return ["| measure | key | definition |", "|---|---|---|", *rows]


def translations_table() -> list[str]:
    """Markdown table of the nearest measures of other tools."""
    rows = [
        f"| {m.name} | {' | '.join(m.others.get(tool, '–') for tool in TOOLS)} |"
        for m in MEASURES
        if m.others
    ]
    return [f"| ours | {' | '.join(TOOLS)} |", f"|---{'|---' * len(TOOLS)}|", *rows]
