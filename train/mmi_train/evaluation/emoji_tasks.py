"""Evaluation of a model of emoji: captions by name and keyword, pictures by retrieval.

A drawn picture is compared with what should have been drawn and with the same picture of other
emoji, by a measure that no network takes part in: the mean squared error of the pictures averaged
to 16 by 16 cells. It is retrieved if the right one is the nearest of `CANDIDATES`. Names that were
held out of training are counted apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from tokenizers import Tokenizer

from mmi_deploy.system.progress import Progress, silent
from mmi_train.data.corpus import Split
from mmi_train.data.document import TextPart
from mmi_train.data.emoji.documents import (
    BACKGROUNDS,
    EmojiCorpus,
    EmojiDocument,
    EmojiImage,
    Scene,
)
from mmi_train.data.emoji.emoji_set import WIDTHS
from mmi_train.evaluation.synthetic_tasks import Evaluator, Sample, without_mmfs
from mmi_train.model.mm_interleaved import MMInterleaved

CANDIDATES = 100
CELLS = 16  # side of the averaged pictures
SPLITS: tuple[Split, ...] = ("train", "held_out")
KINDS = ("caption", "question", "drawing", "keywords", "story")


@dataclass
class EmojiScores:
    """Scores by measure and split, each 0 to 1; a measure is their mean."""

    values: defaultdict[tuple[str, Split], list[float]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def add(self, measure: str, split: Split, score: float) -> None:
        self.values[measure, split].append(float(score))

    def as_json(self) -> dict[str, dict[str, float | int]]:
        """Mean and number of the scores of each measure: {"train", "held_out", "count"}."""
        table: dict[str, dict[str, float | int]] = {}
        for (measure, split), scores in sorted(self.values.items()):
            row = table.setdefault(measure, {})
            row[split], row["count"] = float(np.mean(scores)), len(scores)
        return table


@dataclass(frozen=True)
class EmojiEvaluation:
    """Scores with MMFS and without it; pictures drawn with it by a name of their group: of each
    kind and split the best, those in the middle and the worst."""

    scores: EmojiScores
    without: EmojiScores
    samples: dict[str, list[Sample]]


def averaged(picture: np.ndarray) -> np.ndarray:
    """Mean colours of a uint8 picture's cells, [cells * cells * 3]."""
    side = picture.shape[0] // CELLS
    cells = picture.astype(np.float32).reshape(CELLS, side, CELLS, side, 3)
    return np.asarray(cells.mean((1, 3))).ravel()


class _Retrieval:
    """Averaged pictures of every emoji of a set in every setting, made once."""

    def __init__(self, corpus: EmojiCorpus) -> None:
        self.corpus = corpus
        self._pictures: dict[tuple[str, str, bool], np.ndarray] = {}

    def rank(self, drawn: np.ndarray, scene: Scene, rng: np.random.Generator) -> int:
        """Place of the right emoji, from 0, among `CANDIDATES` in the scene's own setting."""
        setting = (scene.size, scene.background, scene.mirrored)
        if setting not in self._pictures:
            count = len(self.corpus.emoji.emoji)
            all_scenes = [replace(scene, index=index) for index in range(count)]
            self._pictures[setting] = np.stack(
                [averaged(self.corpus.picture(one)) for one in all_scenes]
            )
        errors = np.square(self._pictures[setting] - averaged(drawn)).mean(1)
        others = np.delete(np.arange(len(errors)), scene.index)
        others = rng.permutation(others)[: CANDIDATES - 1]
        return int((errors[others] < errors[scene.index]).sum())

    def setting(self, drawn: np.ndarray, scene: Scene) -> bool:
        """True if the picture is nearer to the scene's size, background and direction than to any
        other of the same emoji."""
        found = averaged(drawn)
        error = {
            one: float(np.square(averaged(self.corpus.picture(one)) - found).mean())
            for size in WIDTHS
            for background in BACKGROUNDS
            for mirrored in (False, True)
            for one in [Scene(scene.index, size, background, mirrored)]
        }
        return error[scene] == min(error.values())


@dataclass(frozen=True)
class _Question:
    document: EmojiDocument
    target: int
    split: Split


def evaluate(
    model: MMInterleaved,
    tokenizer: Tokenizer,
    corpus: EmojiCorpus,
    *,
    count: int = 96,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    without: bool = True,
    progress: Progress = silent,
) -> EmojiEvaluation:
    """Ask `count` questions of each kind and split, with MMFS and, if `without`, without it."""
    scores, ablated = EmojiScores(), EmojiScores()
    samples: dict[str, list[Sample]] = {}
    retrieval = _Retrieval(corpus)
    for name, subject, table in (
        ("with MMFS", model, scores),
        ("MMFS off", without_mmfs(model) if without else None, ablated),
    ):
        if subject is None:
            continue
        evaluator = Evaluator(subject, tokenizer, steps=steps, guidance=guidance, seed=seed)
        for kind in KINDS:
            questions = _questions(corpus, kind, count, seed)
            graded = _ask(evaluator, corpus, retrieval, questions, table, seed, f"{kind}, {name}",
                          progress)  # fmt: skip
            if table is scores:
                samples |= graded
    return EmojiEvaluation(scores, ablated, samples)


