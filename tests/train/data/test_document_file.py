"""Training documents of one's own: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmi_deploy.errors import DocumentError
from mmi_train.data.document import ImagePart, TextPart
from mmi_train.data.document_file import DocumentFile

RED = (220, 10, 10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (5, 4), RED).save(tmp_path / "a.png")
    Image.new("L", (3, 3), 7).save(tmp_path / "grey.png")
    (tmp_path / "more").mkdir()
    Image.new("RGB", (2, 2), "blue").save(tmp_path / "more" / "b.jpg")
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "broken.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "broken.png").read_bytes()[:900])
    return tmp_path


def opened(folder: Path, *documents: Any, name: str = "documents.jsonl") -> DocumentFile:
    path = folder / name
    if path.suffix == ".json":
        path.write_text(json.dumps(documents))
    else:
        path.write_text("\n".join(json.dumps(document) for document in documents) + "\n")
    return DocumentFile(path)


def read(folder: Path, document: Any) -> list[object]:
    """Parts as texts with their `learn`, and sizes of pictures with their `draw`."""
    return [
        (part.text, part.learn) if isinstance(part, TextPart) else (part.image.shape[:2], part.draw)
        for part in opened(folder, document).parts(0)
    ]


def test_parts_are_learned_unless_they_say_otherwise(folder: Path) -> None:
    document = [
        {"text": "Look:", "learn": False},
        {"image": "a.png", "learn": False},
        {"text": "red."},
        {"image": "more/b.jpg"},
    ]
    wanted = [("Look:", False), ((4, 5), False), ("red.", True), ((2, 2), True)]
    assert read(folder, document) == wanted
    assert read(folder, {"id": 7, "parts": document, "source": "mine"}) == wanted


def test_pictures_are_decoded_to_rgb(folder: Path) -> None:
    file = opened(folder, [{"image": "a.png"}], [{"text": "x"}, {"image": "grey.png"}])
    (red,), (_, grey) = file.parts(0), file.parts(1)
    assert isinstance(red, ImagePart) and isinstance(grey, ImagePart)
    np.testing.assert_array_equal(red.image, np.full((4, 5, 3), RED, np.uint8))
    np.testing.assert_array_equal(grey.image, np.full((3, 3, 3), 7, np.uint8))


def test_whitespace_is_what_the_runtime_makes_of_it(folder: Path) -> None:
    """Stripped next to pictures and at both ends, kept between texts."""
    document = [
        {"text": "  \n", "learn": False},
        {"text": " Q: colour?", "learn": False},
        {"text": " red "},
        {"text": "\n"},
        {"image": "a.png"},
        {"text": "\n", "learn": False},
    ]
    assert read(folder, document) == [("Q: colour?", False), (" red", True), ((4, 5), True)]


def test_lines_are_numbered_as_an_editor_does_and_blank_ones_skipped(folder: Path) -> None:
    path = folder / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf[{"text": "one"}]\r\n\r\n  \n[{"text": "two"}]\n[{"text": "3"}]')
    file = DocumentFile(path)
    assert len(file) == 3
    assert [part.text for k in range(3) for part in file.parts(k)] == ["one", "two", "3"]  # type: ignore[union-attr]
    assert [file.name(k).split(" of ")[0] for k in range(3)] == ["line 1", "line 4", "line 5"]


def test_a_list_of_documents_is_read(folder: Path) -> None:
    file = opened(folder, [{"text": "one"}], [{"text": "two"}], name="all.json")
    assert len(file) == 2 and file.name(1) == f"document 2 of {folder / 'all.json'}"
    assert file.parts(1) == (TextPart("two", True),)


def test_pictures_may_lie_in_another_folder(folder: Path) -> None:
    path = folder / "d.jsonl"
    path.write_text('[{"image": "b.jpg"}]')
    (part,) = DocumentFile(path, folder / "more").parts(0)
    assert isinstance(part, ImagePart) and part.image.shape == (2, 2, 3)
    with pytest.raises(DocumentError, match="there is no folder"):
        DocumentFile(path, folder / "less")


def test_answers_of_a_conversation_are_learned(folder: Path) -> None:
    document = {
        "id": "000000033471",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat colour is it?"},
            {"from": "gpt", "value": "Red."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
    }
    assert read(folder, document) == [
        ((4, 5), False),
        ("What colour is it?", False),
        (" Red.", True),
        ("\nSure?", False),
        (" Yes.", True),
    ]


def test_images_of_a_conversation_stand_where_it_places_them(folder: Path) -> None:
    turns = [
        {"from": "human", "value": "First <image> then <image>: which is blue?"},
        {"from": "gpt", "value": "The second."},
    ]
    document = {"image": ["a.png", "more/b.jpg"], "conversations": turns}
    assert read(folder, document) == [
        ("First", False),
        ((4, 5), False),
        ("then", False),
        ((2, 2), False),
        (": which is blue?", False),
        (" The second.", True),
    ]
    turns[0]["value"] = "which is blue?"  # no place: in front
    wanted = [((4, 5), False), ((2, 2), False), ("which is blue?", False), (" The second.", True)]
    assert read(folder, document) == wanted


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("text", "it is not a document"),
        ({"id": 1}, "it is not a document"),
        ([], "the document is empty"),
        ([{"text": " \n"}], "the document is empty"),
        ([{"text": "a", "lern": True}], "part 1 is not understood"),
        ([{"text": "a", "learn": "yes"}], "part 1 is not understood"),
        ([{"text": "a"}, {"text": 7}], "part 2 is not understood"),
        ([{"text": "a"}, {"draw": True}], "part 2 is a place for a picture without the picture"),
        ([{"image": "no.png"}], "there is no picture"),
        ([{"image": "../secret.png"}], "outside the document's folder"),
        ([{"image": "/etc/passwd"}], "outside the document's folder"),
        ([{"image": "https://example.org/a.png"}], "is not a file beside the document"),
        ([{"image": "broken.png"}], "broken.png is damaged"),
        ([{"image": "documents.jsonl"}], "is not a picture that can be read"),
        ({"conversations": []}, "its conversations are not a list of turns"),
        ({"conversations": [{"from": "cat", "value": "mew"}]}, "a turn is not understood"),
        (
            {"image": ["a.png"], "conversations": [{"from": "gpt", "value": "<image><image>"}]},
            "got 1 images for 2",
        ),
        ({"image": 7, "conversations": [{"from": "gpt", "value": "x"}]}, "its image is not"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_a_bad_document_is_one_readable_line(folder: Path, document: Any, said: str) -> None:
    (folder.parent / "secret.png").write_bytes((folder / "a.png").read_bytes())
    with pytest.raises(DocumentError, match=said) as error:
        opened(folder, document).parts(0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("d.jsonl", b"", "holds no document"),
        ("d.jsonl", b"\n \n\t\n", "holds no document"),
        ("d.json", b"[]", "holds no document"),
        ("d.json", b"{}", "is not a list of documents"),
        ("d.json", b'[{"text": "a"}', "is not JSON"),
        ("d.json", b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_file_without_documents_is_refused(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DocumentError, match=said):
        DocumentFile(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "not JSON: line 1"),
        (b'[{"text": "\\ud800"}]', "half a character"),
        (b'[{"text": "\xff"}]', "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_line_that_is_no_json_is_told(tmp_path: Path, line: bytes, said: str) -> None:
    (tmp_path / "d.jsonl").write_bytes(line + b"\n")
    with pytest.raises(DocumentError, match=said):
        DocumentFile(tmp_path / "d.jsonl").parts(0)


def test_files_that_are_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="cannot read"):
        DocumentFile(tmp_path / "none.jsonl")
    with pytest.raises(DocumentError, match="cannot read"):
        DocumentFile(tmp_path)
