"""Golden cases of pre-training: documents of MMC4 and LAION, rows, mixtures, inference records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import numpy as np
import torch

from mmi_deploy.documents.document import Image, Text
from mmi_deploy.documents.files import document_of_json
from mmi_deploy.spec.config import TokenConfig
from mmi_train.data.document import TextPart
from mmi_train.data.packing import PackedRow, Truncation, pack
from mmi_train.data.readers.data_set import picture_of
from mmi_train.data.readers.folder import line_value
from mmi_train.data.readers.image_text import caption_text, line_of
from mmi_train.data.readers.mmc4 import alike, interleaved
from mmi_train.data.readers.pictures import FilePicture, Picture
from mmi_train.data.readers.sample import PicturePart, SamplePart, Skipped
from mmi_train.golden.case_tree import tree
from mmi_train.golden.differences import Case, differs
from mmi_train.golden.published_text import BOI, IMAGE, SPAN, PublishedText, even, shade, written
from mmi_train.model.losses import text_targets

TRUNCATION: Mapping[str, Truncation] = {"image": "image", "sample": "document"}


def _mmc4(case: Case) -> str | None:
    """A document: the pictures that remain, in order, each before or after its sentence."""
    given, options, output = case["input"], case["options"], case["output"]
    sentences = given["text_list"]
    listed = given["image_info"][: len(given["similarity_matrix"])]
    with tree(case) as folder:
        chosen = []
        for at, name in alike(listed, len(sentences), options["sim_threshold"]):
            picture = FilePicture(str(folder / "images"), name)
            try:
                picture_of(PicturePart(picture))
            except Skipped:
                continue
            chosen.append((at, shade(PicturePart(picture)), picture))
        if "error" in output:  # none, or a single picture that chance drops
            return None if len(chosen) < 2 else f"{len(chosen)} pictures, expected an error"
        most = options["max_num_images"]
        where = {level: (at, picture) for at, level, picture in chosen}
        if len(output["images"]) != min(most, len(chosen)) or any(
            level not in where for level in output["images"]
        ):
            return f"{len(chosen)} pictures, expected {output['images']}"
        kept = [where[level] for level in output["images"]]
        chance = {0.0: [False], 1.0: [True]}.get(options["img_first_prob"], [False, True])
        text = PublishedText(case["tokenizer"])
        for firsts in product(chance, repeat=len(kept)):
            before: dict[int, list[Picture]] = {}
            after: dict[int, list[Picture]] = {}
            for (at, picture), first in zip(kept, firsts, strict=True):
                (before if first else after).setdefault(at, []).append(picture)
            parts = interleaved(sentences, before, after)
            shades = [shade(part) for part in parts if isinstance(part, PicturePart)]
            whole = written(parts).removesuffix(" ") + "</s>"
            if even(whole) == even(output["text"]) and shades == output["images"]:
                return differs(text.ids(whole), output["text_ids"], "text_ids")
    return f"no order of the pictures gives {output['text']!r:.160}"


def _laion(case: Case) -> str | None:
    """A line: the published code refuses single quotes, and cuts long captions; ours reads the
    former, and training leaves out the latter. The caption is cut here as published."""
    options, output = case["options"], case["output"]
    entry = line_of(case["input"].encode())
    with tree(case) as folder:
        picture = PicturePart(FilePicture(str(folder), entry["image"]), True)
        if output.get("error") == "JSONDecodeError":
            strict = line_value(case["input"].encode())
            return None if strict is None and isinstance(entry, dict) else "is JSON"
        if "error" in output:
            return None if not picture.picture.exists() else "the picture exists"
        caption = TextPart(caption_text(entry["caption"]), True)
        first = options["img_first_prob"] == 1.0
        parts: list[SamplePart] = [picture, caption] if first else [caption, picture]
        text = PublishedText(case["tokenizer"])
        ids = _cut(text, caption.text, first, options["num_total_token"])
        ours = {
            "text": written(parts, end=True),
            "text_ids": ids,
            "images": [shade(picture)],
            "images_dec": [shade(picture)],
        }
    return differs(ours, output, "output")


def _cut(text: PublishedText, caption: str, picture_first: bool, most: int) -> list[int]:
    """Ids of a caption and its picture, at most `most`: the caption is cut, the picture stays."""
    picture = BOI + IMAGE * SPAN
    if picture_first:
        return text.ids(picture + caption + "</s>")[:most]
    end = text.ids(picture + "</s>")[1:]
    return text.ids(caption.rstrip())[: most - len(end)] + end


def packed(
    case: Case, options: Mapping[str, Any], tokens: TokenConfig, span: int
) -> list[PackedRow[int]]:
    """Rows of the documents of a case."""
    most = options["max_num_images"]
    return list(
        pack(
            [(document["text_ids"], document["images"]) for document in case["input"]],
            tokens,
            length=options["num_total_token"],
            visual_tokens=span,
            truncation=TRUNCATION[options["truncation_level"]],
            max_images=most if most > 0 else None,
        )
    )


def row_of(row: PackedRow[int]) -> dict[str, Any]:
    """A row as the case files hold it."""
    return {
        "text_ids": row.token_ids.tolist(),
        "images": list(row.images),
        "nearest_bos_idxs": list(row.document_start),
    }


def _pack(case: Case) -> str | None:
    text = PublishedText(case["tokenizer"])
    tokens, output = text.tokens, case["output"]
    found = packed(case, case["options"], tokens, SPAN)
    expected = output["rows"]
    ours = [row_of(row) for row in found][: len(expected)]
    trimmed = [{key: row[key] for key in ours[0]} for row in expected]
    if difference := differs(ours, trimmed, "rows"):
        return difference
    for number, (row, other) in enumerate(zip(found, expected, strict=False)):
        unannounced = _unconditional(row, tokens)
        count = {"uncond_image_cnt": unannounced, "image_cnt": len(row.images)}
        if difference := differs(count, {key: other["meta"][key] for key in count}, f"[{number}]"):
            return difference
    batch, first = output["batch_of_first_two"], found[:2]
    width = max(len(row.token_ids) for row in first)
    ids = np.full((2, width), tokens.pad)
    mask = np.zeros((2, width), int)
    for line, row in enumerate(first):
        ids[line, : len(row.token_ids)] = row.token_ids
        mask[line, : len(row.token_ids)] = 1
    got = {
        "text_ids": ids.tolist(),
        "attention_mask": mask.tolist(),
        "num_image_per_seq": [len(row.images) for row in first],
        "nearest_bos_idxs": [start for row in first for start in row.document_start],
        "seq_lens": [len(row.token_ids) for row in first],
    }
    if difference := differs(got, {key: batch[key] for key in got}, "batch"):
        return difference
    for name in ("laion_en", "mmc4"):
        targets = text_targets(
            torch.from_numpy(ids),
            tokens,
            real=torch.from_numpy(mask),
            only_after_image=name.startswith("laion"),
        )
        expected_targets = output[f"targets_when_dataset_is_{name}"]
        if difference := differs(targets.tolist(), expected_targets, f"targets of {name}"):
            return difference
    return None


def _unconditional(row: PackedRow[int], tokens: TokenConfig) -> int:
    """Number of pictures that begin their document, as the published code counts them: also one
    after a single token of a document that the row before holds."""
    places = np.flatnonzero(row.token_ids == tokens.boi)
    return int((places - np.array(row.document_start) <= 1).sum())


def _mixing(case: Case) -> str | None:
    """Mixture of data sets: the next one drawn by its weight. It ends when a set is through
    (`shortest`), when every one was (`longest`, sets begin again), or with all items (`sum`)."""
    generator = torch.Generator().manual_seed(case["seed"] + case["rank"] + case["worker"])
    left = list(range(len(case["lengths"])))
    at, ended, got = [0] * len(left), set(), []
    while left:
        weights = torch.tensor([case["probs"][number] for number in left])
        share = torch.cumsum(weights / weights.sum(), 0)
        number = left[int(torch.searchsorted(share, torch.rand(1, generator=generator)))]
        if at[number] < case["lengths"][number]:
            got.append(f"{chr(97 + number)}{at[number]}")
            at[number] += 1
            continue
        ended.add(number)
        at[number] = 0
        if case["sampling_type"] == "shortest" or len(ended) == len(at):
            break
        if case["sampling_type"] == "sum":
            left.remove(number)
    return differs(got, case["output"], "output")


def _interleaved_prompt(case: Case) -> str | None:
    """A record of the published inference file, as `mmi generate` reads it."""
    output = case["output"]
    with tree(case) as folder:
        document = document_of_json([case["input"]], lambda name: folder / name)
        parts: list[SamplePart] = []
        shades = []
        for part in document.parts:
            if isinstance(part, Text):
                parts.append(TextPart(part.text, True))
            else:
                assert isinstance(part, Image)
                shades.append(int(part.rgb[0, 0, 0]))
                parts.append(PicturePart(FilePicture(str(folder), "")))
    text = PublishedText(case["tokenizer"])
    whole = written(parts)
    ids = text.ids(whole)
    ours = {
        "text": even(whole),
        "images": shades,
        "num_image_per_seq": [len(shades)],
        "target_image_idxs": [len(shades) - 1],
    }
    expected = {key: output[key] for key in ours} | {"text": even(output["text"])}
    return differs(ours, expected, "output") or differs(ids, output["text_ids"], "text_ids")


CHECKS: Mapping[str, Callable[[Case], str | None]] = {
    "mmc4": _mmc4,
    "laion": _laion,
    "pack": _pack,
    "mixing": _mixing,
    "interleaved_prompt": _interleaved_prompt,
}
