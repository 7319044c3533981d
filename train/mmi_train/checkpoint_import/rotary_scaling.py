"""Scaled rotary positions of a Hugging Face configuration, as divisors of the frequencies.

A scaling that multiplies the rotary frequencies by constants is exactly such divisors: `linear`
(position interpolation) and `llama3`. Others also change with the length of the text (`dynamic`,
`longrope`) or scale the attention (`yarn`), and are refused by name.
"""

from __future__ import annotations

import math
from pathlib import Path

from mmi_deploy.errors import ConfigError
from mmi_train.checkpoint_import.config_fields import Fields, consistent_value, unsupported

# The object of rotary positions, as transformers names it before version 5, and from 5 on.
_ROPE = ("rope_scaling", "rope_parameters")


def rotary_base(path: Path, config: Fields, default: float) -> float:
    """Base of the rotary angles; transformers 5 nests it, older versions do not."""
    nested = {f"{field}.rope_theta": (config.get(field) or {}).get("rope_theta") for field in _ROPE}
    stated = consistent_value(path, {**nested, "rope_theta": config.get("rope_theta")})
    return float(default if stated is None else stated)


def rotary_divisors(path: Path, config: Fields, theta: float, head_width: int) -> tuple[float, ...]:
    """Divisors of the frequencies of a head, highest first; none for positions that are not scaled.

    Raises `ConfigError` for another scaling, by name, for partial rotary positions, and for fields
    of a scaling that are missing or wrong.
    """
    found: tuple[float, ...] = ()
    for field in _ROPE:
        rope = config.get(field) or {}
        names = {f"{field}.{name}": rope.get(name) for name in ("rope_type", "type")}
        form = consistent_value(path, names) or "default"
        partial = rope.get("partial_rotary_factor") not in (1.0, None)
        if partial or form not in ("default", "linear", "llama3"):
            raise unsupported(
                path.parent, f"{field} {form}", "rotary positions of form linear or llama3", rope
            )
        if form == "linear":
            factor = _number(path, field, rope, "factor")
            found = (factor,) * (head_width // 2) if factor != 1 else ()
        elif form == "llama3":
            original = rope | {
                "original_max_position_embeddings": config.get("original_max_position_embeddings")
                or rope.get("original_max_position_embeddings")
                or config.get("max_position_embeddings")
            }
            found = llama3_divisors(
                theta,
                head_width,
                factor=_number(path, field, rope, "factor"),
                low=_number(path, field, rope, "low_freq_factor"),
                high=_number(path, field, rope, "high_freq_factor"),
                context=_number(path, field, original, "original_max_position_embeddings"),
            )
    return found


def llama3_divisors(
    theta: float, head_width: int, *, factor: float, low: float, high: float, context: float
) -> tuple[float, ...]:
    """Divisors of LLaMA-3.1's scaling, highest frequency first.

    A frequency that turns at least `high` times in `context` tokens is kept, one that turns at most
    `low` times is divided by `factor`; between them the frequency is interpolated linearly in the
    number of turns.
    """
    found = []
    for pair in range(head_width // 2):
        frequency = theta ** (-2 * pair / head_width)
        turns = context * frequency / (2 * math.pi)
        kept = 1.0 if turns >= high else 0.0 if turns <= low else (turns - low) / (high - low)
        found.append(1 / (kept + (1 - kept) / factor))
    return tuple(found)


def _number(path: Path, field: str, rope: Fields, name: str) -> float:
    value = rope.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(
            f"{path}: {field}.{name} is wrong", expected="a positive number", got=repr(value)
        )
    return float(value)
