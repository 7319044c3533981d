"""The checker finds what is wrong, says what it could not run, and knows its exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mmi_deploy.parity import compare
from mmi_plugins.conformance import check as checker
from mmi_plugins.conformance.calls import draws, write_case
from mmi_plugins.conformance.implementations import IMPLEMENTATIONS
from mmi_plugins.operator import TOLERANCES, Call
from mmi_plugins.reference import mmfs_reference, output_of

Run = Callable[..., tuple[int, str]]


@dataclass
class Fake:
    """The reference, off by `off`."""

    name: str = "fake"
    off: float = 0.0
    most_rows: int | None = None
    lacks: str | None = None
    seen: int = 0

    def missing(self) -> str | None:
        return self.lacks

    def run(self, call: Call, rows: np.ndarray) -> np.ndarray:
        self.seen = len(rows)
        if self.off != self.off:
            raise RuntimeError("it broke\nbadly")
        return mmfs_reference(call, rows) * (1 + self.off)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, dtype in enumerate(("float32", "float16", "bfloat16")):
        for _, call in draws(index, 1, q=17, h=2, dtype=dtype, null_slot=True):
            write_case(tmp_path / f"{dtype}.npz", call, output_of(call, mmfs_reference(call)))
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """The checker with one implementation: exit code, and all that it says."""

    def run(folder: Path, fake: Fake) -> tuple[int, str]:
        monkeypatch.setattr(checker, "IMPLEMENTATIONS", {"fake": lambda: fake})
        code = checker.run([str(folder), "--through", "fake"])
        return code, "".join(capfd.readouterr())

    return run


def test_what_is_right_passes(run: Run, folder: Path) -> None:
    code, output = run(folder, Fake(off=1e-7))
    assert code == 0 and "3 passed, 0 failed, 0 not run" in output


def test_the_tolerance_is_that_of_the_type(run: Run, folder: Path) -> None:
    code, output = run(folder, Fake(off=1e-3))
    assert code == 1 and "1 passed, 2 failed, 0 not run" in output
    code, output = run(folder, Fake(off=1e-2))
    assert code == 1 and "0 passed, 3 failed, 0 not run" in output


def test_what_the_type_cannot_hold_counts_as_the_least_it_can() -> None:
    def relative(got: np.ndarray, expected: np.ndarray, dtype: str) -> float:
        return compare("output", got, expected, TOLERANCES[dtype]).relative

    nothing, least = np.zeros(8), np.full(8, 4e-98)
    assert relative(nothing, least, "float16") < 1e-6
    assert relative(nothing, np.full(8, 1e-3), "float16") == 1
    assert relative(np.full(8, 1e-4), nothing, "float32") > 1


def test_what_breaks_has_failed(run: Run, folder: Path) -> None:
    code, output = run(folder, Fake(off=float("nan")))
    assert code == 1 and "it broke" in output and "badly" not in output


def test_what_is_missing_was_not_run(run: Run, folder: Path) -> None:
    code, output = run(folder, Fake(lacks="there is no such tool"))
    assert code == 2 and "there is no such tool" in output and "3 not run" in output


def test_large_cases_are_run_in_part(run: Run, folder: Path) -> None:
    fake = Fake(most_rows=5)
    code, output = run(folder, fake)
    assert fake.seen == 5 and "5 of" in output


def test_what_cannot_be_read_has_failed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "[red]broken.npz").write_bytes(b"?")
    code, output = run(tmp_path, Fake())
    assert code == 1 and "1 failed" in output and "[red]broken" in output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "there is no folder nowhere"),
        (["."], ". holds no case; expected files ending in .npz"),
        (
            [".", "--through", "shim,mine"],
            f"unknown implementation; expected {', '.join(checker.IMPLEMENTATIONS)}; got mine",
        ),
        (
            [".", "--fast"],
            "No such option: --fast. See `python -m mmi_plugins.check --help`",
        ),
        ([], "Missing argument 'folder'. See `python -m mmi_plugins.check --help`"),
    ],
)
def test_bad_usage_is_one_line(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert checker.run(arguments) == 2
    assert capfd.readouterr() == ("", f"mmi: {says}\n")


def test_without_the_emulator_the_others_run_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As in an installed wheel, which has no `mmi_emulator`."""
    for name in [name for name in sys.modules if name.startswith("mmi_emulator.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mmi_emulator", None)
    emulated = {name: IMPLEMENTATIONS[name] for name in ("emulator", "shim")}
    monkeypatch.setattr(checker, "IMPLEMENTATIONS", {**emulated, "fake": lambda: Fake(off=1e-7)})
    assert checker.run([str(folder)]) == 0
    captured = capfd.readouterr()
    first = captured.err.splitlines()[0]
    assert first == "emulator and shim are not installed: only the source tree has them"
    assert "3 passed, 0 failed, 0 not run" in captured.out and "shim" not in captured.out
    # Named, it counts as what could not be run.
    assert checker.run([str(folder), "--through", "shim,fake"]) == 2
    captured = capfd.readouterr()
    assert "mmi_emulator is not installed" in captured.out and "3 passed" in captured.out
    assert "not installed" not in captured.err
