"""Readers of the evaluation sets' annotation files: id -> answers, captions, box, relevance.

Each reads the published format of its set; pictures are not opened. A reader takes the data folder
and the split, and returns the questions in the order of the set. Missing answers (test splits) are
no error here.
"""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from mmi_train.evaluation.benchmarks.references import (
    AnnotationError,
    Reference,
    Source,
    check_ids,
    read_json,
    read_json_lines,
)

Reader = Callable[[Source, str], list[Reference]]


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    """Convert what a file of another form raises to an `AnnotationError`."""
    try:
        yield
    except (KeyError, TypeError, IndexError, ValueError, AttributeError, OverflowError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise AnnotationError(
            f"{path} is not of the published form: {reason}",
            fix="take the annotations of the version that docs/evaluation.md names",
        ) from None


def _answers(value: Any) -> tuple[str, ...]:
    """Answers of one question: texts, or objects with an `answer`."""
    entries = [value] if isinstance(value, str) else value or []
    return tuple(str(entry["answer"] if isinstance(entry, dict) else entry) for entry in entries)


def _vqa_pair(questions: Path, annotations: Path | None) -> list[Reference]:
    """Questions and annotations in the form of the VQA challenge."""
    answers: dict[Any, dict[str, Any]] = {}
    if annotations is not None:
        with _understood(annotations):
            for entry in read_json(annotations)["annotations"]:
                answers[entry["question_id"]] = entry
    with _understood(questions):
        asked = [entry["question_id"] for entry in read_json(questions)["questions"]]
    # The sample's number is that of the published readers, which follow the annotations.
    known = set(asked)
    order = [number for number in answers if number in known]
    order += [number for number in asked if number not in answers]
    with _understood(annotations or questions):
        found = [
            Reference(
                str(number),
                answers=_answers(answers.get(number, {}).get("answers")),
                group=str(answers.get(number, {}).get("answer_type", "")),
                fields={"question_id": number},
            )
            for number in order
        ]
    check_ids(found, questions)
    return found


def vqav2(source: Source, split: str) -> list[Reference]:
    """VQAv2: `train`, `val`, and `test-dev` and `test` without answers."""
    years = {"test-dev": "test-dev2015", "test": "test2015"}
    year = years.get(split, f"{split}2014")
    return _vqa_pair(
        source.find(f"v2_OpenEnded_mscoco_{year}_questions.json"),
        None if split in years else source.find(f"v2_mscoco_{year}_annotations.json"),
    )


def okvqa(source: Source, split: str) -> list[Reference]:
    """OK-VQA: `train`, `val`."""
    return _vqa_pair(
        source.find(f"OpenEnded_mscoco_{split}2014_questions.json"),
        source.find(f"mscoco_{split}2014_annotations.json"),
    )


def textvqa(source: Source, split: str) -> list[Reference]:
    """TextVQA, as released or in the form of the VQA challenge; `test` has no answers."""
    if questions := source.find_if_there(f"textvqa_{split}_questions.json"):
        answers = f"textvqa_{split}_annotations.json"
        if split == "test":
            return _vqa_pair(questions, source.find_if_there(answers))
        return _vqa_pair(questions, source.find(answers))
    path = source.find(f"TextVQA_0.5.1_{split}.json")
    with _understood(path):
        found = [
            Reference(
                str(entry["question_id"]),
                answers=_answers(entry.get("answers")),
                fields={"question_id": entry["question_id"]},
            )
            for entry in read_json(path)["data"]
        ]
    check_ids(found, path)
    return found


def vizwiz(source: Source, split: str) -> list[Reference]:
    """VizWiz-VQA: the picture's name is the question's id; `test` has no answers."""
    path = source.find(f"{split}.json")
    with _understood(path):
        found = []
        for entry in read_json(path):
            name = str(entry["image"])
            digits = re.search(r"(\d+)\.\w+$", name)
            found.append(
                Reference(
                    name,
                    (str(int(digits[1])), name.rpartition(".")[0]) if digits else (),
                    answers=_answers(entry.get("answers")),
                    group=str(entry.get("answer_type", "")),
                    fields={"image": name},
                )
            )
    check_ids(found, path)
    return found


def gqa(source: Source, split: str) -> list[Reference]:
    """GQA's balanced questions: `testdev`, `val`, `train`, and `test` without answers."""
    path = source.find(f"{split}_balanced_questions.json")
    with _understood(path):
        return [
            Reference(name, answers=_answers(entry.get("answer")), fields={"questionId": name})
            for name, entry in read_json(path).items()
        ]


def _document_questions(path: Path) -> list[Reference]:
    """Questions of DocVQA and InfographicVQA."""
    with _understood(path):
        found = [
            Reference(
                str(entry["questionId"]),
                answers=_answers(entry.get("answers")),
                fields={"questionId": entry["questionId"]},
            )
            for entry in read_json(path)["data"]
        ]
    check_ids(found, path)
    return found


def docvqa(source: Source, split: str) -> list[Reference]:
    """DocVQA (single page); `test` has no answers."""
    return _document_questions(source.find(f"{split}_v1.0_withQT.json", f"{split}_v1.0.json"))


def infovqa(source: Source, split: str) -> list[Reference]:
    """InfographicVQA; `test` has no answers."""
    stems = [f"{name}_{split}_v1.0" for name in ("infographicsVQA", "infographicVQA")]
    endings = ("_withQT.json", ".json")
    return _document_questions(source.find(*(stem + end for stem in stems for end in endings)))


def stvqa(source: Source, split: str) -> list[Reference]:
    """ST-VQA, task 3; `test` has no answers."""
    path = source.find(f"{split}_task_3.json")
    with _understood(path):
        found = [
            Reference(
                str(entry["question_id"]),
                answers=_answers(entry.get("answers")),
                fields={"question_id": entry["question_id"]},
            )
            for entry in read_json(path)["data"]
        ]
    check_ids(found, path)
    return found


def chartqa(source: Source, split: str) -> list[Reference]:
    """ChartQA: people's questions, then the generated ones; a sample has its number as id, or
    `human-0` after its part."""
    found: list[Reference] = []
    for kind in ("human", "augmented"):
        path = source.find(f"{split}_{kind}.json", f"{split}/{split}_{kind}.json")
        with _understood(path):
            found += [
                Reference(
                    str(len(found) + number),
                    (f"{kind}-{number}",),
                    _answers(str(entry["label"])),
                    group=kind,
                )
                for number, entry in enumerate(read_json(path))
            ]
    return found


def _captions(entry: dict[str, Any]) -> list[str]:
    value = entry["caption"]
    found = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(one, str) for one in found):
        raise TypeError(f"a caption is no text: {str(found)[:80]}")
    return found


