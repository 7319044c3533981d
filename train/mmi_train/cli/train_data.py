"""Documents of `mmi train`: of a file, a data set, or the mixture of a recipe, which is shown."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from mmi_deploy.cli.console import print_table
from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import read_config
from mmi_train.data.documents import Documents
from mmi_train.data.mixture import MixedDocuments
from mmi_train.data.readers.mixture import open_mixture
from mmi_train.data.readers.training import SetDocuments, documents_at
from mmi_train.training.settings import Settings
from mmi_train.weights.model_folder import CONFIG


def documents_of(data: Path, images: Path | None, asked: Settings) -> Documents:
    """Documents at `data`: a folder holds the data sets of the recipe, a folder for each. Raises
    `MmiError`."""
    if not data.is_dir():
        return documents_at(data, images)
    if images is not None:
        raise ConfigError("data sets know where their pictures are", fix="leave --images out")
    if asked.packed and asked.steps is None:
        raise ConfigError(
            "packed rows have no epochs: documents are cut", fix="give --steps in their place"
        )
    return open_mixture(data, asked.data, rows=asked.batch, seed=asked.seed)


def print_mixture(out: Console, documents: Documents, asked: Settings) -> None:
    """Print the data sets of a mixture: samples, shares, caps, prompts, what is augmented."""
    if not isinstance(documents, MixedDocuments):
        return
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True)
    for heading, justify in (
        ("data set", "left"),
        ("split", "left"),
        ("samples", "right"),
        ("left out", "right"),
        ("share", "right"),
        ("rows", "left"),
        ("prompt", "left"),
        ("augmentation", "left"),
    ):
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    total = sum(source.weight for source in documents.sources)
    for source in documents.sources:
        assert isinstance(source.documents, SetDocuments)
        data, shape, choice = source.documents.data, source.shape, asked.data[source.name]
        rows = "no packing"
        if asked.packed:
            most = f" of at most {shape.images} pictures" if shape.images else ""
            rows = f"{shape.rows}{most}, cut by {shape.truncation}"
        table.add_row(
            source.name,
            data.split,
            str(len(data)),
            str(data.skipped.total()),
            f"{100 * source.weight / total:.1f} %",
            rows,
            choice.prompt or "its own",
            "mirrored" if choice.mirror else "none",
        )
    for name, choice in asked.data.items():
        if choice.weight == 0:
            table.add_row(name, "", "", "", "0 %", "left out", "", "")
    print_table(out, table)


def size_remarks(model: Path, asked: Settings) -> list[str]:
    """Lines about sizes of pictures for which a recipe was made, and which the model does not
    take."""
    config = read_config(model / CONFIG)
    found = []
    for what, wanted, own in (
        ("given", asked.given_pixels, config.vision.image_size),
        ("drawn", asked.drawn_pixels, config.image_decoder.image_size),
    ):
        if wanted is not None and wanted != own:
            found.append(
                f"the recipe was made for pictures of {wanted} pixels that are {what}; "
                f"{model} takes {own}"
            )
    return found
