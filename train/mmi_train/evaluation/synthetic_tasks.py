"""Evaluation on held-out documents of the synthetic world, with exact programmatic metrics.

Every metric is measured twice, with MMFS and as an ablation without it, and split by the number of
objects in the scene.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch
from tokenizers import Tokenizer

from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.system.progress import Progress, silent
from mmi_train.data.batches import batch_of
from mmi_train.data.corpus import MadeDocument
from mmi_train.data.document import ImagePart, TextPart
from mmi_train.data.pixels import images_from_pixels
from mmi_train.data.rows import TokenDocument, each_alone, make_rows, tokens_of
from mmi_train.data.synthetic.scene_reader import expected_segmentation, mean_iou, segmentation_of
from mmi_train.data.synthetic.tasks import (
    MAKERS,
    TaskDocument,
    TaskImage,
    TaskText,
    grade,
)
from mmi_train.data.synthetic.world import Scene, WorldConfig
from mmi_train.model.generation import draw_pictures
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.model.samplers import noise_of_steps, sampler

# Most tokens of a generated text.
MAX_ANSWER = 32

# Kinds of questions, by the answer.
TEXTS = ("caption", "question", "referring")
PICTURES = ("drawing", "segmentation", "story")
KINDS = TEXTS + PICTURES

ATTRIBUTES = ("background", "count", "shape", "colour", "place")


@dataclass
class Metrics:
    """Values by metric and number of objects in the scene; a metric is the mean of its values."""

    values: defaultdict[tuple[str, int], list[float]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def add(self, metric: str, objects: int, value: float) -> None:
        self.values[metric, objects].append(float(value))

    def names(self) -> list[str]:
        return sorted({metric for metric, _ in self.values})

    def mean(self, metric: str, objects: int | None = None) -> tuple[float, int]:
        """(mean, count) over scenes with `objects` objects; None: over all scenes."""
        chosen = [
            value
            for (name, count), values in self.values.items()
            if name == metric and objects in (None, count)
            for value in values
        ]
        return (float(np.mean(chosen)), len(chosen)) if chosen else (float("nan"), 0)


@dataclass(frozen=True)
class Sample:
    """One drawn picture with its prompt, context and expected picture, for the contact sheet."""

    kind: str
    prompt: str
    context: np.ndarray | None
    drawn: np.ndarray
    expected: np.ndarray
    correct: bool


@dataclass(frozen=True)
class Evaluation:
    """Metrics with MMFS and `without` it, and samples of the pictures drawn with it."""

    metrics: Metrics
    without: Metrics
    samples: tuple[Sample, ...]

    def as_json(self) -> dict:
        """Metrics as JSON values; `without_mmfs` only if it was measured."""
        table = {}
        for name in self.metrics.names():
            objects = sorted({count for metric, count in self.metrics.values if metric == name})
            value, count = self.metrics.mean(name)
            ablated, measured = self.without.mean(name)
            table[name] = {
                "value": value,
                "count": count,
                **({"without_mmfs": ablated} if measured else {}),
                "by_objects": {str(o): self.metrics.mean(name, o)[0] for o in objects},
            }
        return table


@dataclass(frozen=True)
class Question:
    """One target part of a document, and the tokens before it as a prompt."""

    document: TaskDocument
    target: int
    prompt: TokenDocument

    @property
    def part(self) -> TaskText | TaskImage:
        return self.document.parts[self.target]

    @property
    def scene(self) -> Scene:
        """Scene of the target picture, or of the picture that a target text describes."""
        if isinstance(self.part, TaskImage):
            return self.part.scene
        first = self.document.parts[0]
        assert isinstance(first, TaskImage)
        return first.scene


def without_mmfs(model: MMInterleaved) -> MMInterleaved:
    """Copy the model with MMFS ablated in the language model and the U-Net: it adds zero."""
    ablated = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in ablated.named_parameters():
            if name.endswith("look_back.gate") or (".look_back." in name and ".conv." in name):
                parameter.zero_()
    return ablated


def metric_of(question: str) -> str:
    """Metric of a question about a picture, by its wording."""
    kinds = {
        "how many": "count",
        "what is the background": "background",
        "where is": "place",
        "what is at": "object",
        "what colour": "colour",
        "what shape": "shape",
        "what size": "size",
        "which digit": "digit",
    }
    return next(f"answer: {kind}" for start, kind in kinds.items() if question.startswith(start))


def prompt_of(
    document: MadeDocument, target: int, tokenizer: Tokenizer, config: ModelConfig
) -> TokenDocument:
    """Prompt of a target: the document before it; for a picture, with its begin-of-image token."""
    part = document.parts[target]
    end = target + 1 if isinstance(part, ImagePart) else target
    made = tokens_of(
        document.parts[:end], each_alone(tokenizer), config.tokens, config.visual_tokens
    )
    if isinstance(part, TextPart):  # without `</s>`: the model continues the text
        made = TokenDocument(
            made.token_ids[:-1], made.weight[:-1], made.images, made.encoded, made.drawn
        )
    return made


class Evaluator:
    """Answers questions with one model: greedy texts, pictures by its `sampler`.

    `steps`, `guidance`: None for those of the model, 20 and 3.5 unless it is distilled."""

    def __init__(
        self,
        model: MMInterleaved,
        tokenizer: Tokenizer,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        full_every: int = 1,
        seed: int = 0,
        batch: int = 16,
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.steps, self.guidance, self.full_every = steps, guidance, full_every
        self.seed, self.batch = seed, batch

    def prompt(self, document: MadeDocument, target: int) -> TokenDocument:
        """Prompt of a target; see `prompt_of`."""
        return prompt_of(document, target, self.tokenizer, self.model.config)

    @torch.inference_mode()
    def write(self, prompts: list[TokenDocument]) -> list[str]:
        """Greedy continuations, each up to and including its first full stop or end token."""
        config = self.model.config
        stops = {*config.tokens.ends, config.tokens.boi, self.tokenizer.token_to_id(".")}
        written: list[list[int]] = [[] for _ in prompts]
        batch = batch_of(make_rows(prompts, config.tokens), config)
        images = self.model.encode_images(batch.pixels)
        open_rows = list(range(len(prompts)))
        for _ in range(MAX_ANSWER):
            extended = [
                np.concatenate([prompts[row].token_ids, np.array(written[row], np.int64)])
                for row in open_rows
            ]
            width = max(len(ids) for ids in extended)
            ids = torch.full((len(open_rows), width), config.tokens.pad)
            for row, tokens in enumerate(extended):
                ids[row, : len(tokens)] = torch.from_numpy(tokens)
            hidden = self.model.read(ids, images, batch.image_slot[open_rows])
            last = torch.tensor([len(tokens) - 1 for tokens in extended])
            logits = self.model.head(hidden[torch.arange(len(last)), last]).float()
            logits[:, config.tokens.image] = -torch.inf
            for row, token in zip(open_rows, logits.argmax(-1).tolist(), strict=True):
                written[row].append(token)
            open_rows = [row for row in open_rows if written[row][-1] not in stops]
            if not open_rows:
                break
        return [self.tokenizer.decode(ids) for ids in written]

    @torch.inference_mode()
    def draw(self, prompts: list[TokenDocument]) -> list[np.ndarray]:
        """Draw the picture of each prompt's last begin-of-image token, uint8 [height, width, 3]."""
        model, config = self.model, self.model.config
        batch = batch_of(make_rows(prompts, config.tokens), config)
        last = torch.tensor([[row, len(prompt.images) - 1] for row, prompt in enumerate(prompts)])
        scheduler = sampler(config.image_decoder, self.steps)
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn((len(prompts), *model.image_decoder.latent_shape), generator=generator)
        pixels = draw_pictures(
            model,
            batch.token_ids,
            batch.pixels,
            batch.image_slot,
            last,
            noise,
            scheduler,
            guidance=self.guidance,
            full_every=self.full_every,
            step_noise=noise_of_steps(scheduler, noise, generator),
        )
        return images_from_pixels(pixels)

    def run(
        self,
        questions: list[Question],
        metrics: Metrics,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[np.ndarray | str]:
        """Answer and grade all questions; returns the answers in the order of the questions.
        progress: called with the numbers of questions answered and in all."""
        produced: list[np.ndarray | str] = []
        # Batches of similar length have little padding.
        order = sorted(range(len(questions)), key=lambda index: questions[index].prompt.size)
        answers: dict[int, np.ndarray | str] = {}
        for start in range(0, len(order), self.batch):
            progress(start, len(order))
            chunk = order[start : start + self.batch]
            prompts = [questions[index].prompt for index in chunk]
            is_picture = isinstance(questions[chunk[0]].part, TaskImage)
            made = self.draw(prompts) if is_picture else self.write(prompts)
            answers.update(zip(chunk, made, strict=True))
        for index, question in enumerate(questions):
            _grade(question, answers[index], metrics)
            produced.append(answers[index])
        return produced


def _grade(question: Question, produced: np.ndarray | str, metrics: Metrics) -> None:
    """Grade one answer and add the result to every metric that it counts for."""
    document, part = question.document, question.part
    objects = len(question.scene.objects)
    result = grade(document, question.target, produced)
    if isinstance(part, TaskText):
        if part.role == "question":
            before = document.parts[question.target - 1]
            assert isinstance(before, TaskText)
            metrics.add("answer: all", objects, result.correct)
            metrics.add(metric_of(before.text), objects, result.correct)
        elif part.role == "referring":
            metrics.add("box: IoU > 0.5", objects, result.correct)
            metrics.add("box: mean IoU", objects, result.value)
        else:
            metrics.add("caption: exact", objects, result.correct)
        return
    assert result.scene is not None and isinstance(produced, np.ndarray)
    kind = document.kind
    metrics.add(f"{kind}: whole scene", objects, result.correct)
    for attribute in ATTRIBUTES:
        metrics.add(f"{kind}: {attribute}", objects, getattr(result.scene, attribute))
    scene_right = result.scene.place and result.scene.colour
    metrics.add(f"{kind}: place and colour", objects, scene_right)
    classes = 1 + len(document.config.segment_classes)
    iou = mean_iou(
        segmentation_of(produced, document.config),
        expected_segmentation(part.scene, document.config),
        classes,
    )
    metrics.add(f"{kind}: mIoU", objects, iou)


class Prompter(Protocol):
    """Maker of prompts: an `Evaluator`, or another runtime that answers the same questions."""

    def prompt(self, document: TaskDocument, target: int) -> TokenDocument:
        """Prompt of a target; see `prompt_of`."""


def questions_of(
    evaluator: Prompter, world: WorldConfig, count: int, seed: int
) -> Iterator[tuple[str, list[Question]]]:
    """Draw `count` held-out questions of every kind, the same for every model."""
    for index, kind in enumerate(KINDS):
        rng = np.random.default_rng([seed, index])
        found: list[Question] = []
        while len(found) < count:
            document = MAKERS[kind](rng, world, "held_out")
            for target in document.targets:
                found.append(Question(document, target, evaluator.prompt(document, target)))
        yield kind, found[:count]


def sample_of(question: Question, produced: np.ndarray) -> Sample:
    """A drawn picture beside what it was drawn from and what was expected."""
    parts = question.document.parts
    texts = [part.text for part in parts[: question.target] if isinstance(part, TaskText)]
    pictures = [part.image for part in parts[: question.target] if isinstance(part, TaskImage)]
    expected = question.part
    assert isinstance(expected, TaskImage)
    return Sample(
        question.document.kind,
        texts[-1],
        pictures[-1] if pictures else None,
        produced,
        expected.image,
        grade(question.document, question.target, produced).correct,
    )


def evaluate(
    model: MMInterleaved,
    tokenizer: Tokenizer,
    world: WorldConfig,
    *,
    count: int = 96,
    steps: int | None = None,
    guidance: float | None = None,
    full_every: int = 1,
    seed: int = 0,
    without: bool = True,
    progress: Progress = silent,
) -> Evaluation:
    """Evaluate on `count` held-out questions of every kind, with MMFS and, if `without`, without
    it.

    `steps`, `guidance`: see `Evaluator`. `full_every`: see `ImageDecoder.draw`. `on_progress` gets
    a description of each step."""
    with_mmfs, ablated, samples = Metrics(), Metrics(), []
    for name, subject, metrics in (
        ("with MMFS", model, with_mmfs),
        ("MMFS off", without_mmfs(model) if without else None, ablated),
    ):
        if subject is None:
            continue
        evaluator = Evaluator(
            subject, tokenizer, steps=steps, guidance=guidance, full_every=full_every, seed=seed
        )
        for kind, questions in questions_of(evaluator, world, count, seed):
            produced = evaluator.run(questions, metrics, partial(progress, f"{kind}, {name}"))
            if metrics is with_mmfs:
                samples += [
                    sample_of(question, picture)
                    for question, picture in zip(questions, produced, strict=True)
                    if isinstance(picture, np.ndarray)
                ][:16]
    return Evaluation(with_mmfs, ablated, tuple(samples))
