"""Documents: every way to write one gives the same parts; what cannot be meant is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from mmi_deploy.documents.document import Document, Draw, Image, Text, document_of, encode_document
from mmi_deploy.documents.files import (
    parse_json,
    parse_markdown,
    read_document,
    title_of,
    to_markdown,
)
from mmi_deploy.documents.images import to_png
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import DocumentError
from mmi_deploy.spec import presets

CONFIG = presets.tiny()
PICTURE = to_png(np.full((4, 4, 3), 200, np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A document's folder with the pictures a.png, b.png and `my pic.png`."""
    own = tmp_path / "own"
    own.mkdir()
    for name in ("a.png", "b.png", "my pic.png"):
        (own / name).write_bytes(PICTURE)
    (tmp_path / "outside.png").write_bytes(PICTURE)
    return own


def summary(document: Document) -> list[str]:
    """Texts as they are, `=name` for a given picture, `?` for one to draw."""
    return [
        part.text
        if isinstance(part, Text)
        else f"={part.source.name}"
        if isinstance(part, Image) and isinstance(part.source, Path)
        else "?"
        for part in document.parts
    ]


def markdown(text: str, folder: Path) -> list[str]:
    return summary(parse_markdown(text, folder))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        (" \n ", []),
        ("just words", ["just words"]),
        ("![x](a.png)", ["=a.png"]),
        ("one ![x](a.png) two\n", ["one", "=a.png", "two"]),
        ("![x](a.png)\n\nmoves.\n\n![]()\n", ["=a.png", "moves.", "?"]),
        ("![draw]() ![draw](<>)", ["?", "?"]),
        ("![x](a.png)![y](b.png)", ["=a.png", "=b.png"]),
        ("![x](my%20pic.png) ![y](<my pic.png>)", ["=my pic.png", "=my pic.png"]),
        ('![x](./a.png "a title") z', ["=a.png", "z"]),
        ("[![x](a.png)](b.png)", ["[", "=a.png", "](b.png)"]),
        (
            "# A *title*\n\n- item ![x](a.png)\n\n> said",
            ["# A *title*\n\n- item", "=a.png", "> said"],
        ),
        ("> ![x](a.png)\n> more", [">", "=a.png", "> more"]),
        ("![the ![inner](b.png) one](a.png)", ["=a.png"]),
        ("one\r\n\r\n![x](a.png)\r\ntwo", ["one", "=a.png", "two"]),
    ],
)
def test_markdown_image_links_are_pictures_and_the_rest_is_text(
    folder: Path, text: str, parts: list[str]
) -> None:
    assert markdown(text, folder) == parts


@pytest.mark.parametrize(
    "text",
    [
        "`![x](a.png)`",
        "```\n![x](a.png)\n```",
        "    ![x](a.png)",
        "a &amp; b <b>bold</b> \\* [link](http://x.org) * 2",
        "tabs\tand  two spaces\n\n\nand blank lines",
        "ünïcödé 図 🎨",
        "! [not](a.png)",
    ],
)
def test_markdown_text_stays_word_for_word(folder: Path, text: str) -> None:
    assert parse_markdown(text, folder).parts == (Text(text.strip()),)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("![x][one] moves.\n\n[one]: a.png\n", ["=a.png", "moves."]),
        ("[one]: a.png\n\nfirst ![x][ONE] then\n", ["first", "=a.png", "then"]),
        (
            "![one][] and ![one]\n\n[one]: <my pic.png> 'a title'\n",
            ["=my pic.png", "and", "=my pic.png"],
        ),
        (
            "a\n\n[one]: a.png\n[two]: b.png\n\n![x][two] b ![x][one]",
            ["a", "=b.png", "b", "=a.png"],
        ),
        ("a\n\n> [one]:\n>   a.png\n\nb ![x][one]", ["a\n\nb", "=a.png"]),
        # a definition that no picture uses is text, and so is what is not a full link
        ("[a page][one]\n\n[one]: a.png", ["[a page][one]\n\n[one]: a.png"]),
        ("so ![surprising]", ["so ![surprising]"]),
        ("`![x][one]`", ["`![x][one]`"]),
    ],
)
def test_the_target_of_a_link_may_stand_elsewhere(
    folder: Path, text: str, parts: list[str]
) -> None:
    assert markdown(text, folder) == parts


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        (
            "see ![x][one] there",
            "![x][one] looks like a picture link but is not one. add a line",
        ),
        (
            "![x](my pic.png)",
            "![x](my pic.png) looks like a picture link but is not one. put a",
        ),
    ],
)
def test_what_only_looks_like_a_link_is_refused(folder: Path, text: str, fix: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse_markdown(text, folder)
    assert fix in str(caught.value) and "or write \\![ if it is text" in str(caught.value)
    assert markdown(text.replace("![", "\\!["), folder) == [text]


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("# A *short* story\n\n![x](a.png)\n\n# Another", "A short story"),
        ("![x](a.png)\n\nA `story`\n=======\n\nwords", "A story"),
        ("#\n\n## Second", "Second"),
        ("```\n# no title\n```\n\nwords", ""),
        ("![]()", ""),
    ],
)
def test_the_first_heading_is_the_title(folder: Path, text: str, title: str) -> None:
    assert title_of(parse_markdown(text, folder)) == title


