"""Band within which an output under load may differ from its reference.

Of a number of levels alone, pictures may differ by that much and texts not at all. Of a file that
`mmi evaluate --predictions A --against B -o FILE` wrote, both are those that were measured there,
on two files of answers whose quality was not told apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, isfinite, lgamma, log, log1p
from pathlib import Path
from typing import Any

from mmi_bench.serve.definitions import PICTURE_BAND
from mmi_deploy.errors import ConfigError
from mmi_deploy.system.files import open_regular

# Probability with which as many texts as are allowed differ by chance, if the share is right.
_SURE = 0.95

# Largest file that is read, in bytes.
_MOST = 1 << 24


@dataclass(frozen=True)
class Band:
    """levels: by which a picture may differ, in 255. texts: share of requests whose text may
    differ. source: file that it was read from, and what was compared there."""

    levels: int = PICTURE_BAND
    texts: float = 0.0
    source: str = ""

    def allowed(self, requests: int) -> int:
        """Texts that may differ of so many requests: 95 % of samples have no more, if each differs
        with the probability `texts`."""
        if not self.texts:
            return 0
        below, log_not = 0.0, log1p(-self.texts)
        for count in range(requests):
            ways = lgamma(requests + 1) - lgamma(count + 1) - lgamma(requests - count + 1)
            below += exp(ways + count * log(self.texts) + (requests - count) * log_not)
            if below >= _SURE:
                return count
        return requests

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"picture_band": self.levels, "text_band": self.texts}
        return found | ({"band_from": self.source} if self.source else {})


# Equal texts, and pictures that rounding explains.
EXACT = Band()


def parse_band(text: str) -> Band:
    """A band of `3` levels, or of a file. Raises `ConfigError`."""
    if text.isascii() and text.isdecimal():
        if int(text) > 255:
            raise ConfigError("--band is out of range", expected="0 to 255 levels", got=text)
        return Band(int(text))
    path = Path(text)
    try:
        with open_regular(path) as file:
            value = json.loads(file.read(_MOST))
    except OSError as error:
        raise ConfigError(
            f"cannot read the band {path}: {error.strerror}",
            expected="levels from 0 to 255, or a file of `mmi evaluate --against … -o FILE`",
        ) from None
    except (ValueError, RecursionError):
        value = None
    return _band_of(value, path)


def _band_of(value: Any, path: Path) -> Band:
    match value:
        case {
            "benchmark": str(benchmark),
            "split": str(split),
            "against": {
                "differences": {**differences},
                "band": {"levels": (int() | None) as levels, "texts": (int() | float()) as texts},
            },
        } if isfinite(texts) and 0 <= texts < 1 and (levels is None or 0 <= levels <= 255):
            _check_quality(differences, path)
            source = f"{path}: {benchmark}, {split}"
            return Band(PICTURE_BAND if levels is None else levels, float(texts), source)
    raise ConfigError(
        f"{path} is no comparison of two files of answers",
        fix="write one with `mmi evaluate --predictions A --against B … -o FILE`",
    )


def _check_quality(differences: Mapping[Any, Any], path: Path) -> None:
    """Raise `ConfigError` if the first metric tells the two files apart: then a difference of the
    outputs is one of quality."""
    for name, one in differences.items():
        verdict = one.get("verdict") if isinstance(one, Mapping) else None
        if verdict != "not told apart":
            raise ConfigError(
                f"{path} is no band: the answers compared there differ in quality, {name} is "
                f"{verdict}",
                fix="compare targets of equal quality, or give levels as --band 3",
            )
        return
