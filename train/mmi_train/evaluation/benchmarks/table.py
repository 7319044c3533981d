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


def _rows() -> list[Benchmark]:
    vqa = scores.vqa_accuracy()
    published = "https://huggingface.co/OpenGVLab/MM-Interleaved/tree/main/assets/datasets"
    vqa_site = "https://visualqa.org/download.html"
    robust_reading = "https://rrc.cvc.uab.es"
    refer = "https://github.com/lichengunc/refer"
    captions, drawn = scores.caption_scores, picture_scores.drawn_pictures
    coco = "https://cocodataset.org/#download"
    return [
        Benchmark(
            "coco-caption",
            "text",
            ("test", "val"),
            files.coco_karpathy,
            captions,
            published,
            "caption",
        ),
        Benchmark("flickr30k", "text", ("test",), files.flickr30k, captions, published),
        Benchmark(
            "nocaps",
            "text",
            ("val", "test"),
            files.nocaps,
            captions,
            "https://nocaps.org/download",
            "caption",
        ),
        Benchmark(
            "image2paragraph",
            "text",
            ("test", "val", "train"),
            files.image2paragraph,
            captions,
            published,
        ),
        Benchmark(
            "vqav2",
            "text",
            ("val", "train", "test-dev", "test"),
            files.vqav2,
            vqa,
            vqa_site,
            "answer",
        ),
        Benchmark(
            "okvqa",
            "text",
            ("val", "train"),
            files.okvqa,
            vqa,
            "https://okvqa.allenai.org/download.html",
            "answer",
        ),
        Benchmark(
            "gqa",
            "text",
            ("testdev", "val", "train", "test"),
            files.gqa,
            scores.exact_accuracy,
            "https://cs.stanford.edu/people/dorarad/gqa/download.html",
            "prediction",
        ),
        Benchmark(
            "vizwiz",
            "text",
            ("val", "train", "test"),
            files.vizwiz,
            scores.vqa_accuracy(vizwiz=True),
            "https://vizwiz.org/tasks-and-datasets/vqa/",
            "answer",
        ),
        Benchmark(
            "textvqa",
            "text",
            ("val", "train", "test"),
            files.textvqa,
            vqa,
            "https://textvqa.org/dataset/",
            "answer",
        ),
        Benchmark(
            "visdial",
            "ranks",
            ("val", "train", "test"),
            files.visdial,
            scores.ranking,
            "https://visualdialog.org/data",
            "ranks",
        ),
        *(
            Benchmark(name, "text", splits, files.referring(name), scores.box_accuracy, refer)
            for name, splits in {
                "refcoco": ("val", "testA", "testB"),
                "refcoco+": ("val", "testA", "testB"),
                "refcocog": ("val", "test"),
            }.items()
        ),
        Benchmark(
            "chartqa",
            "text",
            ("test", "val", "train"),
            files.chartqa,
            scores.relaxed,
            "https://github.com/vis-nlp/ChartQA",
        ),
        Benchmark(
            "docvqa",
            "text",
            ("val", "train", "test"),
            files.docvqa,
            scores.anls_of,
            robust_reading,
            "answer",
        ),
        Benchmark(
            "infovqa",
            "text",
            ("val", "train", "test"),
            files.infovqa,
            scores.anls_of,
            robust_reading,
            "answer",
        ),
        Benchmark(
            "stvqa",
            "text",
            ("test", "train"),
            files.stvqa,
            scores.anls_of,
            robust_reading,
            "answer",
        ),
        Benchmark(
            "ade20k",
            "image",
            ("validation", "training"),
            files.ade20k,
            picture_scores.segmentation,
            "http://sceneparsing.csail.mit.edu",
        ),
        Benchmark("coco-t2i", "image", ("val",), files.coco_pictures, drawn, coco),
        Benchmark("ln-coco", "image", ("val",), files.localized_narratives, drawn, published),
        Benchmark(
            "vist",
            "image",
            ("test", "val", "train"),
            files.vist,
            drawn,
            "https://visionandlanguage.net/VIST/dataset.html",
        ),
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
