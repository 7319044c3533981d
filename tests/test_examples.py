"""The examples can be read, fit the tiny model, and show what they say they show."""

from __future__ import annotations

import importlib.util
import re
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from exports import SHIPPED, Exported
from mmi_deploy.cli.generate_lines import OPTIONS
from mmi_deploy.documents.document import Draw, Image, Text, encode_document
from mmi_deploy.documents.files import read_document
from mmi_deploy.documents.images import read_rgb
from mmi_deploy.documents.json_lines import DocumentLines
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.spec import presets
from mmi_train.data.emoji.emoji_set import render, write_set
from mmi_train.data.emoji.packages import read_icons
from mmi_train.data.synthetic.tasks import caption_of
from mmi_train.data.synthetic.vocabulary import build_tokenizer
from mmi_train.data.synthetic.world import easy, split_of
from train.data.emoji.packages import write_packages

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DOCS = EXAMPLES.parent / "docs"
DOCUMENTS = sorted(EXAMPLES.glob("*.md"))


def program(name: str) -> ModuleType:
    """A program of the examples as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    return program("make_pictures")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_an_example_fits_the_tiny_model(path: Path) -> None:
    config = presets.tiny()
    tokenizer = Tokenizer(build_tokenizer(), config.tokens)
    encoded = encode_document(read_document(path), tokenizer, config)
    assert len(encoded.token_ids) < config.llama.context // 4


def test_the_lines_of_the_jsonl_fit_the_tiny_model() -> None:
    config = presets.tiny()
    tokenizer = Tokenizer(build_tokenizer(), config.tokens)
    lines = DocumentLines(EXAMPLES / "documents.jsonl", 512, 49, OPTIONS)
    assert [line.id for line in lines] == ["story", "draw", "question"]
    for line in lines:
        encoded = encode_document(lines.document(line), tokenizer, config)
        assert len(encoded.token_ids) < config.llama.context // 4
        replace(GenerationOptions(), **line.options)


def test_the_story_is_a_picture_a_sentence_and_a_picture_to_draw() -> None:
    kinds = [type(part) for part in read_document(EXAMPLES / "story.md").parts]
    assert kinds == [Image, Text, Draw]


def test_the_pictures_are_those_of_the_world(maker: ModuleType) -> None:
    pictures = maker.pictures()
    assert {path.name for path in (EXAMPLES / "pictures").iterdir()} == set(pictures)
    for name, rgb in pictures.items():
        np.testing.assert_array_equal(read_rgb(EXAMPLES / "pictures" / name), rgb)


def test_the_scene_is_held_out_of_training_and_captioned_right(maker: ModuleType) -> None:
    assert split_of(maker.SCENE) == "held_out"
    captions = set()
    for path in DOCUMENTS:
        captions |= set(re.findall(r"!\[(.*)\]\(pictures/scene\.png\)", path.read_text()))
    assert captions == {caption_of(maker.SCENE, easy()).removesuffix(".")}


@pytest.mark.slow
def test_the_service_of_the_docs_answers(
    exported_once: Callable[[str], Exported],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (DOCS / "serving.md").read_text()
    scripts = re.findall(r"^ *```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    together, alone, scored = map(textwrap.dedent, scripts)
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "tiny").symlink_to(exported_once(SHIPPED).bundle.folder)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    exec(compile(together, "serving.md", "exec"), {})
    out = capsys.readouterr().out
    assert "a running text waits at most" in out and "EngineStats(" in out
    exec(compile(alone, "serving.md", "exec"), {})
    assert "max_images: {" in capsys.readouterr().out
    exec(compile(scored, "serving.md", "exec"), {})
    assert re.search(r"^\[-[0-9.]+, -[0-9.]+, -[0-9.]+\]$", capsys.readouterr().out, re.MULTILINE)
    # The one asked for, and one more.
    pictures = sorted(tmp_path.glob("document-0-picture-*.png"))
    assert [picture.stem[-1] for picture in pictures] == ["1", "2"]
    assert all(read_rgb(picture).std() > 0 for picture in pictures)


@pytest.mark.slow
def test_stories_of_emoji_become_one_picture(
    exported_once: Callable[[str], Exported], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a model of something else, which draws something: rows and columns are what counts."""
    write_set(render(read_icons(*write_packages(tmp_path))), tmp_path / "set", ["made here"])
    stories, bundle = program("emoji_stories"), str(exported_once(SHIPPED).bundle.folder)
    out, names = tmp_path / "stories.png", ["red ball", "green flag"]
    fixed = [bundle, str(tmp_path / "set"), "-o", str(out), "--names", *names, "--sentences"]
    stories.main([*fixed, "the red square turns blue.", "the blue square moves down."])
    sheet = read_rgb(out)
    cell = stories.SIDE + stories.GAP
    assert sheet.shape == (stories.HEADING + 2 * cell, 3 * cell + stories.GAP, 3)
    for row in range(2):
        for column in range(3):
            top, left = stories.HEADING + row * cell, stories.GAP + column * cell
            picture = sheet[top : top + stories.SIDE, left : left + stories.SIDE]
            assert picture.std() > 0, (row, column)
    with pytest.raises(SystemExit, match="does not know 'it'"):
        stories.main([*fixed, "it shrinks."])
    with pytest.raises(SystemExit):
        stories.main([*fixed[:4], "--names", "purple cow"])
    assert "no emoji of these names: purple cow" in capsys.readouterr().err
