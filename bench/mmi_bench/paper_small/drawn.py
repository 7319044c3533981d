"""Scores of drawn pictures that need no network: the drawn world's own reader of scenes.

ADE20K's mIoU takes maps of labels that a segmenter makes of the drawn pictures. The paper's is
OneFormer; of pictures of the drawn world template matching gives the maps. FID and CLIP similarity
of the other benchmarks need networks that are not part of this project; in their place the share of
pictures that show the expected scene is measured, which the reader finds in the reference picture.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from mmi_deploy.documents.images import read_rgb
from mmi_deploy.system.output_folder import new_folder
from mmi_train.data.synthetic.published_trees import SHAPE_LABELS
from mmi_train.data.synthetic.scene_reader import read, score, segmentation_of
from mmi_train.data.synthetic.world import WorldConfig
from mmi_train.evaluation.benchmarks.report import Questions
from mmi_train.evaluation.benchmarks.table import benchmark

PREDICTIONS = "predictions.jsonl"


def write_maps(answers: Path, out: Path, world: WorldConfig) -> Path:
    """Write the folder `out`: a map of labels of each picture that `answers` name, and the
    predictions that name them; returns the latter."""
    labels = np.array([0, *(SHAPE_LABELS[shape] for shape in world.segment_classes)], np.uint8)
    lines = []
    with new_folder(out, None, kind="maps") as work:
        for line in answers.read_text().splitlines():
            found = json.loads(line)
            if "image" not in found:
                continue
            classes = segmentation_of(read_rgb(answers.parent / found["image"]), world)
            Image.fromarray(labels[classes]).save(work / f"{found['id']}.png")
            lines.append(json.dumps({"id": found["id"], "image": f"{found['id']}.png"}) + "\n")
        (work / PREDICTIONS).write_text("".join(lines))
    return out / PREDICTIONS


def scenes_right(answers: Path, name: str, data: Path, world: WorldConfig) -> dict[str, float]:
    """Percent of the pictures of a benchmark's `answers` that show the scene of the reference
    picture: with all of its attributes, and with every object in its place."""
    references = Questions.of(benchmark(name), data, None).references
    drawn = {
        str(line["id"]): answers.parent / line["image"]
        for line in map(json.loads, answers.read_text().splitlines())
        if "image" in line
    }
    whole = places = 0
    for reference in references:
        path = drawn.get(reference.id)
        if path is None or not reference.pictures:
            continue
        expected = read(reference.pictures[-1].load(), world).scene
        found = score(read_rgb(path), expected, world)
        whole += found.whole
        places += found.place and found.count
    count = len(references)
    return {"whole scenes": 100 * whole / count, "places": 100 * places / count}
