"""Language of the repository: shape letters, openings of docstrings, words that are not used."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

from mmi_deploy.spec.graphs import Limits, graphs
from mmi_deploy.spec.mmfs_operator import INPUT_SHAPES
from mmi_deploy.spec.presets import PRESETS

REPOSITORY = Path(__file__).resolve().parent.parent

# Folders and files that are checked.
ROOTS = """
    mmi_deploy/documents mmi_deploy/runtime/onnxruntime mmi_deploy/spec mmi_deploy/system
    mmi_deploy/__init__.py mmi_deploy/__main__.py mmi_deploy/errors.py mmi_deploy/parity.py
    plugins examples bench/mmi_bench/cli
    train/mmi_train/baseline train/mmi_train/cli train/mmi_train/data train/mmi_train/evaluation
    train/mmi_train/model train/mmi_train/training
    tests/bench/gpu_check tests/deploy/bundle tests/deploy/cli tests/deploy/documents
    tests/deploy/spec tests/deploy/system tests/emulator tests/oracles tests/plugins tests/train
    tests/conftest.py tests/exports.py
    docs/architecture.md docs/mmfs_kernel.md README.md CONTRIBUTING.md Makefile
""".split()

SUFFIXES = {".py", ".cuh", ".h", ".cu", ".cpp", ".md"}

LEGEND = re.compile(r"\bLetters: ([^.]*)\.")
LINE_START = re.compile(r"\s*\n\s*(?://|#)?\s*")

# Dynamic dimensions of the contract with a name of their own.
SPELLED_OUT = {"steps"}

QUESTION = r"(?:What|How|Where|Which|Whether|Who|Why|When)\b"
OPENS_LIKE_A_QUESTION = re.compile(rf'"""\s*{QUESTION}')

# Words that are not used, each with the term to use instead.
BANNED = re.compile(
    r"\bof ours\b"  # our
    r"|\bmend(?:s|ed|ing)?\b"  # fix
    r"|\blikeliest\b"  # most probable, opt
    r"|\bheed(?:s|ed|ing)?\b"  # read, obey
    r"|stand[-_]in\b",  # placeholder, build-only plugin
    re.IGNORECASE,
)

# Places that read or test targets of earlier versions, which call the build-only plugin `stand-in`.
READ_OLD_TARGETS = {
    "mmi_deploy/runtime/tensorrt/backend.py",
    "tests/deploy/runtime/tensorrt/test_backend.py",
}


@cache
def texts() -> dict[str, str]:
    """Path -> contents of every source and documentation file below `ROOTS`, this file aside."""
    found = {}
    for root in (REPOSITORY / name for name in ROOTS):
        paths = [root] if root.is_file() else sorted(root.rglob("*"))
        for path in paths:
            if path.suffix in SUFFIXES or path.name == "Makefile":
                found[path.relative_to(REPOSITORY).as_posix()] = path.read_text(encoding="utf-8")
    found.pop("tests/test_language.py", None)  # it spells the banned words
    return found


@cache
def table() -> dict[str, str]:
    """Letter -> axis, of the section Shape letters in docs/architecture.md."""
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.split("\n## Shape letters\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(.)` \| ([^|]+?) \|", section, re.MULTILINE)
    assert len(rows) > 20 and len(dict(rows)) == len(rows), "a row per letter"
    return dict(rows)


def legends(text: str) -> Iterator[list[str]]:
    """Entries of each legend, such as `b batch`, without the marks of comments."""
    for legend in LEGEND.finditer(text):
        yield [entry.strip() for entry in LINE_START.sub(" ", legend[1]).split(",")]


def wrong_entries(text: str) -> list[str]:
    """Entries of legends that are not rows of the table."""
    rows = {f"{letter} {axis}" for letter, axis in table().items()}
    return [entry for entries in legends(text) for entry in entries if entry not in rows]


def questions(text: str) -> list[str]:
    """First lines of docstrings of modules, classes and functions that open like a question."""
    if not OPENS_LIKE_A_QUESTION.search(text):  # parsing every file would take seconds
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    strings = (ast.get_docstring(n) for n in ast.walk(ast.parse(text)) if isinstance(n, kinds))
    return [found.splitlines()[0] for found in strings if found and re.match(QUESTION, found)]


def banned(text: str) -> list[str]:
    """Lines with a banned word."""
    return [line.strip() for line in text.splitlines() if BANNED.search(line)]


def listing(wrong: Iterable[tuple[str, list[str]]]) -> str:
    """One line per violation: the file and what is wrong in it."""
    return "\n".join(f"{path}: {line}" for path, lines in wrong for line in lines)


def test_legends_use_the_letters_and_words_of_the_table() -> None:
    with_legend = {path for path, text in texts().items() if any(legends(text))}
    assert with_legend >= {"mmi_deploy/spec/graphs.py", "plugins/mmi_plugins/csrc/mmfs.h"}
    assert not (wrong := listing((path, wrong_entries(text)) for path, text in texts().items())), (
        wrong
    )


@pytest.mark.parametrize(
    ("legend", "wrong"),
    [
        ("Letters: b batch, q queries.", []),
        ("// Letters: b batch, d channels per head,\n// n encoded images.\n", []),
        ("Letters: b batch,\n    t tokens. More.", []),
        ("Letters: b rows, t tokens.", ["b rows"]),
        ("# Letters: b batch,\n# e experts.", ["e experts"]),
        ("Letters: n pool of\nencoded images.", ["n pool of encoded images"]),
    ],
)
def test_a_wrong_legend_is_found(legend: str, wrong: list[str]) -> None:
    assert wrong_entries(legend) == wrong


@pytest.mark.parametrize("name", PRESETS)
def test_dimensions_of_the_contract_are_in_the_table(name: str) -> None:
    known = table().keys() | SPELLED_OUT
    for graph in graphs(PRESETS[name](), Limits(context=20)).values():
        sides = [side for tensor in (*graph.inputs, *graph.outputs) for side in tensor.shape]
        named = {side.rpartition("*")[2] for side in sides if isinstance(side, str)}
        bounds = {tensor.below for tensor in graph.inputs if isinstance(tensor.below, str)}
        assert named | bounds | graph.ranges.keys() <= known, graph.name


def test_axes_of_the_mmfs_operator_are_in_the_table() -> None:
    letters = {letter for shape in INPUT_SHAPES.values() for letter in shape if letter.isalpha()}
    assert letters == set("bqmlhpdnsr") and letters <= table().keys()


def test_docstrings_do_not_open_like_questions() -> None:
    assert not (wrong := listing((path, questions(text)) for path, text in texts().items())), wrong


def test_a_docstring_that_opens_like_a_question_is_found() -> None:
    text = '"""Shapes."""\n\n\ndef f():\n    """Whether it fits."""\n    return """What?"""\n'
    assert questions(text) == ["Whether it fits."]


def test_banned_words_do_not_occur() -> None:
    wrong = listing(
        (path, banned(text)) for path, text in texts().items() if path not in READ_OLD_TARGETS
    )
    assert not wrong, wrong


@pytest.mark.parametrize(
    "line", ["a buffer of ours", "mends = 1", "write_stand_in(x)", "# a stand-in", "The Likeliest"]
)
def test_a_banned_word_is_found(line: str) -> None:
    assert banned(f"x = 1\n{line}\n") == [line]
    assert not banned("that_stand_in_are, amends, recommended, of hours")
