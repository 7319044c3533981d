"""Conformance test, `python -m mmi_plugins.check DIR`: every implementation on a folder of cases.

A case is an `.npz` of the operator's inputs and attributes, an optional `dtype` and `expected` in
float64 (`calls.read_case`). Exit code 1: an implementation failed. 2: one could not run.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmi_deploy.cli import program
from mmi_deploy.errors import EngineError, MmiError
from mmi_deploy.parity import Comparison, compare
from mmi_deploy.system.progress import shown
from mmi_plugins.conformance.calls import read_case
from mmi_plugins.conformance.implementations import EMULATED, IMPLEMENTATIONS, Implementation
from mmi_plugins.operator import TOLERANCES, Call
from mmi_plugins.reference import all_rows, rows_of

WRONG, NOT_RUN = 1, 2


@dataclass(frozen=True)
class Verdict:
    """Result of one implementation on one case. `reason`: of a missing comparison or a failure."""

    case: str
    implementation: str
    comparison: Comparison | None = None
    rows: int = 0
    of: int = 0
    reason: str = ""
    wrong: bool = False

    @property
    def relative(self) -> float:
        """The relative error; NaN where nothing was compared."""
        return self.comparison.relative if self.comparison else float("nan")

    @property
    def word(self) -> str:
        """The verdict in a word."""
        if self.wrong:
            return "FAILED"
        return "not run" if self.reason else "passed"


def chosen_rows(call: Call, most: int | None, name: str) -> np.ndarray:
    """All rows, or `most` of them, the same for the same case name."""
    rows = all_rows(call)
    if most is None or len(rows) <= most:
        return rows
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rows[np.sort(rng.choice(len(rows), most, replace=False))]


def check(name: str, call: Call, expected: np.ndarray, implementation: Implementation) -> Verdict:
    """Run one case; `expected` [b, q, h*d]. An implementation that fails is a wrong one."""
    rows = chosen_rows(call, implementation.most_rows, name)
    try:
        got = implementation.run(call, rows)
    except Exception as error:  # any exception is a failure of this case
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return Verdict(name, implementation.name, reason=reason, wrong=True)
    compared = compare("output", got, rows_of(expected, call, rows), TOLERANCES[call.dtype])
    return Verdict(
        name,
        implementation.name,
        compared,
        len(rows),
        call.rows,
        "" if compared.passed else compared.describe(),
        wrong=not compared.passed,
    )


def check_folder(folder: Path, names: Sequence[str]) -> Iterator[Verdict]:
    """Every case of `folder` through the implementations called `names`.

    Raises `EngineError` where there is no such folder, no case in it, or no such implementation.
    """
    if unknown := [name for name in names if name not in IMPLEMENTATIONS]:
        known = ", ".join(IMPLEMENTATIONS)
        raise EngineError("unknown implementation", expected=known, got=", ".join(unknown))
    if not folder.is_dir():
        raise EngineError(f"there is no folder {folder}")
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise EngineError(f"{folder} holds no case", expected="files ending in .npz")
    ready: list[Implementation] = []
    absent: dict[str, str] = {}
    for name in names:
        try:
            implementation = IMPLEMENTATIONS[name]()
            reason = implementation.missing()
        except ImportError as error:
            package = (error.name or str(error)).partition(".")[0]
            reason = f"{package} is not installed"
        if reason:
            absent[name] = reason
        else:
            ready.append(implementation)
    for file in files:
        try:
            call, expected = read_case(file)
        except MmiError as error:
            yield Verdict(file.stem, "reading", reason=str(error), wrong=True)
            continue
        for implementation in ready:
            yield check(file.stem, call, expected, implementation)
        for name, reason in absent.items():
            yield Verdict(file.stem, name, reason=reason)


def table(verdicts: Sequence[Verdict]) -> Table:
    """The verdicts as a table."""
    shown = Table("case", "through", "rows", "max error", "relative rms", "tolerance", "verdict")
    for verdict in verdicts:
        part = f" of {verdict.of}" if verdict.rows < verdict.of else ""
        numbers = [""] * 4
        if (found := verdict.comparison) and found.error:
            numbers = [f"{verdict.rows}{part}", f"{found.error.max_abs:.1e}"]
            numbers += [f"{found.relative:.1e}", f"{found.tolerance.relative:.0e}"]
        word = f"{verdict.word}: {verdict.reason}" if verdict.reason else verdict.word
        shown.add_row(*map(escape, (verdict.case, verdict.implementation, *numbers, word)))
    return shown


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of .npz cases.")],
    through: Annotated[
        str | None,
        typer.Option(
            help=f"Implementations, separated by commas: {', '.join(IMPLEMENTATIONS)}.",
            show_default="all that are installed",
        ),
    ] = None,
) -> int:
    """Compare implementations of the MMFS operator with float64 on every case of a folder."""
    console = Console(width=None if Console().is_terminal else 160)
    screen = Console(stderr=True, soft_wrap=True)
    if through is not None:
        names = [name.strip() for name in through.split(",")]
    elif find_spec("mmi_emulator"):
        names = list(IMPLEMENTATIONS)
    else:
        screen.print(f"{' and '.join(EMULATED)} are not installed: only the source tree has them")
        names = [name for name in IMPLEMENTATIONS if name not in EMULATED]
    verdicts = []
    with shown(screen, patience=2.0) as progress:
        for verdict in check_folder(folder, names):
            verdicts.append(verdict)
            progress("checking", detail=f"{len(verdicts)} done")
    console.print(table(verdicts))
    words = [verdict.word for verdict in verdicts]
    console.print(
        f"{words.count('passed')} passed, {words.count('FAILED')} failed, "
        f"{words.count('not run')} not run"
    )
    if "FAILED" in words:
        return WRONG
    return NOT_RUN if "not run" in words else 0


run = program.program("python -m mmi_plugins.check", main)
