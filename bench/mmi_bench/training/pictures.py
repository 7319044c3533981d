"""Measure how fast training pictures are read, decoded and made into both sizes, on one core.

    python -m mmi_bench.training.pictures

The pictures are JPEGs of 640 x 480, noise over smooth colours; times are CPU time.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image

from mmi_deploy.cli import program
from mmi_train.data.document import ImagePart
from mmi_train.data.document_file import DocumentFile
from mmi_train.data.pixels import pixels_at

# Sides of the encoder's and of the image decoder's pictures.
SIDES = ((224, 256), (224, 512), (448, 512))

PICTURES, ROUNDS = 40, 5


def write_documents(folder: Path, count: int) -> Path:
    """Write documents of a picture each; returns their file."""
    draw = np.random.default_rng(0)
    lines = []
    for index in range(count):
        colours = Image.fromarray(draw.integers(0, 256, (60, 80, 3), np.uint8))
        smooth = colours.resize((640, 480), Image.Resampling.BICUBIC)
        noise = Image.fromarray(draw.integers(0, 256, (480, 640, 3), np.uint8))
        Image.blend(smooth, noise, 0.12).save(folder / f"{index}.jpg", quality=90)
        lines.append(json.dumps([{"text": "a"}, {"image": f"{index}.jpg"}]))
    path = folder / "documents.jsonl"
    path.write_text("\n".join(lines))
    return path


def pictures_per_second(file: DocumentFile, sides: tuple[int, int]) -> float:
    """Pictures of `file` read and resized to both `sides` in a second of CPU time."""
    begun = time.process_time()
    for index in range(len(file)):
        for part in file.parts(index):
            if isinstance(part, ImagePart):
                for side in sides:
                    pixels_at([part.image], side)
    return len(file) / (time.process_time() - begun)


def pictures(
    count: Annotated[int, typer.Option(min=1, help="Pictures.")] = PICTURES,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = ROUNDS,
) -> int:
    """Measure how many training pictures one core reads, decodes and resizes in a second."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        file = DocumentFile(write_documents(Path(folder), count))
        size = median(path.stat().st_size for path in Path(folder).glob("*.jpg"))
        typer.echo(f"JPEG, 640 x 480, {size / 1e3:.0f} kB")
        for sides in SIDES:
            found = sorted(pictures_per_second(file, sides) for _ in range(rounds))
            typer.echo(
                f"{sides[0]} and {sides[1]} pixels: {median(found):.0f} pictures/s "
                f"({found[0]:.0f} to {found[-1]:.0f})"
            )
    return 0


run = program.program("pictures", pictures)

if __name__ == "__main__":
    program.main(run)