def coco_karpathy(source: Source, split: str) -> list[Reference]:
    """COCO captions in Karpathy's split, or in COCO's form, in which the official splits are.

    A picture's id is the number at the end of its name.
    """
    official = [f"captions_{split}2014.json", f"captions_{split}2017.json"]
    path = source.find(f"coco_karpathy_{split}.json", f"coco_karpathy_{split}_gt.json", *official)
    if path.name != f"coco_karpathy_{split}.json":
        return _coco_form(path)
    captions: defaultdict[int, list[str]] = defaultdict(list)
    others: dict[int, tuple[str, ...]] = {}
    with _understood(path):
        for entry in read_json(path):
            image = str(entry["image"])
            number = int(image.rpartition(".")[0].rpartition("_")[2])
            captions[number] += _captions(entry)
            named = (image, image.rpartition("/")[2], str(entry.get("image_id", image)))
            others.setdefault(number, named)
    return [
        Reference(str(number), others[number], tuple(texts), fields={"image_id": number})
        for number, texts in captions.items()
    ]


def _coco_form(path: Path, group: str = "") -> list[Reference]:
    """Captions of a file in COCO's form. group: the key of an image that tells its part."""
    captions: defaultdict[Any, list[str]] = defaultdict(list)
    with _understood(path):
        value = read_json(path)
        for entry in value.get("annotations", []):
            captions[entry["image_id"]] += _captions(entry)
        images = {entry["id"]: entry for entry in value.get("images", [])}
        return [
            Reference(
                str(number),
                tuple(str(images[number][key]) for key in ("file_name",) if key in images[number]),
                tuple(captions[number]),
                group=str(images[number].get(group, "")),
                fields={"image_id": number},
            )
            for number in images
        ]


def flickr30k(source: Source, split: str) -> list[Reference]:
    """Flickr30k, the 1000 test pictures of Karpathy's split."""
    return _coco_form(source.find("test1k.token.coco_format", f"flickr30k_{split}_karpathy.json"))


def nocaps(source: Source, split: str) -> list[Reference]:
    """NoCaps: `val`, with its domains; `test` has no captions."""
    names = {"val": ["nocaps_val_4500_captions.json"], "test": ["nocaps_test_image_info.json"]}
    return _coco_form(source.find(*names[split]), group="domain")


def image2paragraph(source: Source, split: str) -> list[Reference]:
    """Stanford's image paragraphs: one paragraph a picture."""
    listed = source.find(f"{split}_split.json")
    numbers = read_json(listed)
    released = source.find_if_there("paragraphs_coco.json", "paragraphs_v1.json")
    path = released or source.find("paragraphs_v1.json")
    with _understood(path):
        value = read_json(path)
        entries = value["annotations"] if isinstance(value, dict) else value
        texts = {
            entry["image_id"]: tuple(_captions(entry))
            if "caption" in entry
            else (str(entry["paragraph"]),)
            for entry in entries
        }
    with _understood(listed):
        wanted = set(numbers)
    return [
        Reference(str(number), answers=answers, fields={"image_id": number})
        for number, answers in texts.items()
        if number in wanted
    ]


