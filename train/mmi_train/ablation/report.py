"""Tables of studies: means with intervals over the seeds, beside the paper's direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

import numpy as np

from mmi_train.ablation.studies import Measure, Row, Study

# Factor of the standard error of a 95 % interval, by the number of seeds (Student's t).
_STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
_NORMAL = 1.96

# Results of a row: measures of each seed, by the measure's metric.
Results = Mapping[str, Sequence[Mapping[str, float]]]

Verdict = Literal["as the paper", "against the paper", "better", "worse", "undecided"]


def half_width(half: float | None) -> str:
    """Half the width of an interval as ` ± x`, to two digits; empty for None."""
    if half is None:
        return ""
    return f" ± {half:.0f}" if half >= 10 else f" ± {half:.2g}"


@dataclass(frozen=True)
class Mean:
    """Mean over seeds, and half of its 95 % interval; None of a single seed."""

    value: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        half = None
        if len(values) > 1:
            factor = _STUDENT.get(len(values), _NORMAL)
            half = factor * float(np.std(values, ddof=1)) / sqrt(len(values))
        return cls(float(np.mean(values)), half)

    def __str__(self) -> str:
        return f"{self.value:.3g}{half_width(self.half)}"


@dataclass(frozen=True)
class Cell:
    """A measure of a row: its mean, and its difference to the baseline, paired by seed.

    paper: the difference in the paper, where there is one. verdict: None of the baseline.
    """

    mean: Mean
    difference: Mean | None
    paper: float | None
    verdict: Verdict | None


def cells(study: Study, results: Results) -> dict[str, dict[str, Cell]]:
    """Cells by row and measure, of the rows and measures that `results` has."""
    table: dict[str, dict[str, Cell]] = {}
    baseline = study.rows[0]
    for row in study.rows:
        if row.name not in results:
            continue
        table[row.name] = {}
        for measure in study.measures:
            own = [seed[measure.metric] for seed in results[row.name] if measure.metric in seed]
            if own:
                base = results.get(baseline.name, ()) if row is not baseline else ()
                theirs = [seed[measure.metric] for seed in base if measure.metric in seed]
                table[row.name][measure.name] = _cell(measure, row, baseline, own, theirs)
    return table


def _cell(
    measure: Measure, row: Row, baseline: Row, own: Sequence[float], theirs: Sequence[float]
) -> Cell:
    if len(theirs) != len(own):
        return Cell(Mean.of(own), None, None, None)
    difference = Mean.of([a - b for a, b in zip(own, theirs, strict=True)])
    paper = None
    if measure.name in row.paper and measure.name in baseline.paper:
        paper = row.paper[measure.name] - baseline.paper[measure.name]
    return Cell(Mean.of(own), difference, paper, _verdict(measure, difference, paper))


def _verdict(measure: Measure, difference: Mean, paper: float | None) -> Verdict:
    """Say what the interval of the difference says; a difference of one seed decides nothing."""
    if difference.half is None or abs(difference.value) <= difference.half:
        return "undecided"
    better = (difference.value > 0) == (measure.better == "higher")
    if not paper:
        return "better" if better else "worse"
    theirs = (paper > 0) == (measure.paper_better == "higher")
    return "as the paper" if better == theirs else "against the paper"


def as_json(study: Study, results: Results) -> dict[str, Any]:
    """The table as JSON values, with the values of all seeds."""
    table = cells(study, results)
    rows = {}
    for row in study.rows:
        found = table.get(row.name)
        rows[row.name] = None if found is None else {
            measure.name: _as_json(found[measure.name], measure, results[row.name])
            for measure in study.measures
            if measure.name in found
        }  # fmt: skip
    return {"title": study.title, "source": study.source, "rows": rows}


def _as_json(cell: Cell, measure: Measure, seeds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    told: dict[str, Any] = {
        "mean": cell.mean.value,
        "half_of_95_percent_interval": cell.mean.half,
        "seeds": [seed[measure.metric] for seed in seeds],
        "unit": measure.unit,
        "better": measure.better,
    }
    if cell.difference is not None:
        told["difference"] = cell.difference.value
        told["difference_half"] = cell.difference.half
        told["paper_difference"] = cell.paper
        told["verdict"] = cell.verdict
    return told


def as_markdown(study: Study, results: Results, pictures: Mapping[str, str]) -> str:
    """The table in Markdown: a row of values, then one of differences to the first row, and the
    paper's differences where it has them. `pictures`: a contact sheet by row."""
    table = cells(study, results)
    shown = [m for m in study.measures if any(m.name in row for row in table.values())]
    lines = [f"## {study.title[0].upper()}{study.title[1:]}", "", f"{study.source}.", ""]
    arrows = {"higher": "↑", "lower": "↓"}
    heads = [f"{m.name}{f', {m.unit}' * bool(m.unit)} {arrows[m.better]}" for m in shown]
    lines += [f"| | {' | '.join(heads)} |", f"|---|{'---:|' * len(shown)}"]
    for row in study.rows:
        found = table.get(row.name)
        if found is None:
            lines.append(f"| {row.name} |{' not measured |' * len(shown)}")
            continue
        values = [str(found[m.name].mean) if m.name in found else "–" for m in shown]
        lines.append(f"| {row.name} | {' | '.join(values)} |")
        if any(cell.difference is not None for cell in found.values()):
            changes = [_told(found.get(m.name)) for m in shown]
            lines.append(f"| *to {study.rows[0].name}* | {' | '.join(changes)} |")
    sheets = [f"[{row.name}]({pictures[row.name]})" for row in study.rows if row.name in pictures]
    if sheets:
        lines += ["", f"Pictures: {', '.join(sheets)}."]
    return "\n".join(lines) + "\n"


def _told(cell: Cell | None) -> str:
    if cell is None or cell.difference is None:
        return "–"
    half = half_width(cell.difference.half)
    paper = "" if cell.paper is None else f" (paper {cell.paper:+.3g})"
    return f"*{cell.difference.value:+.3g}{half}: {cell.verdict}{paper}*"
