"""Table of the benchmarks: sets, splits, scores, and the form of their submissions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from mmi_deploy.errors import ConfigError
from mmi_train.evaluation.benchmarks import annotation_files as files
from mmi_train.evaluation.benchmarks import picture_scores, scores
from mmi_train.evaluation.benchmarks.predictions import Kind
from mmi_train.evaluation.benchmarks.references import AnnotationError, Reference, Source


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. splits: the first is the default. answer: key of an answer in the official
    submission; None if the set has no such server."""

    name: str
    kind: Kind
    splits: tuple[str, ...]
    read: files.Reader
    score: scores.Scorer
    address: str
    answer: str | None = None

    def references(self, data: Path, split: str | None) -> tuple[str, list[Reference]]:
        """The split and its questions. Raises `ConfigError` and `AnnotationError`."""
        chosen = split or self.splits[0]
        if chosen not in self.splits:
            raise ConfigError(f"{self.name} has no split {chosen}", expected=", ".join(self.splits))
        found = self.read(Source(data, self.address), chosen)
        if not found:
            raise AnnotationError(f"the {chosen} split of {self.name} in {data} has no question")
        return chosen, found


_PUBLISHED = "https://huggingface.co/OpenGVLab/MM-Interleaved/tree/main/assets/datasets"
_COCO = "https://cocodataset.org/#download"
_REFER = "https://github.com/lichengunc/refer"
_ROBUST_READING = "https://rrc.cvc.uab.es"

# Where the files of each set are to be had.
_ADDRESSES = {
    "coco-caption": _PUBLISHED,
    "flickr30k": _PUBLISHED,
    "nocaps": "https://nocaps.org/download",
    "image2paragraph": _PUBLISHED,
    "vqav2": "https://visualqa.org/download.html",
    "okvqa": "https://okvqa.allenai.org/download.html",
    "gqa": "https://cs.stanford.edu/people/dorarad/gqa/download.html",
    "vizwiz": "https://vizwiz.org/tasks-and-datasets/vqa/",
    "textvqa": "https://textvqa.org/dataset/",
    "visdial": "https://visualdialog.org/data",
    "refcoco": _REFER,
    "refcoco+": _REFER,
    "refcocog": _REFER,
    "chartqa": "https://github.com/vis-nlp/ChartQA",
    "docvqa": _ROBUST_READING,
    "infovqa": _ROBUST_READING,
    "stvqa": _ROBUST_READING,
    "ade20k": "http://sceneparsing.csail.mit.edu",
    "coco-t2i": _COCO,
    "ln-coco": _PUBLISHED,
    "vist": "https://visionandlanguage.net/VIST/dataset.html",
}


def _row(
    name: str,
    splits: str,
    read: files.Reader,
    score: scores.Scorer,
    answer: str | None = None,
    kind: Kind = "text",
) -> Benchmark:
    return Benchmark(name, kind, tuple(splits.split()), read, score, _ADDRESSES[name], answer)


def _rows() -> list[Benchmark]:
    captions, boxes, anls = scores.caption_scores, scores.box_accuracy, scores.anls_of
    vqa, vizwiz = scores.vqa_accuracy(), scores.vqa_accuracy(vizwiz=True)
    maps, drawn = picture_scores.segmentation, picture_scores.drawn_pictures
    return [
        _row("coco-caption", "test val", files.coco_karpathy, captions, "caption"),
        _row("flickr30k", "test", files.flickr30k, captions),
        _row("nocaps", "val test", files.nocaps, captions, "caption"),
        _row("image2paragraph", "test val train", files.image2paragraph, captions),
        _row("vqav2", "val train test-dev test", files.vqav2, vqa, "answer"),
        _row("okvqa", "val train", files.okvqa, vqa, "answer"),
        _row("gqa", "testdev val train test", files.gqa, scores.exact_accuracy, "prediction"),
        _row("vizwiz", "val train test", files.vizwiz, vizwiz, "answer"),
        _row("textvqa", "val train test", files.textvqa, vqa, "answer"),
        _row("visdial", "val train test", files.visdial, scores.ranking, "ranks", "ranks"),
        _row("refcoco", "val testA testB", files.referring("refcoco"), boxes),
        _row("refcoco+", "val testA testB", files.referring("refcoco+"), boxes),
        _row("refcocog", "val test", files.referring("refcocog"), boxes),
        _row("chartqa", "test val train", files.chartqa, scores.relaxed),
        _row("docvqa", "val train test", files.docvqa, anls, "answer"),
        _row("infovqa", "val train test", files.infovqa, anls, "answer"),
        _row("stvqa", "test train", files.stvqa, anls, "answer"),
        _row("ade20k", "validation training", files.ade20k, maps, kind="image"),
        _row("coco-t2i", "val", files.coco_pictures, drawn, kind="image"),
        _row("ln-coco", "val", files.localized_narratives, drawn, kind="image"),
        _row("vist", "test val train", files.vist, drawn, kind="image"),
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
