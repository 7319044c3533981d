"""Golden cases of prompts: what a reader gives, and the texts, ids and targets made of it.

Our readers read the case's files; their samples are tokenized as for training. Of few-shot
prompts, whose examples the published code draws at random, the examples must be those of the set in
the template, each once, with their pictures. Options of generation are those of our benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

from mmi_train.data.document import TextPart
from mmi_train.data.readers.captions import Captioned, Captions
from mmi_train.data.readers.data_set import Settings
from mmi_train.data.readers.registry import open_set
from mmi_train.data.readers.sample import PicturePart, SamplePart, joined
from mmi_train.data.readers.templates import PROMPTS, Prompt
from mmi_train.data.readers.text_to_image import CocoToDraw
from mmi_train.data.readers.visdial import HISTORY, VisDial
from mmi_train.evaluation.benchmarks.prompts import generation_of
from mmi_train.evaluation.benchmarks.table import BENCHMARKS, benchmark
from mmi_train.golden.case_tree import tree
from mmi_train.golden.differences import Case, PublishedFailure, differs
from mmi_train.golden.published_text import (
    BOI,
    IMAGE,
    SPAN,
    PublishedText,
    even,
    padded,
    shade,
    written,
)

_PICTURE = BOI + IMAGE * SPAN


# Default templates of few-shot examples, by what stands for the answer.
_EXAMPLES = {
    "caption": "Caption: {caption}",
    "vqa": "Question: {question} Short answer: {answer}{eos_token}",
}


@dataclass(frozen=True)
class Row:
    """One sample of a batch: its parts up to the answer, and with it; its pictures' shades."""

    prompt: Sequence[SamplePart]
    whole: Sequence[SamplePart]
    shades: Sequence[int]


def published_class(case: Case) -> str:
    """Name of the published reader."""
    return str(case["source"][0]).rpartition(":")[2]


def batch_differs(case: Case, rows: Sequence[Row], *, end: bool) -> str | None:
    """Compare a batch: texts, ids, mask, targets, length of prompts, order of pictures. `end`:
    whether `</s>` closes the texts of training."""
    output = case["output"]
    batch = output["batch"]
    options = case.get("collator_options", {})
    text = PublishedText(case["tokenizer"])
    most = options.get("max_length", case.get("model_max_length", 2048))
    boi = options.get("add_soi_token", case.get("dataset_options", {}).get("add_soi_token", True))
    training = options["mode"] == "train"
    texts = [
        written(row.whole if training else row.prompt, end=training and end, boi=boi)
        for row in rows
    ]
    if found := _texts_differ(texts, batch["texts"], "{few_shot_example}" in str(options)):
        return found
    if "{few_shot_example}" in str(options):
        return None
    if "images" in batch:
        found = differs([one for row in rows for one in row.shades], batch["images"], "images")
        if found:
            return found
    ids = [text.ids(one)[:most] for one in texts]
    width = most if options.get("padding") == "max_length" else max(map(len, ids))
    if found := _rows_differ(ids, width, text.tokens.pad, batch, left=not training):
        return found
    if training and boi:
        found = _training_differs(text, rows, ids, batch.get("targets", output.get("targets")), end)
        if found:
            return found
    if training and batch.get("ignore_prompt_token_offset"):
        lengths = [len(text.ids(written(row.prompt, boi=boi).rstrip())) for row in rows]
        return differs(lengths, batch["ignore_prompt_token_offset"], "ignore_prompt_token_offset")
    return None


def _texts_differ(ours: Sequence[str], expected: Sequence[str], few_shot: bool) -> str | None:
    """Compare texts up to blanks beside pictures; of few-shot prompts what follows the examples."""
    if not few_shot:
        return differs([even(one) for one in ours], [even(one) for one in expected], "texts")
    for one, other in zip(ours, expected, strict=True):
        if not even(other).endswith(even(one)):
            return f"{one!r} does not end {other!r}"
    return None


