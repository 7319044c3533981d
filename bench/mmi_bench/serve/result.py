"""Result of a benchmark: all runs with their statistics, as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmi_bench.serve.definitions import (
    BY_KEY,
    GOOD_CV,
    LATENCIES,
    RATES,
    WORST_CV,
)
from mmi_bench.serve.goodput import GoodputLimit
from mmi_bench.serve.measures import values_of
from mmi_bench.serve.records import RequestRecord
from mmi_bench.serve.reference import Check, thumbnails
from mmi_bench.serve.run import Plan, Run
from mmi_bench.serve.sample_statistics import (
    Interval,
    Summary,
    quantiles,
    resampled,
    summary,
    t_interval,
    variation,
)

FORMAT = 1

# Runs from which intervals are those of run means.
LEAST_RUNS = 5

# Relative difference of reported and recomputed token counts that is remarked.
_MISCOUNT = 0.01

_RESAMPLES, _SEED = 1000, 77

# Blocks of time into which a window is cut.
_LEAST_BLOCKS, _MOST_BLOCKS = 5, 60


@dataclass(frozen=True)
class Rate:
    """Rate a second. interval: 95 % confidence; None for fewer than two requests."""

    value: float
    interval: Interval | None

    def to_json(self) -> dict[str, Any]:
        interval = list(self.interval) if self.interval else None
        return {"value": self.value, "interval95": interval}


@dataclass
class RunResult:
    """One run with its statistics. goodput_fraction: of the requests that were not cut."""

    run: Run
    measures: dict[str, Summary]
    rates: dict[str, Rate]
    goodput_fraction: float | None

    def to_json(self) -> dict[str, Any]:
        run = self.run
        return {
            "number": run.number,
            "complete": run.complete,
            "steady": run.steady,
            "over_saturated": run.over_saturated,
            "client_bound": run.client_bound,
            "client_cpu_seconds": run.client_cpu,
            "warm_up": {
                "steady": run.warm,
                "seconds": run.warm_up_seconds,
                "requests": len(run.warm_up_records),
            },
            "window": {"begin": run.begin, "end": run.end, "seconds": run.seconds},
            "in_flight": {"mean": run.mean_in_flight, "peak": run.peak_in_flight},
            "counts": run.counts(),
            "measures": {key: found.to_json() for key, found in self.measures.items()},
            "rates": {key: rate.to_json() for key, rate in self.rates.items()},
            "goodput_fraction": self.goodput_fraction,
        }


@dataclass
class Result:
    """All runs. about: argv, machine, server, workload, load. limits: of goodput."""

    about: dict[str, Any]
    plan: Plan
    limits: Sequence[GoodputLimit]
    runs: list[RunResult] = field(default_factory=list)
    check: Check | None = None
    complete: bool = False

    def add(self, run: Run) -> None:
        """Add a run."""
        self.runs.append(run_result(run, self.limits))
        self.__dict__.pop("measures", None)

    @property
    def valid(self) -> bool:
        """False if an output was not that of the reference."""
        return self.check is None or self.check.valid

    @property
    def over_saturated(self) -> bool:
        return any(one.run.over_saturated for one in self.runs)

    @property
    def records(self) -> list[RequestRecord]:
        """Requests of all windows."""
        return [record for one in self.runs for record in one.run.records]

    @cached_property
    def measures(self) -> dict[str, Summary]:
        """Statistics of the requests of all runs."""
        return summaries(one for result in self.runs for one in result.run.successes)

    @property
    def rates(self) -> dict[str, Rate]:
        """Means of the runs; intervals of run means for five runs or more, else bootstrapped."""
        if not self.runs:
            return {}
        found = {}
        for key in self.runs[0].rates:
            each = [one.rates[key] for one in self.runs]
            values = [rate.value for rate in each]
            interval = t_interval(values) if len(values) >= LEAST_RUNS else None
            if len(values) == 1:
                interval = each[0].interval
            found[key] = Rate(mean(values), interval)
        return found

    def run_means(self, key: str) -> list[float]:
        """A measure's mean in each run, or a rate."""
        return [
            one.rates[key].value if key in one.rates else one.measures[key].mean
            for one in self.runs
            if key in one.rates or key in one.measures
        ]

    @property
    def variations(self) -> dict[str, float]:
        """Coefficient of variation of run means, by measure."""
        found = {key: variation(self.run_means(key)) for key in (*LATENCIES, *RATES)}
        return {key: value for key, value in found.items() if value is not None}

    def mean_interval(self, key: str) -> Interval | None:
        """Interval of a latency's mean: of run means for five runs or more, else bootstrapped."""
        means = self.run_means(key)
        if len(means) >= LEAST_RUNS:
            return t_interval(means)
        return self.measures[key].intervals.get("mean")

    def notes(self) -> list[str]:
        """Remarks on everything that limits the result."""
        found = []
        if not self.complete:
            found.append("INCOMPLETE: the benchmark was stopped before its end")
        if self.check is not None:
            found.append(self.check.line())
        for one in self.runs:
            found += [f"run {one.run.number + 1}: {text}" for text in run_notes(one.run, self.plan)]
        if self.about["workload"]["prompts"] == "repeated":
            found.append("prompts are repeated: the server may answer from its caches")
        counted = [r for r in self.records if r.recomputed is not None and r.outcome == "done"]
        if counted:
            reported = sum(record.tokens for record in counted)
            again = sum(record.recomputed or 0 for record in counted)
            text = f"text tokens: {reported} reported, {again} recomputed from the text"
            if abs(reported - again) > _MISCOUNT * max(reported, again):
                text += ": THEY DIFFER"
            found.append(text)
        if len(self.runs) >= LEAST_RUNS:
            worst = max(self.variations.items(), key=lambda item: item[1], default=None)
            if worst and worst[1] > GOOD_CV:
                verdict = "refused by compare" if worst[1] > WORST_CV else "above 5 %"
                name = BY_KEY[worst[0]].name
                found.append(f"run means vary by {100 * worst[1]:.1f} % in {name} ({verdict})")
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "kind": "mmi bench serve",
            "complete": self.complete,
            "valid": self.valid,
            "over_saturated": self.over_saturated,
            **self.about,
            "plan": vars(self.plan),
            "goodput_limits": [limit.word for limit in self.limits],
            "measures": {
                key: {**one.to_json(), "mean_interval95": self.mean_interval(key)}
                for key, one in self.measures.items()
            },
            "rates": {key: rate.to_json() for key, rate in self.rates.items()},
            "variations": self.variations,
            "server_stages": stages(self.records),
            "check": self.check.to_json() if self.check else None,
            "runs": [one.to_json() for one in self.runs],
            "notes": self.notes(),
        }

    def lines(self) -> Iterable[dict[str, Any]]:
        """One object for each request: `requests.jsonl`."""
        for one in self.runs:
            run = one.run
            for phase, records in (("warm-up", run.warm_up_records), ("window", run.records)):
                for record in records:
                    line = {"run": run.number, "phase": phase, **record.to_json()}
                    line["cut"] = phase == "window" and record.number in run.cut
                    if record.checked and not record.difference:
                        line["thumbnails"] = thumbnails(record)
                    yield line


