"""Document files: parse Markdown and JSON into parts, and write parts as Markdown.

In Markdown an image link is a given picture, an image link without a target, `![]()`, is a place
where the model draws a picture, and everything else is literal text. A link is spelled
`![alt](file.png)`, or `![alt][name]` with a definition `[name]: file.png`, which then is not part
of the text. A literal `![` is written `\\![`. A backslash before `<img`, or before the start of a
code fence or an HTML block at the beginning of a line, is an escape too.

In JSON a document is a list such as
`[{"text": "a red circle"}, {"image": "circle.png"}, {"draw": true}]`; the annt.json of the
published code is read too.

Pictures are files beside the document: a link out of the document's folder is refused.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote

from markdown_it import MarkdownIt
from pydantic import TypeAdapter, ValidationError

from mmi_deploy.documents.document import (
    Document,
    Draw,
    Image,
    Part,
    Text,
    check_pictures,
    document_of,
)
from mmi_deploy.documents.images import Rgb
from mmi_deploy.documents.markdown_links import Link, image_links, refuse_html_picture
from mmi_deploy.errors import DocumentError
from mmi_deploy.spec.config import first_flaw
from mmi_deploy.system.files import open_regular

# File or pixels of the picture that a document names.
SourceOf = Callable[[str], Path | Rgb]

# Limits of a document that is read without a model.
CONTEXT = 15 * 1024
IMAGES = 1000

# Largest size of a document file: bytes per token, and bytes for links and a few long words.
_BYTES_PER_TOKEN = 64
_MORE_BYTES = 2**16

# Number of names in a folder that are compared with a missing file's name.
_LISTED = 10_000

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:|//")
_MARKS = re.compile(r"!\[|<img", re.IGNORECASE)
_HTML_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_LINK_IN_HTML = re.compile(r"(?<!\\)(?:\\\\)*(!\[[^\[\]\n]*\]\([^\n)]*\)?)")

_MARK = r"(?=!\[|<img[\s/>])"
_BEFORE_MARK = re.compile(rf"(?<!\\)(\\*){_MARK}", re.IGNORECASE)
_ESCAPED_MARK = re.compile(rf"(?<!\\)((?:\\\\)*)\\{_MARK}", re.IGNORECASE)
_OPENING = r"(?:```|~~~|<!--|<\?|<![a-z]|<(?:script|pre|style|textarea)(?=[\s>]|$))"
_OPENING_LINE = re.compile(rf"^( {{0,3}})(?=\\*{_OPENING})", re.MULTILINE | re.IGNORECASE)
_ESCAPED_LINE_AGAIN = re.compile(rf"^( {{0,3}})(?=\\+{_OPENING})", re.MULTILINE | re.IGNORECASE)
_ESCAPED_LINE = re.compile(rf"^( {{0,3}})\\(?=\\*{_OPENING})", re.MULTILINE | re.IGNORECASE)
_IN_ALT = re.compile(r"[\\`<\[\]]")
_ESCAPED_IN_ALT = re.compile(r"\\([!-/:-@\[-`{-~])")


def read_document(path: Path, context: int = CONTEXT, images: int = IMAGES) -> Document:
    """Read a document by its suffix: .md, .markdown, .txt or .json.

    Every picture is decoded once, to find damaged ones now. `context`, `images`: the model's limits
    of tokens and pictures. Raises `DocumentError` for a file that cannot be read, before parsing
    for a file larger than any text of `context` tokens, and before decoding for too many pictures.
    """
    parsers = {
        ".md": parse_markdown,
        ".markdown": parse_markdown,
        ".txt": parse_markdown,
        ".json": parse_json,
    }
    parse = parsers.get(path.suffix.lower())
    if parse is None:
        raise DocumentError(
            f"{path} is of an unknown kind",
            expected=", ".join(parsers),
            got=path.suffix or "no suffix",
        )
    most = most_bytes(context)
    try:
        with open_regular(path) as file:
            _check_size(f"{path}", os.fstat(file.fileno()).st_size, most)
            content = file.read(most + 1)  # the file may be growing
        _check_size(f"{path}", len(content), most)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DocumentError(f"{path} is not UTF-8 text", fix="save it as UTF-8") from None
    except OSError as error:
        raise DocumentError(f"cannot read {path}: {error.strerror}") from None
    return with_pictures(parse(text, path.parent, context), images)


def with_pictures(document: Document, images: int = IMAGES) -> Document:
    """The document, its given pictures decoded. Raises `DocumentError` for a damaged picture, and
    before that for more than `images` pictures."""
    check_pictures(len(document.images), images)
    for image in document.images:
        if isinstance(image, Image):
            _ = image.rgb
    return document


def most_bytes(context: int) -> int:
    """Upper bound of the bytes of a document of `context` tokens."""
    return _MORE_BYTES + _BYTES_PER_TOKEN * context


def _check_size(what: str, size: int, most: int) -> None:
    """Raise `DocumentError` for more than `most` bytes."""
    if size > most:
        raise DocumentError(
            f"{what} is too long for the model",
            expected=f"at most {most // 1000} kB",
            got=f"{size // 1000} kB",
            fix="shorten it",
        )


def resolve_link(target: str, folder: Path) -> Path:
    """Resolve `target` to a file inside `folder`; raises `DocumentError` for anything else."""
    if _URL.match(target) or "\0" in target:
        raise DocumentError(
            f"the picture {target} is not a file beside the document",
            fix="save it there and link it by name",
        )
    try:
        path = _as_on_disk(target, folder).resolve()
        there = path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, or a link to itself
        raise DocumentError(f"the picture {target} cannot be looked up: {error}") from None
    if Path(target).is_absolute() or not path.is_relative_to(folder.resolve()):
        raise DocumentError(
            f"the picture {target} lies outside the document's folder",
            fix="copy it there and link it by name",
        )
    if not there:
        raise DocumentError(f"there is no picture {path}", fix=_nearest(target, folder, path))
    return path


def _as_on_disk(target: str, folder: Path) -> Path:
    """Path of `target` in `folder`, spelled in the disk's Unicode normal form.

    macOS writes `é` as two characters (NFD), keyboards as one (NFC).
    """
    place = folder
    for name in Path(target).parts:
        if name != ".." and not os.path.lexists(place / name):
            same = [other for other in _names(place) if _composed(other) == _composed(name)]
            name = same[0] if len(same) == 1 else name
        place /= name
    return place


def _nearest(target: str, folder: Path, path: Path) -> str:
    """The fix for a link to a missing file: the nearest name, if there is one."""
    if path.exists():
        return "link a file, not a folder, a pipe or a device"
    turned = target.replace("\\", "/")
    if turned != target and (folder / turned).resolve().is_relative_to(folder.resolve()):
        if (folder / turned).is_file():
            return f"write {turned}: folders are separated by /"
    lower = {name.lower(): name for name in _names(path.parent)}
    if near := get_close_matches(path.name.lower(), lower, n=1, cutoff=0.6):
        return f"the nearest name there is {lower[near[0]]}"
    return "correct the link or add the file"


def _names(folder: Path) -> list[str]:
    """The first `_LISTED` names in `folder`; none if the folder cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in islice(entries, _LISTED)]
    except OSError:
        return []


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _parser() -> MarkdownIt:
    """CommonMark parser that accepts every link target; `resolve_link` refuses the bad ones."""
    markdown = MarkdownIt("commonmark", {"store_labels": True})
    markdown.validateLink = lambda url: True  # type: ignore[method-assign]
    markdown.normalizeLink = lambda url: url  # type: ignore[method-assign]
    return markdown


