"""Stories and their page: everything is there, in order, escaped, and can be read again."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mmi_deploy.documents.document import Document, Draw, Image, Text, document_of
from mmi_deploy.documents.files import read_document
from mmi_deploy.documents.html import alt_of, page
from mmi_deploy.documents.images import read_rgb, to_png
from mmi_deploy.documents.story import Entry, Story, picture_names, write_story


def picture(value: int, side: int = 4) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def summary(story: Story) -> list[str]:
    """Text as it is or the picture's grey value; `+` before what the model made."""
    return [
        ("+" if entry.generated else "")
        + (entry.part.text if isinstance(entry.part, Text) else str(entry.part.rgb[0, 0, 0]))
        for entry in story.entries
    ]


def test_drawn_pictures_take_the_open_places_first() -> None:
    story = Story(document_of(Text("a"), Draw(), Text("b"), Image(picture(9)), Draw(), Text("c")))
    assert summary(story) == ["a", "b", "9", "c"]
    story.add_picture(picture(1))
    story.add_picture(picture(2))
    story.add_text(" d")
    story.add_text(" e")
    story.add_picture(picture(3))
    story.add_text("f")
    assert summary(story) == ["a", "+1", "b", "9", "+2", "c", "+ d e", "+3", "+f"]


def test_pictures_are_numbered_and_keep_a_suffix_that_browsers_know() -> None:
    parts: list[Text | Image] = [
        Image(Path("x/a.JPG")),
        Text("t"),
        Image(Path("b.tiff")),
        Image(picture(1)),
    ]
    names = picture_names([Entry(part, False) for part in parts])
    assert names == {0: "picture-01.jpg", 2: "picture-02.png", 3: "picture-03.png"}


@pytest.fixture
def entries(tmp_path: Path) -> tuple[Entry, ...]:
    given = tmp_path / "given pic.png"
    given.write_bytes(to_png(picture(7)))
    story = Story(document_of(Image(given, alt='a "red" <ring>'), Text("it <b>moves</b> &amp; ![")))
    story.add_text(" down.\n\nthen </span><script>alert(1)</script>")
    story.add_picture(picture(8))
    return story.entries


def test_a_written_story_reads_back_as_the_same_document(
    tmp_path: Path, entries: tuple[Entry, ...]
) -> None:
    write_story(tmp_path, entries)
    again = read_document(tmp_path / "story.md")
    texts = [part.text for part in again.parts if isinstance(part, Text)]
    assert texts == [
        "it <b>moves</b> &amp; ![ down.\n\nthen </span><script>alert(1)</script>",
    ]
    values = [int(part.rgb[0, 0, 0]) for part in again.parts if isinstance(part, Image)]
    assert values == [7, 8]


ALT = "drawn after: then </span><script>alert(1)</script>"


class Reader(HTMLParser):
    """Collects what a browser would show and load."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.alts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        if tag == "img":
            self.sources.append(found["src"] or "")
            self.alts.append(found["alt"] or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(re.sub(r"<style>.*</style>", "", html, flags=re.DOTALL))
    return reader


def test_the_page_shows_text_verbatim_and_runs_nothing(entries: tuple[Entry, ...]) -> None:
    shown = read(page("my <i>story</i>", entries, {"seed": "<7>"}))
    assert "it <b>moves</b> &amp; ![ down.\n\nthen </span><script>alert(1)</script>" in shown.text
    assert "my <i>story</i>" in shown.text and "<7>" in shown.text
    assert shown.alts == 2 * ['a "red" <ring>', ALT]  # each small, and as large as the window
    assert not {"script", "i", "b"} & set(shown.tags) - {"b"}
    assert shown.tags.count("b") == 2  # the two captions, none from the text


def test_the_page_needs_only_the_pictures_beside_it(
    tmp_path: Path, entries: tuple[Entry, ...]
) -> None:
    write_story(tmp_path, entries)
    html = page("x", entries, {})
    sources = read(html).sources
    assert sources == 2 * ["picture-01.png", "picture-02.png"]
    sources = sources[:2]
    assert [read_rgb(tmp_path / name)[0, 0, 0] for name in sources] == [7, 8]
    assert not re.search(r"(src|href)=.?(https?:)?//|@import|url\(", html)


def test_the_page_marks_what_was_generated(entries: tuple[Entry, ...]) -> None:
    html = page("x", entries, {})
    assert html.count('<figure class="given"') == html.count('<figure class="generated"') == 1
    assert '<span class="generated"> down.' in html
    empty = page("x", Story(Document(())).entries, {})
    assert "<figure" not in empty and 'class="text"' not in empty


def entry(part: Text | str | None, generated: bool = True, alt: str = "") -> Entry:
    """A text, or a picture for None."""
    if part is None:
        return Entry(Image(np.zeros((4, 4, 3), np.uint8), alt), generated)
    return Entry(Text(str(part)), generated)


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        (["a cat.\n\n  a dog\tsleeps.\n"], "drawn after: a dog sleeps."),
        (["a cat ", "sleeps."], "drawn after: a cat sleeps."),
        (["a cat.", None], "a generated picture"),
        ([" \n"], "a generated picture"),
        ([], "a generated picture"),
        (["word " * 40 + "end."], "drawn after: … " + "word " * 23 + "end."),
        (["x" * 300], "drawn after: … " + "x" * 120),
    ],
)
def test_a_drawn_picture_is_described_by_the_words_right_before_it(
    before: list[str | None], expected: str
) -> None:
    entries = [*map(entry, before), entry(None)]
    assert alt_of(entries, len(before)) == expected


def test_a_given_picture_keeps_its_own_words() -> None:
    entries = [entry("a cat."), entry(None, False, "my cat"), entry("x"), entry(None, False)]
    assert (alt_of(entries, 1), alt_of(entries, 3)) == ("my cat", "a given picture")


def test_every_picture_is_enlarged_by_a_link_and_the_way_back_is_there(
    entries: tuple[Entry, ...],
) -> None:
    html = page("x", entries, {})
    links, ids = re.findall(r'href="#([^"]+)"', html), re.findall(r' id="([^"]+)"', html)
    assert sorted(ids) == ["picture-1", "picture-2", "view-1", "view-2"]
    assert set(links) == set(ids) and len(ids) == len(set(ids))
    assert html.count(">next</a>") == html.count(">previous</a>") == 1


def test_a_text_stands_with_the_pictures_that_follow_it() -> None:
    entries = [entry(None), entry("a"), entry("b"), entry(None), entry(None), entry("c")]
    sections = re.findall(r"<section>(.*?)</section>", page("x", entries, {}), re.DOTALL)
    found = [(read(one).text.split()[:1], one.count("<figure")) for one in sections]
    assert [count for _, count in found] == [1, 2, 0]
    assert [words[0] for words, _ in found[1:]] == ["ab", "c"]


def test_the_command_line_is_escaped_and_selected_whole(entries: tuple[Entry, ...]) -> None:
    html = page("x", entries, {}, "mmi generate '<a b>.md' --seed 7")
    assert "<code>mmi generate &#x27;&lt;a b&gt;.md&#x27; --seed 7</code>" in html
    assert re.search(r"code \{[^}]*user-select: all", html)
    assert "<code>" not in page("x", entries, {})
