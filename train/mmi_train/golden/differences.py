"""Differences of two values of JSON, for golden cases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Case = Mapping[str, Any]


class PublishedFailure(Exception):
    """The published code fails on a case, so that there is nothing to compare; the message says
    why."""


def differs(got: object, expected: object, what: str = "") -> str | None:
    """First place where two values of JSON differ, on one line; None if they are equal."""
    if isinstance(expected, dict) and isinstance(got, dict) and got.keys() == expected.keys():
        pairs = [(got[key], value, f"{what}.{key}") for key, value in expected.items()]
    elif isinstance(expected, list) and isinstance(got, list) and len(got) == len(expected):
        pairs = [(a, b, f"{what}[{i}]") for i, (a, b) in enumerate(zip(got, expected, strict=True))]
    else:
        return None if got == expected else f"{what} is {got!r:.160}, expected {expected!r:.160}"
    return next((found for pair in pairs if (found := differs(*pair))), None)
