"""Documents by anyone: read back exactly, refused with a reason, and never slow."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import unicodedata
from pathlib import Path
from random import Random

import numpy as np
import pytest

from mmi_deploy.documents.document import Document, Draw, Image, Part, Text, document_of
from mmi_deploy.documents.files import parse_json, parse_markdown, read_document, to_markdown
from mmi_deploy.documents.images import to_png
from mmi_deploy.documents.story import Entry, write_story
from mmi_deploy.errors import DocumentError

PICTURE = to_png(np.full((4, 4, 3), 200, np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    own = tmp_path_factory.mktemp("own")
    (own / "pictures").mkdir()
    for name in ("a.png", "Photo 1.PNG", "pictures/b.png"):
        (own / name).write_bytes(PICTURE)
    return own


# --- written and read back ------------------------------------------------------------------------

PIECES = (
    *("![", "[", "]", "](", "(", ")", "\\", "`", "``", "```", "````", "~~~", "<", ">", '"', "'"),
    *("<!--", "-->", "<script>", "</script>", "<pre>", "<style ", "<textarea>", "<?", "<!X", "<b>"),
    *("<![CDATA[", "<div>\n", "<img src='x'>", "<IMG/", "a", "word", " ", "\n", "\n\n", "\n   "),
    *("\n> ", "\n- ", "\n1. ", "\n    ", "\t", "![](x)", "![n]", "[n]: a.png", "\n[n]: a.png\n"),
    *(
        "\\![",
        "\\\\![x](y)",
        "\n```",
        "\n~~~",
        "\n\\```",
        "\n<!--",
        "#",
        "===",
        "---",
        "!",
        "&amp;",
    ),
    *("<imgur>", "é", "図", "\ufffd", "\0", "\x0b", "\u2028", "\ufeff"),
)


def random_text(random: Random) -> str:
    return "".join(random.choice(PIECES) for _ in range(random.randrange(1, 12)))


def as_read(document: Document) -> list[tuple[str, ...]]:
    return [
        ("text", part.text)
        if isinstance(part, Text)
        else ("image", Path(str(part.source)).name, part.alt)
        if isinstance(part, Image)
        else ("draw",)
        for part in document.parts
    ]


def written(document: Document) -> str:
    return to_markdown(document.parts, lambda image: Path(str(image.source)).name)


@pytest.mark.parametrize("seed", range(4))
def test_any_text_reads_back_exactly(folder: Path, seed: int) -> None:
    random = Random(seed)
    for _ in range(1500):
        kinds: list[Part] = []
        for _ in range(random.randrange(1, 5)):
            alt = " ".join(random_text(random).split())
            made: tuple[Part, ...] = (
                Text(random_text(random)),
                Image(folder / random.choice(["a.png", "Photo 1.PNG"]), alt),
                Draw(),
            )
            kinds.append(random.choice(made))
        document = document_of(*kinds)
        text = written(document)
        again = parse_markdown(text, folder)
        assert as_read(again) == as_read(document), text
        assert written(again) == text


@pytest.mark.parametrize(
    "text",
    [
        "```python\nprint(1)",
        "code:\n\n~~~~\n![](x.png)\n",
        "C:\\![x](y)",
        "C:\\\\\\![x](y)",
        "<!-- a remark",
        "<script>\nlet a",
        "see <img src='a.png'> there",
        "`` a",
        "\\``` no fence\n\n```\nopen",
        "- ```\n  open in a list",
        "[n]: a.png",
    ],
)
def test_what_a_text_leaves_open_swallows_no_picture(tmp_path: Path, text: str) -> None:
    parts = (Text(text), Image(np.zeros((4, 4, 3), np.uint8)), Text("and on"))
    write_story(tmp_path, [Entry(part, generated=True) for part in parts])
    again = read_document(tmp_path / "story.md")
    assert as_read(again) == [
        ("text", text.strip()),
        ("image", "picture-01.png", ""),
        ("text", "and on"),
    ]


def test_closed_code_is_written_as_it_is(folder: Path) -> None:
    text = "so:\n\n```python\nprint(1)\n```\n\n<!-- done -->"
    assert written(document_of(Text(text))) == text + "\n"


def test_a_story_keeps_a_mark_at_its_start(tmp_path: Path) -> None:
    """UTF-8 readers leave out the first U+FEFF of a file."""
    write_story(tmp_path, [Entry(Text("\ufeffword"), generated=True)])
    assert read_document(tmp_path / "story.md").parts == (Text("\ufeffword"),)


# --- what was meant for a picture -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            'see <img src="a.png"> there',
            '<img src="a.png"> is HTML, which is not read as a picture.',
        ),
        ("<p>\n<IMG SRC=a.png/>\n</p>", "<IMG SRC=a.png/> is HTML, which is not"),
        ("<img\nsrc='a.png'>", "is HTML, which is not read as a picture"),
        ("<center>\n![x](a.png)\n</center>", "![x](a.png) is inside HTML, where no link is a pic"),
        (
            "note ![[a.png]] here",
            "![[a.png]] looks like a picture link but is not one. a pic",
        ),
        ("![a](a.png", "![a](a.png looks like a picture link but is not one. close it with )"),
        (
            "![a](a.png\n\nmore)",
            "![a](a.png looks like a picture link but is not one. close it with )",
        ),
        ("![a](x (1.png)", "looks like a picture link but is not one. close it with )"),
        ("![a]b](a.png)", "looks like a picture link but is not one"),
        (
            "![a] (a.png)",
            "![a] (a.png) looks like a picture link but is not one. take out",
        ),
        ("![a](<a.png)", "![a](<a.png) looks like a picture link but is not one"),
        ("[![a](my a.png)](b)", "![a](my a.png) looks like a picture link but is not one"),
    ],
)
def test_what_was_meant_for_a_picture_is_refused(folder: Path, text: str, line: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse_markdown(text, folder)
    assert line in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "`<img src=x>` and `![[a.png]]`",
        "```\n<img src=x>\n![a](x.png\n```",
        "    ![a](x.png",
        "<!-- <img src=x> ![a](b) -->",
        "<div>\n\nwords\n\n</div>",
        "so ![surprising] (really)",
        "a <imgur.com> b, 1 < 2",
        "![not] and [a link](b)",
        "![",
    ],
)
def test_what_was_not_stays_text(folder: Path, text: str) -> None:
    assert parse_markdown(text, folder).parts == (Text(text.strip()),)


@pytest.mark.parametrize("text", ["see \\<img src=x>", "\\```\nwords", "\\<!-- so", "a \\![b](c)"])
def test_a_backslash_says_that_it_is_text(folder: Path, text: str) -> None:
    assert parse_markdown(text, folder).parts == (Text(text.replace("\\", "")),)


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "fix"),
    [
        ("pictures\\b.png", "write pictures/b.png: folders are separated by /"),
        ("A.png", "the nearest name there is a.png"),
        ("a.jpg", "the nearest name there is a.png"),
        ("photo 1.png", "the nearest name there is Photo 1.PNG"),
        ("pictures/c.png", "the nearest name there is b.png"),
        ("nothing/b.png", "correct the link or add the file"),
        ("..\\secret.png", "correct the link or add the file"),
        ("pictures", "link a file, not a folder, a pipe or a device"),
    ],
)
def test_a_wrong_name_is_told_the_nearest(folder: Path, target: str, fix: str) -> None:
    (folder.parent / "secret.png").write_bytes(PICTURE)
    for read in (
        lambda: parse_markdown(f"![x](<{target}>)", folder),
        lambda: parse_json(json.dumps([{"image": target}]), folder),
    ):
        with pytest.raises(DocumentError, match="there is no picture") as caught:
            read()
        assert str(caught.value).endswith(fix)


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("linked", ["NFC", "NFD"])
def test_names_that_look_the_same_are_the_same(tmp_path: Path, stored: str, linked: str) -> None:
    names = "é/ünï한.png"
    there = tmp_path / unicodedata.normalize(stored, names)
    there.parent.mkdir()
    there.write_bytes(PICTURE)
    text = f"![x]({unicodedata.normalize(linked, names)})"
    (image,) = parse_markdown(text, tmp_path).parts
    assert isinstance(image, Image) and image.source == there


# --- bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "piece",
    [
        *("![", "![[", "![](", "![x](", "[", "[](", "[a](b", "[[a](b)", "]", "`", "` ``", "\\["),
        *("<", "<!--", "<?", "<a b='", '[x](a "', "[a](b)", "![a][b]", "[a](<", "<img ", "("),
    ],
)
def test_200_kb_of_anything_are_parsed_at_once(folder: Path, piece: str) -> None:
    """28 s for `![`; twice the text takes twice the time."""
    text = "![]() " + piece * (200_000 // len(piece))
    begun = time.process_time()
    try:
        parse_markdown(text, folder)
    except DocumentError as error:
        assert len(str(error)) < 300
    assert time.process_time() - begun < 4


@pytest.mark.parametrize(("suffix", "head"), [("md", "![]() "), ("txt", ""), ("json", "[")])
def test_30_mb_are_refused_before_they_are_parsed(tmp_path: Path, suffix: str, head: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_text(head + "word " * 6_000_000)
    begun = time.process_time()
    expected = "too long for the model; expected at most 98 kB; got 30000 kB. shorten it"
    with pytest.raises(DocumentError, match=expected):
        read_document(path, context=512)
    with pytest.raises(DocumentError, match="too long for the model"):
        read_document(path)
    assert time.process_time() - begun < 1


def test_a_model_of_a_longer_context_takes_a_longer_document(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text("word " * 400_000)
    assert len(read_document(path, context=128 * 1024).parts) == 1
    with pytest.raises(DocumentError, match="too long"):
        read_document(path, context=2048)
    for parse in (parse_markdown, parse_json):
        with pytest.raises(DocumentError, match="too long"):
            parse(path.read_text(), tmp_path)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.md")
    (tmp_path / "zero.md").symlink_to("/dev/zero")
    (tmp_path / "folder.md").mkdir()
    for name, reason in (
        ("pipe", "Not a regular file"),
        ("zero", "Not a regular file"),
        ("folder", "Is a directory"),
    ):
        path = tmp_path / f"{name}.md"
        found: list[str] = []
        thread = threading.Thread(target=refusal, args=(path, found), daemon=True)
        thread.start()
        thread.join(5)  # a pipe that is opened as files are would wait for ever
        assert found == [f"cannot read {path}: {reason}"]


def refusal(path: Path, found: list[str]) -> None:
    with pytest.raises(DocumentError) as caught:
        read_document(path)
    found.append(str(caught.value))


def test_pictures_are_counted_before_they_are_decoded(folder: Path) -> None:
    path = folder / "many.md"
    path.write_text("![x](broken.png) " * 50)
    (folder / "broken.png").write_bytes(PICTURE[:40])
    with pytest.raises(DocumentError, match="too many pictures .* at most 49; got 50"):
        read_document(path, images=49)


def test_a_program_whose_output_is_closed_still_works(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`mmi inspect ... --json >&-`: Python has no stdout then."""
    from mmi_deploy.cli.app import run

    monkeypatch.setattr(sys, "stdout", None)
    assert run(["inspect", "--preset", "tiny"]) == 0
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert run(["inspect", "--preset", "nonsense"]) == 2
