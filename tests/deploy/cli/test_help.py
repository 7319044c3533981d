"""`--help` on a narrow terminal: paragraphs wrap once, long commands group their options."""

from __future__ import annotations

import re

import pytest

from mmi_deploy.cli import program
from mmi_deploy.cli.app import run

COMMANDS = (
    "ablate", "bench", "bench batch", "bench compare", "bench graph", "bench mmfs",
    "bench pytorch", "bench scale", "bench serve", "build", "convert", "data", "data check",
    "delta apply", "delta make", "evaluate", "export", "generate", "init", "inspect",
    "inspect batch", "plugins build", "plugins list", "push", "serve", "train", "train-tiny",
    "triton", "verify",
)  # fmt: skip
# Most options in one panel: longer lists are hard to read.
MOST = 12

# Commands of many views, each with options of its own.
LONG = {"inspect"}


def help_of(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    assert run([*command.split(), "--help"]) == 0
    return str(capsys.readouterr().out)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_paragraph_wraps_at_the_width_and_nowhere_else(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    text = help_of(command, monkeypatch, capsys)
    prose = text[text.index("Usage") : text.index("╭")].splitlines()
    for line, after in zip(prose, prose[1:], strict=False):
        first = after.split()[:1]
        if line.strip() and first and "Usage" not in line:
            assert len(line.rstrip()) + 1 + len(first[0]) > 78, line


@pytest.mark.parametrize("command", sorted({*COMMANDS} - LONG))
def test_no_panel_is_a_long_list(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    panels = help_of(command, monkeypatch, capsys).split("╭─")[1:]
    assert all(len(re.findall(r"^│ \*? *--", panel, re.M)) <= MOST for panel in panels)


def test_generate_groups_its_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    text = help_of("generate", monkeypatch, capsys)
    panels = re.split(r"^╭─ (\w+) ─+╮$", text, flags=re.M)
    names, bodies = panels[1::2], panels[2::2]
    assert names == ["Arguments", "Options", "Document", "Text", "Pictures", "Machine"]
    found = dict(zip(names, bodies, strict=True))
    assert "--seed" in found["Document"] and "--top-p" in found["Text"]
    assert "--guidance" in found["Pictures"] and "--kernels" in found["Machine"]


def test_examples_have_a_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    lines = [line.strip() for line in help_of("generate", monkeypatch, capsys).splitlines()]
    assert "Examples:" in lines
    assert "mmi generate examples/story.md --json | jq .parts" in lines


def test_help_of_keeps_paragraphs_apart() -> None:
    def command() -> None:
        """One line,
        broken.

        Another
        one.
        """

    assert program.help_of(command) == "One line, broken.\n\nAnother one."
