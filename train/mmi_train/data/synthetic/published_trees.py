"""The drawn world as data sets in their published formats: a folder a set, for runs in small.

Training splits show scenes of the world's training split, the others held-out scenes. Pictures are
JPEGs and PNGs of 64 pixels, named and placed as the sets' authors do; docs/data.md describes the
layouts. The same seed and sizes write the same bytes.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from mmi_train.data.synthetic.scene_reader import expected_segmentation
from mmi_train.data.synthetic.tasks import caption_of, colouring_of, questions_about
from mmi_train.data.synthetic.world import (
    Scene,
    Split,
    WorldConfig,
    box_of,
    change,
    place_of,
    random_scene,
    reference_to,
    render,
)

# Labels of ADE20K for the shapes of the easy world: those whose colours are nearest to the world's
# own colours of segmentations.
SHAPE_LABELS: Mapping[str, int] = MappingProxyType({"square": 29, "ring": 149, "cross": 133})

# Pictures of a story of VIST.
_STORY = 5

# Annotators of a question of VQAv2.
_ANNOTATORS = 10

_SEPARATORS = (",", ":")


@dataclass(frozen=True)
class Sizes:
    """Number of samples: of each training split, and of each held-out split."""

    train: int = 512
    held_out: int = 64


@dataclass
class _Tree:
    """Files of one set below its folder, with scenes drawn from a generator of its own."""

    folder: Path
    rng: np.random.Generator
    world: WorldConfig
    sizes: Sizes

    def scenes(self, split: Split) -> Iterator[Scene]:
        count = self.sizes.train if split == "train" else self.sizes.held_out
        for _ in range(count):
            yield random_scene(self.rng, self.world, split)

    def write(self, name: str, content: bytes | str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, separators=_SEPARATORS))

    def lines(self, name: str, values: Sequence[Any]) -> None:
        self.write(name, "".join(json.dumps(value) + "\n" for value in values))

    def picture(self, name: str, rgb: np.ndarray) -> None:
        self.write(name, encoded(rgb, name))


def encoded(picture: np.ndarray, name: str) -> bytes:
    """A picture as the ending of its name says."""
    file = io.BytesIO()
    if name.endswith(".jpg"):
        Image.fromarray(picture).save(file, "JPEG", quality=95, subsampling=0)
    else:
        Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def _story(tree: _Tree, split: Split, pictures: int) -> tuple[list[Scene], list[str]]:
    """Scenes that change one after the other, and a sentence for each: the caption of the first,
    then the changes."""
    while True:
        scene = random_scene(tree.rng, tree.world, split)
        scenes, sentences = [scene], [caption_of(scene, tree.world)]
        while len(scenes) < pictures:
            changed = change(tree.rng, scenes[-1], tree.world, split)
            if changed is None:
                break
            sentences.append(changed[0])
            scenes.append(changed[1])
        else:
            return scenes, sentences


def _mmc4(tree: _Tree) -> None:
    documents = []
    for number in range(tree.sizes.train):
        scenes, sentences = _story(tree, "train", int(tree.rng.integers(2, 5)))
        images, matrix = [], []
        for at, scene in enumerate(scenes):
            name = f"{number:06x}{at:06x}.jpg"
            tree.picture(f"images/{name}", render(scene))
            alike = round(float(tree.rng.uniform(0.2, 0.35)), 3)  # some below the paper's 0.24
            matrix.append([alike if other == at else 0.1 for other in range(len(sentences))])
            images.append(
                {
                    "image_name": name,
                    "raw_url": f"https://example.org/{name}",
                    "matched_text_index": at,
                    "matched_sim": alike,
                    "face_detections": None,
                }
            )
        documents.append(
            {
                "url": f"https://example.org/{number}",
                "text_list": sentences,
                "image_info": images,
                "similarity_matrix": matrix,
                "could_have_url_duplicate": 0,
            }
        )
    tree.lines("docs_shard_0_v2.jsonl", documents)


def _pairs(tree: _Tree) -> None:
    """Lines of the published code: the picture's path and its caption."""
    lines = []
    for number, scene in enumerate(tree.scenes("train")):
        name = f"00000/{number:09d}.jpg"
        tree.picture(f"images/{name}", render(scene))
        lines.append({"image": name, "caption": caption_of(scene, tree.world).capitalize()})
    tree.lines("0000000.txt", lines)