@dataclass(frozen=True)
class _Definition:
    """Range [start, end) of a link reference definition, `[name]: file.png`, which is not text."""

    start: int
    end: int


def _links(text: str) -> list[Link | _Definition]:
    """All image links of `text` and the definitions of their targets, in order, without links
    inside code or alternative text.

    The block parser finds paragraphs, headings and so on; `image_links` finds the links in them.
    """
    if not _MARKS.search(text):
        return []
    lines = text.split("\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    environment: dict[str, Any] = {}
    found: list[Link | _Definition] = []
    blocks = _parser().disable("inline").parse(text, environment)
    references = environment.get("references", {})
    for block in blocks:
        if block.type == "html_block":
            _refuse_pictures_in_html(block.content)
        if block.type != "inline" or not block.map or not _MARKS.search(block.content):
            continue
        first, last = block.map
        source = "\n".join(lines[first:last])
        links = image_links(source, references)
        inside = block.content  # without the markers of lists and quotations
        if source != inside and len(links) != len(image_links(inside, references)):
            raise DocumentError(
                f"the image links in line {first + 1} of the document are ambiguous",
                fix="put each on a line of its own, as ![what it shows](file.png)",
            )
        offset = starts[first]
        found += [replace(x, start=x.start + offset, end=x.end + offset) for x in links]
    for name in {link.name for link in found if isinstance(link, Link)} - {""}:
        first, last = environment["references"][name]["map"]
        while last < len(lines) and not lines[last].strip():  # including the blank lines after it
            last += 1
        found.append(_Definition(starts[first], starts[last]))
    return sorted(found, key=lambda place: place.start)


def _refuse_pictures_in_html(block: str) -> None:
    """Raise `DocumentError` for a picture inside an HTML block, where links are not parsed."""
    shown = _HTML_COMMENT.sub("", block)
    refuse_html_picture(shown)
    if link := _LINK_IN_HTML.search(shown):
        raise DocumentError(
            f"{link[1]:.60} is inside HTML, where no link is a picture",
            fix="put an empty line before and after it, or write \\![ if it is text",
        )


def parse_markdown(text: str, folder: Path, context: int = CONTEXT) -> Document:
    """Parse Markdown with pictures in `folder`, for a model of `context` tokens.

    Raises `DocumentError`.
    """
    _check_size("the document", len(text), most_bytes(context))
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # as CommonMark counts lines
    parts: list[Part] = []
    end = 0
    for link in _links(text):
        parts.append(Text(_unescape(text[end : link.start])))
        end = link.end
        if isinstance(link, Link):
            target = unquote(link.target).strip()
            alt = _unescape_alt(link.alt)
            parts.append(Image(resolve_link(target, folder), alt) if target else Draw())
    parts.append(Text(_unescape(text[end:])))
    return document_of(*parts)


def title_of(document: Document) -> str:
    """Text of the first heading of the document; empty if there is none."""
    for part in document.parts:
        if isinstance(part, Text):
            blocks = iter(_parser().parse(part.text))
            for block in blocks:
                if block.type == "heading_open":
                    words = next(blocks).children or ()
                    if title := "".join(word.content for word in words).strip():
                        return title
    return ""


def _unescape(text: str) -> str:
    """Inverse of `_escape`; in any other text, these escapes as CommonMark defines them."""
    text = _ESCAPED_LINE.sub(r"\1", text)
    return _ESCAPED_MARK.sub(lambda run: run[1][: len(run[1]) // 2], text)


def _escape(text: str) -> str:
    """Escape `text` as Markdown that parses back to `text`, without pictures.

    Nothing is left open, such as a code fence, that would turn a picture after it into text.
    """
    text = _BEFORE_MARK.sub(lambda run: run[1] * 2 + "\\", text)
    end = _parser().disable("inline").parse(f"{text}\n\nend")
    is_open = len(end) < 2 or (end[-2].content, end[-2].level) != ("end", 1)
    return (_OPENING_LINE if is_open else _ESCAPED_LINE_AGAIN).sub(r"\1\\", text)


def _escape_alt(alt: str) -> str:
    return _IN_ALT.sub(r"\\\g<0>", " ".join(alt.split()))


def _unescape_alt(alt: str) -> str:
    return _ESCAPED_IN_ALT.sub(r"\1", alt)


def to_markdown(parts: Sequence[Part], name_of: Callable[[Image], str]) -> str:
    """Write `parts` as Markdown that parses back to the same parts.

    Each picture is a paragraph of its own, linked by `name_of(picture)`. Line ends become `\\n`,
    and runs of spaces in alternative texts become one space.
    """
    blocks = []
    for part in parts:
        if isinstance(part, Text):
            blocks.append(_escape(part.text))
        elif isinstance(part, Image):
            blocks.append(f"![{_escape_alt(part.alt)}]({quote(name_of(part))})")
        else:
            blocks.append("![]()")
    return "\n\n".join(blocks) + "\n"


def parse_json(text: str, folder: Path, context: int = CONTEXT) -> Document:
    """Parse JSON parts, or an annt.json of the published code with one entry, for a model of
    `context` tokens. Raises `DocumentError`."""
    _check_size("the document", len(text), most_bytes(context))
    value = json_value(text)
    parts = value.get("parts", value) if isinstance(value, dict) else value
    return document_of_json(parts, files_in(folder))


def json_value(text: str, line: int = 1) -> Any:
    """Decode JSON that UTF-8 can hold. line: number of the first line, for `DocumentError`."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        number = line + error.lineno - 1
        raise DocumentError(f"the document is not JSON: line {number}: {error.msg}") from None
    except UnicodeEncodeError:
        raise DocumentError(
            "the document holds half a character, such as \\ud83d alone",
            fix="write it whole, as \\ud83c\\udfa8 or as the character itself in UTF-8",
        ) from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise DocumentError(f"the document is not JSON: {error}") from None
    return value


def files_in(folder: Path) -> SourceOf:
    """Pictures of a document that are files beside it, in `folder`."""
    return partial(resolve_link, folder=folder)


def document_of_json(parts: object, source_of: SourceOf) -> Document:
    """Document of decoded JSON: a list of parts, or the entry of an annt.json. source_of: file or
    pixels of the picture that a part names. Raises `DocumentError`."""
    entries = parts if isinstance(parts, list) else [parts]
    if entries and all(isinstance(entry, dict) and "sentences" in entry for entry in entries):
        if len(entries) > 1:
            raise DocumentError(
                "an annt.json is one document",
                expected="one entry",
                got=len(entries),
                fix="put each entry into a file of its own",
            )
        return _published(entries[0], source_of)
    return document_of(
        *(_json_part(entry, index, source_of) for index, entry in enumerate(entries))
    )


def _json_part(entry: object, index: int, source_of: SourceOf) -> Part:
    match entry:
        case {"text": str(text), **rest} if not rest:
            return Text(text)
        case {"image": str(target), **rest} if rest.keys() <= {"alt"}:
            return Image(source_of(target), str(rest.get("alt", "")))
        case {"draw": True, **rest} if not rest:
            return Draw()
    raise DocumentError(
        f"part {index + 1} of the document is not understood",
        expected='{"text": "..."}, {"image": "file.png"} or {"draw": true}',
        got=json.dumps(entry, ensure_ascii=False)[:80],
    )


@dataclass(frozen=True)
class _Published:
    """One entry of the published code's annt.json.

    `sentence_ixs[i]` is the sentence to which an image belongs; `image_first[i]`: the image comes
    before the sentence. With `generate_mode` "generate_images" the last image is the one to draw.
    `num_iter`, the number of turns of the published loop, is not read: `mmi generate` has its own
    limits.
    """

    sentences: list[str]
    images: list[str]
    sentence_ixs: list[int]
    image_first: list[bool]
    generate_mode: Literal["generate_texts", "generate_images"] = "generate_texts"


def _published(value: object, source_of: SourceOf) -> Document:
    try:
        entry = TypeAdapter(_Published).validate_python(value)
    except ValidationError as error:
        raise DocumentError(
            f"the annt.json is malformed: {first_flaw(error)}", fix="correct it in the file"
        ) from None
    slots = list(zip(entry.sentence_ixs, entry.image_first, strict=False))
    same = len(entry.images) == len(entry.sentence_ixs) == len(entry.image_first)
    if not same or not all(0 <= index < len(entry.sentences) for index, _ in slots):
        raise DocumentError(
            "the annt.json contradicts itself",
            expected="one sentence_ixs and one image_first for each image, each naming a sentence",
            got=f"{len(entry.sentences)} sentences, {len(entry.images)} images, sentence_ixs "
            f"{entry.sentence_ixs}, image_first {entry.image_first}",
        )
    given, drawn = entry.images, entry.generate_mode == "generate_images"
    if drawn:
        if not given:
            raise DocumentError(
                "the annt.json asks for a picture without a place for it",
                expected='with "generate_mode": "generate_images", an image that stands for it',
                got="no images",
                fix="add one to images, sentence_ixs and image_first; its file is not read",
            )
        given = given[:-1]
    pictures: list[Part] = [Image(source_of(target)) for target in given]
    pictures += [Draw()] * drawn
    in_order = iter(pictures)  # the i-th slot in reading order takes the i-th image
    parts: list[Part] = []
    for index, sentence in enumerate(entry.sentences):
        parts += [next(in_order) for _ in range(slots.count((index, True)))]
        parts.append(Text(sentence))
        parts += [next(in_order) for _ in range(slots.count((index, False)))]
        parts.append(Text(" "))
    return document_of(*parts)
