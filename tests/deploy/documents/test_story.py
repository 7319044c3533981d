"""Stories and their page: everything is there, in order, escaped, and can be read again."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mmi_deploy.documents.document import Document, Draw, Image, Text, document_of
from mmi_deploy.documents.files import read_document
from mmi_deploy.documents.html import page
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
    assert shown.alts == ['a "red" <ring>', "a generated picture"]
    assert not {"script", "i", "b"} & set(shown.tags) - {"b"}
    assert shown.tags.count("b") == 2  # the two captions, none from the text


def test_the_page_needs_only_the_pictures_beside_it(
    tmp_path: Path, entries: tuple[Entry, ...]
) -> None:
    write_story(tmp_path, entries)
    html = page("x", entries, {})
    sources = read(html).sources
    assert sources == ["picture-01.png", "picture-02.png"]
    assert [read_rgb(tmp_path / name)[0, 0, 0] for name in sources] == [7, 8]
    assert not re.search(r"(src|href)=.?(https?:)?//|@import|url\(", html)


def test_the_page_marks_what_was_generated(entries: tuple[Entry, ...]) -> None:
    html = page("x", entries, {})
    assert html.count('<figure class="given">') == html.count('<figure class="generated">') == 1
    assert '<span class="generated"> down.' in html
    empty = page("x", Story(Document(())).entries, {})
    assert "<figure" not in empty and 'class="text"' not in empty
