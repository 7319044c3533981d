"""Comparison of two results of `mmi bench serve`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from mmi_bench.serve.definitions import BY_KEY, LATENCIES, PICTURE_BAND, RATES, WORST_CV
from mmi_bench.serve.measures import values_of
from mmi_bench.serve.records import RequestRecord
from mmi_bench.serve.report import REQUESTS, RESULT
from mmi_bench.serve.result import FORMAT, LEAST_RUNS, rate_draws
from mmi_bench.serve.sample_statistics import (
    Interval,
    quantiles,
    resampled,
    standard_error,
    t_quantile,
    variation,
)
from mmi_deploy.errors import ConfigError, MmiError

# Latencies that no verdict is based on: that of the client, and one that may be nothing but noise.
_NOT_JUDGED = ("send_lag", "queue")

# Pairs below which a latency is not judged.
_LEAST_PAIRS = 5

_RESAMPLES, _SEED = 2000, 4711

# Facts about the machine that must be equal.
_MACHINE = ("processor", "cores", "memory_bytes")

# A request by its prompt and its turn.
_Key = tuple[str, int]


@dataclass(frozen=True)
class Saved:
    """A result that was read. lines: of `requests.jsonl`, with their records."""

    path: Path
    about: Mapping[str, Any]
    lines: Sequence[tuple[Mapping[str, Any], RequestRecord]]

    @property
    def successes(self) -> Iterator[tuple[Mapping[str, Any], RequestRecord]]:
        """Requests that began and ended well in a window."""
        for line, record in self.lines:
            if line["phase"] == "window" and not line["cut"] and record.outcome == "done":
                yield line, record

    def by_prompt(self) -> dict[_Key, dict[str, float]]:
        """Mean of each latency of each prompt and turn, over the request's values and repeats."""
        found: dict[_Key, dict[str, list[float]]] = {}
        for _, record in self.successes:
            each = found.setdefault((record.prompt, record.turn), {})
            for key, values in values_of(record).items():
                each.setdefault(key, []).append(mean(values))
        return {
            prompt: {key: mean(values) for key, values in each.items()}
            for prompt, each in found.items()
        }

    def run_means(self, key: str) -> list[float]:
        """A latency's mean in each run, or a rate."""
        runs = self.about["runs"]
        if key in RATES:
            return [run["rates"][key]["value"] for run in runs if key in run["rates"]]
        return [run["measures"][key]["mean"] for run in runs if key in run["measures"]]

    def rate_draws(self, key: str) -> Any:
        """Bootstrapped means of a rate over the runs; None without two requests in each."""
        each = []
        for run in self.about["runs"]:
            begin, end = run["window"]["begin"], run["window"]["end"]
            ended = [
                (record.end, record)
                for line, record in self.lines
                if line["run"] == run["number"]
                and record.outcome == "done"
                and record.end is not None
                and not line["cut"]
                and begin <= record.end <= end
            ]
            ended.sort(key=lambda pair: pair[0])
            amounts = [
                {"tokens_per_second": record.tokens, "images_per_second": record.images}.get(key, 1)
                for _, record in ended
            ]
            fixed = self.about["load"]["kind"] in ("offline", "trace") or not ended
            span = 0.0 if fixed else mean(time - record.start for time, record in ended)
            times, flying = [time for time, _ in ended], float(run["in_flight"]["mean"])
            draws = rate_draws(begin, end - begin, times, amounts, span, flying)
            if draws is None:
                return None
            each.append(draws)
        least = min((len(draws) for draws in each), default=0)
        # Windows are independent: each is drawn with an order of its own.
        shuffled = [np.random.default_rng(n).permutation(d)[:least] for n, d in enumerate(each)]
        return np.mean(shuffled, axis=0) if shuffled else None


