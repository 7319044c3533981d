"""index.html: a finished document for people. One file beside its pictures; no scripts, no network.

What the model made stands out by a coloured edge and the word "generated". All text is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
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
main, footer { max-width: 40rem; margin: 0 auto; padding: 0 1.25rem; }
h1, footer, figcaption, .legend { font-family: system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 2.5rem 0 .25rem; overflow-wrap: anywhere; }
.legend { color: var(--faint); font-size: .85rem; margin: 0 0 2rem; }
.legend span, .text .generated { background: var(--made-soft); border-radius: .2rem; }
.legend span { color: var(--made); padding: .1rem .4rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 1.5rem 0; }
.text .generated { box-shadow: 0 0 0 .15rem var(--made-soft); }
figure { margin: 1.5rem 0; padding-left: .9rem; border-left: .25rem solid var(--line); }
figure.generated { border-color: var(--made); }
img { display: block; max-width: 100%; height: auto; border-radius: .4rem;
  background: var(--line); }
img.small { width: 100%; max-width: 20rem; image-rendering: pixelated; }
figcaption { color: var(--faint); font-size: .8rem; margin-top: .4rem; overflow-wrap: anywhere; }
.generated figcaption b { color: var(--made); font-weight: 600; }
footer { border-top: 1px solid var(--line); color: var(--faint); font-size: .85rem;
  margin-top: 3rem; padding-top: 1rem; padding-bottom: 3rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; }
dt, dd { margin: 0; } dd { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
</style>
</head>
<body>
<main>
<h1>$title</h1>
<p class="legend">What the model made is marked as <span>generated</span>.</p>
$parts
</main>
<footer>
<dl>
$facts
</dl>
</footer>
</body>
</html>
""")

_SMALL = 256
"""Pictures with sides below this are shown larger than they are, with sharp pixels."""


def page(title: str, entries: Sequence[Entry], facts: Mapping[str, str]) -> str:
    """The page of `entries`; `facts` (name and value) stand at its foot."""
    names = picture_names(entries)
    blocks = []
    texts_or_not = groupby(enumerate(entries), key=lambda item: isinstance(item[1].part, Text))
    for is_text, run in texts_or_not:
        if is_text:
            spans = "".join(_span(entry) for _, entry in run)
            blocks.append(f'<p class="text">{spans}</p>')
        else:
            blocks += [_figure(entry, names[index]) for index, entry in run]
    return _PAGE.substitute(
        title=escape(title),
        parts="\n".join(blocks),
        facts="\n".join(
            f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items()
        ),
    )


def _span(entry: Entry) -> str:
    assert isinstance(entry.part, Text)
    text = escape(entry.part.text)
    return f'<span class="generated">{text}</span>' if entry.generated else text


def _figure(entry: Entry, name: str) -> str:
    assert isinstance(entry.part, Image)
    height, width, _ = entry.part.rgb.shape
    kind = "generated" if entry.generated else "given"
    alt = escape(entry.part.alt or f"a {kind} picture")
    small = ' class="small"' if max(height, width) < _SMALL else ""
    return (
        f'<figure class="{kind}"><img src="{escape(name)}" alt="{alt}" width="{width}" '
        f'height="{height}"{small}><figcaption><b>{kind}</b> · {escape(name)} · '
        f"{width} × {height}</figcaption></figure>"
    )
