"""Goodput: limits that a request must meet, such as `ttft=200ms,gap_p99=50ms,image=2s,e2e=5s`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mmi_bench.serve.definitions import BY_KEY
from mmi_bench.serve.measures import Values
from mmi_bench.serve.sample_statistics import percentile
from mmi_deploy.errors import ConfigError

# Words of --goodput and the measures that they limit; the keys of latencies are words as well.
WORDS = {
    "ttft": "first_token",
    "image": "first_image",
    "output": "first_output",
    "gap": "text_gap",
    "stall": "picture_stall",
    "tpot": "time_per_token",
    "e2e": "end_to_end",
}

_LIMIT = re.compile(r"([a-z_0-9]+?)(?:_p(\d{1,2}))?=(\d+(?:\.\d+)?)(ms|s)")


@dataclass(frozen=True)
class GoodputLimit:
    """Limit of one measure, in seconds. percentile: of the values of a request; None for all."""

    word: str
    key: str
    percentile: int | None
    seconds: float

    def meets(self, values: Values) -> bool:
        """True if the request meets the limit, or has no value of the measure."""
        found = values.get(self.key)
        if not found:
            return True
        return (max(found) if self.percentile is None else percentile(found, self.percentile)) <= (
            self.seconds
        )


def parse_goodput(text: str) -> tuple[GoodputLimit, ...]:
    """Parse limits; raises `ConfigError`."""
    limits = []
    for part in text.split(","):
        match = _LIMIT.fullmatch(part.strip())
        key = WORDS.get(match[1], match[1]) if match else ""
        if not match or key not in BY_KEY or BY_KEY[key].kind != "latency" or match[2] == "0":
            raise ConfigError(
                "--goodput is malformed",
                expected=f"limits such as ttft=200ms,gap_p99=50ms of {', '.join(WORDS)}",
                got=part,
            )
        scale = 1e-3 if match[4] == "ms" else 1.0
        rank = int(match[2]) if match[2] else None
        limits.append(GoodputLimit(part.strip(), key, rank, float(match[3]) * scale))
    return tuple(limits)
