"""Emoji sets from packages, and documents about them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mmi_deploy.cli.app import app
from mmi_deploy.errors import DocumentError
from mmi_train.data.emoji.documents import BACKGROUNDS, EmojiCorpus, EmojiImage, Scene
from mmi_train.data.emoji.emoji_set import EmojiSet, read_set, render, write_set
from mmi_train.data.emoji.packages import read_icons
from mmi_train.data.synthetic.vocabulary import UNKNOWN
from train.data.emoji.packages import icon_files, keyword_files, write_package, write_packages


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> EmojiSet:
    return render(read_icons(*write_packages(tmp_path_factory.mktemp("packages"))))


def test_names_groups_and_keywords_are_those_of_the_packages(emoji: EmojiSet) -> None:
    first = emoji.emoji[0]
    assert (first.name, first.group) == ("red ball", "Balls & Boxes")
    assert first.keywords == ("red ball", "red", "mr. thing")
    assert len(emoji.emoji) == 32  # not the one without a group
    assert 0 < len(emoji.of("held_out")) < 10
    assert sorted(emoji.of("held_out") + emoji.of("train")) == list(range(32))


def test_pictures_are_drawn_at_both_sizes(emoji: EmojiSet) -> None:
    box = [one.name for one in emoji.emoji].index("blue box")
    large = emoji.pictures["large"][box]
    assert large.shape == (56, 56, 4) and emoji.pictures["small"].shape == (32, 36, 36, 4)
    assert large[28, 28].tolist() == [0, 0, 255, 255] and large[1, 1].tolist()[3] == 0


def test_a_scene_is_its_emoji_on_its_background(emoji: EmojiSet) -> None:
    corpus = EmojiCorpus(emoji)
    flag = [one.name for one in emoji.emoji].index("green flag")
    plain = corpus.picture(Scene(flag, "large", "pink"))
    mirrored = corpus.picture(Scene(flag, "large", "pink", mirrored=True))
    assert plain.shape == (64, 64, 3) and plain.dtype == np.uint8
    assert tuple(plain[0, 0]) == BACKGROUNDS["pink"]
    assert tuple(plain[32, 20]) == (0, 128, 0) and tuple(plain[32, 44]) == BACKGROUNDS["pink"]
    assert np.array_equal(mirrored, plain[:, ::-1])


@pytest.mark.parametrize("kind", ["reading", "caption", "question", "drawing", "keywords", "story"])
def test_documents_show_what_their_texts_say(emoji: EmojiSet, kind: str) -> None:
    corpus = EmojiCorpus(emoji)
    tokenizer = corpus.tokenizer()
    rng = np.random.default_rng(0)
    for split in ("train", "held_out"):
        own = set(emoji.of(split))
        for _ in range(30):
            document = corpus.document(kind, rng, split)
            for part in document.parts:
                if isinstance(part, EmojiImage):
                    assert part.scene.index in own
                    assert np.array_equal(part.image, corpus.picture(part.scene))
                else:
                    ids = tokenizer.encode(part.text, add_special_tokens=False).ids
                    assert UNKNOWN not in ids and tokenizer.decode(ids) == part.text
            assert document.targets and document.kind == kind


def test_a_story_changes_one_thing_at_a_time(emoji: EmojiSet) -> None:
    corpus, rng = EmojiCorpus(emoji), np.random.default_rng(1)
    seen = set()
    for _ in range(60):
        parts = corpus.document("story", rng).parts
        for before, text, after in zip(parts, parts[1:], parts[2:], strict=False):
            if not isinstance(before, EmojiImage):
                continue
            assert isinstance(after, EmojiImage) and not isinstance(text, EmojiImage)
            one, other = before.scene, after.scene
            seen.add(text.text.split()[0] + text.text.split()[1])
            if text.text.startswith("next: "):
                assert text.text == f"next: {corpus.phrase(other)}." and not other.mirrored
                continue
            assert one.index == other.index
            changed = [
                name
                for name in ("size", "background", "mirrored")
                if getattr(one, name) != getattr(other, name)
            ]
            expected = {"it flips.": "mirrored", "it grows.": "size", "it shrinks.": "size"}
            assert changed == [expected.get(text.text, "background")]
    assert {"itflips.", "itgrows.", "itshrinks.", "thebackground"} <= seen


def test_the_same_draws_make_the_same_document(emoji: EmojiSet) -> None:
    one, other = (
        EmojiCorpus(emoji).document("story", np.random.default_rng(3)).parts for _ in range(2)
    )
    assert [getattr(part, "text", None) for part in one] == [
        getattr(part, "text", None) for part in other
    ]


def test_a_set_is_read_as_it_was_written(emoji: EmojiSet, tmp_path: Path) -> None:
    write_set(emoji, tmp_path / "set", ["icons.tgz", "keywords.tgz"])
    again = read_set(tmp_path / "set")
    assert again.checksum == emoji.checksum and again.emoji == emoji.emoji


def test_a_broken_set_is_refused_in_a_line(emoji: EmojiSet, tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="is no emoji set"):
        read_set(tmp_path)
    write_set(emoji, tmp_path / "set", [])
    index = tmp_path / "set" / "set.json"
    content = json.loads(index.read_text())
    content["emoji"].pop()
    index.write_text(json.dumps(content))
    with pytest.raises(DocumentError, match=r"pictures are not \(31, 36, 36, 4\)"):
        read_set(tmp_path / "set")


def test_other_packages_are_refused(tmp_path: Path) -> None:
    icons, keywords = write_packages(tmp_path)
    with pytest.raises(DocumentError, match="is not the package emojilib"):
        read_icons(icons, icons)
    (tmp_path / "text.tgz").write_text("no archive")
    with pytest.raises(DocumentError, match="npm pack @iconify-json/fluent-emoji-flat"):
        read_icons(tmp_path / "text.tgz", keywords)
    files = icon_files()
    files["icons.json"].pop("icons")
    with pytest.raises(DocumentError, match="is laid out in another way; got KeyError"):
        read_icons(write_package(tmp_path / "other.tgz", files), keywords)
    files = icon_files()
    files["icons.json"]["icons"]["red-ball"]["body"] = "<g"
    broken = read_icons(write_package(tmp_path / "broken.tgz", files), keywords)
    with pytest.raises(DocumentError, match="the SVG of 'red ball' cannot be drawn"):
        render(broken)


def test_the_command_makes_a_set_with_a_contact_sheet(tmp_path: Path) -> None:
    icons, keywords = write_packages(tmp_path)
    given = ["data", "emoji", "--icons", str(icons), "--keywords", str(keywords)]
    out = tmp_path / "set"
    result = CliRunner().invoke(app, [*given, "-o", str(out)])
    assert result.exit_code != 0 and "there is no group 'Animals & Nature'" in str(result.exception)
    named = ["--group", "Balls & Boxes", "--group", "Signs", "--sheet", str(tmp_path / "sheet.png")]
    result = CliRunner().invoke(app, [*given, "-o", str(out), *named])
    assert result.exit_code == 0, result.output
    assert len(read_set(out).emoji) == 32
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (24 * 64, 2 * 64)
    (out / "mine.txt").write_text("mine")
    result = CliRunner().invoke(app, [*given, "-o", str(out), *named[:4], "--force"])
    assert result.exit_code != 0 and (out / "mine.txt").read_text() == "mine"


def test_keywords_of_a_package_may_lack_an_emoji(tmp_path: Path) -> None:
    words = keyword_files()
    words["dist/emoji-en-US.json"].popitem()
    icons, _ = write_packages(tmp_path)
    found = read_icons(icons, write_package(tmp_path / "few.tgz", words))
    assert found[-1].keywords == () or found[-1].keywords[0] == found[-1].name
