"""Rules of a run: the end of warm-up, an over-saturated server, a client that is the bottleneck."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from mmi_bench.serve.definitions import (
    LAG_FRACTION,
    LAG_SECONDS,
    WARM_AGREEMENT,
    WARM_REQUESTS,
    WARM_WINDOWS,
)
from mmi_bench.serve.sample_statistics import percentile, slope_interval

# Smallest window of warm-up, in requests.
_SMALLEST_WINDOW = 5

# A quantity rises if its last third is at least so many times its first third.
_RISE = 1.5

# Points before a rise is judged.
_LEAST_POINTS = 30

# Share of a core above which the client is suspected.
_BUSY = 0.9


def is_warm(latencies: Sequence[float], in_flight: int) -> bool:
    """True if the last windows of end-to-end latencies have medians that agree, and at least twice
    as many requests as were in flight have ended."""
    window = max(_SMALLEST_WINDOW, in_flight)
    if len(latencies) < max(WARM_WINDOWS * window, WARM_REQUESTS * in_flight):
        return False
    last = latencies[-WARM_WINDOWS * window :]
    medians = [median(last[n * window : (n + 1) * window]) for n in range(WARM_WINDOWS)]
    return max(medians) - min(medians) <= WARM_AGREEMENT * min(medians)


def is_rising(times: Sequence[float], values: Sequence[float]) -> bool:
    """True if a straight line rises with 95 % confidence, and the median of the last third is 1.5
    times that of the first."""
    if len(times) < _LEAST_POINTS:
        return False
    interval = slope_interval(times, values)
    third = len(values) // 3
    grown = median(values[-third:]) >= _RISE * median(values[:third])
    return interval is not None and interval[0] > 0 and grown


def is_over_saturated(
    in_flight: Sequence[tuple[float, float]], first_outputs: Sequence[tuple[float, float]]
) -> bool:
    """True if both the requests in flight and the times to first output rise; both as pairs of a
    time and a value."""
    return all(
        is_rising([time for time, _ in points], [value for _, value in points])
        for points in (in_flight, first_outputs)
    )


def client_bound(lags: Sequence[float], seconds: float, cpu_seconds: float) -> str | None:
    """Reason to suspect the client; None if there is none. lags: of each request, none in a closed
    loop. seconds: of the window. cpu_seconds: of the client in it."""
    if lags:
        lag, interval = percentile(lags, 99), seconds / len(lags)
        if lag > LAG_SECONDS or lag > LAG_FRACTION * interval:
            return f"requests left up to {1000 * lag:.1f} ms (p99) after they were due"
    if seconds > 0 and cpu_seconds > _BUSY * seconds:
        return f"the client used {100 * cpu_seconds / seconds:.0f} % of a core"
    return None
