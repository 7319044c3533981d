"""Penn Treebank tokens in Python, by the rules that Stanford's tokenizer applies to captions.

It agrees with Stanford's (CoreNLP 3.4.1) on English sentences; it knows only the most frequent
abbreviations, so that its scores are given under a name of their own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_LETTER = r"[^\W\d_]"
_WORD = rf"{_LETTER}[\w]*"

# Abbreviations that keep their full stop.
_ABBREVIATIONS = """
    jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri sat sun mr mrs
    ms dr drs prof st sr jr rev gen col lt sgt capt gov sen rep pres hon mt ft vs etc inc ltd co
    corp bros dept est vol fig ave blvd rd bldg al ph esp
""".split()

_KINDS = (
    ("url", r"(?:https?://|www\.)[^\s<>\"]+"),
    ("email", r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    ("tag", r"</?[A-Za-z!][^<>\s]*/?>"),
    ("handle", r"[@#][A-Za-z_]\w*"),
    # Single letters with full stops, as in p.m. and U.S.
    ("acronym", rf"(?<![\w.])(?:{_LETTER}\.){{2,}}|(?<![\w.]){_LETTER}\.(?=\s+\w)"),
    (
        "abbreviation",
        rf"(?<![\w.])(?i:{'|'.join(_ABBREVIATIONS)})\.(?=\s|$)|(?<![\w.])(?i:no)\.(?=\s+\d)",
    ),
    ("mixed", r"(?<![\w.,/])\d+ \d{1,2}/\d{1,2}(?![\w/])"),
    ("smiley", r"[:;]-?\)"),
    ("decade", r"'\d\ds\b"),
    ("old", r"'(?:tis|twas)\b|\bol'(?!\w)|'n'"),
    ("time", r"(?<![\w.])\d{1,2}:\d\d(?=[ap]m\b)"),
    ("number", r"[-+]?(?<![\w])\d[\d]*(?:[.,:/]\d+)*(?!\w|[-/&]\w|['’]s\b)|(?<!\w)[.]\d+(?!\w)"),
    # Words, with apostrophes, hyphens and slashes inside.
    (
        "word",
        r"\w+(?:(?:['’]|[-/&.](?=\w)|[.,:](?=\d)(?<=\d.))\w+)*",
    ),
    ("dots", r"\.{2,}|…"),
    ("dashes", r"-{2,}|—|–"),
    ("run", r"[!?]+|\*+|~+|=+|\^+|_+|\++"),
    ("quote", r"''|``|[\"“”«»]|['‘’`]"),
    ("other", r"\S"),
)
_TOKEN = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in _KINDS))

# Characters that are written as others.
_SIGNS = str.maketrans({"€": "$", "£": "#", "¢": " cents", "½": " 1/2", "¼": " 1/4", "¾": " 3/4"})

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

# Words of two tokens.
_JOINED = {
    "cannot": "can not",
    "gonna": "gon na",
    "wanna": "wan na",
    "gotta": "got ta",
    "lemme": "lem me",
    "gimme": "gim me",
    "'tis": "'t is",
    "'twas": "'t was",
    "y'all": "y' all",
    "rock'n'roll": "rock 'n' roll",
}
_ENDINGS = re.compile(r"(?<=\w)(n['’]t|['’](?:s|m|d|re|ve|ll))$")


def token_lines(texts: Sequence[str]) -> list[str]:
    """Lower-case tokens of each text, joined by blanks."""
    return [" ".join(tokens(text)) for text in texts]


def tokens(text: str) -> list[str]:
    """Lower-case tokens of a text, punctuation among them."""
    found: list[str] = []
    for match in _TOKEN.finditer(text.translate(_SIGNS)):
        kind, token = str(match.lastgroup), match[0].lower()
        if kind in ("word", "old"):
            found += _word(token)
        elif kind == "mixed":
            found.append(token.replace(" ", "\u00a0"))
        elif kind == "smiley":
            found.append(token.replace(")", "-rrb-"))
        elif kind == "dots":
            found.append("...")
        elif kind == "dashes":
            found.append("--")
        elif kind == "quote":
            found.append("''" if len(token) > 1 or token in '"“”«»' else "'")
        else:
            found.append(_BRACKETS.get(token, token))
    return found


def _word(token: str) -> list[str]:
    if token in _JOINED:
        return _JOINED[token].split()
    parts: list[str] = []
    while ending := _ENDINGS.search(token):
        parts.insert(0, ending[0].replace("’", "'"))
        token = token[: ending.start()]
    return [token, *parts]