def run_result(run: Run, limits: Sequence[GoodputLimit]) -> RunResult:
    """Statistics of a run."""
    judged = [r for r in run.records if r.number not in run.cut]
    good = {id(r) for r in run.ended if is_good(r, limits)}
    fraction = None
    if limits and judged:
        fraction = sum(id(record) in good for record in judged) / len(judged)
    return RunResult(
        run, summaries(run.successes), rates_of(run, good if limits else None), fraction
    )


def is_good(record: RequestRecord, limits: Sequence[GoodputLimit]) -> bool:
    values = values_of(record)
    return all(limit.meets(values) for limit in limits)


def summaries(records: Iterable[RequestRecord]) -> dict[str, Summary]:
    """Summary of every latency that any request has."""
    values = [values_of(record) for record in records]
    found = {key: summary([one.get(key, []) for one in values]) for key in LATENCIES}
    return {key: one for key, one in found.items() if one is not None}


def rates_of(run: Run, good: set[int] | None) -> dict[str, Rate]:
    """Rates of the window. good: identities of the requests that meet the limits; None for none."""
    ended, seconds = run.ended, run.seconds
    amounts = {
        "requests_per_second": [1.0] * len(ended),
        "tokens_per_second": [float(record.tokens) for record in ended],
        "images_per_second": [float(record.images) for record in ended],
    }
    if good is not None:
        amounts["goodput"] = [float(id(record) in good) for record in ended]
    if not seconds:
        return {key: Rate(0.0, None) for key in amounts}
    ends = [record.end or 0.0 for record in ended]
    # A fixed set of requests has a beginning and an end, and no steady rate between them.
    span = 0.0 if run.fixed else mean(_spans(ended))
    found = {}
    for key, values in amounts.items():
        draws = rate_draws(run.begin, seconds, ends, values, span, run.mean_in_flight)
        interval = None if draws is None else quantiles(draws)
        found[key] = Rate(sum(values) / seconds, interval)
    return found


