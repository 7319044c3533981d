"""Renaming between the published checkpoint's tensors and ours, in both directions.

Each part of the model has a table beside this file: `RULES`, pairs of (pattern of a whole published
name, replacement by our name), and `DERIVED`, the same for tensors that the published files hold
although the configuration determines them (position ids, CLIP's mean and deviation, sin/cos
tables), and our buffer of the same values.
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

# Skip connections of the released model's U-Net.
RELEASED_SKIPS = 12


@dataclass(frozen=True)
class DerivedConstant:
    """A published tensor that is not a parameter of our model; our `buffer` has the same values."""

    buffer: str


@cache
def _rules() -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), ours) for table in _TABLES for pattern, ours in table.RULES]


@cache
def _derived() -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), ours) for table in _TABLES for pattern, ours in table.DERIVED]


def rename(name: str, skips: int = RELEASED_SKIPS) -> str | DerivedConstant:
    """Our name of the published tensor `name`; raises `WeightsError` without a rule for it.

    skips: skip connections of the U-Net, which number the MMFS of its middle block.
    """
    for rules, derived in ((_rules(), False), (_derived(), True)):
        for pattern, ours in rules:
            if match := pattern.fullmatch(name):
                target = match.expand(ours).replace(_LOOK_BACK + MIDDLE, f"{_LOOK_BACK}{skips}")
                return DerivedConstant(target) if derived else target
    raise WeightsError(f"{name} is not a tensor of the published model")


def published_name(ours: str, skips: int = RELEASED_SKIPS) -> str | None:
    """The published name of our parameter or buffer `ours`; None without one.

    It inverts the tables: the replacement is read as a pattern, and the published pattern filled
    with its groups.
    """
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
    """The pattern that matches an expanded replacement and captures its groups as `g1`, `g2`, …"""
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
    """Fill the groups of `pattern` with their texts; None when a group's text is not known."""
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
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(pattern)):
        depth += {"(": 1, ")": -1}.get(pattern[index], 0)
        if depth == 0:
            return index
    raise ValueError(f"unbalanced parentheses in {pattern!r}")
