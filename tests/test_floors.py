"""Least versions of dependencies are declared, and are those that `make floors` tried."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

from floors import floors

REPOSITORY = Path(__file__).resolve().parent.parent


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def test_what_is_installed_is_no_older_than_declared() -> None:
    found = floors()
    assert {"numpy", "typer", "onnxruntime"} <= set(found)
    for name, floor in found.items():
        assert version(importlib.metadata.version(name)) >= version(floor), name


def test_typer_is_new_enough_for_its_exceptions() -> None:
    """`typer.exceptions`, with which every command ends, came with 0.28: older ones start none."""
    assert "from typer.exceptions" in (REPOSITORY / "mmi_deploy" / "cli" / "program.py").read_text()
    assert version(floors()["typer"]) >= (0, 28)


def test_the_environment_of_floors_is_made_of_them() -> None:
    recipe = (REPOSITORY / "Makefile").read_text().split("\nfloors:")[1].split("\n\n")[0]
    assert "tests/floors.py" in recipe and "mmi verify" in recipe and "mmi generate" in recipe