def _rows_differ(
    ids: Sequence[Sequence[int]], width: int, pad: int, batch: Case, *, left: bool
) -> str | None:
    """Compare padded ids and their mask; `left`: whether padding may stand before them."""
    expected = {key: batch[key] for key in ("text_ids", "attention_mask")}
    made = [
        {
            "text_ids": padded(ids, pad, width, left=side),
            "attention_mask": padded([[1] * len(row) for row in ids], 0, width, left=side),
        }
        for side in ([False, True] if left else [False])
    ]
    return None if expected in made else differs(made[0], expected, "batch")


def _training_differs(
    text: PublishedText,
    rows: Sequence[Row],
    ids: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]] | None,
    end: bool,
) -> str | None:
    """Compare the tokens that training makes of the samples, and their targets.

    Where a token spans the border of prompt and answer (`>(`), training encodes the answer on its
    own, as the model will be asked for it; the published code learns what follows that token.
    """
    made = []
    for row, expected in zip(rows, ids, strict=True):
        prompt = text.ids(written(row.prompt).rstrip())
        document = text.document(row.whole)
        ours = [int(number) for number in document.token_ids]
        target = text.targets(document)
        if list(expected[: len(prompt)]) == prompt[: len(expected)]:
            ours = ours if end else ours[:-1]
            if ours[: len(expected)] != list(expected):
                return differs(ours[: len(expected)], list(expected), "ids of training")
            made.append(target[: len(expected) - 1])
        else:
            made.append([-100] * (len(prompt) - 1) + list(expected[len(prompt) :]))
    if targets is None:
        return None
    width = len(targets[0])
    return differs([row[:width] for row in padded(made, -100)], targets, "targets")


def _prompt(options: Mapping[str, Any], default: Prompt, kind: str | None = None) -> Prompt:
    """Prompt of a collator: three parts, in the order assistant, user, system, or one."""
    three = options.get("instr_prompts")
    if kind is not None and three is not None:
        three = three[kind]
    if options.get("use_instr_format", True) and three:
        assistant, user, system = three
        user = user.replace("{few_shot_example}", "")
        return Prompt(user, assistant, system)
    if not options.get("use_instr_format", True) and "text_prompt" in options:
        return Prompt(options["text_prompt"].strip())
    return default


_CAPTION_SETS = {
    "CocoCaptionKarpathyDataset": ("coco-caption", {}),
    "NoCapsDataset": ("nocaps", {"ann.json": "nocaps_val_4500_captions.json"}),
    "Flickr30KDataset": ("flickr30k", {"ann.json": "test1k.token.coco_format"}),
    "Image2ParagraphDataset": ("image2paragraph", {}),
}


def _caption(case: Case) -> str | None:
    name, names = _CAPTION_SETS[published_class(case)]
    options = case["dataset_options"]
    with tree(case, names) as folder:
        data = open_set(name, folder, Settings(split=options.get("phase")))
        assert isinstance(data, Captions)
        once = options.get("image_only") or name == "image2paragraph"
        records = [data.record(n) for n in range(len(data))] if once else list(data.captioned())
        items, rows = [], []
        prompt = _prompt(case["collator_options"], PROMPTS[data.default_prompt], "text")
        for index, expected in zip(case["order"], case["output"]["items"], strict=True):
            record = records[index]
            assert isinstance(record, Captioned)
            picture = PicturePart(data.folder.picture(*record.pictures))
            ending = options.get("add_eos", "")
            known = [one.strip().lower() if data.lower else one for one in record.captions]
            told = expected[1].removesuffix(ending)  # one of several captions, drawn
            items.append([shade(picture), expected[1] if told in known else known, record.id])
            parts = prompt.parts(picture, {})
            answer = TextPart(" " + told.strip(), True)
            rows.append(Row(parts, joined([*parts, answer]), [shade(picture)]))
        examples = [
            [
                _example(case, "caption", PicturePart(data.folder.picture(*one.pictures)), **fields)
                for text in one.captions
                for fields in [{"caption": text.strip().lower() if data.lower else text.strip()}]
            ]
            for one in records
            if isinstance(one, Captioned)
        ]
    return (
        differs(items, case["output"]["items"], "items")
        or batch_differs(case, rows, end="add_eos" in options)
        or _few_shot_differs(case, rows, examples)
        or _generation_differs(case, name)
    )


