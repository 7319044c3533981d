"""Sampling of the next token from logits, in numpy, in the order of transformers' processors.

Logit bias, repetition penalty, frequency and presence penalties, banned ids, temperature, top-k,
top-p, min-p, then inverse transform sampling with one uniform number.

The token is defined by sums in a fixed order: top-p adds up the probabilities of the sorted tokens
one after another from the least probable on, inverse transform sampling those of all tokens by id.
Sums of blocks find the same token sooner, and are trusted only where rounding cannot change it
(`_first_beyond`).

Letters: b batch, u vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import TokenConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Logits = NDArray[np.float32]
Float64 = NDArray[np.float64]
# Logits, or log probabilities in double precision.
Scores = TypeVar("Scores", NDArray[np.float32], NDArray[np.float64])
LogitBias = Mapping[int, float] | tuple[tuple[int, float], ...]

# Values whose sum is one step of a search in a cumulative sum.
BLOCK = 256

# Bound of the relative rounding error of a sum in any order, per number, times 8.
ROUNDING = 8 * float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class TextSampling:
    """Parameters of text sampling.

    temperature: 0 is greedy. top_k: 0 keeps all tokens. top_p: keep the smallest set of tokens with
    at least this probability mass. repetition_penalty: factor on the logits of tokens seen before
    (Keskar et al. 2019), 1 for none. min_p: keep tokens at least this times as probable as the most
    probable one (Nguyen et al. 2024), 0 for all. presence_penalty, frequency_penalty: subtracted
    from the logit of a token seen before, once and for each time, as in OpenAI's API. logit_bias:
    number to add to the logit of an id, a mapping or pairs; kept as pairs sorted by id. logprobs:
    number of most probable tokens to return with their log probabilities, 0 for the sampled token
    alone, None for neither.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: LogitBias = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        heat = self.temperature  # nearer to 0 or infinity, scaled logits would overflow
        bias = dict(self.logit_bias)
        check_ranges(
            self,
            ("temperature", heat == 0 or 0.001 <= heat <= 1000, "0, or 0.001 to 1000"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "0.01 to 100"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "-2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "-2 to 2"),
            ("logit_bias", all(-100 <= x <= 100 for x in bias.values()), "biases of -100 to 100"),
            ("logit_bias", min(bias, default=0) >= 0, "token ids of 0 or more"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "0 to 20"),
        )

    def check_ids(self, vocab: int) -> None:
        """Raise `ConfigError` if `logit_bias` names an id beyond a vocabulary of `vocab` ids."""
        largest = max(dict(self.logit_bias), default=0)
        if largest >= vocab:
            raise ConfigError(
                "logit_bias has an id beyond the model's vocabulary",
                expected=f"0 to {vocab - 1}",
                got=largest,
            )


@dataclass(frozen=True)
class SampleRequest:
    """Sampling of one row's next token.

    uniform: number in [0, 1). seen: ids of the current turn in order, to which the penalties apply.
    banned: ids that are never sampled.
    """

    sampling: TextSampling
    uniform: float
    seen: Sequence[int] = ()
    banned: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Sampled:
    """A sampled token.

    logprob: natural logarithm of the token's probability. top: (id, log probability) of the most
    probable tokens, ties by id. Both are the model's own, before any option changes the logits;
    None and empty unless the options ask for them.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


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


def _biases(value: object) -> tuple[tuple[int, float], ...]:
    pairs = list(value.items() if isinstance(value, Mapping) else _pairs(value))
    biases = {_whole(token): _number(bias) for token, bias in pairs}
    if len(biases) != len(pairs):  # an id given twice
        raise TypeError
    return tuple(sorted(biases.items()))


def _pairs(value: object) -> tuple[tuple[object, object], ...]:
    if not isinstance(value, tuple | list):
        raise TypeError
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in value):
        raise TypeError
    return tuple((token, bias) for token, bias in value)


# Annotation of a field -> its converter, and its name for messages. numpy numbers are accepted.
_TYPES: dict[str, tuple[Callable[[object], object], str]] = {
    "int": (_whole, "a whole number"),
    "float": (_number, "a number"),
    "bool": (_switch, "True or False"),
    "str": (_string, "a string"),
    "tuple[str, ...]": (_strings, 'a tuple of strings, as in ("moves",)'),
    "LogitBias": (_biases, "a mapping from ids, each once, to numbers, as in {5: -100}"),
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


def sample_rows(logits: Logits, requests: Sequence[SampleRequest]) -> list[Sampled]:
    """Sample the next token of each row of `logits` [b, u]; a row's answer is that of `sample`.

    Rows are computed one after another: the arrays of one row stay in the CPU's cache, those of
    several in one array are 3.5 times slower a row at 32,004 ids.
    """
    return [_sample_row(row, request) for row, request in zip(logits, requests, strict=True)]


def sample(
    logits: Logits,
    sampling: TextSampling,
    uniform: float,
    *,
    seen: Sequence[int] = (),
    banned: Collection[int] = (),
) -> int:
    """Sample the next token's id from `logits` [u] with one number `uniform` in [0, 1).

    seen: ids that the penalties apply to. banned: ids that are never sampled.
    """
    return _sample_row(logits, SampleRequest(sampling, uniform, seen, frozenset(banned))).token


def _sample_row(logits: Logits, request: SampleRequest) -> Sampled:
    token = _next_token(logits, request)
    if request.sampling.logprobs is None:
        return Sampled(token)
    logprobs = log_softmax(logits)
    return Sampled(token, float(logprobs[token]), largest(logprobs, request.sampling.logprobs))


def _next_token(logits: Logits, request: SampleRequest) -> int:
    how = request.sampling
    scores = processed(logits, how, request.seen, request.banned)
    if how.temperature == 0:
        return int(scores.argmax())
    if how.temperature != 1:
        scores = scores / np.float32(how.temperature)
    return draw(scores, candidates(scores, how), request.uniform)


def processed(
    scores: Scores, how: TextSampling, seen: Sequence[int], banned: Collection[int]
) -> Scores:
    """Logits, or log probabilities, [u] with the bias, the penalties for the ids in `seen` and
    minus infinity for banned ids."""
    scores = penalise_repetition(add_bias(scores, how), seen, how.repetition_penalty)
    scores = penalise_presence(scores, seen, how.presence_penalty, how.frequency_penalty)
    return ban(scores, banned)


def add_bias(logits: Scores, sampling: TextSampling) -> Scores:
    """Add the biases of `sampling.logit_bias` to the logits [u]."""
    if not sampling.logit_bias:
        return logits
    sampling.check_ids(len(logits))
    scores, bias = logits.copy(), dict(sampling.logit_bias)
    scores[list(bias)] += np.array(list(bias.values()), np.float32)
    return scores


def penalise_repetition(logits: Scores, seen: Collection[int], penalty: float) -> Scores:
    """Divide positive logits of the ids in `seen` by the penalty, and multiply negative ones."""
    if penalty == 1 or not seen:
        return logits
    scores, ids = logits.copy(), list(set(seen))
    scores[ids] = np.where(scores[ids] < 0, scores[ids] * penalty, scores[ids] / penalty)
    return scores


def penalise_presence(
    logits: Scores, seen: Sequence[int], presence: float, frequency: float
) -> Scores:
    """Subtract from the logits of the ids in `seen` `presence`, and `frequency` for each time."""
    if not (presence or frequency) or not len(seen):
        return logits
    ids, counts = np.unique(np.asarray(seen), return_counts=True)
    scores = logits.copy()
    scores[ids] -= (presence + frequency * counts).astype(np.float32)
    return scores


def ban(logits: Scores, banned: Collection[int]) -> Scores:
    """Set the logits of banned ids to minus infinity."""
    if not banned:
        return logits
    scores = logits.copy()
    scores[list(banned)] = -np.inf
    return scores


def candidates(logits: Logits, how: TextSampling) -> NDArray[np.intp] | None:
    """Ids that top-k, top-p and min-p keep of `logits` [u], ascending; None for all.

    Top-k: the `top_k` largest logits and ties with the smallest of them. Top-p: the most probable
    tokens until their probabilities reach `top_p`, at least one; of equal logits the larger ids.
    Min-p: tokens at least `min_p` times as probable as the most probable one.
    """
    least_k = how.top_k if 0 < how.top_k < len(logits) else 0
    if not (least_k or how.top_p < 1 or how.min_p):
        return None
    # Each rule keeps an end of the sorted logits. The values alone are sorted: unlike a sort of
    # the ids, that is vectorised. Their order needs no ids, as equal logits have equal powers.
    ascending, first = np.sort(logits), 0
    if least_k:
        first = int(np.searchsorted(ascending, ascending[-least_k]))
    if how.top_p < 1:
        first = _first_of_top_p(ascending, first, how.top_p)
    if how.min_p:
        bound = np.float64(ascending[-1]) + math.log(how.min_p)
        first = max(first, int(np.searchsorted(ascending, bound)))
    smallest = ascending[first]
    kept = np.flatnonzero(~(logits < smallest))
    # A stable sort has the larger ids last among equal logits: the smaller ones are dropped.
    ties = first - int(np.searchsorted(ascending, smallest))
    if ties > 0:
        kept = np.delete(kept, np.flatnonzero(logits[kept] == smallest)[:ties])
    return kept


def _first_of_top_p(ascending: Logits, first: int, mass: float) -> int:
    """Index of the first logit that top-p keeps of `ascending`, from `first` on."""
    dropped = _first_beyond(_powers(ascending[first:]), 1 - mass)
    if dropped is not None:
        return first + dropped
    scores = ascending.copy()
    scores[:first] = -np.inf
    tail = np.cumsum(softmax(scores))
    return int(np.searchsorted(tail[:-1], 1 - mass, side="right"))


def draw(logits: Logits, kept: NDArray[np.intp] | None, uniform: float) -> int:
    """Sample one of the ids `kept` from softmax(`logits` [u]), as `inverse_cdf` does."""
    place = _first_beyond(_powers(logits if kept is None else logits[kept]), uniform)
    if place is not None:
        return place if kept is None else int(kept[place])
    scores = logits
    if kept is not None:
        scores = np.full_like(logits, -np.inf)
        scores[kept] = logits[kept]
    return inverse_cdf(softmax(scores), uniform)


def _first_beyond(values: Float64, share: float) -> int | None:
    """First index at which the cumulative sum of `values` exceeds `share` of their sum.

    None if a cumulative sum before or there is so close that another order of summation could give
    another index.
    """
    whole = len(values) // BLOCK * BLOCK
    blocks = np.cumsum(values[:whole].reshape(-1, BLOCK).sum(axis=1))
    total = values[whole:].sum() + (blocks[-1] if whole else 0)
    target = share * total
    block = int(np.searchsorted(blocks, target, side="right"))
    before = blocks[block - 1] if block else 0.0
    first = block * BLOCK
    sums = before + np.cumsum(values[first : first + BLOCK])
    place = int(np.searchsorted(sums, target, side="right"))
    if place == len(sums):
        return None
    below = sums[place - 1] if place else before
    # Above the sum of both orders' rounding errors, each at most n x eps of the total.
    margin = ROUNDING * len(values) * total
    certain = below < target - margin and sums[place] > target + margin
    return first + place if certain else None


def _powers(logits: Logits) -> Float64:
    """Exponentials of the logits less their maximum, in float64."""
    powers = np.subtract(logits, float(logits.max()), dtype=np.float64)
    return np.exp(powers, out=powers)  # in place: pages of a second array cost more than exp


def softmax(logits: Logits) -> Float64:
    """Probabilities in float64: in float32, rounding of the sum would grow with the vocabulary."""
    powers = _powers(logits)
    return powers / powers.sum()


def log_softmax(logits: Logits) -> Float64:
    """Natural logarithms of the probabilities of `logits` [u]."""
    less = logits.astype(np.float64) - float(logits.max())
    return less - math.log(float(np.exp(less).sum()))


def largest(values: Float64, count: int) -> tuple[tuple[int, float], ...]:
    """(index, value) of the `count` largest values [u], largest first, ties by index."""
    if count == 0:
        return ()
    count = min(count, len(values))
    smallest = np.partition(values, -count)[-count]
    candidates = np.flatnonzero(values >= smallest)
    order = candidates[np.argsort(-values[candidates], kind="stable")][:count]
    return tuple((int(index), float(values[index])) for index in order)


def inverse_cdf(probabilities: Float64, uniform: float) -> int:
    """First id whose cumulative probability exceeds `uniform`; never one of probability 0."""
    cumulative = np.cumsum(probabilities)
    chosen = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
    # Rounding may bring the product up to the sum, whose position lies beyond the last id.
    last = np.flatnonzero(probabilities)[-1]
    return int(min(chosen, last))
