"""Data sets of a recipe: what it says of each, and the mixture of those in a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from mmi_deploy.errors import ConfigError, DocumentError
from mmi_train.data.mixture import MixedDocuments, RowShape, Source
from mmi_train.data.packing import Truncation
from mmi_train.data.readers.data_set import Settings
from mmi_train.data.readers.image_text import ImageText
from mmi_train.data.readers.layouts import LAYOUTS
from mmi_train.data.readers.registry import entry_called, open_set
from mmi_train.data.readers.training import SetDocuments


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class SetChoice:
    """A data set in a recipe.

    `weight`: relative probability of the set, 0 to leave it out; "sqrt": the square root of its
    number of samples. `folder`: below the root, by default the set's name. `split`: by default the
    training split. `prompt`: a name of `templates.PROMPTS`, by default the set's own. `mirror`:
    mirror half of the pictures, with their boxes, maps and the words left and right. `rows`,
    `images`, `truncation`: packed rows of a micro-batch (by default the recipe's `batch`), the most
    pictures of each, and what is cut.
    """

    weight: Annotated[float, Field(ge=0)] | Literal["sqrt"] = "sqrt"
    folder: str | None = None
    split: str | None = None
    prompt: str | None = None
    mirror: bool = False
    rows: int | None = Field(default=None, ge=1)
    images: int | None = Field(default=None, ge=1)
    truncation: Truncation = "image"


def open_mixture(
    root: Path, choices: Mapping[str, SetChoice], *, rows: int = 1, seed: int = 0
) -> MixedDocuments:
    """Documents of the data sets of `choices` in the folder `root`, a folder for each.

    rows: packed rows of a set that does not choose. seed: of what the sets draw. Raises
    `ConfigError` if no set is left, and `DocumentError`, which says what a missing set consists of
    and where it is to be had.
    """
    used = {name: choice for name, choice in choices.items() if choice.weight != 0}
    if not used:
        raise ConfigError(
            "the recipe has no data sets to look for in a folder",
            expected="a recipe with tables such as [data.coco-caption], or a file of documents",
            got=str(root),
            fix="choose one with --recipe, as vqa_captions, or give --data FILE.jsonl",
        )
    for name in used:
        entry_called(name)
    folders = {name: root / (choice.folder or name) for name, choice in used.items()}
    missing = [name for name, folder in folders.items() if not folder.is_dir()]
    if missing:
        raise _missing(missing, folders, root)
    return MixedDocuments(
        [_source(name, choice, folders[name], rows, seed) for name, choice in used.items()]
    )


def _source(name: str, choice: SetChoice, folder: Path, rows: int, seed: int) -> Source:
    reader = entry_called(name).reader
    split = choice.split or next((one for one in reader.splits if one.startswith("train")), None)
    if split is None:
        raise ConfigError(
            f"the data set {name} is published without a training split",
            expected=f"--set data.{name}.split=NAME, one of {', '.join(reader.splits)}",
        )
    settings = Settings(split=split, prompt=choice.prompt, seed=seed, mirror=choice.mirror)
    try:
        documents = SetDocuments(open_set(name, folder, settings))
    except DocumentError as error:
        raise DocumentError(f"{error}. {_left_out([name])}") from None
    weight = len(documents) ** 0.5 if choice.weight == "sqrt" else choice.weight
    shape = RowShape(
        choice.rows or rows,
        choice.images,
        choice.truncation,
        only_after_image=issubclass(reader, ImageText) and not reader.text_learns,
    )
    return Source(name, documents, weight, shape)


def _missing(names: list[str], folders: Mapping[str, Path], root: Path) -> DocumentError:
    """Error that tells of the first missing set what it holds, and of the others their names."""
    first, *others = names
    entry = entry_called(first)
    more = f"; {', '.join(others)} are missing too" if others else ""
    return DocumentError(
        f"there is no folder {folders[first]} of the data set {first}{more}",
        expected=LAYOUTS.get(first, "what docs/data.md says of it"),
        fix=f"Get it from {entry.source}. {_left_out(names)}",
    )


def _left_out(names: Iterable[str]) -> str:
    options = " ".join(f"--set data.{name}.weight=0" for name in names)
    return f"Or leave it out: {options}"
