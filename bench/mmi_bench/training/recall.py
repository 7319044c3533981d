"""Documents whose answers cannot be guessed, for a check that a fine-tuned model learned them.

    python -m mmi_bench.training.recall write FOLDER
    mmi train assets/tiny --data FOLDER/documents.jsonl -o run ...
    mmi export run/model -o bundle
    mmi generate FOLDER/questions.jsonl -o results.jsonl --bundle bundle --temperature 0
    python -m mmi_bench.training.recall score results.jsonl

The words are those of the drawn world, which the tiny model knows.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated, Literal

import typer

from mmi_deploy.cli import program
from mmi_deploy.errors import DocumentError
from mmi_deploy.system.output_folder import new_folder

DOCUMENTS = 200

_NUMBERS = "zero one two three four".split()
_COLOURS = "red green blue yellow purple cyan white black gray pink".split()
_SHAPES = "square ring cross triangle circle bar".split()
_PLACES = "top middle bottom left center right up down".split()


def pairs(count: int = DOCUMENTS, seed: int = 1) -> list[tuple[str, str]]:
    """Distinct questions, each with an answer at random."""
    draw = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        words = (draw.choice(one) for one in (_NUMBERS, _COLOURS, _PLACES, _NUMBERS))
        colour, shape, place = (draw.choice(one) for one in (_COLOURS, _SHAPES, _PLACES))
        found.setdefault(f"what is {' '.join(words)}?", f"the {colour} {shape} moves {place}.")
    return list(found.items())


def write(folder: Path) -> None:
    """Write the documents and their questions into a new folder."""
    made = pairs()
    documents = [[{"text": a, "learn": False}, {"text": f" {b}"}] for a, b in made]
    questions = [{"id": n, "parts": [{"text": a}]} for n, (a, _) in enumerate(made)]
    with new_folder(folder, kind="recall documents") as work:
        for name, lines in (("documents", documents), ("questions", questions)):
            (work / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def score(results: Path) -> tuple[int, int, int, int]:
    """Answers that came back whole, answers, words that came back in their places, and words.
    Raises `DocumentError` for results of other questions."""
    whole = same = total = 0
    made = pairs()
    written = [json.loads(line) for line in results.read_text().splitlines()]
    found = {one["id"]: one["parts"] for one in written if "id" in one}
    if found.keys() != set(range(len(made))):
        raise DocumentError(f"{results} does not answer these questions")
    for number, (_, answer) in enumerate(made):
        said = "".join(part.get("text", "") for part in found[number] if part.get("generated"))
        words, wanted = (text.replace(".", " .").split() for text in (said, answer))
        whole += words == wanted
        same += sum(a == b for a, b in zip(words, wanted, strict=False))
        total += len(wanted)
    return whole, len(made), same, total


def recall(
    what: Annotated[Literal["write", "score"], typer.Argument(help="write or score.")],
    path: Annotated[
        Path, typer.Argument(help="write: a new folder. score: the results of `mmi generate`.")
    ],
) -> int:
    """Write documents whose answers cannot be guessed, or score what a model says of them."""
    if what == "write":
        write(path)
        typer.echo(f"{path}: {DOCUMENTS} documents and their questions")
    else:
        whole, answers, same, words = score(path)
        typer.echo(f"{whole} of {answers} answers, {same} of {words} words")
    return 0


run = program.program("recall", recall)

if __name__ == "__main__":
    program.main(run)