def _tar(tree: _Tree) -> None:
    """A tar of img2dataset: picture, caption and what became of its download."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for number, scene in enumerate(tree.scenes("train")):
            key, caption = f"{number:09d}", caption_of(scene, tree.world)
            about = {"caption": caption, "key": key, "status": "success", "width": 64, "height": 64}
            for ending, data in (
                ("jpg", encoded(render(scene), ".jpg")),
                ("json", json.dumps(about).encode()),
                ("txt", caption.encode()),
            ):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    tree.write("00000.tar", content.getvalue())


def _coco_caption(tree: _Tree) -> None:
    number = 0
    for split, of in (("train", "train"), ("val", "held_out"), ("test", "held_out")):
        entries = []
        for scene in tree.scenes("train" if of == "train" else "held_out"):
            number += 1
            year = "train2014" if split == "train" else "val2014"
            name = f"{year}/COCO_{year}_{number:012d}.jpg"
            tree.picture(name, render(scene))
            caption = caption_of(scene, tree.world)
            one = {"image": name, "image_id": f"coco_{number}"}
            entries.append({**one, "caption": caption if split == "train" else [caption] * 5})
        tree.json(f"coco_karpathy_{split}.json", entries)


def _vqav2(tree: _Tree) -> None:
    number = 0
    for year in ("train2014", "val2014"):
        asked, answered = [], []
        for scene in tree.scenes("train" if year == "train2014" else "held_out"):
            number += 1
            tree.picture(f"{year}/COCO_{year}_{number:012d}.jpg", render(scene))
            options = questions_about(scene, tree.world)
            question, answer = options[int(tree.rng.integers(len(options)))]
            answer = answer.rstrip(".")
            key = {"image_id": number, "question_id": 1000 * number}
            asked.append({**key, "question": question})
            answered.append(
                {
                    **key,
                    "question_type": question.split()[0],
                    "answer_type": "number" if question.startswith("how many") else "other",
                    "multiple_choice_answer": answer,
                    "answers": [
                        {"answer": answer, "answer_confidence": "yes", "answer_id": person}
                        for person in range(1, _ANNOTATORS + 1)
                    ],
                }
            )
        tree.json(f"v2_OpenEnded_mscoco_{year}_questions.json", {"questions": asked})
        tree.json(f"v2_mscoco_{year}_annotations.json", {"annotations": answered})


def _llava(tree: _Tree) -> None:
    entries = []
    for number, scene in enumerate(tree.scenes("train")):
        name = f"coco/train2017/{number:012d}.jpg"
        tree.picture(name, render(scene))
        options = questions_about(scene, tree.world)
        turns: list[dict[str, str]] = []
        for index in tree.rng.permutation(len(options))[:2].tolist():
            question, answer = options[index]
            place = "" if turns else "<image>\n"
            turns.append({"from": "human", "value": place + question.rstrip("?")})
            turns.append({"from": "gpt", "value": answer})
        entries.append({"id": f"{number:012d}", "image": name, "conversations": turns})
    tree.json("llava_v1_5_mix665k.json", entries)


def _regions(tree: _Tree, name: str, splits: Sequence[str]) -> None:
    number = 0
    for split in ("train", *splits):
        lines = []
        for scene in tree.scenes("train" if split == "train" else "held_out"):
            number += 1
            image = f"train2014/COCO_train2014_{number:012d}.jpg"
            tree.picture(image, render(scene))
            item = scene.objects[int(tree.rng.integers(len(scene.objects)))]
            sentence = reference_to(item)
            if name != "refcoco+":  # which names no places
                sentence += f" at {place_of(item, tree.world.grid_side)}"
            box = list(box_of(item, tree.world.grid_side))
            size = {"width": 64, "height": 64}
            lines.append({"image": image, "sent": sentence, "bbox": box, **size})
        tree.lines(f"{name}_{split}.jsonl", lines)


def _ade20k(tree: _Tree) -> None:
    classes = tree.world.segment_classes
    numbers = np.array([0, *(SHAPE_LABELS[shape] for shape in classes)], np.uint8)
    for split, short in (("training", "train"), ("validation", "val")):
        captions = []
        of: Split = "train" if split == "training" else "held_out"
        for number, scene in enumerate(tree.scenes(of), 1):
            key = f"ADE_{short}_{number:08d}"
            tree.picture(f"images/{split}/{key}.jpg", render(scene))
            labels = numbers[expected_segmentation(scene, tree.world)]
            tree.picture(f"annotations/{split}/{key}.png", labels)
            caption = colouring_of(scene, tree.world).rstrip(".")
            captions.append({"image_id": key, "caption": caption})
        tree.json(f"{split}.json", captions)


def _vist(tree: _Tree) -> None:
    number = 0
    for split in ("train", "val", "test"):
        of: Split = "train" if split == "train" else "held_out"
        count = tree.sizes.train if split == "train" else tree.sizes.held_out
        stories = {}
        for story in range(-(-count // _STORY) if split == "train" else count):
            scenes, sentences = _story(tree, of, _STORY)
            entries = []
            for at, (scene, sentence) in enumerate(zip(scenes, sentences, strict=True)):
                number += 1
                tree.picture(f"images/{split}_images/{number}.png", render(scene))
                entries.append({"caption": sentence, "image_id": str(number), "sequence_index": at})
            stories[f"{split}{story:05d}"] = entries
        tree.json(f"{split}_formatted_filtered.json", {"annotations": stories})


def _coco_to_draw(tree: _Tree) -> None:
    captions = []
    for number, scene in enumerate(tree.scenes("held_out"), 1):
        tree.picture(f"val2014/COCO_val2014_{number:012d}.jpg", render(scene))
        caption = {"image_id": number, "id": number, "caption": caption_of(scene, tree.world)}
        captions.append(caption)
    tree.json("captions_val2014.json", {"images": [], "annotations": captions})


_WRITERS: Mapping[str, Callable[[_Tree], None]] = MappingProxyType(
    {
        "mmc4": _mmc4,
        "laion-en": _pairs,
        "laion-coco": _tar,
        "cc12m": _pairs,
        "objects365": _pairs,
        "llava-665k": _llava,
        "coco-caption": _coco_caption,
        "vqav2": _vqav2,
        "refcoco": lambda tree: _regions(tree, "refcoco", ("val", "testA", "testB")),
        "refcoco+": lambda tree: _regions(tree, "refcoco+", ("val", "testA", "testB")),
        "refcocog": lambda tree: _regions(tree, "refcocog", ("val", "test")),
        "ade20k": _ade20k,
        "vist": _vist,
        "coco-t2i": _coco_to_draw,
    }
)

NAMES = tuple(_WRITERS)


def write_tree(folder: Path, name: str, world: WorldConfig, sizes: Sizes, seed: int = 0) -> None:
    """Write the data set `name` of `NAMES` into `folder`. Raises `KeyError` for another name."""
    rng = np.random.default_rng([seed, NAMES.index(name)])
    _WRITERS[name](_Tree(folder, rng, world, sizes))


def small(sizes: Sizes, share: float) -> Sizes:
    """The sizes times a share, at least one."""
    return replace(
        sizes,
        train=max(round(sizes.train * share), 1),
        held_out=max(round(sizes.held_out * share), 1),
    )
