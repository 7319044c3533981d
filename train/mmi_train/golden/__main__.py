"""`python -m mmi_train.golden DIR [--weights DIR]`: compare the model with published runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mmi_deploy.errors import MmiError
from mmi_deploy.system.progress import shown
from mmi_train.golden.check import Report, check_folder
from mmi_train.golden.compare import Line

_HEADER = ("unit", "tensor", "max error", "tolerance", "verdict")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


def _cells(line: Line) -> tuple[str, ...]:
    verdict = f"{line.verdict}: {line.detail}" if line.detail else line.verdict
    return line.unit, line.tensor, _number(line.error), _number(line.allowed), verdict


def table(report: Report) -> str:
    """Format the report: a line per tensor, units that cannot run, ignored files, and totals."""
    rows = [_HEADER, *(_cells(line) for line in report.lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER) - 1)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]
    lines += [f"{name}: cannot be run: {reason}" for name, reason in report.broken.items()]
    lines += [f"{name}: ignored: {reason}" for name, reason in report.ignored.items()]
    verdicts = [line.verdict for line in report.lines]
    lines.append(
        f"{verdicts.count('pass')} passed, {verdicts.count('FAIL')} failed, "
        f"{verdicts.count('not compared')} not compared, {len(report.broken)} units cannot be run"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns 0 if every comparison passes and every unit runs, else 1."""
    parser = argparse.ArgumentParser(prog="python -m mmi_train.golden", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of golden files")
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="DIR",
        help="folder with the full_forward to take weights from",
    )
    options = parser.parse_args(arguments)
    try:
        with shown(Console(stderr=True, soft_wrap=True), "reading the files") as progress:
            report = check_folder(options.folder, options.weights, progress)
    except MmiError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(table(report))
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
