"""Files of predictions: JSONL, a question a line.

    {"id": 262148000, "text": "down"}
    {"id": 185565, "scores": [-3.2, -0.7, -1.5]}
    {"id": "ADE_val_00000001", "image": "pictures/1.png"}
    {"id": "s_01_e_02_shot_000002_000003", "images": ["1.png", "2.png", "3.png", "4.png"]}

`id`: the set's own question or image id; where it has none, the sample's number from 0. `scores`
rank the options of Visual Dialog (or `ranks`, from 1). `image` is a file, named from the folder of
the JSONL; `images` are those of a story, in its order. Other keys are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal, TypeGuard

from mmi_deploy.errors import MmiError
from mmi_deploy.system.files import open_regular
from mmi_train.evaluation.benchmarks.references import Reference
from mmi_train.evaluation.metrics.ndcg import ranks_of

Kind = Literal["text", "ranks", "image"]

# Scores beyond it are no numbers of a model, NaN included.
_GREATEST = 1e300

_KEYS: dict[Kind, str] = {"text": "text", "ranks": "scores", "image": "image"}


class PredictionError(MmiError):
    """A file of predictions that is not understood, or belongs to another set."""


@dataclass(frozen=True)
class Prediction:
    """One answer, of which the kind that a benchmark asks for is set."""

    text: str = ""
    ranks: tuple[int, ...] = ()
    images: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Matched:
    """Predictions in the order of the references; None where one is missing.

    remarks: lines for the user about how ids were understood.
    """

    predictions: tuple[Prediction | None, ...]
    remarks: tuple[str, ...] = ()

    @property
    def answered(self) -> int:
        return sum(prediction is not None for prediction in self.predictions)

    @property
    def missing(self) -> int:
        return len(self.predictions) - self.answered


def read_predictions(path: Path, kind: Kind) -> dict[str, Prediction]:
    """Predictions by id, as text. Raises `PredictionError`, which names the line."""
    found: dict[str, Prediction] = {}
    lines: dict[str, int] = {}
    try:
        with TextIOWrapper(open_regular(path), encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"line {number} of {path}"
                value = _object(line, where)
                name = _id(value, where)
                if name in found:
                    raise PredictionError(
                        f"lines {lines[name]} and {number} of {path} have the same id",
                        expected="one prediction for each question",
                        got=name,
                    )
                found[name], lines[name] = _prediction(value, kind, path.parent, where), number
    except OSError as error:
        raise PredictionError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise PredictionError(f"{path} is not UTF-8 text", fix="save it as UTF-8") from None
    if not found:
        raise PredictionError(f"{path} holds no prediction")
    return found


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise PredictionError(
            f"{where} is no JSON object",
            expected='a line such as {"id": 1, "text": "yes"}',
            got=line.strip()[:80],
        )
    return value


def _id(value: dict[str, Any], where: str) -> str:
    name = value.get("id")
    if isinstance(name, bool) or not isinstance(name, int | str) or name == "":
        raise PredictionError(
            f"{where} has no id", expected="a text or a whole number", got=json.dumps(name)
        )
    return str(name)


def _prediction(value: dict[str, Any], kind: Kind, folder: Path, where: str) -> Prediction:
    if kind == "text" and isinstance(value.get("text"), str):
        return Prediction(text=value["text"])
    if kind == "image":
        files = value["images"] if "images" in value else [value.get("image")]
        if isinstance(files, list) and files and all(_is_name(name) for name in files):
            return Prediction(images=tuple(folder / name for name in files))
    if kind == "ranks" and _numbers(value.get("scores")):
        return Prediction(ranks=tuple(ranks_of(value["scores"])))
    if kind == "ranks" and _numbers(ranks := value.get("ranks")):
        if sorted(ranks) != list(range(1, len(ranks) + 1)):
            raise PredictionError(f"{where} has ranks that are not 1 to {len(ranks)}, each once")
        return Prediction(ranks=tuple(int(rank) for rank in ranks))
    key = _KEYS[kind]
    raise PredictionError(
        f'{where} has no "{key}" for this benchmark',
        expected={
            "text": "a text",
            "ranks": "a list of numbers, one for each option",
            "image": "the path of a picture, or a list of them as `images`",
        }[kind],
        got=json.dumps(value.get(key))[:80],
    )


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value) and "\0" not in value


def _numbers(value: object) -> TypeGuard[list[float]]:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(number, int | float)
            and not isinstance(number, bool)
            and abs(number) <= _GREATEST
            for number in value
        )
    )


def match(
    predictions: dict[str, Prediction], references: Sequence[Reference], what: str, path: Path
) -> Matched:
    """Order predictions as the references are.

    Ids are the set's own or other names of the samples; if none of them occurs, numbers from 0.
    what: the benchmark and split, for errors. Raises `PredictionError` if no
    id belongs to the set.
    """
    numbers = {str(reference.number): place for place, reference in enumerate(references)}
    named = {name: place for place, one in enumerate(references) for name in one.other_ids}
    named |= {reference.id: place for place, reference in enumerate(references)}
    # Numbers may name samples of any set: one that is too large shows that they mean another.
    known = {str(number) for number in range(references[-1].number + 1)}
    tables = [named, *([numbers] if predictions.keys() <= known else [])]
    places = next((table for table in tables if predictions.keys() & table.keys()), None)
    if places is None:
        raise PredictionError(
            f"no id of {path} is in {what}",
            expected=f"ids such as {references[0].id}",
            got=next(iter(predictions)),
            fix="predictions of another set or split? Choose it with --benchmark and --split",
        )
    ordered: list[Prediction | None] = [None] * len(references)
    for name in predictions.keys() & places.keys():
        if ordered[places[name]] is not None:
            raise PredictionError(f"two ids of {path} mean the same sample of {what}", got=name)
        ordered[places[name]] = predictions[name]
    remarks = ["ids are taken as numbers of samples, from 0"] if places is numbers else []
    if strangers := [name for name in predictions if name not in places]:
        remarks.append(
            f"{len(strangers)} of {len(predictions)} predictions are left out: their ids, such as "
            f"{strangers[0]}, are not in {what}"
        )
    return Matched(tuple(ordered), tuple(remarks))