def test_an_escaped_image_link_is_text(folder: Path) -> None:
    assert markdown("see \\![x](a.png)", folder) == ["see ![x](a.png)"]
    assert markdown("see \\\\![x](a.png)", folder) == ["see \\\\", "=a.png"]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("http://x.org/a.png", "not a file beside"),
        ("//x.org/a.png", "not a file beside"),
        ("file:///etc/passwd", "not a file beside"),
        ("data:image/png;base64,AAAA", "not a file beside"),
        ("a%00.png", "not a file beside"),
        ("../outside.png", "outside the document's folder"),
        ("x/../../outside.png", "outside the document's folder"),
        ("%2e%2e/outside.png", "outside the document's folder"),
        ("/etc/passwd", "outside the document's folder"),
        ("link.png", "outside the document's folder"),
        ("missing.png", "there is no picture"),
        (".", "there is no picture"),
    ],
)
def test_links_to_anything_but_a_file_beside_the_document_are_refused(
    folder: Path, target: str, reason: str
) -> None:
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    with pytest.raises(DocumentError, match=reason) as caught:
        parse_markdown(f"![x]({target})", folder)
    assert "\n" not in str(caught.value)


def test_reading_finds_a_damaged_picture_before_anything_runs(folder: Path) -> None:
    (folder / "a.png").write_bytes(PICTURE[:40])
    (folder / "story.md").write_text("![x](a.png)")
    with pytest.raises(DocumentError, match="a.png"):
        read_document(folder / "story.md")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.docx", b"", "unknown kind"),
        ("a.md", b"\xff\xfe", "not UTF-8"),
        ("a.json", b"[", "not JSON: line 1"),
        ("a.json", b'"text"', "part 1 of the document is not understood"),
        ("a.json", b'[{"text": "a"}, {"text": 1}]', "part 2 .* is not understood"),
        ("a.json", b'[{"text": "a", "image": "b"}]', "part 1 .* is not understood"),
        ("a.json", b'[{"draw": false}]', "part 1 .* is not understood"),
        ("a.json", b'[{"image": "missing.png"}]', "there is no picture"),
        ("a.json", rb'[{"text": "a \ud83d b"}]', "half a character"),
        ("a.json", rb'[{"image": "\udc00.png"}]', "half a character"),
    ],
)
def test_unreadable_files_are_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DocumentError, match=reason) as caught:
        read_document(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["loop.png", "x" * 5000])
def test_names_that_lead_nowhere_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    with pytest.raises(DocumentError, match="cannot be looked up|there is no picture") as caught:
        parse_markdown(f"![a]({name})", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_document_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="cannot read .*: No such file"):
        read_document(tmp_path / "a.md")


def test_json_parts_and_markdown_give_the_same_document(folder: Path) -> None:
    parts = [{"image": "a.png", "alt": "x"}, {"text": "moves."}, {"draw": True}]
    same = parse_markdown("![x](a.png) moves. ![]()", folder)
    assert parse_json(json.dumps(parts), folder) == same
    assert parse_json(json.dumps({"parts": parts}), folder) == same


ANNT = {
    "sentences": ["first.", "second."],
    "images": ["a.png", "b.png"],
    "sentence_ixs": [0, 1],
    "image_first": [False, True],
    "generate_mode": "generate_texts",
    "num_iter": 2,
}


NO_IMAGES: dict[str, object] = {"images": [], "sentence_ixs": [], "image_first": []}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({}, ["first.", "=a.png", "=b.png", "second."]),
        ({"image_first": [True, False]}, ["=a.png", "first. second.", "=b.png"]),
        ({"generate_mode": "generate_images"}, ["first.", "=a.png", "?", "second."]),
        # what stands for the picture to draw need not be there
        (
            {"generate_mode": "generate_images", "images": ["a.png", "none.png"]},
            ["first.", "=a.png", "?", "second."],
        ),
        (NO_IMAGES, ["first. second."]),
        # the first place in reading order takes the first image, whatever sentence_ixs says
        ({"sentence_ixs": [1, 0]}, ["=a.png", "first. second.", "=b.png"]),
    ],
)
def test_the_published_annotation_format_is_read(
    folder: Path, change: dict[str, object], parts: list[str]
) -> None:
    assert summary(parse_json(json.dumps([{**ANNT, **change}]), folder)) == parts


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([ANNT, ANNT], "one document; expected one entry; got 2"),
        ([{**ANNT, "sentence_ixs": [0]}], "contradicts itself"),
        ([{**ANNT, "sentence_ixs": [0, 2]}], "contradicts itself"),
        ([{**ANNT, "sentences": "first."}], "malformed: sentences"),
        ([{"sentences": ["a"]}], "malformed: images"),
        (
            [{**ANNT, "generate_mode": "generate_image"}],
            "generate_mode: .* 'generate_texts' or 'generate_images'; got 'generate_image'",
        ),
        (
            [{**ANNT, "generate_mode": "generate_images"} | NO_IMAGES],
            "asks for a picture without a place for it",
        ),
    ],
)
def test_a_wrong_annotation_is_refused(folder: Path, entries: object, reason: str) -> None:
    with pytest.raises(DocumentError, match=reason):
        parse_json(json.dumps(entries), folder)


