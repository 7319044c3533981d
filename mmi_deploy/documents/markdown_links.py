"""Image links in one paragraph of Markdown, parsed in linear time.

CommonMark 0.31, sections 6.3 and 6.4, by the algorithm of its appendix: opening brackets wait on a
stack for the bracket that closes them. Of the other inline constructs only those matter that hide
brackets: escapes, code spans, HTML and autolinks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markdown_it.common.utils import normalizeReference, unescapeAll

from mmi_deploy.errors import DocumentError

_SPECIAL = re.compile(r"[\\`<\]]|!?\[")
_BACKTICKS = re.compile(r"`+")
_SPACES = re.compile(r"[ \t\n]*")
_AUTOLINK = re.compile(
    r"<(?:[a-zA-Z][a-zA-Z0-9+.-]{1,31}:[^<>\x00-\x20]*"
    r"|[a-zA-Z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[a-zA-Z0-9.-]{1,255})>"
)
_ATTRIBUTE = (
    r"""(?:\s+[a-zA-Z_:][a-zA-Z0-9:._-]*(?:\s*=\s*(?:[^"'=<>`\x00-\x20]+|'[^']*'|"[^"]*"))?)"""
)
_TAG = re.compile(rf"<[A-Za-z][A-Za-z0-9-]*{_ATTRIBUTE}*\s*/?>|</[A-Za-z][A-Za-z0-9-]*\s*>")
_ENDED_BY = (("<!--", "-->"), ("<![CDATA[", "]]>"), ("<?", "?>"), ("<!", ">"))
_POINTED = re.compile(r"<((?:[^<>\\\n]|\\.|\\$)*)>")
_PLAIN = re.compile(r"[^\\()\x00-\x20\x7f]+|\\(?:[^ ]|$)|[()]", re.DOTALL)
_TITLE = re.compile(r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|\((?:[^()\\]|\\.)*\)""", re.DOTALL)
_LABEL = re.compile(r"\[((?:[^\\\[\]]|\\.){0,999})\]", re.DOTALL)
_MOST_NESTED = 32
_TOO_NESTED = re.compile(rf"(?:[^\\()\x00-\x20\x7f]*\(){{{_MOST_NESTED + 1}}}")
_LONGEST_LABEL = 999

_TEXT = "write \\![ if it is text"
_DEFINE = f"add a line such as [name]: file.png, or {_TEXT}"
_BRACKET = f"put a name with spaces in <>, as in ![](<my file.png>), or {_TEXT}"

# Texts that an author may have meant as a picture, and the fix.
_LIKE_A_LINK = (
    (re.compile(r"!\[[^\[\]]*\]\[[^\[\]]+\]"), _DEFINE),
    (re.compile(r"!\[[^\[\]]*\]\([^()\n]*\)"), _BRACKET),
    (
        re.compile(r"!\[[^\[\n]*\]\([^\n]*|!\[[^\[\]]*\]\([^\n]*"),
        f"close it with ), and {_BRACKET}",
    ),
    (
        re.compile(r"!\[\[[^\[\]\n]+\]\]"),
        f"a picture is linked as ![what it shows](file.png); {_TEXT}",
    ),
    (
        re.compile(r"!\[[^\[\]\n]*\]\s\([^()\n]*\.(?:png|jpe?g|webp|gif|bmp|tiff?)\)", re.I),
        f"take out the space before (, or {_TEXT}",
    ),
)

_IMG = re.compile(r"<img[\s/>]", re.IGNORECASE)
HTML_PICTURE = re.compile(r"(?<!\\)(?:\\\\)*<img[\s/>][^>\n]*>?", re.IGNORECASE)


@dataclass(frozen=True)
class Link:
    """An image link: its range [start, end) in the text, target and alternative text. `name`: label
    of its link reference definition."""

    start: int
    end: int
    target: str
    alt: str
    name: str = ""


@dataclass
class _Opener:
    """An opening bracket on the stack. `first`: number of links found before it."""

    start: int
    inside: int
    is_image: bool
    first: int


def refuse_html_picture(text: str) -> None:
    """Raise `DocumentError` for an `<img>` tag: HTML is read as text."""
    if found := HTML_PICTURE.search(text):
        tag = " ".join(found[0].lstrip("\\").split())
        raise DocumentError(
            f"{tag:.60} is HTML, which is not read as a picture",
            fix="link it as ![what it shows](file.png), or write \\<img if it is text",
        )


def image_links(source: str, references: Mapping[str, Any]) -> list[Link]:
    """Image links of a paragraph in order, without those inside code or alternative text.

    `references`: link reference definitions by normalised label, as markdown-it collects them.
    Raises `DocumentError` for text that looks like a picture but is not one.
    """
    return _Paragraph(source, references).links()


class _Paragraph:
    def __init__(self, source: str, references: Mapping[str, Any]) -> None:
        self.source, self.references = source, references
        self.openers: list[_Opener] = []
        self.found: list[Link] = []
        # Closing marks that do not occur any more: searched once, so that time stays linear.
        self.no_more: set[object] = set()
        # Number of openers before the last link: they cannot open a link, which must not contain
        # another one; pictures may.
        self.before_link = 0

    def links(self) -> list[Link]:
        position = 0
        while (special := _SPECIAL.search(self.source, position)) is not None:
            position = special.end()
            match special[0]:
                case "\\":
                    position += 1
                case "`":
                    position = self._after_code(special.start())
                case "<":
                    position = self._after_html(special.start())
                case "]":
                    position = self._close(special.start())
                case opener:
                    self.openers.append(
                        _Opener(special.start(), position, opener == "![", len(self.found))
                    )
        for left in self.openers:
            self._refuse_if_meant(left)
        return self.found

    def _after_code(self, start: int) -> int:
        run = _BACKTICKS.match(self.source, start)
        assert run is not None, "called at a backtick"
        length, end = len(run[0]), run.end()
        if length not in self.no_more:
            for other in _BACKTICKS.finditer(self.source, end):
                if len(other[0]) == length:
                    return other.end()
            self.no_more.add(length)
        return end

    def _after_html(self, start: int) -> int:
        for begin, finish in _ENDED_BY:
            if self.source.startswith(begin, start):
                if begin == "<!" and not self.source[start + 2 : start + 3].isalpha():
                    return start + 1
                if begin == "<!--" and (
                    short := re.match("<!---?>", self.source[start : start + 6])
                ):
                    return start + short.end()
                if begin not in self.no_more:
                    end = self.source.find(finish, start + len(begin))
                    if end >= 0:
                        return end + len(finish)
                    self.no_more.add(begin)
                return start + 1
        if link := _AUTOLINK.match(self.source, start):
            return link.end()
        if _IMG.match(self.source, start):
            refuse_html_picture(self.source[start : start + 200])  # no backslash before it
        tag = _TAG.match(self.source, start)
        return tag.end() if tag else start + 1

    def _close(self, place: int) -> int:
        """A closing bracket at `place`: make a link of it and its opener, or text of both."""
        if not self.openers:
            return place + 1
        opener = self.openers.pop()
        inactive = len(self.openers) < self.before_link and not opener.is_image
        self.before_link = min(self.before_link, len(self.openers))
        if inactive:
            return place + 1
        inside = (opener.inside, place)
        link = self._inline_target(place + 1) or self._reference(inside, opener.is_image)
        if link is None:
            self._refuse_if_meant(opener)
            return place + 1
        target, name, end = link
        if opener.is_image:
            del self.found[opener.first :]  # pictures in the alternative text
            self.found.append(Link(opener.start, end, target, self.source[slice(*inside)], name))
        else:
            self.before_link = len(self.openers)
        return end

    def _inline_target(self, position: int) -> tuple[str, str, int] | None:
        """Parse `(target "title")` at `position`: target, empty name, end."""
        if not self.source.startswith("(", position):
            return None
        position = self._after_spaces(position + 1)
        target, after = self._destination(position)
        position = self._after_spaces(after)
        if position > after and (title := self._title(position)):
            position = self._after_spaces(title)
        return (target, "", position + 1) if self.source.startswith(")", position) else None

    def _after_spaces(self, position: int) -> int:
        spaces = _SPACES.match(self.source, position)
        assert spaces is not None, "the pattern matches the empty string"
        return spaces.end()

    def _destination(self, start: int) -> tuple[str, int]:
        """Parse a link's destination: destination (empty if there is none) and end."""
        if self.source.startswith("<", start):
            pointed = _POINTED.match(self.source, start)
            return (unescapeAll(pointed[1]), pointed.end()) if pointed else ("", start)
        if _TOO_NESTED.match(self.source, start):  # one match: without it time would be quadratic
            return "", start
        level, position = 0, start
        while piece := _PLAIN.match(self.source, position):
            if piece[0] == "(":
                level += 1
                if level > _MOST_NESTED:
                    return "", start
            elif piece[0] == ")":
                if level == 0:
                    break
                level -= 1
            position = piece.end()
        return (unescapeAll(self.source[start:position]), position) if level == 0 else ("", start)

    def _title(self, start: int) -> int | None:
        mark = self.source[start : start + 1]
        if mark not in ('"', "'", "(") or (mark, "title") in self.no_more:
            return None
        title = _TITLE.match(self.source, start)
        if title is None and mark != "(":
            self.no_more.add((mark, "title"))
        return title.end() if title else None

    def _reference(self, inside: tuple[int, int], is_image: bool) -> tuple[str, str, int] | None:
        """Parse `[name]`, `[]` or nothing after a closing bracket: target, name, end."""
        position = inside[1] + 1
        if not self.references or (is_image and self.source.startswith("(", position)):
            return None
        label, end = "", position
        if self.source.startswith("[", position) and (
            written := _LABEL.match(self.source, position)
        ):
            label, end = written[1], written.end()
        if not label:
            if inside[1] - inside[0] > _LONGEST_LABEL:
                return None
            label = self.source[slice(*inside)]
        name = normalizeReference(label)
        defined = self.references.get(name)
        return (defined["href"], name, end) if defined else None

    def _refuse_if_meant(self, opener: _Opener) -> None:
        if not opener.is_image:
            return
        for form, fix in _LIKE_A_LINK:
            if like := form.match(self.source, opener.start):
                shown = " ".join(like[0].split())
                raise DocumentError(
                    f"{shown:.60} looks like a picture link but is not one", fix=fix
                )
