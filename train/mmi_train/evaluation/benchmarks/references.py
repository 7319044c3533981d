"""Questions of evaluation sets with what is right, from the samples of the data set's reader.

The same reader gives the questions that a model is asked and the references that its answers are
scored with, so that both have the same order, ids and splits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from mmi_deploy.errors import MmiError
from mmi_train.data.readers.data_set import DataSet
from mmi_train.data.readers.pictures import Picture
from mmi_train.data.readers.questions import DUPLICATE, MALFORMED, UNANSWERED
from mmi_train.data.readers.sample import Sample, Skipped
from mmi_train.evaluation.metrics.boxes import Box

# Keys of a sample's `about` that tell the part of the set that it belongs to.
_PARTS = ("answer_type", "kind", "domain")

# Keys of a sample's `about` that name its picture.
_FILE, _IMAGE = "image", "image_id"


class AnnotationError(MmiError):
    """Annotations of a data set that answers cannot be scored with."""


@dataclass(frozen=True)
class Form:
    """Form in which samples of a set become references.

    numbered: ids are the samples' numbers, since the set has none or repeats them. merged: samples
    of one id are one question with all their answers. given: the picture that counts is the one
    that the model is given (a map), not those that it draws. id_key: the id's name in the official
    submission. also: further values of `about` that it repeats.
    """

    numbered: bool = False
    merged: bool = False
    given: bool = False
    id_key: str = ""
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reference:
    """One question.

    id: the set's own. number: of its sample, from 0. other_ids: further names by which predictions
    may call it. answers: right answers or captions; none if they are not published. group: part of
    the set whose score is given apart. box, size: in pixels, with the picture's width and height.
    relevance: of each answer option. pictures: the real ones, in the order in which the model draws
    them, or the map of labels. fields: values that the official submission repeats.
    """

    id: str
    number: int
    other_ids: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    group: str = ""
    box: Box | None = None
    size: tuple[float, float] | None = None
    relevance: tuple[float, ...] = ()
    pictures: tuple[Picture, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answered(self) -> bool:
        """True if the annotations say what is right."""
        return bool(self.answers or self.box or self.relevance or self.pictures)


@dataclass(frozen=True)
class References:
    """Questions of a split in its order. left_out: number of samples without one, by reason."""

    questions: Sequence[Reference]
    left_out: Counter[str]


def references_of(data: DataSet[Any], kind: str, form: Form) -> References:
    """Questions of an opened split. kind: of the answers, `text`, `ranks` or `image`.

    Raises `AnnotationError` for entries that are malformed or have the same id: scores without them
    would be of another set.
    """
    _check(data, data.skipped, data.examples)
    found: list[Reference] = []
    left_out = Counter({UNANSWERED: data.skipped[UNANSWERED]})
    for number in range(len(data)):
        try:
            found.append(_reference(data.sample(number), number, kind, form))
        except Skipped as reason:
            _check(data, [reason.reason], {reason.reason: str(reason)})
            left_out[reason.reason] += 1
    if any(one.answered for one in found):
        left_out[UNANSWERED] += sum(not one.answered for one in found)
        found = [one for one in found if one.answered]
    if form.merged:
        found = _merged(found)
    for name, count in Counter(one.id for one in found).items():
        if count > 1:
            raise AnnotationError(f"{data.files[-1]} has two questions of the id {name}")
    names = [name for one in found for name in one.other_ids]
    if len(set(names)) < len(names):  # names that questions share, such as captions of a picture
        found = [replace(one, other_ids=()) for one in found]
    return References(found, +left_out)


def _check(
    data: DataSet[Any], reasons: Sequence[str] | Counter[str], examples: Mapping[str, str]
) -> None:
    """Raise `AnnotationError` if samples were left out that a score must not miss."""
    path = data.files[-1] if data.files else data.folder.path
    if MALFORMED in reasons:
        raise AnnotationError(
            f"{path} is not of the published form: {examples[MALFORMED]}",
            fix="take the annotations of the version that docs/data.md names",
        )
    if DUPLICATE in reasons:
        raise AnnotationError(f"{path} has two questions of the id {examples[DUPLICATE]}")


def _reference(sample: Sample, number: int, kind: str, form: Form) -> Reference:
    about, answers = sample.about, sample.answers if kind == "text" else ()
    drawn = [part.picture for part in sample.pictures if part.learn is not form.given]
    box = None
    if "bbox" in about:
        left, top, right, bottom = about["bbox"]
        box = float(left), float(top), float(right), float(bottom)
    own = str(sample.id)
    ids = [str(number), own] if form.numbered else [own]
    ids = list(dict.fromkeys([*ids, *_names(sample, drawn, kind, form)]))
    fields = {form.id_key: sample.id} if form.id_key else {}
    return Reference(
        ids[0],
        number,
        tuple(ids[1:]),
        answers,
        group=str(next((about[key] for key in _PARTS if key in about), "")),
        box=box,
        size=None if box is None else (float(about["width"]), float(about["height"])),
        relevance=tuple(about.get("gt_relevance", ())) if kind == "ranks" else (),
        pictures=tuple(drawn) if kind == "image" else (),
        fields=fields | {key: about[key] for key in form.also},
    )


def _names(sample: Sample, drawn: Sequence[Picture], kind: str, form: Form) -> Iterator[str]:
    """Names of the picture that a question is about or asks for, if it is the only one of it."""
    found: list[str] = []
    if form.merged or _FILE in sample.about:
        found += [str(sample.about[key]) for key in (_FILE, _IMAGE) if key in sample.about]
        found += [part.picture.name for part in sample.pictures]
    elif kind == "image" and len(drawn) == 1:
        found += [drawn[0].name]
    for name in found:
        path = PurePosixPath(name)
        yield from (name, path.name, path.stem)


def _merged(references: Sequence[Reference]) -> list[Reference]:
    """One question of each id, with the answers of all."""
    found: dict[str, Reference] = {}
    for one in references:
        first = found.get(one.id)
        answers = one.answers if first is None else first.answers + one.answers
        found[one.id] = replace(first or one, answers=answers)
    return list(found.values())


def groups_of(references: Sequence[Reference]) -> list[str]:
    """Names of the parts of a set, in order of their first question."""
    return list(dict.fromkeys(one.group for one in references if one.group))
