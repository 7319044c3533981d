"""`mmi evaluate --predictions`: score a file of predictions on one of the paper's benchmarks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from mmi_deploy.cli.console import print_json, print_table, remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.errors import ConfigError
from mmi_deploy.system.files import prepare_file, write_new_file
from mmi_deploy.system.progress import shown
from mmi_deploy.system.result_lines import run_of
from mmi_train.evaluation.benchmarks.report import Questions, Report
from mmi_train.evaluation.benchmarks.scores import Options
from mmi_train.evaluation.benchmarks.table import BENCHMARKS, SEGMENTED, benchmark


def questions_of(name: str | None, data: Path | None, split: str | None) -> Questions:
    """Questions of benchmark `name` with the annotations in `data`. Raises `MmiError`."""
    if name is None or data is None:
        missing = "--benchmark NAME" if name is None else "--data DIR"
        raise ConfigError(
            f"--predictions needs {missing}", fix=f"benchmarks: {', '.join(BENCHMARKS)}"
        )
    return Questions.of(benchmark(name), data, split)


def score_predictions(
    predictions: Path,
    questions: Questions,
    options: Options,
    *,
    against: Path | None,
    submission: Path | None,
    as_json: bool,
    out: Path | None = None,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Score `predictions` on the questions of a benchmark, and print the report.

    submission: also write the file that the set's server scores; for a split whose answers are not
    published that is all. out: also write the report, a new .json file. generation: how the answers
    were generated, for the report. Raises `MmiError`.
    """
    if submission is not None:
        prepare_file(submission)
    if out is not None:
        prepare_file(out, ".json")
    if options.segmenter is not None and questions.benchmark.name != SEGMENTED:
        raise ConfigError(f"--segmenter is of {SEGMENTED}", fix="leave it out")
    if submission is not None:
        write_new_file(submission, questions.submission(predictions))
        remarks().print(f"wrote {submission}")
        if not questions.answered:
            return
    # Networks that see pictures are torch's; answers are scored without it.
    with shown(remarks(), patience=2.0) as progress, extras("evaluate"):
        report = questions.report(predictions, replace(options, progress=progress), against)
    for remark in report.remarks:
        remarks().print(remark)
    told = {} if generation is None else {"generation": dict(generation)}
    if told:
        words = (f"{name} {value:g}" for name, value in told["generation"].items())
        remarks().print(f"answered with {', '.join(words)}")
    whole = {**report.as_json(), **told, **_run(predictions)}
    if against is not None:
        whole["against"] |= _run(against)
    if out is not None:
        write_new_file(out, json.dumps(whole, indent=1) + "\n")
        remarks().print(f"wrote {out}")
    if as_json:
        print_json(whole)
    else:
        print_table(results(), _table(report))


def _run(predictions: Path) -> dict[str, Any]:
    """Field with the settings of a file that `mmi evaluate --benchmark` wrote; none of another."""
    run = run_of(predictions)
    return {} if run is None else {"run": run}


def _table(report: Report) -> Table:
    """A line for each metric, with its interval, and the other file's value and the difference."""
    table = Table(
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        title=f"{report.benchmark}, {report.split}: {report.answered} answered, "
        f"{report.missing} missing",
        title_justify="left",
    )
    table.add_column("metric", no_wrap=True)
    compared = report.against
    more = ["against", "difference", "95 %", "verdict"] if compared is not None else []
    for heading in ("value", "95 %", *more):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, value in report.metrics.items():
        row = [name, f"{value:.2f}", _ends(report.intervals.get(name))]
        if compared is not None:
            other, one = compared.metrics.get(name), compared.differences.get(name)
            row.append("" if other is None else f"{other:.2f}")
            if one is not None:
                row += [f"{one.value:+.2f}", _ends((one.low, one.high)), one.verdict]
        table.add_row(*row)
    return table


def _ends(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"
