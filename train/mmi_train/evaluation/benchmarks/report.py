"""Score of one file of predictions, or of two on the same questions, and the submission file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmi_deploy.errors import ConfigError
from mmi_train.data.readers.data_set import DataSet
from mmi_train.data.readers.questions import UNANSWERED
from mmi_train.evaluation.benchmarks.agreement import Agreement, agreement_of
from mmi_train.evaluation.benchmarks.predictions import (
    Matched,
    PredictionError,
    match,
    read_predictions,
)
from mmi_train.evaluation.benchmarks.references import AnnotationError, Reference, references_of
from mmi_train.evaluation.benchmarks.scores import Metrics, Options
from mmi_train.evaluation.benchmarks.table import Benchmark
from mmi_train.evaluation.metrics.intervals import Difference, Measure, difference, interval


@dataclass(frozen=True)
class Against:
    """Scores of another file on the same questions, the differences from it by metric, and how far
    the answers themselves agree."""

    path: Path
    metrics: dict[str, float]
    missing: int
    differences: dict[str, Difference]
    agreement: Agreement


@dataclass(frozen=True)
class Report:
    """Scores by metric, in percent or in the metric's own unit, with 95 % intervals."""

    benchmark: str
    split: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    answered: int
    missing: int
    remarks: list[str] = field(default_factory=list)
    against: Against | None = None

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values; null for a metric that no question has a value of."""
        found: dict[str, Any] = {
            "benchmark": self.benchmark,
            "split": self.split,
            "metrics": {name: _known(value) for name, value in self.metrics.items()},
            "intervals": {name: [*map(_known, ends)] for name, ends in self.intervals.items()},
            "answered": self.answered,
            "missing": self.missing,
        }
        if self.against is not None:
            found["against"] = {
                "predictions": str(self.against.path),
                "metrics": {n: _known(value) for n, value in self.against.metrics.items()},
                "missing": self.against.missing,
                "differences": {
                    name: {
                        "value": _known(one.value),
                        "interval": [_known(one.low), _known(one.high)],
                        "verdict": one.verdict,
                    }
                    for name, one in self.against.differences.items()
                },
                **self.against.agreement.as_json(),
            }
        return found


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


@dataclass(frozen=True)
class Questions:
    """Questions of one split of a benchmark. left_out: samples that have no answer, or no picture
    to compare with, by reason."""

    benchmark: Benchmark
    split: str
    references: Sequence[Reference]
    left_out: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, benchmark: Benchmark, data: Path, split: str | None) -> Questions:
        """Read the annotations in `data`."""
        return cls.in_set(benchmark, benchmark.open(data, split))

    @classmethod
    def in_set(cls, benchmark: Benchmark, data: DataSet[Any]) -> Questions:
        """Questions of an opened set. Raises `AnnotationError` if there is none."""
        found = references_of(data, benchmark.kind, benchmark.form)
        if not found.questions:
            where = f"the {data.split} split of {benchmark.name} in {data.folder.path}"
            reasons = "; ".join(f"{reason}: {n}" for reason, n in found.left_out.items())
            raise AnnotationError(f"{where} has no question" + (f" ({reasons})" if reasons else ""))
        return cls(benchmark, data.split, found.questions, found.left_out)

    @property
    def answered(self) -> bool:
        """True if the right answers are published."""
        return self.references[0].answered  # else none is

    def matched(self, path: Path) -> Matched:
        """Predictions of a file, in the order of the questions."""
        what = f"the {self.split} split of {self.benchmark.name}"
        return match(read_predictions(path, self.benchmark.kind), self.references, what, path)

    def report(
        self, path: Path, options: Options | None = None, against: Path | None = None
    ) -> Report:
        """Score the predictions in `path`; `against`: compare them with those of another file.

        Raises `ConfigError` if the right answers are not published.
        """
        if not self.answered:
            raise ConfigError(
                f"answers of the {self.split} split of {self.benchmark.name} are not published",
                fix="write the file that its server scores with --submission FILE"
                if self.benchmark.answer
                else f"choose another split: {', '.join(self.benchmark.splits)}",
            )
        options = replace(options or Options(), compared=against is not None)
        matched = self.matched(path)
        found = self._metrics(matched, options)
        remarks = self._remarks(matched, path)
        total = sum(self.left_out.values()) + len(self.references)
        for reason, count in self.left_out.items():
            why = "have no answer and" if reason == UNANSWERED else f"({reason})"
            remarks.append(f"{count} of {total} questions {why} are left out")
        compared = None
        if against is not None:
            other = self.matched(against)
            base = {one.name: one for one in self._metrics(other, options)}
            pairs = [(one, base.get(one.name)) for one in found]
            remarks += self._remarks(other, against)
            compared = Against(
                against,
                {name: one.total() for name, one in base.items()},
                other.missing,
                {
                    one.name: difference(one, two)
                    for one, two in pairs
                    if isinstance(one, Measure) and isinstance(two, Measure)
                },
                agreement_of(matched.predictions, other.predictions),
            )
        return Report(
            self.benchmark.name,
            self.split,
            {one.name: one.total() for one in found},
            {one.name: interval(one) for one in found if isinstance(one, Measure)},
            matched.answered,
            matched.missing,
            remarks,
            compared,
        )

    def submission(self, path: Path) -> str:
        """The official submission, JSON, of the predictions in `path`. Raises `ConfigError` for a
        set that has none."""
        key = self.benchmark.answer
        if key is None:
            raise ConfigError(f"{self.benchmark.name} has no submission file")
        entries = []
        for reference, prediction in zip(
            self.references, self.matched(path).predictions, strict=True
        ):
            answer: str | list[int] = ""
            if prediction is None and key == "ranks":
                raise PredictionError(
                    f"{path} does not rank the options of {reference.id}",
                    expected="a ranking for each question, which the server asks for",
                )
            if prediction is not None:
                answer = list(prediction.ranks) if key == "ranks" else prediction.text
            entries.append({**reference.fields, key: answer})
        return json.dumps(entries)

    def _metrics(self, matched: Matched, options: Options) -> Metrics:
        return self.benchmark.score(self.references, matched.predictions, options)

    def _remarks(self, matched: Matched, path: Path) -> list[str]:
        remarks = [f"{path}: {remark}" for remark in matched.remarks]
        if matched.missing:
            remarks.append(
                f"{path}: {matched.missing} of {len(self.references)} questions have no "
                "prediction; they count as wrong"
            )
        return remarks