def _best_median_worst(ranked: Sequence[Sample], each: int = 4) -> dict[str, list[Sample]]:
    """The `each` best of some samples that are sorted, those in the middle, and the worst; all of
    few."""
    if len(ranked) < 3 * each:
        return {"from best to worst": list(ranked)}
    middle = (len(ranked) - each) // 2
    return {
        "best": list(ranked[:each]),
        "in the middle": list(ranked[middle : middle + each]),
        "worst": list(ranked[-each:]),
    }


def _questions(corpus: EmojiCorpus, kind: str, count: int, seed: int) -> list[_Question]:
    """Questions of a kind, the same for every model; of a story only its first changes."""
    found: list[_Question] = []
    for split in SPLITS:
        rng = np.random.default_rng([seed, KINDS.index(kind), SPLITS.index(split)])
        wanted = len(found) + count
        while len(found) < wanted:
            document = corpus.document(kind, rng, split)
            if kind == "story" and _sentence(document, document.targets[0]).startswith("next"):
                continue  # that is a drawing
            found.append(_Question(document, document.targets[0], split))
    return found


def _sentence(document: EmojiDocument, target: int) -> str:
    part = document.parts[target - 1]
    assert isinstance(part, TextPart)
    return part.text


def _ask(
    evaluator: Evaluator,
    corpus: EmojiCorpus,
    retrieval: _Retrieval,
    questions: list[_Question],
    scores: EmojiScores,
    seed: int,
    what: str,
    progress: Progress,
) -> dict[str, list[Sample]]:
    """Ask and grade; returns some pictures of each split: the best, the median and the worst."""
    rng = np.random.default_rng([seed, len(questions)])
    ranked: list[tuple[Split, int, float, Sample]] = []
    for start in range(0, len(questions), evaluator.batch):
        progress(what, start, len(questions))
        chunk = questions[start : start + evaluator.batch]
        prompts = [evaluator.prompt(one.document, one.target) for one in chunk]
        if not isinstance(chunk[0].document.parts[chunk[0].target], EmojiImage):
            for one, text in zip(chunk, evaluator.write(prompts), strict=True):
                _grade_text(corpus, one, text, scores)
            continue
        for one, drawn in zip(chunk, evaluator.draw(prompts), strict=True):
            expected = one.document.parts[one.target]
            assert isinstance(expected, EmojiImage)
            scene, kind = expected.scene, one.document.kind
            rank = retrieval.rank(drawn, scene, rng)
            scores.add(f"{kind}: retrieved of {CANDIDATES}", one.split, rank == 0)
            scores.add(f"{kind}: among the first 5", one.split, rank < 5)
            if kind == "story":
                right = retrieval.setting(drawn, scene)
                scores.add("story: size, background, direction", one.split, right)
            first = one.document.parts[0]
            context = first.image if isinstance(first, EmojiImage) else None
            error = float(np.square(averaged(drawn) - averaged(expected.image)).mean())
            sample = Sample(
                kind, _sentence(one.document, one.target), context, drawn, expected.image, rank == 0
            )
            ranked.append((one.split, rank, error, sample))
    found: dict[str, list[Sample]] = {}
    for split in SPLITS:
        own = [sample for one, *_, sample in sorted(ranked, key=_place) if one == split]
        if own:
            names = "names that were trained" if split == "train" else "names that were held out"
            found |= {
                f"{own[0].kind}, {names}: {which}": samples
                for which, samples in _best_median_worst(own).items()
            }
    return found


def _place(found: tuple[Split, int, float, Sample]) -> tuple[int, float]:
    """Order of drawn pictures: by rank, then by error."""
    return found[1], found[2]


def _grade_text(corpus: EmojiCorpus, one: _Question, text: str, scores: EmojiScores) -> None:
    """Grade a caption or an answer."""
    expected = one.document.parts[one.target]
    shown = one.document.parts[0]
    assert isinstance(expected, TextPart) and isinstance(shown, EmojiImage)
    if one.document.kind == "question":
        scores.add(
            f"answer: {_sentence(one.document, one.target)}", one.split, text == expected.text
        )
        return
    emoji = corpus.emoji.emoji[shown.scene.index]
    known = set(" ".join([emoji.name, *emoji.keywords]).split())
    said = set(text.removesuffix(".").rpartition(" on ")[0].split()) - {"small"}
    scores.add("caption: exact", one.split, text == expected.text)
    scores.add("caption: a word of its name or keywords", one.split, bool(said & known))
