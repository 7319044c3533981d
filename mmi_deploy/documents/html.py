"""HTML page (index.html) of a finished document: one file beside its pictures.

The page has no scripts and loads nothing from the network. A link to a picture's anchor enlarges it
(CSS `:target`); one click selects the command line. Generated parts are marked by a coloured edge
and the word "generated". All text is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby, takewhile
from string import Template

from mmi_deploy.documents.document import Image, Text
from mmi_deploy.documents.story import Entry, picture_names

_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="mmi_deploy">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1d1f23; --paper: #fbfaf7; --faint: #6a6f78;
  --line: #dedbd2; --made: #2f6feb; --made-soft: #2f6feb14; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e6e1; --paper: #16181c; --faint: #9aa0aa;
  --line: #33373e; --made: #7aa7ff; --made-soft: #7aa7ff1f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1.125rem/1.65 Georgia, "Iowan Old Style", "Noto Serif", serif; }
header, main, footer { max-width: 100rem; margin: 0 auto; padding: 0 1.25rem; }
h1, footer, figcaption, .legend, .view { font-family: system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 2.5rem 0 .25rem; overflow-wrap: anywhere; }
.legend { color: var(--faint); font-size: .85rem; margin: 0 0 2rem; }
.legend span, .text .generated { background: var(--made-soft); border-radius: .2rem; }
.legend span { color: var(--made); padding: .1rem .4rem; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr));
  gap: 1rem 2.5rem; align-items: end; }
section { max-width: 44rem; min-width: 0; }
section:not(:has(figure)) { align-self: start; }
section:only-child { margin: 0 auto; width: 100%; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 1rem 0; }
.text .generated { box-shadow: 0 0 0 .15rem var(--made-soft); }
figure { margin: 1rem 0; padding-left: .9rem; border-left: .25rem solid var(--line); }
figure.generated { border-color: var(--made); }
img { display: block; max-width: 100%; height: auto; border-radius: .4rem;
  background: var(--line); }
img.small { width: 100%; max-width: 20rem; image-rendering: pixelated; }
figure a { display: block; max-width: max-content; cursor: zoom-in; }
figure a:has(.small) { max-width: 20rem; }
.view { display: none; position: fixed; inset: 0; background: #000d; color: #fff; z-index: 1; }
.view:target { display: grid; grid-template: 1fr auto / 1fr; }
.view .close { display: grid; place-items: center; min-height: 0; padding: 1rem; cursor: zoom-out; }
.view img { max-width: 100%; max-height: 100%; object-fit: contain; background: none; }
.view img.small { width: min(90vw, 80vh); max-width: none; }
.view nav { display: flex; gap: 2rem; justify-content: center; padding: 0 1rem 1rem; }
.view nav a { color: inherit; }
figcaption { color: var(--faint); font-size: .8rem; margin-top: .4rem; overflow-wrap: anywhere; }
.generated figcaption b { color: var(--made); font-weight: 600; }
footer { border-top: 1px solid var(--line); color: var(--faint); font-size: .85rem;
  margin-top: 3rem; padding-top: 1rem; padding-bottom: 3rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; }
dt, dd { margin: 0; } dd { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
code { display: block; user-select: all; overflow-wrap: anywhere; cursor: copy;
  padding: .4rem .6rem; background: var(--made-soft); border-radius: .3rem; font-size: .95em; }
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="legend">What the model made is marked as <span>generated</span>. A click enlarges a
picture.</p>
</header>
<main>
$parts
</main>
<footer>
<dl>
$facts
</dl>
</footer>
$views
</body>
</html>
""")

# Pictures with both sides below this number of pixels are shown enlarged, with sharp pixels.
_SMALL = 256

# Characters of the text before a drawn picture that become its alternative text.
_ALT = 120