@dataclass(frozen=True)
class Change:
    """Change of one measure from A to B. slower: relative, above 0 if B is worse; with its 95 %
    interval, None if the sample is too small for a verdict. pairs: prompts in both."""

    key: str
    a: float
    b: float
    slower: float
    interval: Interval | None
    pairs: int

    def verdict(self, limit: float | None) -> str:
        """`WORSE` if the whole interval lies beyond the limit (0 without one)."""
        if self.interval is None:
            return "too few requests or runs"
        low, high = self.interval
        if low > (limit or 0.0):
            return "WORSE" if limit is not None else "slower"
        return "faster" if high < 0 else "slower within the limit" if low > 0 else "no difference"

    def to_json(self, limit: float | None) -> dict[str, Any]:
        return {
            "measure": self.key,
            "a": self.a,
            "b": self.b,
            "slower": self.slower,
            "interval95": list(self.interval) if self.interval else None,
            "pairs": self.pairs,
            "verdict": self.verdict(limit),
        }


def read_result(path: Path) -> Saved:
    """Read the folder of a result, or its result.json. Raises `MmiError`."""
    folder = path.parent if path.name == RESULT else path
    try:
        about = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise MmiError(
                f"{path} was written by another version", expected=FORMAT, got=about["format"]
            )
        lines = []
        with (folder / REQUESTS).open(encoding="utf-8") as file:
            for text in file:
                line = json.loads(text)
                lines.append((line, RequestRecord.of_json(line)))
        saved = Saved(path, about, lines)
        _ = [run["window"]["end"] - run["window"]["begin"] for run in about["runs"]]
        return saved
    except OSError as error:
        raise MmiError(
            f"cannot read {error.filename}: {error.strerror}",
            fix="name a folder that `mmi bench serve -o` wrote",
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MmiError(
            f"{path} is not a result of `mmi bench serve` ({type(error).__name__}: {error})"
        ) from None


def compare(a: Saved, b: Saved) -> list[Change]:
    """Changes of all measures that both have. Raises `ConfigError` for results that cannot be
    compared: see `check_alike`."""
    check_alike(a, b)
    first, second = a.by_prompt(), b.by_prompt()
    changes = []
    for key in LATENCIES:
        if key in _NOT_JUDGED:
            continue
        shared = [p for p in first if key in first[p] and key in second.get(p, {})]
        if shared:
            pairs = np.array([[first[p][key], second[p][key]] for p in shared])
            changes.append(_of_pairs(key, pairs, a.run_means(key), b.run_means(key)))
    for key in RATES:
        means = a.run_means(key), b.run_means(key)
        if all(means) and all(mean(one) > 0 for one in means):
            changes.append(_of_rates(key, a, b))
    return changes


def _of_pairs(key: str, pairs: Any, a: Sequence[float], b: Sequence[float]) -> Change:
    """Change of a latency, from pairs [prompts, 2]."""
    first, second = pairs.mean(axis=0).tolist()
    slower, interval = second / first - 1 if first else 0.0, None
    if len(a) >= LEAST_RUNS and len(b) >= LEAST_RUNS:
        interval = _of_runs(a, b)
    elif len(pairs) >= _LEAST_PAIRS:
        draws = resampled(np.random.default_rng(_SEED), _RESAMPLES, len(pairs)) @ pairs
        known = draws[:, 0] > 0
        interval = quantiles(draws[known, 1] / draws[known, 0] - 1) if known.any() else None
    return Change(key, first, second, slower, interval, len(pairs))


def _of_rates(key: str, a: Saved, b: Saved) -> Change:
    """Change of a rate; slower is the change of its inverse."""
    means, interval = (a.run_means(key), b.run_means(key)), None
    first, second = mean(means[0]), mean(means[1])
    if all(len(one) >= LEAST_RUNS for one in means):
        interval = _of_runs(means[1], means[0])
    elif key != "goodput":
        draws = a.rate_draws(key), b.rate_draws(key)
        if draws[0] is not None and draws[1] is not None:
            least = min(len(one) for one in draws)
            # The order of the second is another one: both were drawn from the same seed.
            other = np.random.default_rng(_SEED).permutation(draws[1])
            found = draws[0][:least] / np.maximum(other[:least], 1e-12) - 1
            interval = quantiles(found)
    return Change(key, first, second, first / second - 1, interval, 0)


def _of_runs(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Interval of the ratio b / a less 1, by Welch's t over the logarithms of run means."""
    logs = [np.log(np.maximum(one, 1e-12)) for one in (a, b)]
    errors = [standard_error(one.tolist()) ** 2 for one in logs]
    total = sum(errors)
    change = float(logs[1].mean() - logs[0].mean())
    if total == 0:
        half = 0.0
    else:
        parts = sum(e**2 / (len(one) - 1) for e, one in zip(errors, logs, strict=True))
        half = t_quantile(total**2 / parts) * float(np.sqrt(total))
    return float(np.expm1(change - half)), float(np.expm1(change + half))


def check_alike(a: Saved, b: Saved) -> None:
    """Raise `ConfigError` unless both are whole, valid results of the same workload, load, machine
    and precision, with the same outputs, whose runs vary little enough."""
    for one in (a, b):
        if not one.about["complete"] or one.about["over_saturated"]:
            raise ConfigError(f"{one.path} is incomplete", fix="measure it again, to the end")
        if not one.about["valid"]:
            raise ConfigError(f"{one.path} is INVALID: its outputs are not those of the reference")
        for key in (*LATENCIES, *RATES):
            means = one.run_means(key)
            spread = variation(means) if len(means) >= LEAST_RUNS else None
            if spread is not None and spread > WORST_CV and key not in _NOT_JUDGED:
                raise ConfigError(
                    f"the runs of {one.path} vary too much in {BY_KEY[key].name}",
                    expected=f"at most {100 * WORST_CV:.0f} %",
                    got=f"{100 * spread:.0f} %",
                    fix="measure on a quieter machine",
                )
    for name in ("workload", "load", "client"):
        _check_equal(name, a.about[name], b.about[name])
    if a.about["load"]["kind"] == "offline":
        _check_equal("--requests", a.about["plan"]["requests"], b.about["plan"]["requests"])
    for name in _MACHINE:
        _check_equal(f"machine: {name}", *(one.about["machine"][name] for one in (a, b)))
    _check_equal("precision", *(one.about["server"]["target"] for one in (a, b)))
    _check_outputs(a, b)


def _check_equal(name: str, a: object, b: object) -> None:
    if a != b:
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            key = next(key for key in {**a, **b} if a.get(key) != b.get(key))
            name, a, b = f"{name}: {key}", a.get(key), b.get(key)
        raise ConfigError(
            f"the results cannot be compared: {name} differs",
            got=f"{json.dumps(a)} and {json.dumps(b)}",
        )


def _check_outputs(a: Saved, b: Saved) -> None:
    """Raise `ConfigError` if a prompt has another text, or pictures beyond the band."""
    first = {(r.prompt, r.turn): (line, r) for line, r in a.successes}
    shared = 0
    for line, record in b.successes:
        if (record.prompt, record.turn) not in first:
            continue
        shared += 1
        other, known = first[record.prompt, record.turn]
        if what := _unlike(other, known, line, record):
            raise ConfigError(
                f"the results cannot be compared: the {what} of prompt {record.prompt} differs",
                fix="compare servers that give the same outputs",
            )
    if not shared:
        raise ConfigError("the results share no prompt that was answered in both")


def _unlike(
    a: Mapping[str, Any], first: RequestRecord, b: Mapping[str, Any], second: RequestRecord
) -> str | None:
    """Part of the output that differs; pictures are compared by hash, then by thumbnails."""
    if first.text_hash != second.text_hash:
        return "text"
    if len(first.picture_hashes) != len(second.picture_hashes):
        return "number of pictures"
    if first.picture_hashes != second.picture_hashes and "thumbnails" in a and "thumbnails" in b:
        for one, other in zip(a["thumbnails"], b["thumbnails"], strict=True):
            levels = [np.frombuffer(bytes.fromhex(x), np.uint8).astype(int) for x in (one, other)]
            # Each mean is rounded once more.
            if np.abs(levels[0] - levels[1]).max(initial=0) > PICTURE_BAND + 1:
                return "picture"
    return None


def parse_limit(text: str) -> float:
    """Parse `5%` or `0.05`; raises `ConfigError`."""
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 10:
        raise ConfigError("--fail-above is malformed", expected="a share, as 5%", got=text)
    return value
