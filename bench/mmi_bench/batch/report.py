"""Tables of the batch benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from mmi_bench.batch.latency import Beside, SecondTurn, p99
from mmi_bench.batch.measure import MANY, BatchResult
from mmi_bench.batch.sample import Sample
from mmi_bench.batch.workloads import DOCUMENTS, TEXT
from mmi_bench.statistics import Statistics
from mmi_deploy.cli.console import print_table

# Minimum speed-up of text at `MANY` at once, and of one document alone; minimum share of the bound;
# maximum of the last first token over the queue's, and of a second turn's over the cold one's.
TEXT_GOAL, ALONE_GOAL, BOUND_GOAL, LAST_GOAL, SECOND_GOAL = 3.2, 0.95, 0.9, 1 / 3, 0.25


def print_report(console: Console, result: BatchResult) -> None:
    """Print the tables, then the single figures with their goals."""
    about = result.about
    print_table(console, speed_table(result))
    print_table(console, latency_table(result))
    if result.bounds:
        print_table(console, bound_table(result))
    for line in lines(result):
        console.print(line)
    equal = (
        "Tokens and PNG bytes of every document equal those of its single run"
        if about["exact"]
        else "Outputs were not compared"
    )
    console.print(
        f"{equal}. {about['machine']['processor']}, {about['threads']} threads, {about['target']}, "
        f"{', '.join(about['schedules'])}; {about['rounds']} rounds, both sides in turns; policy: "
        f"{about['policy']}; load before: {about['machine']['load_before']:.1f}"
    )


def speed_table(result: BatchResult) -> Table:
    """Build the table of throughput: medians over rounds, quartiles of the speed-up."""
    cpu = result.about["clock"] == "CPU"
    table = _table(
        f"{result.about['model']}: documents at once against one after another, medians"
        + (" by CPU time" if cpu else ""),
        "workload", "rows", "tokens/s", "images/s", "one by one", "times as fast",
        "wall time" if cpu else "CPU time",
        "decode rows", "denoise rows", "equal",
    )  # fmt: skip
    for cell in result.cells:
        speed, runs = cell.speedup, cell.runs
        unit = "tokens" if cell.workload == TEXT else "pictures"
        table.add_row(
            cell.workload,
            str(cell.rows),
            _rate(cell.rate(cell.together, "tokens")),
            _rate(cell.rate(cell.together, "pictures")),
            _rate(cell.rate(cell.single, unit)),
            _spread(speed),
            f"{cell.other_speedup.median:.2f}",
            _number(runs.mean_batch("decode")),
            _number(runs.mean_batch("denoise")),
            "yes" if result.about["exact"] else "",
        )
    return table


def latency_table(result: BatchResult) -> Table:
    """Build the table of latencies, those of the queue in brackets."""
    table = _table(
        "latencies in ms: at once (one after another)",
        "workload", "rows", "text gap p50", "p99", "first token", "of the last", "of the queue's",
    )  # fmt: skip
    for cell in result.cells:
        gaps = [gap for sample in cell.together for gap in sample.gaps]
        alone = [gap for sample in cell.single for gap in sample.gaps]
        if not gaps:
            continue
        last = cell.last_token
        table.add_row(
            cell.workload,
            str(cell.rows),
            f"{_ms(float(np.median(gaps)))} ({_ms(float(np.median(alone)))})",
            f"{_ms(p99(gaps))} ({_ms(p99(alone))})",
            f"{_ms(_first(cell.together, median))} ({_ms(_first(cell.single, median))})",
            f"{_ms(_first(cell.together, max))} ({_ms(_first(cell.single, max))})",
            "" if last is None else f"{last.median:.2f}",
        )
    return table


def bound_table(result: BatchResult) -> Table:
    """Build the table of the runs' gains and the bound for whole documents."""
    shown = [stage for stage in result.shares if result.shares[stage] >= 0.005]
    table = _table(
        "whole documents: share of a stage one by one, gain of its runs per row, bound",
        "rows", *(f"{stage} {100 * result.shares[stage]:.0f} %" for stage in shown), "bound",
        "measured", "of the bound",
    )  # fmt: skip
    for one in result.bounds:
        table.add_row(
            str(one.rows),
            *(f"{one.gains.get(stage, 1.0):.2f}" for stage in shown),
            f"{one.bound:.2f}",
            f"{one.bound * one.reached:.2f}",
            f"{one.reached:.2f}",
        )
    return table


def lines(result: BatchResult) -> list[str]:
    """Lines of single figures with their goals."""
    found = []
    most = max(cell.rows for cell in result.cells)
    text, whole = result.cell(TEXT, most), result.cell(DOCUMENTS, most)
    if text:
        speed = text.speedup.median
        found.append(
            f"text only, {most} at once: {speed:.2f} times as fast"
            + (_goal(speed >= TEXT_GOAL, f">= {TEXT_GOAL}") if most == MANY else "")
        )
    for one in result.bounds[-1:]:
        goal = _goal(one.reached >= BOUND_GOAL, f">= {BOUND_GOAL}") if one.rows > 1 else ""
        found.append(f"whole documents, {one.rows} at once: {one.reached:.2f} of the bound{goal}")
    if whole and whole.last_token and most > 1:
        share = whole.last_token.median
        found.append(
            f"time to first token of the last of {most} whole documents: {share:.2f} of the "
            f"queue's{_goal(share <= LAST_GOAL, '<= 1/3')}"
        )
    alone = [cell for cell in result.cells if cell.rows == 1]
    if alone:
        speeds = ", ".join(f"{cell.workload} {cell.speedup.median:.2f}" for cell in alone)
        least = min(cell.speedup.median for cell in alone)
        goal = _goal(least >= ALONE_GOAL, f">= {ALONE_GOAL}")
        found.append(f"one document alone, times as fast as `generate`: {speeds}{goal}")
    if result.beside:
        found.append(_beside(result.beside))
    if result.second:
        found.append(_second(result.second))
    return found


def _beside(beside: Beside) -> str:
    worst, limit = p99(beside.gaps), max(beside.bounds)
    goal = "" if worst is None else _goal(worst <= limit, "within the bound")
    return (
        f"a text beside {beside.pictures} pictures (default policy): gap p50 "
        f"{_ms(float(np.median(beside.gaps)))} ms, p99 {_ms(worst) or '-'} ms; bound "
        f"{' to '.join(_ms(one) for one in beside.bounds)} ms{goal}; alone p50 "
        f"{_ms(float(np.median(beside.alone)))} ms; {len(beside.gaps)} gaps, {beside.drawn} "
        f"pictures, {_number(beside.denoise_batch)} rows a step"
    )


def _second(second: SecondTurn) -> str:
    share = second.share
    goal = _goal(share.median <= SECOND_GOAL and not second.encodes, "<= 0.25, 0 encoder runs")
    return (
        f"second turn: first token after {_ms(median(second.warm))} ms, cold "
        f"{_ms(median(second.cold))} ms: {_spread(share)}, {second.encodes} encoder runs{goal}; "
        f"{second.cached} of {second.given} tokens were in the cache"
    )


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    return table


def _first(samples: Sequence[Sample], of: Callable[[list[float]], float]) -> float | None:
    """Median over samples of the median or last time to first token of their documents."""
    found = [of(s.first_tokens) for s in samples if s.first_tokens]
    return median(found) if found else None


def _rate(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}" if value else ""


def _spread(one: Statistics) -> str:
    return f"{one.median:.2f} ({one.low:.2f}–{one.high:.2f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return ""
    value = 1000 * seconds
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _goal(reached: bool, text: str) -> str:
    return f" [{text}: {'reached' if reached else 'missed'}]"
