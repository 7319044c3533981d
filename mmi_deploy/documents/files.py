"""Documents in files: Markdown and JSON become parts, and parts become Markdown again.

In Markdown an image link is a given picture, an image link without a target, `![]()`, is a place
where the model draws one, and everything else is text, word for word. A link may be spelled
`![alt](file.png)`, or `![alt][name]` with a line `[name]: file.png` somewhere, which is no text
then. A literal `![` is written `\\![`. In JSON a document is a list such as
`[{"text": "a red circle"}, {"image": "circle.png"}, {"draw": true}]`; the published code's
annt.json is read too.

Pictures are files beside the document: a link that leaves its folder is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.rules_inline.image import image as image_rule
from pydantic import TypeAdapter, ValidationError

from mmi_deploy.documents.document import Document, Draw, Image, Part, Text, document_of
from mmi_deploy.errors import DocumentError
from mmi_deploy.spec.config import first_flaw

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:|//")
_LIKE_A_LINK = re.compile(r"!\[[^\[\]]*\](?:\[[^\[\]]+\]|\([^()\n]*\))")
_DEFINE = "add a line such as [name]: file.png, or write \\![ if it is text"
_BRACKET = "put a name with spaces in <>, as in ![](<my file.png>), or write \\![ if it is text"
_ESCAPED_IMAGE = re.compile(r"(?<!\\)((?:\\\\)*)\\!\[")


def read_document(path: Path) -> Document:
    """Read a document by its suffix: .md, .markdown, .txt or .json. Every picture is decoded once,
    so that a damaged one is found now; raises `DocumentError`."""
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
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DocumentError(f"{path} is not UTF-8 text", fix="save it as UTF-8") from None
    except OSError as error:
        raise DocumentError(f"cannot read {path}: {error.strerror}") from None
    document = parse(text, path.parent)
    for image in document.images:
        if isinstance(image, Image):
            _ = image.rgb
    return document


def resolve_link(target: str, folder: Path) -> Path:
    """The file that `target` names inside `folder`; raises `DocumentError` for anything else."""
    if _URL.match(target) or "\0" in target:
        raise DocumentError(
            f"the picture {target} is not a file beside the document",
            fix="save it there and link it by name",
        )
    try:
        path = (folder / target).resolve()
        there = path.is_file()
    except (OSError, RuntimeError) as error:  # a name without end, or a link to itself
        raise DocumentError(f"the picture {target} cannot be looked up: {error}") from None
    if Path(target).is_absolute() or not path.is_relative_to(folder.resolve()):
        raise DocumentError(
            f"the picture {target} lies outside the document's folder",
            fix="copy it there and link it by name",
        )
    if not there:
        raise DocumentError(f"there is no picture {path}", fix="correct the link or add the file")
    return path


@dataclass(frozen=True)
class _Link:
    """An image link: where it stands in the text, and what it says. `name`: of its definition."""

    start: int
    end: int
    target: str
    alt: str
    name: str = ""


def _parser() -> MarkdownIt:
    """CommonMark that accepts every link target: we refuse bad ones ourselves, in words."""
    markdown = MarkdownIt("commonmark", {"store_labels": True})
    markdown.validateLink = lambda url: True  # type: ignore[method-assign]
    markdown.normalizeLink = lambda url: url  # type: ignore[method-assign]
    return markdown


@dataclass(frozen=True)
class _Definition:
    """What defines the target of image links, `[name]: file.png`: no text, only its place."""

    start: int
    end: int


def _links(text: str) -> list[_Link | _Definition]:
    """Every image link of `text` and what defines its target, in order; no link inside code or
    alternative text.

    The block parser says which lines are paragraphs, headings and so on; the inline parser says
    where the links are in those lines.
    """
    lines = text.split("\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    environment: dict[str, Any] = {}
    found: list[_Link | _Definition] = []
    for block in _parser().parse(text, environment):
        if block.type != "inline" or not block.map or "![" not in block.content:
            continue
        first, last = block.map
        links = _inline_links("\n".join(lines[first:last]), environment)
        if len(links) != sum(token.type == "image" for token in block.children or ()):
            raise DocumentError(
                f"the image links in line {first + 1} of the document are ambiguous",
                fix="put each on a line of its own, as ![what it shows](file.png)",
            )
        offset = starts[first]
        found += [replace(x, start=x.start + offset, end=x.end + offset) for x in links]
    for name in {link.name for link in found if isinstance(link, _Link)} - {""}:
        first, last = environment["references"][name]["map"]
        while last < len(lines) and not lines[last].strip():  # the blank lines after it go too
            last += 1
        found.append(_Definition(starts[first], starts[last]))
    return sorted(found, key=lambda place: place.start)


def _inline_links(source: str, environment: dict[str, Any]) -> list[_Link]:
    """The image links of one paragraph, with places relative to it."""
    links: list[_Link] = []

    def rule(state: StateInline, silent: bool) -> bool:
        start = state.pos
        accepted = image_rule(state, silent)
        if state.src != source:  # alternative text
            return accepted
        if accepted and not silent:
            token = state.tokens[-1]
            target, name = str(token.attrs["src"]), token.meta.get("label", "")
            links.append(_Link(start, state.pos, target, token.content, name))
        elif not accepted and (failed := _LIKE_A_LINK.match(source, start)):
            raise DocumentError(
                f"{failed[0]} looks like a picture link and is none",
                fix=_DEFINE if failed[0].endswith("]") else _BRACKET,
            )
        return accepted

    parser = _parser()
    parser.inline.ruler.at("image", rule)
    parser.inline.parse(source, parser, environment, [])
    return links


def parse_markdown(text: str, folder: Path) -> Document:
    """A Markdown document whose pictures lie in `folder`; raises `DocumentError`."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # as CommonMark counts lines
    parts: list[Part] = []
    end = 0
    for link in _links(text):
        parts.append(Text(_unescape(text[end : link.start])))
        end = link.end
        if isinstance(link, _Link):
            target = unquote(link.target).strip()
            parts.append(Image(resolve_link(target, folder), link.alt) if target else Draw())
    parts.append(Text(_unescape(text[end:])))
    return document_of(*parts)


