"""Validation in the loop: losses of held-out documents, and pictures drawn from prompts.

Every random draw is keyed by the document and the picture, so that values compare between steps and
between runs on the same file, whatever the batch and the number of ranks.
"""

from __future__ import annotations

import io
import json
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image, ImageDraw
from torch import Tensor

from mmi_deploy.errors import DocumentError
from mmi_deploy.system.files import write_file
from mmi_train.data.batches import batch_of
from mmi_train.data.documents import Documents
from mmi_train.data.pixels import images_from_pixels
from mmi_train.data.rows import TokenDocument, make_rows
from mmi_train.model.diffusion import scheduler_options
from mmi_train.model.generation import draw_pictures
from mmi_train.model.image_decoder import ImageDecoder, RandomDraws
from mmi_train.model.layout import moved
from mmi_train.model.mm_interleaved import Batch
from mmi_train.training.ranks import Ranks
from mmi_train.training.stages.documents import DocumentsStage
from mmi_train.training.stages.same_parts import all_parts, parts_of, with_parts

VALUES, BEST, SAMPLES = "validation.jsonl", "best.json", "samples"

# Most prompts of a grid, solver steps and guidance of its pictures.
MOST_SAMPLES, SOLVER_STEPS, GUIDANCE = 64, 20, 3.5

_COLUMNS, _MARGIN, _TEXT, _LARGEST = 4, 8, 44, 256
_PAPER, _INK = (225, 225, 225), (40, 40, 40)


@dataclass
class Validation:
    """Losses of the documents of `held_out`, and a grid of the pictures of `prompts` in
    `folder/samples`, every `every` steps. `stage`: that of the run, whose weights of the losses and
    micro-batch count here too.

    `folder` gets `validation.jsonl`, a line for each validation, and `best.json`, the least total
    of a step with a checkpoint. All ranks call all methods; the first one writes.
    """

    stage: DocumentsStage
    held_out: Documents | None
    prompts: Documents | None
    folder: Path
    every: int
    ranks: Ranks

    def __post_init__(self) -> None:
        self._seen: list[dict[str, float]] = []
        self._stages = {
            file: replace(self.stage, file=file)
            for file in (self.held_out, self.prompts)
            if file is not None
        }
        if self.prompts is not None and len(self.prompts) > MOST_SAMPLES:
            raise DocumentError(
                f"too many prompts for a grid: {self.prompts.name(0)} is the first",
                expected=f"at most {MOST_SAMPLES}",
                got=len(self.prompts),
            )

    def resume(self, step: int) -> None:
        """Forget what was measured after `step`, from which the run goes on."""
        self._seen = [
            value
            for value in self.ranks.gather(read_values(self.folder / VALUES))[0]
            if value["step"] <= step
        ]

    def due(self, step: int, last: int) -> bool:
        """True at the start, every `every` steps and at the end, unless it was done before."""
        done = any(value["step"] == step for value in self._seen)
        return not done and (step % self.every == 0 or step == last)

    def measure(self, step: int) -> dict[str, float]:
        """Losses at `step`, which `folder` gets too, and the grid. The module is in evaluation mode
        and takes no gradients. Raises `DocumentError` for a document that cannot be read."""
        values = {} if self.held_out is None else self._losses(self.held_out)
        self._seen.append({"step": step, **values})
        grid = None if self.prompts is None else self._grid(self.prompts)
        if self.ranks.main:
            if self.held_out is not None:
                lines = [json.dumps(value) + "\n" for value in self._seen]
                write_file(self.folder / VALUES, "".join(lines))
            if grid is not None:
                content = io.BytesIO()
                grid.save(content, "PNG")
                (self.folder / SAMPLES).mkdir(exist_ok=True)
                write_file(self.folder / SAMPLES / f"step-{step:08d}.png", content.getvalue())
        return values

    def best(self, checkpoints: int, last: int) -> int | None:
        """Step with the least total among those at which there was a checkpoint, every
        `checkpoints` steps and at the last; the first rank notes it in `folder`."""
        fitting = [
            value
            for value in self._seen
            if "total" in value
            and value["step"] > 0
            and (value["step"] % checkpoints == 0 or value["step"] == last)
            and math.isfinite(value["total"])
        ]
        if not fitting:
            return None
        found = min(fitting, key=lambda value: value["total"])
        if self.ranks.main:
            write_file(self.folder / BEST, json.dumps(found) + "\n")
        return int(found["step"])

    def _document(self, file: Documents, index: int) -> TokenDocument:
        try:
            return self._stages[file].document(index)
        except DocumentError as error:
            raise DocumentError(f"{file.name(index)} cannot be used: {error}") from None

    def _losses(self, file: Documents) -> dict[str, float]:
        model, size = self.stage.model, self.stage.documents
        device = model.boi_embedding.device
        starts = range(0, len(file), size)
        sums = torch.zeros(4, dtype=torch.float64)  # text, targets, image, pictures
        for first in range(0, len(starts), self.ranks.size):
            own = first + self.ranks.rank
            # A rank without documents of its own runs others with all.
            counts = own < len(starts)
            start = starts[own if counts else 0]
            numbers = range(start, min(start + size, len(file)))
            documents = [self._document(file, number) for number in numbers]
            batch = batch_of(make_rows(documents, model.config.tokens), model.config)
            parts = parts_of(batch)
            wanted = all_parts(self.ranks.gather(parts))
            keys = [
                (number, picture)
                for number, document in zip(numbers, documents, strict=True)
                for picture in range(sum(document.drawn))
            ]
            draws = None
            if parts.pictures:
                draws = keyed_draws(model.image_decoder, keys)
            batch = moved(with_parts(batch, wanted, model.config), device)
            losses = model(batch, draws=draws, image_weight=self.stage.image_weight)
            if counts:
                sums += _sums(batch, losses.text, losses.pictures if parts.pictures else None)
        text, targets, image, pictures = sum(self.ranks.gather(sums)).tolist()
        found = {"text": text / max(targets, 1.0), "image": image / max(pictures, 1.0)}
        weights = {"text": self.stage.text_weight, "image": self.stage.image_weight}
        return {"total": sum(weights[name] * value for name, value in found.items()), **found}

    def _grid(self, file: Documents) -> Image.Image:
        documents = [self._document(file, number) for number in range(len(file))]
        for number, document in enumerate(documents):
            if not any(document.drawn):
                raise DocumentError(
                    f"{file.name(number)} has no picture to draw",
                    fix='name one that the drawn one is set beside: {"image": "a.png"}',
                )
        size = self.stage.documents
        with self.ranks.gathered(self.stage.model):
            drawn = [
                picture
                for start in range(0, len(documents), size)
                for picture in self._drawn(documents[start : start + size], start)
            ]
        boi = self.stage.model.config.tokens.boi
        cells = []
        for document, picture in zip(documents, drawn, strict=True):
            last = _last_drawn(document)
            place = np.flatnonzero(document.token_ids == boi)[last]
            text = self.stage.tokenizer.decode(document.token_ids[:place].tolist())
            before = document.images[last - 1 : last] if last else ()
            cells.append((text, [*before, picture, document.images[last]]))
        return grid_of(cells)

    def _drawn(self, documents: list[TokenDocument], first: int) -> Iterator[np.ndarray]:
        """Draw the last picture of each document from what precedes it, uint8 [side, side, 3]."""
        model = self.stage.model
        device = model.boi_embedding.device
        batch = moved(batch_of(make_rows(documents, model.config.tokens), model.config), device)
        scheduler = DPMSolverMultistepScheduler(
            **scheduler_options(model.config.image_decoder.diffusion)
        )
        scheduler.set_timesteps(SOLVER_STEPS)
        keys = [(number, 0) for number in range(first, first + len(documents))]
        places = [[row, _last_drawn(document)] for row, document in enumerate(documents)]
        pixels = draw_pictures(
            model,
            batch.token_ids,
            batch.pixels,
            batch.image_slot,
            torch.tensor(places, device=device),
            keyed_draws(model.image_decoder, keys).noise,
            scheduler,
            guidance=GUIDANCE,
        )
        yield from images_from_pixels(pixels.float().cpu())


