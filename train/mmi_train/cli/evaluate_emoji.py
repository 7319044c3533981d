"""Evaluation of a model of emoji, for `mmi evaluate --emoji`."""

from __future__ import annotations

import io
from pathlib import Path

from rich import box
from rich.table import Table

from mmi_deploy.cli.console import print_json, remarks, results
from mmi_deploy.documents.tokenizer import Tokenizer, read_tokenizer_file
from mmi_deploy.errors import ConfigError
from mmi_deploy.system.files import write_new_file
from mmi_deploy.system.progress import shown
from mmi_train.data.emoji.documents import EmojiCorpus
from mmi_train.data.emoji.emoji_set import read_set
from mmi_train.evaluation.contact_sheet import grouped_contact_sheet
from mmi_train.evaluation.emoji_tasks import EmojiEvaluation, evaluate
from mmi_train.weights.model_folder import TOKENIZER, load_model


def evaluate_emoji(
    model: Path,
    named: str,
    folder: Path,
    *,
    count: int,
    steps: int | None,
    guidance: float | None,
    seed: int,
    without: bool,
    pictures: Path | None,
    as_json: bool,
) -> None:
    """Print the accuracy of a model folder on an emoji set. named: the folder as it was given.
    pictures: file of a contact sheet."""
    with shown(remarks(), f"evaluating {named}") as progress:
        corpus = EmojiCorpus(read_set(folder))
        loaded = load_model(model)
        Tokenizer.open(model / TOKENIZER, loaded.config.tokens)
        tokenizer = read_tokenizer_file(model / TOKENIZER)
        if tokenizer.get_vocab() != corpus.tokenizer().get_vocab():
            raise ConfigError(
                f"{named} was not trained on the emoji of {folder}: their words differ",
                fix="name the set that it was trained on, or train it: mmi train-tiny --emoji DIR",
            )
        evaluation = evaluate(
            loaded,
            tokenizer,
            corpus,
            count=count,
            steps=steps,
            guidance=guidance,
            seed=seed,
            without=without,
            progress=progress,
        )
    if pictures is not None:
        sheet = io.BytesIO()
        grouped_contact_sheet(evaluation.samples).save(sheet, "PNG")
        write_new_file(pictures, sheet.getvalue())
    if as_json:
        print_json(_as_json(evaluation))
    else:
        results().print(_table(evaluation))


def _as_json(evaluation: EmojiEvaluation) -> dict[str, dict[str, object]]:
    ablated = evaluation.without.as_json()
    return {
        measure: {**row, **({"without_mmfs": ablated[measure]} if measure in ablated else {})}
        for measure, row in evaluation.scores.as_json().items()
    }


def _table(evaluation: EmojiEvaluation) -> Table:
    """Table of the measures, in shares of 1, of trained and of held-out names."""
    ablated = evaluation.without.as_json()
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("measure", no_wrap=True)
    off = ["trained, MMFS off", "held out, MMFS off"] if ablated else []
    for heading in ("asked", "trained", "held out", *off):
        table.add_column(heading, justify="right")
    for measure, row in evaluation.scores.as_json().items():
        shares = [row, *([ablated[measure]] if ablated else [])]
        cells = [share.get(split) for share in shares for split in ("train", "held_out")]
        texts = ["" if cell is None else f"{cell:.3f}" for cell in cells]
        table.add_row(measure, str(row["count"]), *texts)
    return table