def title_of(document: Document) -> str:
    """The words of the first heading in the document's texts; empty when there is none."""
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
    return _ESCAPED_IMAGE.sub(r"\1![", text)


def to_markdown(parts: Sequence[Part], name_of: Callable[[Image], str]) -> str:
    """`parts` as Markdown, each picture a paragraph of its own, linked by its `name_of`."""
    blocks = []
    for part in parts:
        if isinstance(part, Text):
            blocks.append(part.text.replace("![", "\\!["))
        elif isinstance(part, Image):
            alt = part.alt.replace("\\", "").replace("[", "(").replace("]", ")")
            blocks.append(f"![{alt}]({quote(name_of(part))})")
        else:
            blocks.append("![]()")
    return "\n\n".join(blocks) + "\n"


def parse_json(text: str, folder: Path) -> Document:
    """JSON parts, or the published code's annt.json with one entry; raises `DocumentError`."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise DocumentError(f"the document is not JSON: line {error.lineno}: {error.msg}") from None
    except UnicodeEncodeError:
        raise DocumentError(
            "the document holds half a character, such as \\ud83d alone",
            fix="write it whole, as \\ud83c\\udfa8 or as the character itself in UTF-8",
        ) from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise DocumentError(f"the document is not JSON: {error}") from None
    parts = value.get("parts", value) if isinstance(value, dict) else value
    entries = parts if isinstance(parts, list) else [parts]
    if entries and all(isinstance(entry, dict) and "sentences" in entry for entry in entries):
        if len(entries) > 1:
            raise DocumentError(
                "an annt.json is one document",
                expected="one entry",
                got=len(entries),
                fix="put each entry into a file of its own",
            )
        return _published(entries[0], folder)
    return document_of(*(_json_part(entry, index, folder) for index, entry in enumerate(entries)))


def _json_part(entry: object, index: int, folder: Path) -> Part:
    match entry:
        case {"text": str(text), **rest} if not rest:
            return Text(text)
        case {"image": str(target), **rest} if rest.keys() <= {"alt"}:
            return Image(resolve_link(target, folder), str(rest.get("alt", "")))
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

    `sentence_ixs[i]` is the sentence that an image belongs to and `image_first[i]` whether it comes
    before it. With `generate_mode` "generate_images" the last image is the one to draw. `num_iter`,
    the number of turns of the published loop, is not read: `mmi generate` has its own limits.
    """

    sentences: list[str]
    images: list[str]
    sentence_ixs: list[int]
    image_first: list[bool]
    generate_mode: Literal["generate_texts", "generate_images"] = "generate_texts"


def _published(value: object, folder: Path) -> Document:
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
    pictures: list[Part] = [Image(resolve_link(target, folder)) for target in given]
    pictures += [Draw()] * drawn
    in_order = iter(pictures)  # the k-th slot in reading order takes the k-th image
    parts: list[Part] = []
    for index, sentence in enumerate(entry.sentences):
        parts += [next(in_order) for _ in range(slots.count((index, True)))]
        parts.append(Text(sentence))
        parts += [next(in_order) for _ in range(slots.count((index, False)))]
        parts.append(Text(" "))
    return document_of(*parts)
