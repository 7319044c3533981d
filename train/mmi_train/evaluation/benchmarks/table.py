"""Table of the benchmarks: splits, scores, and the form of their references and submissions.

Their files are read by the reader of the same name in `mmi_train.data.readers.registry`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mmi_deploy.errors import ConfigError
from mmi_train.data.readers.data_set import DataSet, Settings
from mmi_train.data.readers.registry import open_set
from mmi_train.evaluation.benchmarks import picture_scores, scores
from mmi_train.evaluation.benchmarks.predictions import Kind
from mmi_train.evaluation.benchmarks.references import Form

# The benchmark whose drawn pictures a segmenter makes maps of.
SEGMENTED = "ade20k"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. splits: the first is the default. answer: key of an answer in the official
    submission; None if the set has no such server."""

    name: str
    kind: Kind
    splits: tuple[str, ...]
    score: scores.Scorer
    form: Form
    answer: str | None = None

    def open(self, data: Path, split: str | None, prompt: str | None = None) -> DataSet[Any]:
        """Open the set in a folder. Raises `MmiError` for an unknown split or missing files."""
        chosen = split or self.splits[0]
        if chosen not in self.splits:
            raise ConfigError(f"{self.name} has no split {chosen}", expected=", ".join(self.splits))
        return open_set(self.name, data, Settings(split=chosen, prompt=prompt))


def _row(
    name: str,
    splits: str,
    score: scores.Scorer,
    form: Form,
    answer: str | None = None,
    kind: Kind = "text",
) -> Benchmark:
    return Benchmark(name, kind, tuple(splits.split()), score, form, answer)


def _rows() -> list[Benchmark]:
    captions, boxes, anls = scores.caption_scores, scores.box_accuracy, scores.anls_of
    vqa, vizwiz = scores.vqa_accuracy(), scores.vqa_accuracy(vizwiz=True)
    maps, drawn = picture_scores.segmentation, picture_scores.drawn_pictures
    plain, numbered = Form(), Form(numbered=True)
    pictures = Form(merged=True, id_key="image_id")
    question, page = Form(id_key="question_id"), Form(id_key="questionId")
    rounds = Form(id_key="image_id", also=("round_id",))
    return [
        _row("coco-caption", "test val", captions, pictures, "caption"),
        _row("flickr30k", "test", captions, pictures),
        _row("nocaps", "val test", captions, pictures, "caption"),
        _row("image2paragraph", "test val train", captions, pictures),
        _row("vqav2", "val train test-dev test", vqa, question, "answer"),
        _row("okvqa", "val train", vqa, question, "answer"),
        _row("gqa", "testdev val train test", scores.exact_accuracy, page, "prediction"),
        _row("vizwiz", "val train test", vizwiz, Form(also=("image",)), "answer"),
        _row("textvqa", "val train test", vqa, question, "answer"),
        _row("visdial", "val train test", scores.ranking, rounds, "ranks", "ranks"),
        _row("refcoco", "val testA testB", boxes, plain),
        _row("refcoco+", "val testA testB", boxes, plain),
        _row("refcocog", "val test", boxes, plain),
        _row("chartqa", "test val train", scores.relaxed, numbered),
        _row("docvqa", "val train test", anls, page, "answer"),
        _row("infovqa", "val train test", anls, page, "answer"),
        _row("stvqa", "test train", anls, question, "answer"),
        _row(SEGMENTED, "validation training", maps, Form(given=True), kind="image"),
        _row("coco-t2i", "val", drawn, plain, kind="image"),
        _row("ln-coco", "val", drawn, numbered, kind="image"),
        _row("vist", "val test train", drawn, plain, kind="image"),
        _row("pororo", "test val", drawn, plain, kind="image"),
        _row("flintstones", "test val", drawn, plain, kind="image"),
    ]


BENCHMARKS: Mapping[str, Benchmark] = {row.name: row for row in _rows()}


def benchmark(name: str) -> Benchmark:
    """The benchmark of a name. Raises `ConfigError`, which offers the nearest one."""
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    near = get_close_matches(name.lower(), BENCHMARKS, n=1, cutoff=0.4)
    raise ConfigError(
        f"there is no benchmark {name}",
        fix=f"the nearest one is {near[0]}" if near else f"there are {', '.join(BENCHMARKS)}",
    )
