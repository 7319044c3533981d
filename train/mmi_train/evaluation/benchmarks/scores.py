"""Scores of a benchmark: measures from references and predictions, a function per kind of set.

A missing prediction counts as a wrong one. Names without a remark are the official values, those
that tables compare; where a rule of the official code is not what its authors describe, the value
by the described rule stands beside it under a name of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from mmi_deploy.errors import ConfigError
from mmi_deploy.system.progress import Progress, silent
from mmi_train.evaluation.benchmarks.predictions import Prediction, PredictionError
from mmi_train.evaluation.benchmarks.references import Reference, groups_of
from mmi_train.evaluation.metrics import anls, boxes, captions, ndcg, relaxed_accuracy, vqa
from mmi_train.evaluation.metrics.caption_tokens import meteor, tokenizer
from mmi_train.evaluation.metrics.intervals import Measure, mean_of
from mmi_train.evaluation.metrics.segmenter import Segmenter, open_segmenter

# Rules of the published evaluation that are left out unless they are asked for.
Published = Literal["extract-answer", "first-sentence", "absent-classes-as-zero", "fid-64"]
PUBLISHED: tuple[Published, ...] = get_args(Published)


@dataclass(frozen=True)
class Total:
    """A value of the whole set, which is no function of sums over questions."""

    name: str
    value: float

    def total(self) -> float:
        """The value."""
        return self.value


@dataclass(frozen=True)
class Options:
    """published: rules of the published evaluation to follow. weights: folder of the networks that
    a metric needs. meteor: also score captions by METEOR, which takes Java half a minute.
    segmenter: makes maps of drawn pictures; without it predictions are maps. compared: also give
    measures that say the same as another here, since they may differ in the other file. progress:
    reports the reading of pictures."""

    published: frozenset[Published] = frozenset()
    weights: Path | None = None
    meteor: bool = False
    segmenter: Segmenter | None = None
    compared: bool = False
    progress: Progress = silent


def options_of(
    published: Sequence[str],
    weights: Path | None,
    meteor: bool,
    segmenter: str | None = None,
    data: Path | None = None,
) -> Options:
    """Options from names of published rules, and of a segmenter, which must not be code in `data`.
    Raises `MmiError`, which offers the nearest rule."""
    for name in published:
        if name not in PUBLISHED:
            near = get_close_matches(name, PUBLISHED, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"the published evaluation has no rule {name}",
                expected=", ".join(PUBLISHED),
                fix=f"the nearest one is {near}",
            )
    rules = frozenset(rule for rule in PUBLISHED if rule in published)
    opened = open_segmenter(segmenter, data or Path()) if segmenter is not None else None
    return Options(rules, weights, meteor, opened)


Metrics = list[Measure | Total]
Scorer = Callable[[Sequence[Reference], Sequence[Prediction | None], Options], Metrics]


def _by_group(
    name: str, values: Sequence[float | None], references: Sequence[Reference]
) -> list[Measure]:
    """The mean over all questions, then of each part of the set."""
    measures = [mean_of(name, values)]
    groups = groups_of(references)
    for group in groups if len(groups) > 1 else []:
        pairs = zip(values, references, strict=True)
        inside = [value if reference.group == group else None for value, reference in pairs]
        measures.append(mean_of(f"{name}, {group}", inside))
    return measures


def _short_answers(predictions: Sequence[Prediction | None], options: Options) -> list[str | None]:
    """Texts of predictions, by the published rule if it is asked for; None for a missing one."""
    texts = [None if prediction is None else prediction.text for prediction in predictions]
    if "extract-answer" not in options.published:
        return texts
    return [None if text is None else vqa.extract_answer(text) for text in texts]


def vqa_accuracy(*, vizwiz: bool = False) -> Scorer:
    """Official accuracy of VQA and the sets that share its code. vizwiz: by VizWiz's code."""

    def official(text: str, answers: Sequence[str]) -> float:
        if vizwiz:
            return vqa.accuracy(
                text, answers, few_full_stops=True, raw_answers=True, apostrophe="’"
            )
        return vqa.accuracy(text, answers, raw_when_unanimous=True, few_full_stops=True)

    def score(
        references: Sequence[Reference],
        predictions: Sequence[Prediction | None],
        options: Options,
    ) -> Metrics:
        answers = [reference.answers for reference in references]
        pairs = list(zip(_short_answers(predictions, options), answers, strict=True))
        found = [0.0 if text is None else official(text, given) for text, given in pairs]
        always = [0.0 if text is None else vqa.accuracy(text, given) for text, given in pairs]
        measures: Metrics = [*_by_group("accuracy", found, references)]
        if found != always or options.compared:
            measures.append(mean_of("accuracy, always normalised", always))
        return measures

    return score