def _example(case: Case, kind: str, picture: PicturePart, **fields: str) -> tuple[str, int | None]:
    """A few-shot example, and its picture's shade if it shows it."""
    template = case["collator_options"].get("few_shot_template", _EXAMPLES[kind])
    shown = "{image}" in template
    text = template.format(image=_PICTURE, eos_token="", **fields)
    return text, shade(picture) if shown else None


def _few_shot_differs(
    case: Case, rows: Sequence[Row], examples: Sequence[Sequence[tuple[str, int | None]]]
) -> str | None:
    """Compare the examples before each prompt, which are of different records. examples: the forms
    that each record may have."""
    options, batch = case["collator_options"], case["output"]["batch"]
    if "{few_shot_example}" not in str(options):
        return None
    count, images = options.get("few_shot_n_shot", 2), []
    for row, text in zip(rows, batch["texts"], strict=True):
        before = even(text).removesuffix(even(written(row.prompt)))
        found = next(
            (
                chosen
                for records in permutations(examples, count)
                for chosen in product(*records)
                if even("".join(one for one, _ in chosen)) == before
            ),
            None,
        )
        if found is None:
            return f"no {count} examples give {before!r}"
        images += [[level for _, level in found if level is not None], row.shades]
    # Examples may be alike in all but their pictures, which then tell them apart.
    given = batch["images"]
    if len(given) != sum(map(len, images)):
        return f"{len(given)} pictures, expected {sum(map(len, images))}"
    known = {level for forms in examples for _, level in forms}
    for at, levels in enumerate(images):
        own, given = given[: len(levels)], given[len(levels) :]
        if own != list(levels) if at % 2 else not {*own} <= known:
            return f"pictures {own}, expected {levels}"
    return None


def _generation_differs(case: Case, name: str) -> str | None:
    """Compare the options of generation that travel with a batch with those of our benchmark
    `name`: its own, unless the case asks for others."""
    batch, options = case["output"]["batch"], case["collator_options"]
    given = options.get("generation_kwargs")
    # Paragraphs are asked for by options of their own, and trained with those of captions.
    own = name != "image2paragraph" or given
    how = generation_of(benchmark(name if own else "coco-caption"))
    ours: dict[str, Any] = {
        "max_length": how.max_tokens,
        "min_length": how.min_tokens + 1 if how.min_tokens else 0,  # theirs counts the `<s>`
        "num_beams": how.beams,
        "length_penalty": how.length_penalty,
        "repetition_penalty": how.repetition_penalty,
    }
    if name != "image2paragraph":
        ours |= given or {}
    there = {key: ours[key] for key in ours if key in batch}
    return differs(there, {key: batch[key] for key in there}, "generation")


def _text_to_image(case: Case) -> str | None:
    name = "ln-coco" if published_class(case) == "LNCOCODataset" else "coco-t2i"
    output, options = case["output"], case["dataset_options"]
    with tree(case) as folder:
        data = open_set(name, folder)
        if name == "coco-t2i" and not options.get("image_only"):
            assert isinstance(data, CocoToDraw)
            records = [one for one in data.every() if isinstance(one, Captioned)]
        else:
            records = [data.record(n) for n in range(len(data))]
        if options.get("image_only"):
            records = list({one.id: one for one in reversed(records)}.values())[::-1]
            records.sort(key=lambda one: [item[-1] for item in output["items"]].index(one.id))
        lower = isinstance(data, CocoToDraw) and data.lower
        known = []
        rows: list[Row] = []
        for record, item in zip(_matching(records, output["items"]), output["items"], strict=True):
            picture = PicturePart(data.folder.picture(*record.pictures), True)
            caption = record.captions[0].lower() if lower else record.captions[0]
            grey = shade(picture)
            known.append([[grey, grey] if isinstance(item[0], list) else grey, caption, record.id])
            dropped = output["batch"]["texts"][len(rows)] == _PICTURE  # by chance
            text = [] if dropped else [TextPart(caption, True)]
            if text and (three := case["collator_options"].get("instr_prompts")):
                assistant, user, system = three["image"]
                told = " ".join(one for one in (system, user, caption, assistant) if one)
                text = [TextPart(told, True)]
            parts = joined([*text, picture])
            rows.append(Row(parts, parts, [grey]))
    return differs(known, output["items"], "items") or batch_differs(case, rows, end=False)