def test_markdown_written_is_read_back(folder: Path) -> None:
    document = document_of(
        Text("with ![x](y.png) and ünïcödé\n\ntwo paragraphs"),
        Image(folder / "my pic.png", alt="a [red] circle"),
        Draw(),
        Text("# end"),
    )

    def name_of(image: Image) -> str:
        assert isinstance(image.source, Path)
        return image.source.name

    text = to_markdown(document.parts, name_of)
    again = parse_markdown(text, folder)
    assert summary(again) == summary(document)
    assert to_markdown(again.parts, name_of) == text


# --- tokens ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    names = ["<pad>", "<s>", "</s>", "<|beginofimage|>", "<|image|>", "<unk>", "red", "moves", "."]
    inner = tokenizers.Tokenizer(WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    inner.add_special_tokens(names[:6])
    return Tokenizer(inner, CONFIG.tokens)


def encode(tokenizer: Tokenizer, *parts: Text | Image | Draw, **kw: int) -> list[int]:
    return encode_document(document_of(*parts), tokenizer, CONFIG, **kw).token_ids.tolist()


def test_a_document_begins_with_bos_and_a_picture_is_boi_and_its_image_tokens(
    tokenizer: Tokenizer, folder: Path
) -> None:
    given = Image(folder / "a.png")
    picture = [3] + [4] * CONFIG.visual_tokens
    encoded = encode_document(document_of(given, Text(" red moves. "), Draw()), tokenizer, CONFIG)
    assert encoded.token_ids.tolist() == [1, *picture, 6, 7, 8, *picture]
    assert encoded.token_ids.dtype == np.int64
    assert encoded.images == (given, None)


@pytest.mark.parametrize("text", ["<s>", "</s>", "<|beginofimage|>", "<|image|>", "red <|image|>"])
def test_special_tokens_in_a_text_never_become_special(tokenizer: Tokenizer, text: str) -> None:
    mark = text.removeprefix("red ")
    with pytest.raises(DocumentError) as caught:
        encode(tokenizer, Text(text))
    assert f"the text holds {mark!r}, which the model reserves" in str(caught.value)
    assert "write it in other words" in str(caught.value)


def test_special_tokens_in_a_text_are_plain_text_where_every_character_has_a_token() -> None:
    """A byte-level vocabulary, as published LLMs have: the text is kept, as ordinary tokens."""
    specials = ["<pad>", "<s>", "</s>", "<|beginofimage|>", "<|image|>"]
    letters = sorted(set("".join(specials)))
    vocabulary = {token: index for index, token in enumerate(specials + letters)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    inner.add_special_tokens(specials)
    tokenizer = Tokenizer(inner, CONFIG.tokens)
    text = "".join(specials)
    ids = tokenizer.encode(text)
    assert not set(ids) & {0, 1, 2, 3, 4}
    assert tokenizer.decode(ids).replace(" ", "") == text


def test_unknown_words_are_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(DocumentError, match="does not know 'elephant', 'pink'"):
        encode(tokenizer, Text("red elephant pink elephant moves"))
    with pytest.raises(DocumentError, match="does not know '<', 's', '>'"):
        encode(tokenizer, Text("red < s >"))
    words = " ".join(f"w{index} w{index}" for index in range(100))
    with pytest.raises(DocumentError, match=r"does not know 'w0', .*, 'w7' and 92 more\. say"):
        encode(tokenizer, Text(words))


def test_an_empty_document_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DocumentError, match="the document is empty"):
        encode(tokenizer, Text("  "))


def test_a_document_that_is_too_long_is_refused_with_its_length(tokenizer: Tokenizer) -> None:
    fits = Text("red " * 9)
    assert len(encode(tokenizer, fits, context=10)) == 10
    with pytest.raises(DocumentError, match=r"at most 9 tokens; got 10"):
        encode(tokenizer, fits, context=9)
    with pytest.raises(DocumentError, match=rf"at most {CONFIG.llama.context} tokens"):
        encode(tokenizer, Text("red " * CONFIG.llama.context), context=10**6)


def test_more_pictures_than_the_model_can_tell_apart_are_refused(tokenizer: Tokenizer) -> None:
    config = replace(CONFIG, llm_mmfs=replace(CONFIG.llm_mmfs, images=3, images_seen=2))
    encode_document(document_of(Draw(), Draw()), tokenizer, config)
    with pytest.raises(DocumentError, match="too many pictures .* at most 2; got 3"):
        encode_document(document_of(Draw(), Draw(), Draw()), tokenizer, config)
    with pytest.raises(DocumentError, match="too many pictures .* at most 1; got 2"):
        encode_document(document_of(Draw(), Draw()), tokenizer, config, images=1)