def exact_accuracy(
    references: Sequence[Reference], predictions: Sequence[Prediction | None], options: Options
) -> Metrics:
    """Share of answers that equal the right one after VQA's normalisation (GQA)."""
    values = []
    for reference, text in zip(references, _short_answers(predictions, options), strict=True):
        right = {vqa.normalised(answer) for answer in reference.answers}
        values.append(float(text is not None and vqa.normalised(text) in right))
    return [*_by_group("accuracy", values, references)]


def anls_of(
    references: Sequence[Reference], predictions: Sequence[Prediction | None], options: Options
) -> Metrics:
    """ANLS, in percent."""
    return [
        mean_of(
            "ANLS",
            [
                0.0 if prediction is None else anls.anls(prediction.text, reference.answers)
                for reference, prediction in zip(references, predictions, strict=True)
            ],
        )
    ]


def relaxed(
    references: Sequence[Reference], predictions: Sequence[Prediction | None], options: Options
) -> Metrics:
    """Relaxed accuracy, of all questions and of people's and generated ones."""
    values = [
        float(
            prediction is not None
            and any(
                relaxed_accuracy.relaxed_match(prediction.text, answer)
                for answer in reference.answers
            )
        )
        for reference, prediction in zip(references, predictions, strict=True)
    ]
    return [*_by_group("relaxed accuracy", values, references)]


def box_accuracy(
    references: Sequence[Reference], predictions: Sequence[Prediction | None], options: Options
) -> Metrics:
    """Share of boxes with an IoU of at least one half, and the mean IoU."""
    overlaps = []
    for reference, prediction in zip(references, predictions, strict=True):
        assert reference.box is not None and reference.size is not None
        text = "" if prediction is None else prediction.text
        box = boxes.in_pixels(boxes.parse_box(text), *reference.size)
        overlaps.append(boxes.iou(box, reference.box))
    return [
        mean_of("IoU@0.5", [float(boxes.counts(overlap)) for overlap in overlaps]),
        mean_of("mean box IoU", np.nan_to_num(overlaps).tolist()),
    ]


def ranking(
    references: Sequence[Reference], predictions: Sequence[Prediction | None], options: Options
) -> Metrics:
    """NDCG; questions without a relevant option are left out."""
    values: list[float | None] = []
    for reference, prediction in zip(references, predictions, strict=True):
        if prediction is not None and len(prediction.ranks) != len(reference.relevance):
            raise PredictionError(
                f"the prediction of {reference.id} does not rank its options",
                expected=f"{len(reference.relevance)} scores",
                got=len(prediction.ranks),
            )
        if not any(reference.relevance):
            values.append(None)
        elif prediction is None:
            values.append(0.0)
        else:
            values.append(ndcg.ndcg(prediction.ranks, reference.relevance))
    return [mean_of("NDCG", values)]


def caption_scores(
    references: Sequence[Reference], predictions: Sequence[Prediction | None], options: Options
) -> Metrics:
    """CIDEr, BLEU, ROUGE-L, and METEOR if asked for, in percent, over the official tokens.

    A missing caption is an empty one. CIDEr of a part of the set has document frequencies of its
    own.
    """
    texts = ["" if prediction is None else prediction.text for prediction in predictions]
    if "first-sentence" in options.published:
        texts = [text.split(".")[0] for text in texts]
    tokenize, said = tokenizer(brackets_stay=True)
    counts = [len(reference.answers) for reference in references]
    lines = iter(tokenize([*texts, *(a for reference in references for a in reference.answers)]))
    candidates = [next(lines) for _ in texts]
    others = [[next(lines) for _ in range(count)] for count in counts]
    measures: Metrics = [*captions.measures(candidates, others)]
    groups = groups_of(references)
    for group in groups if len(groups) > 1 else []:
        inside = [place for place, one in enumerate(references) if one.group == group]
        values: list[float | None] = [None] * len(references)
        own = captions.cider_values([candidates[i] for i in inside], [others[i] for i in inside])
        for place, value in zip(inside, own, strict=True):
            values[place] = value
        measures.append(mean_of(f"CIDEr, {group}", values))
    if options.meteor:
        measures.append(Total("METEOR", 100 * meteor(candidates, others)))
    return [replace(one, name=f"{one.name}, {said}") for one in measures] if said else measures
