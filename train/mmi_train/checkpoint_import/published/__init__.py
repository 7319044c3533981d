"""The published checkpoint's tensor names and ours.

Each part of the model has a table of rules beside this file: `RULES`, pairs of (pattern of a whole
published name, our name), and `DERIVED`, tensors that the published files hold although the
configuration determines them (position ids, CLIP's mean and deviation, sin/cos tables), with the
buffer of ours that holds the same values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from mmi_deploy.errors import WeightsError
from mmi_train.checkpoint_import.published import image_decoder, llm, vision
from mmi_train.checkpoint_import.published.image_decoder import MIDDLE

_TABLES = (vision, llm, image_decoder)
_LOOK_BACK = "image_decoder.unet.look_back."

RELEASED_SKIPS = 12


@dataclass(frozen=True)
class DerivedConstant:
    """A published tensor that no parameter of ours stands for; `buffer` holds the same values."""

    buffer: str


@cache
def _rules() -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), ours) for table in _TABLES for pattern, ours in table.RULES]


@cache
def _derived() -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), ours) for table in _TABLES for pattern, ours in table.DERIVED]


def rename(name: str, skips: int = RELEASED_SKIPS) -> str | DerivedConstant:
    """Our name of the published tensor `name`; raises `WeightsError` when no rule knows it.

    `skips`: skip connections of the U-Net; the middle block of its MMFS comes after them.
    """
    for rules, derived in ((_rules(), False), (_derived(), True)):
        for pattern, ours in rules:
            if match := pattern.fullmatch(name):
                target = match.expand(ours).replace(_LOOK_BACK + MIDDLE, f"{_LOOK_BACK}{skips}")
                return DerivedConstant(target) if derived else target
    raise WeightsError(f"{name} is no tensor of the published model")


def published_name(ours: str, skips: int = RELEASED_SKIPS) -> str | None:
    """The published name of our parameter or buffer `ours`; None when it has none."""
    symbolic = ours.replace(f"{_LOOK_BACK}{skips}.", f"{_LOOK_BACK}{MIDDLE}.")
    for pattern, replacement in (*_rules(), *_derived()):
        if match := _reader(replacement).fullmatch(symbolic):
            name = _fill(pattern.pattern, {int(k[1:]): v for k, v in match.groupdict().items()})
            if name is not None and _renamed(name, skips) == ours:
                return name
    return None


def _renamed(name: str, skips: int) -> str | None:
    try:
        found = rename(name, skips)
    except WeightsError:
        return None
    return found.buffer if isinstance(found, DerivedConstant) else found


@cache
def _reader(replacement: str) -> re.Pattern[str]:
    """A pattern that reads the groups `g1`, `g2`, ... back out of an expanded replacement."""
    pattern, known = "", set()
    for piece in re.split(r"(\\\d)", replacement):
        if not re.fullmatch(r"\\\d", piece):
            pattern += re.escape(piece)
        elif piece in known:
            pattern += f"(?P=g{piece[1:]})"
        else:
            known.add(piece)
            pattern += f"(?P<g{piece[1:]}>.+)"
    return re.compile(pattern)


def _fill(pattern: str, groups: dict[int, str]) -> str | None:
    """`pattern` with its groups replaced by their texts; None when a group's text is not known."""
    name, index, number = "", 0, 0
    while index < len(pattern):
        if pattern[index] == "\\":
            name += pattern[index + 1]
            index += 2
        elif pattern.startswith("(?", index):
            return None
        elif pattern[index] == "(":
            end = _group_end(pattern, index)
            number += 1
            if number not in groups:
                return None
            name += groups[number]
            number += len(re.findall(r"\((?!\?)", pattern[index + 1 : end]))
            index = end + 1
        else:
            name += pattern[index]
            index += 1
    return name


def _group_end(pattern: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(pattern)):
        depth += {"(": 1, ")": -1}.get(pattern[index], 0)
        if depth == 0:
            return index
    raise ValueError(f"unbalanced parentheses in {pattern!r}")
