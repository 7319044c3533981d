"""Golden case files: inputs with outputs of published reference code, as JSON.

Such a file is an object. Each key is a kind of case, its value the list of its cases (or one case,
an object), apart from the keys of `_REMARKS`. A check of a kind gets a case as it stands in the
file, with the file's `tokenizer` beside it, and returns the first difference from our own result.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from mmi_train.golden.compare import Line
from mmi_train.golden.data_cases import CHECKS as DATA_CHECKS
from mmi_train.golden.differences import Case, PublishedFailure
from mmi_train.golden.metric_cases import CHECKS as METRIC_CHECKS

Check = Callable[[Case], str | None]

# Kind of case -> its check.
CHECKS: Mapping[str, Check] = {**DATA_CHECKS, **METRIC_CHECKS}

# Files of this name are case files, whatever kinds they hold; others are if they hold a known kind.
_NAME = "data_and_metrics"

_REMARKS = {"about", "format", "published_faults", "tokenizer"}

# Differences that a line of the report shows.
_SHOWN = 5


def read_cases(path: Path) -> dict[str, list[Case]] | None:
    """Cases of a file by their kind; None if `path` is not a case file."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or "config" in found:
        return None
    kinds = {kind: value for kind, value in found.items() if kind not in _REMARKS}
    if not path.name.startswith(_NAME) and not kinds.keys() & CHECKS.keys():
        return None
    cases: dict[str, list[Case]] = {}
    for kind, value in kinds.items():
        entries = value if isinstance(value, list) else [value]
        cases[kind] = [
            {**entry, "tokenizer": found.get("tokenizer")}
            if isinstance(entry, dict) and isinstance(value, list)
            else entry
            for entry in entries
        ]
    return cases


def check_cases(name: str, cases: Mapping[str, list[Case]]) -> list[Line]:
    """A line for each kind of the file called `name`: all its cases pass, or the first that do not.

    A check that raises fails that case. Kinds without a check are not compared, nor cases on which
    the published code fails, which the line counts.
    """
    lines = []
    for kind, entries in cases.items():
        count = f"{kind} ({len(entries)})"
        if kind not in CHECKS:
            lines.append(Line(name, count, "not compared", detail="no check knows this kind"))
            continue
        wrong, failures = [], Counter[str]()
        for number, entry in enumerate(entries):
            try:
                if difference := CHECKS[kind](entry):
                    wrong.append(f"{_title(entry, number)}: {difference}")
            except PublishedFailure as failure:
                failures[str(failure)] += 1
            except Exception as error:  # a faulty case must not hide the others
                reason = " ".join(str(error).split())
                wrong.append(f"{_title(entry, number)}: {type(error).__name__}: {reason}")
        detail = "; ".join(
            f"{often} not compared, on which the published code fails: {why}"
            for why, often in failures.items()
        )
        if wrong:
            detail = f"{len(wrong)} of {len(entries)} cases differ: " + "; ".join(wrong[:_SHOWN])
        lines.append(Line(name, count, "FAIL" if wrong else "pass", detail=detail))
    return lines


def _title(case: Case, number: int) -> str:
    name = case.get("name") if isinstance(case, Mapping) else None
    return f"case {number}" + (f" ({name})" if name else "")
