"""Measures of an ablated model on held-out documents: accuracies, IoU, colour errors and losses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import torch

from mmi_deploy.documents.images import resize
from mmi_deploy.system.progress import Progress, silent
from mmi_train.data.rows import TokenDocument
from mmi_train.data.synthetic.drawn_world import DrawnWorld
from mmi_train.data.synthetic.scene_reader import expected_segmentation
from mmi_train.data.synthetic.tasks import TaskImage
from mmi_train.data.synthetic.world import IMAGE_SIDE
from mmi_train.evaluation.synthetic_tasks import (
    PICTURES,
    Evaluator,
    Metrics,
    Question,
    Sample,
    sample_of,
)
from mmi_train.training.stages.interleaved import InterleavedStage

# Kinds of questions that a kind of training document prepares for.
_ASKED = {"reading": ("caption", "question", "referring")}

# Names of the measures of texts: those of other kinds are the evaluation's own.
_RENAMED = {
    "caption": {"caption: exact": "caption"},
    "question": {"answer: all": "question"},
    "digit": {"answer: all": "digit"},
    "shots": {"answer: all": "shots"},
}

# Samples of each kind of picture on a contact sheet.
_SAMPLES = 8


def measure(
    stage: InterleavedStage,
    questions: int,
    solver_steps: int,
    loss_batches: int,
    seed: int,
    progress: Progress = silent,
) -> tuple[dict[str, float], list[Sample]]:
    """Measure the model of `stage` on `questions` held-out questions of each kind that its mixture
    prepares for, the same for every model: measures by name (rates and IoU in percent), and drawn
    pictures. Texts without weight in the stage's loss are not asked for, nor pictures.

    `seed`: of the noise that pictures start from. `loss_batches`: micro-batches of the held-out
    losses, which are means over all kinds of documents.
    """
    evaluator = _Evaluator(stage.model, stage.tokenizer, steps=solver_steps, seed=seed)
    found: dict[str, float] = {}
    samples: list[Sample] = []
    for index, kind in enumerate(_kinds(stage)):
        asked = list(_questions(evaluator, stage, kind, index, questions))
        metrics = Metrics()
        made = evaluator.run(asked, metrics, partial(progress, f"measuring: {kind}"))
        names = _RENAMED.get(kind)
        for name in metrics.names():
            if names is None or name in names:
                found[name if names is None else names[name]] = 100 * metrics.mean(name)[0]
        drawn = [
            (question, picture)
            for question, picture in zip(asked, made, strict=True)
            if isinstance(picture, np.ndarray)
        ]
        if drawn:
            errors = [colour_error(question, picture) for question, picture in drawn]
            found[f"{kind}: colour error"] = float(np.mean(errors))
            samples += [sample_of(question, picture) for question, picture in drawn[:_SAMPLES]]
    return found | _losses(stage, loss_batches), samples


class _Evaluator(Evaluator):
    """Draws pictures of the world's size, whatever the model's."""

    def draw(self, prompts: list[TokenDocument]) -> list[np.ndarray]:
        drawn = super().draw(prompts)
        return [p if p.shape[0] == IMAGE_SIDE else resize(p, IMAGE_SIDE) for p in drawn]


def _kinds(stage: InterleavedStage) -> list[str]:
    kinds = [asked for kind in stage.mixture for asked in _ASKED.get(kind, (kind,))]
    return [k for k in kinds if stage.weights["image" if k in PICTURES else "text"]]


def _questions(
    evaluator: Evaluator, stage: InterleavedStage, kind: str, index: int, count: int
) -> Iterator[Question]:
    world = stage.corpus
    assert isinstance(world, DrawnWorld)
    rng = np.random.default_rng([0, index])
    while count > 0:
        document = world.document(kind, rng, "held_out")
        for target in document.targets[:count]:
            yield Question(document, target, evaluator.prompt(document, target))
            count -= 1


def colour_error(question: Question, drawn: np.ndarray) -> float:
    """Mean absolute error of the mean colours of the expected picture's regions, the background
    and each kind of shape, in steps of 255."""
    part = question.part
    assert isinstance(part, TaskImage)
    regions = expected_segmentation(part.scene, question.document.config)
    errors = [
        np.abs(drawn[regions == region].mean(0) - part.image[regions == region].mean(0)).mean()
        for region in np.unique(regions)
    ]
    return float(np.mean(errors))


@torch.no_grad()
def _losses(stage: InterleavedStage, batches: int) -> dict[str, float]:
    """Held-out losses; every draw is the same for every model."""
    sums: defaultdict[str, float] = defaultdict(float)
    for index in range(batches):
        torch.manual_seed(index)
        batch = stage.batch(index, np.random.default_rng([1, index]), "held_out")
        for name, value in _of(stage, stage.losses(batch)).items():
            sums[f"loss: {name}"] += float(value) / batches
    return dict(sums)


def _of(stage: InterleavedStage, losses: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    return {n: loss for n, loss in losses.items() if n in ("text", "image") and stage.weights[n]}