def _matching(records: Sequence[Captioned], items: Sequence[Any]) -> list[Captioned]:
    """Records in the order of the items: further draws of LN-COCO name one again."""
    if len(records) == len(items):
        return list(records)
    found = list(records[: len(items)])
    for item in items[len(found) :]:
        found.append(next(one for one in records if [one.captions[0], one.id] == item[1:]))
    return found


_QUESTION_SETS = {
    "VQAV2Dataset": ("vqav2", {}),
    "OKVQADataset": ("okvqa", {}),
    "VizWizVQADataset": ("vizwiz", {}),
    "TextVQADataset": ("textvqa", {}),
    "LLaVADataset": (
        "llava-665k",
        {"llava.json": "llava_v1_5_mix665k.json", "llava.jsonl": "llava_v1_5_mix665k.jsonl"},
    ),
}


def _vqa(case: Case) -> str | None:
    if published_class(case) == "VQABaseDataset":
        raise PublishedFailure("the option total_length")
    name, names = _QUESTION_SETS[published_class(case)]
    with tree(case, names) as folder:
        data = open_set(name, folder, Settings(split=case["dataset_options"].get("phase")))
        prompt = _prompt(case["collator_options"], PROMPTS["vqa"])
        data.prompt = prompt
        items, rows = [], []
        for number, sample in enumerate(data.samples()):
            record = data.record(number)
            grey = shade(sample.pictures[0])
            items.append([grey, record.question, record.learned, sample.id])
            parts = prompt.parts(sample.pictures[0], {"question": record.question})
            rows.append(Row(parts, sample.parts, [grey]))
        examples = [
            [
                _example(case, "vqa", sample.pictures[0], question=record.question, answer=answer)
                for answer in dict.fromkeys((record.learned, *sample.answers))
            ]
            for number, sample in enumerate(data.samples())
            for record in [data.record(number)]
        ]
    return (
        differs(items, case["output"]["items"], "items")
        or batch_differs(case, rows, end=True)
        or _few_shot_differs(case, rows, examples)
        or (_generation_differs(case, name) if name in BENCHMARKS else None)
    )


def _visdial(case: Case) -> str | None:
    output = case["output"]
    text = PublishedText(case["tokenizer"])
    with tree(case) as folder:
        data = open_set("visdial", folder, Settings(published=frozenset({HISTORY})))
        assert isinstance(data, VisDial)
        (sample,) = data.samples()
        options = sample.about["options"]
        rows = [text.ids(option)[1:] for option in options]
        ours = {
            "text": even(written(sample.prompt)),
            "options": options,
            "options_ids": padded(rows, text.tokens.pad),
            "options_attn_mask": padded([[1] * len(row) for row in rows], 0),
            "image_id": sample.id,
            "image": shade(sample.pictures[0]),
            "text_ids": text.ids(written(sample.prompt)),
        }
        expected = {key: output[key] for key in ours} | {"text": even(output["text"])}
        if isinstance(output["text_ids"][0], list):
            expected["text_ids"] = output["text_ids"][0]
        if found := differs(ours, expected, "output"):
            return found
        # By default the round before the question is there too.
        right = next(iter(open_set("visdial", folder).samples()))
        turns = data.record(0).number - 1
        return differs(written(right.prompt).count("question: "), turns + 1, "rounds")


CHECKS: Mapping[str, Callable[[Case], str | None]] = {
    "caption": _caption,
    "text_to_image": _text_to_image,
    "vqa": _vqa,
    "visdial": _visdial,
}
