"""The documentation names files, tests, links and commands that exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest

from mmi_deploy.cli.app import run
from mmi_deploy.cli.command_table import VIEWS
from mmi_deploy.spec.config import DistillationKind
from mmi_train.training.recipes import shipped

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
DOCS += [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "assets/tiny/README.md")]

# Files that commands write and the repository does not hold.
WRITTEN = {
    "best.json",
    "bundle.json",
    "gpu_check/report.json",
    "gpu_check/report.md",
    "report.json",
    "report.md",
    ".mmi-run.json",
    "result.json",
    "target.json",
    "model.safetensors.index.json",
}

# Files of published data sets and networks.
OF_DATA_SETS = {
    "captions_val2014.json",
    "config.json",
    "flickr30k_test_karpathy.json",
    "flintstones_annotations_v1-0.json",
    "instances.json",
    "nocaps_test_image_info.json",
    "nocaps_val_4500_captions.json",
    "paragraphs_coco.json",
    "paragraphs_v1.json",
    "tokenizer.json",
    "train-val-test_split.json",
}

# A script of the published code, and names in examples.
OTHERS = {"download_hf_models.py", "a.md", "A.md", "from_NAME.py"}

ELSEWHERE = WRITTEN | OF_DATA_SETS | OTHERS


@cache
def sources() -> dict[str, Path]:
    """Every file of the packages, tests and docs by its path in the repository."""
    folders = ("mmi_deploy", "export", "train", "bench", "plugins", "tests", "docs", "examples")
    paths = [path for folder in folders for path in (REPOSITORY / folder).rglob("*.*")]
    paths += REPOSITORY.glob("*.md")
    return {path.relative_to(REPOSITORY).as_posix(): path for path in paths}


@cache
def names_of_tests() -> set[str]:
    """Names of all tests and of their files."""
    paths = list((REPOSITORY / "tests").rglob("test_*.py"))
    texts = [path.read_text() for path in paths]
    named = {name for text in texts for name in re.findall(r"^def (test_\w+)", text, re.M)}
    return named | {path.stem for path in paths}


def code(text: str) -> Iterator[str]:
    """Lines of code blocks, and code within lines."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S):
        if not language:
            yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def anchors(text: str) -> set[str]:
    """Anchors of headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("doc", DOCS, ids=lambda path: path.stem)
def test_files_and_tests_exist(doc: Path) -> None:
    names = {Path(path).name for path in sources()}
    for word in code(doc.read_text()):
        if doc.stem == "data" and word.endswith(".json"):
            continue  # a file that a data set publishes
        if ELSEWHERE & {word, Path(word).name}:
            continue
        if re.fullmatch(r"\w[\w./-]*\.(py|md|json|cpp|cuh?|h)", word):
            within = any(path.endswith(f"/{word}") for path in sources())
            assert word in sources() or within if "/" in word else word in names, word
        if re.fullmatch(r"test_\w+", word):
            assert word in names_of_tests(), word
        if re.fullmatch(r"mmi_\w+(\.\w+)+", word):
            module, _, name = word.rpartition(".")
            assert hasattr(import_module(module), name) or find_spec(word), word


@pytest.mark.parametrize("doc", DOCS, ids=lambda path: path.stem)
def test_rows_of_tables_follow_each_other(doc: Path) -> None:
    """A row after an empty line, or of another width, is not drawn as one."""
    text = re.sub(r"^```.*?^```", "", doc.read_text(), flags=re.M | re.S)
    for block in re.split(r"\n\s*\n", text):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        if rows:
            assert len(rows) > 1 and re.fullmatch(r"[|:\- ]+", rows[1]), rows[0]
            widths = {len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", row))) for row in rows}
            assert len(widths) == 1, rows[0]


def test_every_recipe_and_every_kind_of_distillation_is_described() -> None:
    training = (REPOSITORY / "docs/training.md").read_text()
    drawing = (REPOSITORY / "docs/few_step_drawing.md").read_text()
    assert {name for name in shipped() if f"`{name}`" not in training} == set()
    assert {
        kind for kind in get_args(DistillationKind) if f"--distill {kind}" not in drawing
    } == set()


@pytest.mark.parametrize("doc", DOCS, ids=lambda path: path.stem)
def test_links_lead_somewhere(doc: Path) -> None:
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", doc.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = doc.parent / path if path else doc
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("doc", DOCS, ids=lambda path: path.stem)
def test_commands_have_the_options_they_are_given(
    doc: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    two_words = {f"{command} {view}" for command in VIEWS for view in VIEWS[command]}
    two_words |= {"plugins build", "plugins list"}
    for line in code(doc.read_text()):
        if not re.match(r"(\.venv/bin/)?mmi [^A-Z]", line):
            continue
        words = shlex.split(re.sub(r"^\.venv/bin/", "", line), comments=True)
        command = words[1:3] if " ".join(words[1:3]) in two_words else words[1:2]
        if " ".join(command) in VIEWS:
            command.append(next(iter(VIEWS[command[0]])))  # the default view without its word
        assert run([*command, "--help"]) == 0, line
        options = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", capsys.readouterr().out))
        assert {word for word in words[1:] if word.startswith("-")} <= options, line