def rate_draws(
    begin: float,
    seconds: float,
    ends: Sequence[float],
    amounts: Sequence[float],
    span: float,
    in_flight: float,
) -> NDArray[np.float64] | None:
    """Bootstrapped rates of a window, by blocks of time: requests that share the server end
    together, so that one by one they are not independent.

    span: mean seconds of a request; a block is at least twice as long. in_flight: mean number of
    requests; an edge of the window may fall before or after the end of as many, which widens the
    draws. None for fewer than 5 blocks or 2 requests.
    """
    blocks = min(_MOST_BLOCKS, int(seconds / (2 * span))) if span > 0 else 0
    if len(ends) < 2 or blocks < _LEAST_BLOCKS:
        return None
    edges = np.linspace(begin, begin + seconds, blocks + 1)
    each, _ = np.histogram(ends, edges, weights=amounts)
    generator = np.random.default_rng(_SEED)
    edge = min(1.0, in_flight / len(ends))
    shifts = 1 + generator.uniform(-edge, edge, _RESAMPLES)
    draws: NDArray[np.float64] = resampled(generator, _RESAMPLES, blocks) @ each / seconds
    return draws * shifts


def _spans(records: Sequence[RequestRecord]) -> list[float]:
    """Seconds of each request."""
    return [record.end - record.start for record in records if record.end is not None] or [0.0]


def run_notes(run: Run, plan: Plan) -> list[str]:
    """Remarks on one run."""
    found = []
    warmed = len(run.warm_up_records)
    how = "steady" if run.warm else "NOT steady, medians still differ by more than 5 %,"
    if plan.warm_up:
        found.append(f"warm-up {how} after {warmed} requests in {run.warm_up_seconds:.1f} s")
    else:
        found.append("NOT WARMED UP: --warm-up is 0")
    counts = run.counts()
    parts = [f"{counts[name]} {name}" for name in ("done", "rejected", "failed", "cut")]
    found.append(f"{counts['sent']} requests in {run.seconds:.1f} s: {', '.join(parts)}")
    failed = [record for record in run.records if record.outcome == "failed"]
    if failed:
        found.append(f"first failure: status {failed[0].status}: {failed[0].error}")
    if run.over_saturated:
        found.append("OVER-SATURATED: requests in flight and time to first output kept rising")
    elif run.complete and not run.steady:
        found.append(f"NOT STEADY: --max-seconds ({plan.max_seconds:.0f}) came first")
    if run.client_bound:
        found.append(f"CLIENT-BOUND: {run.client_bound}")
    return found


def stages(records: Iterable[RequestRecord]) -> dict[str, float]:
    """Mean seconds of each stage in a request, as the server reports them."""
    found: dict[str, list[float]] = {}
    for record in records:
        seconds: Mapping[str, Any] = (record.server or {}).get("stage_seconds") or {}
        for stage, value in seconds.items() if isinstance(seconds, Mapping) else ():
            if isinstance(value, int | float):
                found.setdefault(stage, []).append(float(value))
    return {stage: mean(values) for stage, values in found.items()}