def page(title: str, entries: Sequence[Entry], facts: Mapping[str, str], command: str = "") -> str:
    """HTML page of `entries`, with `facts` (name -> value) and the command line that reproduces the
    document in the footer. Wide screens show a storyboard: each text above its pictures."""
    names = picture_names(entries)
    pictures = list(names)
    listed = [f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items()]
    if command:
        listed.append(f"<dt>again</dt><dd><code>{escape(command)}</code></dd>")
    return _PAGE.substitute(
        title=escape(title),
        parts="\n".join(_sections(entries, names)),
        facts="\n".join(listed),
        views="\n".join(
            _view(number, len(pictures), _image(entries, index, names[index], lazy=True))
            for number, index in enumerate(pictures, start=1)
        ),
    )


def _sections(entries: Sequence[Entry], names: Mapping[int, str]) -> Iterator[str]:
    """One section per run of texts, with the pictures that follow it."""
    numbers = {index: number for number, index in enumerate(names, start=1)}
    blocks: list[str] = []
    runs = groupby(enumerate(entries), key=lambda item: isinstance(item[1].part, Text))
    for is_text, run in runs:
        if is_text:
            spans = "".join(_span(entry) for _, entry in run)
            blocks = [f'<p class="text">{spans}</p>']
        else:
            blocks += [_figure(entries, index, names[index], numbers[index]) for index, _ in run]
            yield _section(blocks)
            blocks = []
    if blocks:
        yield _section(blocks)


def _section(blocks: Sequence[str]) -> str:
    return "<section>\n" + "\n".join(blocks) + "\n</section>"


def _span(entry: Entry) -> str:
    assert isinstance(entry.part, Text)
    text = escape(entry.part.text)
    return f'<span class="generated">{text}</span>' if entry.generated else text


def _figure(entries: Sequence[Entry], index: int, name: str, number: int) -> str:
    entry = entries[index]
    assert isinstance(entry.part, Image)
    height, width, _ = entry.part.rgb.shape
    kind = _kind(entry)
    return (
        f'<figure class="{kind}" id="picture-{number}"><a href="#view-{number}">'
        f"{_image(entries, index, name)}</a><figcaption><b>{kind}</b> · {escape(name)} · "
        f"{width} × {height}</figcaption></figure>"
    )


def _view(number: int, of: int, image: str) -> str:
    """Overlay of a picture in the size of the window, shown while the URL's fragment names it."""
    links = [(number - 1, "previous"), (number + 1, "next")]
    beside = [f'<a href="#view-{at}">{word}</a>' for at, word in links if 1 <= at <= of]
    return (
        f'<div class="view" id="view-{number}"><a class="close" href="#picture-{number}" '
        f'title="back to the document">{image}</a><nav>{"".join(beside)}</nav></div>'
    )


def _image(entries: Sequence[Entry], index: int, name: str, *, lazy: bool = False) -> str:
    part = entries[index].part
    assert isinstance(part, Image)
    height, width, _ = part.rgb.shape
    small = ' class="small"' if max(height, width) < _SMALL else ""
    loading = ' loading="lazy"' if lazy else ""
    return (
        f'<img src="{escape(name)}" alt="{escape(alt_of(entries, index))}" width="{width}" '
        f'height="{height}"{small}{loading}>'
    )


def _kind(entry: Entry) -> str:
    return "generated" if entry.generated else "given"


def alt_of(entries: Sequence[Entry], index: int) -> str:
    """Alternative text of a picture: its own, or for a drawn picture without one the last line of
    the text right before it."""
    entry = entries[index]
    assert isinstance(entry.part, Image)
    if entry.part.alt:
        return entry.part.alt
    if entry.generated:
        before = takewhile(lambda e: isinstance(e.part, Text), reversed(entries[:index]))
        text = "".join(reversed([e.part.text for e in before if isinstance(e.part, Text)]))
        lines = [" ".join(line.split()) for line in text.splitlines()]
        if last := next(filter(None, reversed(lines)), ""):
            return f"drawn after: {_tail(last)}"
    return f"a {_kind(entry)} picture"


def _tail(line: str) -> str:
    """The last words of a line, at most `_ALT` characters."""
    if len(line) <= _ALT:
        return line
    return f"… {line[-_ALT:].partition(' ')[2] or line[-_ALT:]}"