def visdial(source: Source, split: str) -> list[Reference]:
    """Visual Dialog 1.0: the round of each dialog whose options people judged; in `test`, without
    published judgements, the last one."""
    path = source.find(f"visdial_1.0_{split}.json")
    judged: dict[Any, tuple[int, tuple[float, ...]]] = {}
    if split != "test":
        dense = source.find(f"visdial_1.0_{split}_dense_annotations.json")
        with _understood(dense):
            for entry in read_json(dense):
                values = entry["gt_relevance"] if "gt_relevance" in entry else entry["relevance"]
                judged[entry["image_id"]] = entry["round_id"], tuple(map(float, values))
    with _understood(path):
        found = []
        for dialog in read_json(path)["data"]["dialogs"]:
            number = dialog["image_id"]
            if split == "test":
                judged[number] = len(dialog["dialog"]), ()
            if number not in judged:
                continue
            place, relevance = judged[number]
            fields = {"image_id": number, "round_id": place}
            found.append(Reference(str(number), relevance=relevance, fields=fields))
    check_ids(found, path)
    return found


def referring(name: str) -> Reader:
    """Reader of RefCOCO, RefCOCO+ or RefCOCOg as JSONL; samples are numbered."""

    def read(source: Source, split: str) -> list[Reference]:
        path = source.find(f"{name}_{split}.jsonl", f"{name.replace('+', '%2B')}_{split}.jsonl")
        with _understood(path):
            found = []
            for number, entry in enumerate(read_json_lines(path)):
                x1, y1, x2, y2 = (float(side) for side in entry["bbox"])
                size = float(entry["width"]), float(entry["height"])
                found.append(Reference(str(number), box=(x1, y1, x2, y2), size=size))
        return found

    return read


def ade20k(source: Source, split: str) -> list[Reference]:
    """ADE20K's maps of labels."""
    folders = [
        folder
        for folder in (source.folder, *sorted(source.folder.glob("*")))
        if (folder / "annotations" / split).is_dir()
    ]
    if not folders:
        raise AnnotationError(
            f"{source.folder} holds no annotations/{split}",
            fix=f"get ADEChallengeData2016.zip from {source.address} and unpack it there",
        )
    maps = sorted((folders[0] / "annotations" / split).glob("*.png"))
    if not maps:
        raise AnnotationError(f"{folders[0] / 'annotations' / split} holds no .png")
    return [Reference(path.stem, picture=path) for path in maps]


# Pictures of MS-COCO that are drawn, as the paper does.
DRAWN = 30_000


def coco_pictures(source: Source, split: str) -> list[Reference]:
    """MS-COCO's pictures to draw: the first caption of each, the first 30 000."""
    path = source.find(f"captions_{split}2014.json")
    with _understood(path):
        numbers = [operator.index(entry["image_id"]) for entry in read_json(path)["annotations"]]
    return [
        Reference(
            str(number),
            picture=source.folder / f"{split}2014" / f"COCO_{split}2014_{number:012d}.jpg",
        )
        for number in list(dict.fromkeys(numbers))[:DRAWN]
    ]


def localized_narratives(source: Source, split: str) -> list[Reference]:
    """LN-COCO's captions; samples are numbered, since a picture may have several."""
    path = source.find("coco_val_captions.jsonl", "coco_val_localized_narratives.jsonl")
    with _understood(path):
        numbers = [int(entry["image_id"]) for entry in read_json_lines(path)]
    folder = source.folder / f"{split}2017"
    return [
        Reference(str(place), picture=folder / f"{number:012d}.jpg")
        for place, number in enumerate(numbers)
    ]


def vist(source: Source, split: str) -> list[Reference]:
    """VIST: the last picture of each story, as released or in the form that the paper takes."""
    path = source.find(
        f"{split}_formatted_filtered.json",
        f"{split}_formatted.json",
        f"{split}.story-in-sequence.json",
    )
    places = [source.folder / "images" / f"{split}_images", source.folder / f"{split}_images"]
    folder = next((place for place in places if place.is_dir()), places[0])
    last: dict[str, tuple[int, str]] = {}
    with _understood(path):
        stories = read_json(path)["annotations"]
        if isinstance(stories, dict):
            scenes = [
                (name, int(entry["sequence_index"]), entry["image_id"])
                for name in sorted(stories)
                for entry in stories[name]
            ]
        else:
            scenes = [
                (
                    str(one["story_id"]),
                    int(one["worker_arranged_photo_order"]),
                    one["photo_flickr_id"],
                )
                for (one,) in stories
            ]
        for name, place, image in scenes:
            last[name] = max(last.get(name, (-1, "")), (place, str(image)))
    return [
        Reference(name, (image,), picture=folder / f"{image}.png")
        for name, (_, image) in last.items()
    ]


def groups_of(references: Sequence[Reference]) -> list[str]:
    """Names of the parts of a set, in order of their first question."""
    return list(dict.fromkeys(chain(reference.group for reference in references)))