def read_values(path: Path) -> list[dict[str, float]]:
    """Lines of `validation.jsonl`; none where there is no such file or it is damaged."""
    try:
        return [dict(json.loads(line)) for line in path.read_text().splitlines()]
    except (OSError, ValueError):
        return []


def keyed_draws(decoder: ImageDecoder, keys: Sequence[tuple[int, int]]) -> RandomDraws:
    """Draws of pictures that depend on their keys alone; no condition is dropped."""
    rows = [
        decoder.random_draws(
            1,
            torch.Generator().manual_seed(int(np.random.default_rng(key).integers(2**62))),
        )
        for key in keys
    ]
    made = RandomDraws(
        *(torch.cat([getattr(row, part.name) for row in rows]) for part in fields(RandomDraws))
    )
    return replace(made, drop=torch.ones_like(made.drop))


def _sums(batch: Batch, text: Tensor, pictures: Tensor | None) -> Tensor:
    """Sum of the text's losses, of their weights, of the pictures' losses, and their number."""
    assert batch.layout is not None and batch.token_weight is not None
    row, column = batch.layout.target_row, batch.layout.target_column
    weight = batch.token_weight[row, column + 1].double().sum()
    found = [text.double() * weight, weight]
    if pictures is not None:
        real = pictures[~pictures.isnan()].double()
        found += [real.sum(), real.new_tensor(len(real))]
    else:
        found += [torch.zeros_like(weight)] * 2
    return torch.stack(found).cpu()


def _last_drawn(document: TokenDocument) -> int:
    return max(index for index, drawn in enumerate(document.drawn) if drawn)


def grid_of(cells: Sequence[tuple[str, Sequence[np.ndarray]]]) -> Image.Image:
    """Cells of pictures side by side (the one before, the drawn one, the expected one), with the
    text that they belong to below."""
    side = min(_LARGEST, max(64, *(len(pictures[-2]) for _, pictures in cells)))
    most = max(len(pictures) for _, pictures in cells)
    width, height = most * (side + 4) + _MARGIN, side + _TEXT + _MARGIN
    columns = min(_COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * width + _MARGIN, rows * height + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, (text, pictures) in enumerate(cells):
        left = _MARGIN + index % columns * width
        top = _MARGIN + index // columns * height
        for place, picture in enumerate(pictures):
            image = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(image, (left + place * (side + 4), top))
        lines = textwrap.wrap(text, width=max(most * side // 7, 10))[:3]
        pen.multiline_text((left, top + side + 4), "\n".join(lines), fill=_INK, spacing=1)
    return sheet
