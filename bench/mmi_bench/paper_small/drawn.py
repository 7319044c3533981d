"""Scores of drawn pictures that need no network: the drawn world's own reader of scenes.

ADE20K's mIoU takes maps of labels that a segmenter makes of the drawn pictures. The paper's is
OneFormer; of pictures of the drawn world template matching gives the maps. FID and CLIP similarity
of the other benchmarks need networks that are not part of this project; in their place the share of
pictures that show the expected scene is measured, which the reader finds in the reference picture.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from mmi_deploy.documents.images import read_rgb
from mmi_deploy.system.output_folder import new_folder
from mmi_train.data.document import TextPart
from mmi_train.data.readers.data_set import Settings, picture_of
from mmi_train.data.readers.registry import open_set
from mmi_train.data.synthetic.published_trees import SHAPE_LABELS
from mmi_train.data.synthetic.scene_reader import read, score, segmentation_of
from mmi_train.data.synthetic.world import WorldConfig
from mmi_train.evaluation.benchmarks.table import benchmark

QUESTIONS = "questions.jsonl"


def write_questions(data: Path, out: Path) -> None:
    """Write the folder `out`: ADE20K's validation maps and captions as documents of
    `mmi generate`, which end with a picture to draw."""
    samples = open_set("ade20k", data, Settings(split="validation"))
    lines = []
    with new_folder(out, None, kind="questions") as work:
        for number in range(len(samples)):
            sample = samples.sample(number)
            parts: list[dict[str, object]] = []
            for part in sample.prompt:
                if isinstance(part, TextPart):
                    parts.append({"text": part.text})
                    continue
                name = f"{sample.id}.png"
                content = io.BytesIO()
                Image.fromarray(picture_of(part)).save(content, "PNG")
                (work / name).write_bytes(content.getvalue())
                parts.append({"image": name})
            lines.append(json.dumps({"id": sample.id, "parts": [*parts, {"draw": True}]}) + "\n")
        (work / QUESTIONS).write_text("".join(lines))


def write_maps(results: Path, out: Path, world: WorldConfig) -> Path:
    """Write the folder `out`: a map of labels of each picture that `mmi generate` drew, and the
    predictions that name them; returns the latter."""
    labels = np.array([0, *(SHAPE_LABELS[shape] for shape in world.segment_classes)], np.uint8)
    lines = []
    with new_folder(out, None, kind="maps") as work:
        for line in results.read_text().splitlines():
            found = json.loads(line)
            drawn = [part["image"] for part in found["parts"] if part.get("generated")]
            classes = segmentation_of(read_rgb(results.parent / drawn[0]), world)
            Image.fromarray(labels[classes]).save(work / f"{found['id']}.png")
            lines.append(json.dumps({"id": found["id"], "image": f"{found['id']}.png"}) + "\n")
        (work / "predictions.jsonl").write_text("".join(lines))
    return out / "predictions.jsonl"


def scenes_right(answers: Path, name: str, data: Path, world: WorldConfig) -> dict[str, float]:
    """Percent of the pictures of a benchmark's `answers` that show the scene of the reference
    picture: with all of its attributes, and with every object in its place."""
    _, references = benchmark(name).references(data, None)
    drawn = {
        str(line["id"]): answers.parent / line["image"]
        for line in map(json.loads, answers.read_text().splitlines())
        if "image" in line
    }
    whole = places = 0
    for reference in references:
        path = drawn.get(reference.id)
        if path is None or reference.picture is None:
            continue
        expected = read(read_rgb(reference.picture), world).scene
        found = score(read_rgb(path), expected, world)
        whole += found.whole
        places += found.place and found.count
    count = len(references)
    return {"whole scenes": 100 * whole / count, "places": 100 * places / count}
