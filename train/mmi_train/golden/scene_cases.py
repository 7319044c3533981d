"""Golden cases of stories, maps and regions: what a reader gives, and the texts made of it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from mmi_train.data.document import TextPart
from mmi_train.data.readers.ade20k import Ade20k
from mmi_train.data.readers.data_set import Settings
from mmi_train.data.readers.pictures import Frame, Picture
from mmi_train.data.readers.refer import (
    Refer,
    Region,
    box_text,
    mirrored_box,
    swapped,
    thousandths,
)
from mmi_train.data.readers.registry import open_set
from mmi_train.data.readers.sample import PicturePart, SamplePart, joined
from mmi_train.data.readers.stories import Scenes, Stories
from mmi_train.data.readers.templates import PROMPTS, Prompt
from mmi_train.golden.case_tree import tree
from mmi_train.golden.differences import Case, PublishedFailure, differs
from mmi_train.golden.prompt_cases import Row, batch_differs, published_class
from mmi_train.golden.published_text import PublishedText, even, shade, written


def _story_name(case: Case) -> str:
    name = published_class(case).lower()
    return next(one for one in ("vist", "pororo", "flintstones") if one in name)


def _told(
    sentences: Sequence[str], pictures: Sequence[PicturePart], firsts: Sequence[bool]
) -> list[SamplePart]:
    """Each picture before (`firsts`) or after its sentence."""
    parts: list[SamplePart] = []
    for sentence, picture, first in zip(sentences, pictures, firsts, strict=True):
        text = TextPart(sentence, True)
        parts += [picture, text] if first else [text, picture]
        parts.append(TextPart(" ", True))
    return parts


def _contexts(
    sentences: Sequence[str], pictures: Sequence[PicturePart], options: Mapping[str, Any]
) -> Iterator[list[SamplePart]]:
    """Documents that the published code may make of a story, by its options."""
    chance = options.get("img_first_prob", 0.0)
    context, mode = options.get("context_type", "multi_modal"), options["collate_mode"]
    texts_wanted = mode == "generate_texts"
    last = len(sentences) - 1
    if context == "multi_modal":
        orders = {0.0: [False], 1.0: [True]}.get(chance, [False, True])
        for firsts in product(orders, repeat=len(sentences)):
            parts = _told(sentences[:last], pictures[:last], firsts[:last])
            if texts_wanted:
                yield [*parts, pictures[last]]
            elif mode == "generate_images":  # the sentence stands before the picture to draw
                yield [*parts, TextPart(sentences[last], True), pictures[last]]
            else:
                yield _told(sentences, pictures, firsts)
    elif context == "image_only":
        yield list(pictures)
    elif context == "text_only":
        kept = sentences[:last] if texts_wanted else sentences
        text = TextPart(" ".join(kept), True)
        yield [text] if texts_wanted else [text, pictures[last]]
    elif texts_wanted:
        yield [pictures[last]]
    else:
        yield [TextPart(sentences[last], True), pictures[last]]


def _frames(picture: Picture) -> set[int]:
    """Grey levels of the frames of a strip, or of a picture."""
    if not isinstance(picture, Frame):
        return {int(picture.load()[0, 0, 0])}
    strip = picture.strip.load()
    return {int(strip[top, 0, 0]) for top in range(0, len(strip), strip.shape[1])}


def _rounds(record: Scenes, options: Mapping[str, Any]) -> Iterator[tuple[str, Scenes]]:
    """The story, or with `round_range` "all" its beginnings; the published code leaves the whole
    one out."""
    if options.get("round_range") != "all":
        yield record.id, record
        return
    for size in range(1, len(record.pictures)):
        begun = Scenes(record.id, record.pictures[:size], record.sentences[:size])
        yield f"{record.id}_{size}", begun


def _story(case: Case) -> str | None:
    options, output = case["dataset_options"], case["output"]
    with tree(case) as folder:
        data = open_set(_story_name(case), folder, Settings(split=options["phase"]))
        assert isinstance(data, Stories)
        stories = [one for n in range(len(data)) for one in _rounds(data.record(n), options)]
        if len(stories) != output["length"]:
            return f"{len(stories)} stories, expected {output['length']}"
        rows = []
        for (key, record), item in zip(stories, output["items"], strict=True):
            pictures = [data.picture(name, random.Random(0)) for name in record.pictures]
            parts = [PicturePart(picture, True) for picture in pictures]
            if str(item["meta"][0]) != key:
                return f"story {item['meta'][0]}, expected {key}"
            boi = options.get("add_soi_token", True)
            wanted = even(item["text"].removesuffix(options.get("add_eos", "")))
            found = next(
                (
                    one
                    for one in _contexts(record.sentences, parts, options)
                    if even(written(one, boi=boi)) == wanted
                ),
                None,
            )
            if found is None:
                return f"no order of the story gives {item['text']!r}"
            shown = [part for part in found if isinstance(part, PicturePart)]
            shades = item["images"] or []
            if len(shades) != len(shown) or any(
                level not in _frames(part.picture)
                for level, part in zip(shades, shown, strict=True)
            ):
                return f"pictures {shades} of story {key}"
            whole = joined(found)
            rows.append(Row(whole, whole, shades))
    if "batch_error" in output:
        raise PublishedFailure("stories of unequal length with a mask")
    return batch_differs(case, rows, end="add_eos" in options) or _mask_differs(case, rows)


def _mask_differs(case: Case, rows: Sequence[Row]) -> str | None:
    """Compare which pictures are learned: all but the one of an index, if a case leaves one out."""
    batch = case["output"]["batch"]
    left_out = case["collator_options"].get("ignore_image_loss_idx", -1)
    if "image_loss_mask" not in batch:
        return None
    mask = None
    if left_out > 0:  # a published fault: the picture of index 0 is never left out
        mask = [[float(at != left_out) for at in range(len(row.shades))] for row in rows]
    return differs(mask, batch["image_loss_mask"], "image_loss_mask")


def _segmentation(case: Case) -> str | None:
    options, output = case["dataset_options"], case["output"]
    if "error" in output:
        raise PublishedFailure("training with one resolution")
    with tree(case) as folder:
        data = open_set("ade20k", folder, Settings(split=options["phase"]))
        assert isinstance(data, Ade20k)
        items, rows = [], []
        for number, sample in enumerate(data.samples()):
            plan, text, photo = sample.parts
            assert isinstance(plan, PicturePart) and isinstance(photo, PicturePart)
            assert isinstance(text, TextPart)
            parts: list[SamplePart] = [plan, text, photo]
            if options.get("text_first"):  # the text announces the map then
                parts = [text, PicturePart(plan.picture, True), photo]
            boi = options.get("add_soi_token", True)
            ending = options.get("add_eos", "")
            levels: list[Any] = [shade(plan), shade(photo)]
            if "resolution2" in options["transform"]:  # a published fault: the decoder's is a photo
                levels = [[shade(plan), shade(photo)], [shade(photo), shade(photo)]]
            items.append(
                {
                    "text": written(parts, boi=boi) + ending,
                    "images": levels,
                    "meta": [number, text.text.removesuffix(".")],
                }
            )
            rows.append(Row(parts, parts, [shade(plan), shade(photo)]))
    expected = [{key: item[key] for key in items[0]} for item in output["items"]]
    for item, other in zip(items, expected, strict=True):
        other["meta"] = other["meta"][:2] if len(other["meta"]) >= 2 else item["meta"]
        other["text"], item["text"] = even(other["text"]), even(item["text"])
    return differs(items, expected, "items") or batch_differs(case, rows, end="add_eos" in options)


_SYSTEM, _ASSISTANT = "You are a helpful assistant.", "ASSISTANT:"
_REGION = "<ref>region</ref><box>{box}</box>. "

# Prompts of the published grounding collator, by its tasks.
_TASKS = {
    "grounding": PROMPTS["rec"],
    "region_vqa": Prompt("{image}Answer this question according to the " + _REGION + "{query}"),
    "referring": Prompt("{image}Provide a short description for this " + _REGION.strip()),
}


def _grounding(case: Case) -> str | None:
    output = case["output"]
    if "error" in output:
        raise PublishedFailure("grounded captions, which hold no box")
    names = dict.fromkeys(("ann.jsonl", "train_grounding_0.jsonl"), "refcoco_train.jsonl")
    with tree(case, names) as folder:
        regions = list(_regions(case, folder))
        if "batches" in output:
            return _joined_rows(case, regions)
        rows = []
        for item in output["items"]:
            row = _region_row(case, item, regions)
            if isinstance(row, str):
                return row
            rows.append(row)
    return batch_differs(case, rows, end=True)


def _regions(case: Case, folder: Any) -> Iterator[tuple[Region, Picture, str | None]]:
    """Regions of a case with their pictures and questions, those of low confidence left out."""
    options = case["dataset_options"]
    (name, content), *_ = case["files"].items()
    if name.endswith(".json"):
        width, height = case["picture_size"]
        entries = content["annotations"]
        content = "".join(
            json.dumps(one | {"sent": one["caption"], "width": width, "height": height}) + "\n"
            for one in entries
        )
        (folder / "refcoco_train.jsonl").write_text(content)
    lines = [json.loads(line) for line in content.splitlines()]
    data = open_set("refcoco", folder, Settings(split="train"))
    assert isinstance(data, Refer)
    for number in range(len(data)):
        region, line = data.record(number), lines[number]
        if line.get("confidence", 1.0) >= options.get("confidence_threshold", 0.0):
            picture = data.sample(number).pictures[0].picture
            key = options.get("answer_key", "sent")
            region = Region(
                line.get("image_id", -1),
                region.image,
                line[key],
                region.box,
                region.width,
                region.height,
            )
            yield region, picture, line.get("question") if "query_key" in options else None


def _region_row(case: Case, item: Any, regions: Sequence[Any]) -> Row | str:
    """Row of an item of the published reader; or that no region of our reader is it."""
    for region, picture, query in regions:
        size = region.width, region.height
        for label, box in (
            (region.sentence, region.box),
            (
                swapped(region.sentence, published_inside_words=True),
                mirrored_box(region.box, region.width),
            ),
        ):
            cropped = item["image"]["size"] != list(size)  # at random, the box with it
            same = cropped or thousandths(box, *size) == item["bbox"]
            if label == item["label"] and same and item["id"] == region.id:
                if query == item.get("query"):
                    return _row_of(case, label, item["bbox"], picture, query)
    return f"no region is {item!r:.200}"


def _row_of(case: Case, label: str, box: Sequence[int], picture: Picture, query: str | None) -> Row:
    options = case["collator_options"]
    task = options.get("task", "grounding")
    prompt = _TASKS[task]
    if options.get("use_instr_format"):
        prompt = Prompt(
            "USER: " + prompt.user, _ASSISTANT, _SYSTEM, before_answer=prompt.before_answer
        )
    width = 3 if options.get("force_3_digits", True) else 1
    x1, y1, x2, y2 = (str(value).zfill(width) for value in box)
    told = f"({x1},{y1})({x2},{y2})"
    fields = {"sentence": label, "box": told, "query": query or ""}
    part = PicturePart(picture)
    parts = prompt.parts(part, fields)
    answer = f"{told}</box>" if task == "grounding" else label
    whole = joined([*parts, TextPart(prompt.before_answer + answer, True)])
    return Row(parts, whole, [shade(part)])


def _joined_rows(case: Case, regions: Sequence[Any]) -> str | None:
    """Samples joined to rows of at most `max_len` tokens, in some order of the samples."""
    text = PublishedText(case["tokenizer"])
    most = case["dataset_options"]["max_len"]
    known = {}
    for region, picture, query in regions:
        box = thousandths(region.box, region.width, region.height)
        row = _row_of(case, region.sentence, box, picture, query)
        ids = text.ids(written(row.whole, end=True))
        prompt = len(text.ids(written(row.prompt)))
        known[row.shades[0]] = ids, [-100] * prompt + ids[prompt:]
    for batch in case["output"]["batches"]:
        documents = [known[level] for level in batch["images"]]
        ids = [number for document, _ in documents for number in document]
        if len(ids) > most:
            return f"a row of {len(ids)} tokens, expected at most {most}"
        if found := differs([ids], batch["text_ids"], "text_ids"):
            return found
        targets = [number for _, target in documents for number in target]
        if found := differs([targets], batch["gt_text_ids"], "gt_text_ids"):
            return found
    return None


_GROUNDED = re.compile(r"<ref>(.*?)</ref>((?:<box>\([^<]*\)</box>)+)")
_BOX = re.compile(r"<box>(\(([\d.]+),([\d.]+)\)\(([\d.]+),([\d.]+)\))</box>")


def _grounded_boxes(case: Case) -> str | None:
    width, height = case["width"], case["height"]

    def scaled(found: re.Match[str]) -> str:
        x1, y1, x2, y2 = map(float, found.groups()[1:])
        return f"<box>{box_text((x1, y1, x2, y2), width, height)}</box>"

    objects = {
        name: [box[1] for box in _BOX.finditer(boxes)]
        for name, boxes in _GROUNDED.findall(case["input"])
    }
    ours = {"objects": objects, "text": _BOX.sub(scaled, case["input"])}
    return differs(ours, case["output"], "output")


CHECKS: Mapping[str, Callable[[Case], str | None]] = {
    "story": _story,
    "segmentation": _segmentation,
    "grounding": _grounding,
    "grounded_boxes": _grounded_boxes,
}
