"""Sampling of the next token from logits, in numpy, in the order of transformers' processors.

Repetition penalty, banned ids, temperature, top-k, top-p, then inverse transform sampling with one
uniform number.

Letters: u vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import TokenConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class TextSampling:
    """Parameters of text sampling.

    temperature: 0 is greedy. top_k: 0 keeps all tokens. top_p: keep the smallest set of tokens with
    at least this probability mass. repetition_penalty: factor on the logits of tokens seen before
    (Keskar et al. 2019), 1 for none.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        heat = self.temperature  # nearer to 0 or infinity, scaled logits would overflow
        check_ranges(
            self,
            ("temperature", heat == 0 or 0.001 <= heat <= 1000, "0, or 0.001 to 1000"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "0.01 to 100"),
        )


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError
    return int(value)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError
    return float(value)


def _switch(value: object) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError
    return bool(value)


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _strings(value: object) -> tuple[str, ...]:
    if not isinstance(value, tuple | list):  # not any sequence: a string is one of its letters
        raise TypeError
    return tuple(map(_string, value))


# Annotation of a field -> its converter, and its name for messages. numpy numbers are accepted.
_TYPES: dict[str, tuple[Callable[[object], object], str]] = {
    "int": (_whole, "a whole number"),
    "float": (_number, "a number"),
    "bool": (_switch, "True or False"),
    "str": (_string, "a string"),
    "tuple[str, ...]": (_strings, 'a tuple of strings, as in ("moves",)'),
}


def check_types(options: DataclassInstance) -> None:
    """Convert every field to its type; raises `ConfigError` for the first that cannot be."""
    for field in fields(options):
        value, written = getattr(options, field.name), str(field.type)
        take, expected = _TYPES[written.removesuffix(" | None")]
        if value is None and written.endswith(" | None"):
            continue
        try:
            taken = take(value)
        except TypeError:
            got = f"{type(value).__name__} {value!r:.60}"
            raise ConfigError(
                f"{field.name} has the wrong type", expected=expected, got=got
            ) from None
        object.__setattr__(options, field.name, taken)  # the options are frozen


def check_ranges(options: object, *rules: tuple[str, bool, str]) -> None:
    """Raise `ConfigError` for the first rule (field, in range, expected) that is not in range.

    Rules compare positively, as NaN fails every comparison.
    """
    for name, in_range, expected in rules:
        if not in_range:
            raise ConfigError(
                f"{name} is out of range", expected=expected, got=getattr(options, name)
            )


def never_sampled(tokens: TokenConfig) -> frozenset[int]:
    """Ids that are always banned: `<|image|>`, which only images produce, and `<s>` and padding,
    which are never targets in training, unless they are end tokens."""
    return frozenset((tokens.image, tokens.bos, tokens.pad)) - {*tokens.ends}


def sample(
    logits: Logits,
    sampling: TextSampling,
    uniform: float,
    *,
    seen: Collection[int] = (),
    banned: Collection[int] = (),
) -> int:
    """Sample the next token's id from `logits` [u] with one number `uniform` in [0, 1).

    seen: ids that the repetition penalty applies to. banned: ids that are never sampled.
    """
    scores = ban(penalise_repetition(logits, seen, sampling.repetition_penalty), banned)
    if sampling.temperature == 0:
        return int(scores.argmax())
    scores = keep_top_p(
        keep_top_k(scores / np.float32(sampling.temperature), sampling.top_k), sampling.top_p
    )
    return inverse_cdf(softmax(scores), uniform)


def penalise_repetition(logits: Logits, seen: Collection[int], penalty: float) -> Logits:
    """Divide positive logits of the ids in `seen` by the penalty, and multiply negative ones."""
    if penalty == 1 or not seen:
        return logits
    scores, ids = logits.copy(), list(set(seen))
    scores[ids] = np.where(scores[ids] < 0, scores[ids] * penalty, scores[ids] / penalty)
    return scores


def ban(logits: Logits, banned: Collection[int]) -> Logits:
    """Set the logits of banned ids to minus infinity."""
    if not banned:
        return logits
    scores = logits.copy()
    scores[list(banned)] = -np.inf
    return scores


def keep_top_k(logits: Logits, count: int) -> Logits:
    """Top-k: keep the `count` largest logits and ties with the smallest of them; 0 keeps all."""
    if not 0 < count < len(logits):
        return logits
    smallest = np.partition(logits, -count)[-count]
    return np.where(logits < smallest, -np.inf, logits).astype(logits.dtype)


def keep_top_p(logits: Logits, mass: float) -> Logits:
    """Top-p: keep the most probable tokens until their probabilities reach `mass`, at least one."""
    if mass >= 1:
        return logits
    order = np.argsort(logits, kind="stable")  # least likely first
    tail = np.cumsum(softmax(logits[order]))
    dropped = order[:-1][tail[:-1] <= 1 - mass]
    return ban(logits, dropped.tolist())


def softmax(logits: Logits) -> NDArray[np.float64]:
    """Probabilities in float64: in float32, rounding of the sum would grow with the vocabulary."""
    powers = np.exp(logits.astype(np.float64) - logits.max())
    return powers / powers.sum()


def inverse_cdf(probabilities: NDArray[np.float64], uniform: float) -> int:
    """First id whose cumulative probability exceeds `uniform`; never one of probability 0."""
    cumulative = np.cumsum(probabilities)
    chosen = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
    # Rounding may bring the product up to the sum, whose position lies beyond the last id.
    last = np.flatnonzero(probabilities)[-1]
    return int(min(chosen, last))
