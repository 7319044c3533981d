"""Names of the data sets: their readers, what they are for, and where their files come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mmi_deploy.errors import ConfigError
from mmi_train.data.readers.ade20k import Ade20k
from mmi_train.data.readers.captions import (
    CocoCaptions,
    Flickr30k,
    Image2Paragraph,
    NoCaps,
    TextCaps,
)
from mmi_train.data.readers.conversations import Llava665k, Llavar
from mmi_train.data.readers.data_set import DataSet, Settings
from mmi_train.data.readers.folder import Folder
from mmi_train.data.readers.image_text import ImageText, LaionCaptions
from mmi_train.data.readers.mmc4 import Mmc4
from mmi_train.data.readers.question_tables import (
    ChartQa,
    DocVqa,
    Dvqa,
    EstVqa,
    Gqa,
    InfoVqa,
    OcrVqa,
    StVqa,
    VizWiz,
)
from mmi_train.data.readers.refer import RefCoco, RefCocoG, RefCocoPlus
from mmi_train.data.readers.stories import Flintstones, Pororo, Vist
from mmi_train.data.readers.text_to_image import CocoToDraw, LocalizedNarratives
from mmi_train.data.readers.visdial import VisDial
from mmi_train.data.readers.vqa_pairs import OkVqa, TextVqa, VqaV2


@dataclass(frozen=True)
class Entry:
    """A data set: its reader, and the official source of its files."""

    reader: type[DataSet[Any]]
    source: str


_COCO = "cocodataset.org/#download"
_KARPATHY = "cs.stanford.edu/people/karpathy/deepimagesent (files by github.com/salesforce/LAVIS)"
_RRC = "rrc.cvc.uab.es (after registration)"

DATA_SETS: Mapping[str, Entry] = {
    "mmc4": Entry(Mmc4, "github.com/allenai/mmc4"),
    "laion-coco": Entry(LaionCaptions, "laion.ai/blog/laion-coco, downloaded with img2dataset"),
    "laion-en": Entry(LaionCaptions, "laion.ai/blog/laion-5b, downloaded with img2dataset"),
    "cc12m": Entry(
        ImageText, "github.com/google-research-datasets/conceptual-12m, with img2dataset"
    ),
    "objects365": Entry(ImageText, "www.objects365.org, with captions of your own"),
    "llava-665k": Entry(Llava665k, "github.com/haotian-liu/LLaVA (docs/Data.md)"),
    "coco-caption": Entry(CocoCaptions, f"{_COCO}, Karpathy's splits from {_KARPATHY}"),
    "vqav2": Entry(VqaV2, "visualqa.org/download.html"),
    "chartqa": Entry(ChartQa, "github.com/vis-nlp/ChartQA"),
    "docvqa": Entry(DocVqa, _RRC),
    "infovqa": Entry(InfoVqa, _RRC),
    "stvqa": Entry(StVqa, _RRC),
    "estvqa": Entry(EstVqa, "github.com/xinke-wang/EST-VQA"),
    "textcaps": Entry(TextCaps, "textvqa.org/textcaps"),
    "llavar": Entry(Llavar, "github.com/SALT-NLP/LLaVAR"),
    "ocrvqa": Entry(OcrVqa, "ocr-vqa.github.io"),
    "dvqa": Entry(Dvqa, "github.com/kushalkafle/DVQA_dataset"),
    "refcoco": Entry(RefCoco, "github.com/lichengunc/refer"),
    "refcoco+": Entry(RefCocoPlus, "github.com/lichengunc/refer"),
    "refcocog": Entry(RefCocoG, "github.com/lichengunc/refer"),
    "ade20k": Entry(Ade20k, "data.csail.mit.edu/places/ADEchallenge"),
    "vist": Entry(Vist, "visionandlanguage.net/VIST"),
    "pororo": Entry(Pororo, "github.com/adymaharana/storydalle"),
    "flintstones": Entry(Flintstones, "github.com/adymaharana/storydalle"),
    "flickr30k": Entry(Flickr30k, "shannon.cs.illinois.edu/DenotationGraph"),
    "nocaps": Entry(NoCaps, "nocaps.org"),
    "image2paragraph": Entry(
        Image2Paragraph, "cs.stanford.edu/people/ranjaykrishna/im2p, pictures of visualgenome.org"
    ),
    "okvqa": Entry(OkVqa, "okvqa.allenai.org"),
    "gqa": Entry(Gqa, "cs.stanford.edu/people/dorarad/gqa"),
    "vizwiz": Entry(VizWiz, "vizwiz.org/tasks-and-datasets/vqa"),
    "textvqa": Entry(TextVqa, "textvqa.org"),
    "visdial": Entry(VisDial, "visualdialog.org"),
    "coco-t2i": Entry(CocoToDraw, _COCO),
    "ln-coco": Entry(LocalizedNarratives, "google.github.io/localized-narratives"),
}


def entry_called(name: str) -> Entry:
    """The data set of this name; raises `ConfigError` with the nearest."""
    if name not in DATA_SETS:
        near = get_close_matches(name.lower(), DATA_SETS, n=1, cutoff=0.4)
        raise ConfigError(
            f"there is no data set {name}",
            expected=", ".join(DATA_SETS),
            fix=f"The nearest is {near[0]}" if near else "",
        )
    return DATA_SETS[name]


def open_set(name: str, path: Path, settings: Settings | None = None) -> DataSet[Any]:
    """Open the data set `name` in a folder; raises `MmiError` for what is missing there."""
    entry = entry_called(name)
    return entry.reader(Folder(name, path, entry.source), settings or Settings())
