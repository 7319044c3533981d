"""Golden cases of metrics: normalised answers, scores and maps against the published code's.

Rules in which the published code departs from what it describes are asked for by name. Kinds of
`data_and_metrics.json`, the older file, have other forms.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mmi_train.data.readers.ade20k import LABELS
from mmi_train.evaluation.metrics import (
    anls,
    boxes,
    captions,
    mean_iou,
    ndcg,
    relaxed_accuracy,
    vqa,
)
from mmi_train.evaluation.metrics.caption_tokens import (
    TOKENIZER,
    java_archive,
    meteor,
    tokenizer,
    without_punctuation,
)
from mmi_train.evaluation.metrics.frechet import Gaussian, frechet_distance
from mmi_train.evaluation.metrics.ptb_tokens import token_lines
from mmi_train.evaluation.metrics.published_fid import small_pixels

Case = Mapping[str, Any]

METEOR = "METEOR"

# Largest difference of a score, and of one that the published code rounds to 2 decimals.
EXACT, ROUNDED = 1e-6, 0.005 + 1e-6


def _differs(what: str, got: object, expected: object) -> str | None:
    return None if got == expected else f"{what}: expected {expected!r}, got {got!r}"


def _far(what: str, got: float, expected: float, most: float = EXACT) -> str | None:
    if math.isnan(expected) and math.isnan(got):
        return None
    return None if abs(got - expected) <= most else f"{what}: expected {expected}, got {got}"


def _first(*mismatches: str | None) -> str | None:
    return next((found for found in mismatches if found is not None), None)


def vqa_normalise(case: Case) -> str | None:
    """Both steps of normalisation, by VQA's and VizWiz's tables; at most 32 full stops vanish."""
    for name, expected in case["output"].items():
        bare = vqa.without_punctuation(case["input"], most_full_stops=vqa.MOST_FULL_STOPS)
        words = vqa.plain_words(bare, apostrophe="’" if name == "vizwiz" else "'")
        found = _first(
            _differs(f"{name} punctuation", bare, expected["after_punctuation"]),
            _differs(f"{name} words", words, expected["after_digits_articles"]),
        )
        if found:
            return found
    return None


def extract_answer(case: Case) -> str | None:
    """The published short answer; the older file has all answers in one object."""
    pairs = [(case["input"], case["output"])] if "input" in case else case.items()
    return _first(*(_differs(text, vqa.extract_answer(text), answer) for text, answer in pairs))


def _answer(question: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    text = str(question["prediction"])
    return vqa.extract_answer(text) if options.get("use_extract_answer") else text


def _means(case: Case, values: list[float], key: str) -> dict[str, float]:
    """Mean value, in percent, of the questions of each type."""
    found: dict[str, list[float]] = {}
    for question, value in zip(case["input"], values, strict=True):
        found.setdefault(question[key], []).append(value)
    return {name: 100 * float(np.mean(entries)) for name, entries in found.items()}


def _rounded_tables(case: Case, values: list[float], per_question: str) -> str | None:
    """Compare accuracies per question and type with those of a case."""
    output = case["output"]
    asked = [str(question["id"]) for question in case["input"]]
    own = {name: 100 * value for name, value in zip(asked, values, strict=True)}
    tables = {per_question: own}
    for key in ("answer_type", "question_type"):
        if f"per_{key}" in output:
            tables[f"per_{key}"] = _means(case, values, key)
    for table, got in tables.items():
        expected = output[table]
        for name in expected:
            if found := _far(f"{table} {name}", got[name], expected[name], ROUNDED):
                return found
    overall = output.get("result", output)["overall_accuracy"]
    return _far("overall accuracy", 100 * float(np.mean(values)), overall, ROUNDED)


def vqa_accuracy(case: Case) -> str | None:
    """Accuracy by the code of the VQA challenge, with its rules about equal answers."""
    values = [
        vqa.accuracy(
            _answer(question, case["options"]),
            question["answers"],
            raw_when_unanimous=True,
            few_full_stops=True,
            equal_answers_together=case["options"].get("answer_id") is False,
        )
        for question in case["input"]
    ]
    return _rounded_tables(case, values, "per_question")


def vizwiz_accuracy(case: Case) -> str | None:
    """Accuracy by the code of VizWiz, whose ten answers are not normalised."""
    values = [
        vqa.accuracy(
            _answer(question, case["options"]),
            question["answers"],
            few_full_stops=True,
            raw_answers=True,
            apostrophe="’",
        )
        for question in case["input"]
    ]
    return _first(_rounded_tables(case, values, "per_picture"), _vizwiz_captions(case))


def _vizwiz_captions(case: Case) -> str | None:
    """Caption scores that VizWiz's code gives besides: people's answers as references."""
    expected = case["output"]["result"]
    if java_archive(TOKENIZER) is None:
        return None  # its answers hold contractions that the Python tokenizer need not know
    texts = [_answer(question, case["options"]) for question in case["input"]]
    candidates, references = _tokens(texts, [question["answers"] for question in case["input"]])
    found = {
        _published_name(one.name): one.total() for one in captions.measures(candidates, references)
    }
    if METEOR in expected:
        found[METEOR] = 100 * meteor(candidates, references)
    return _first(*(_far(name, found[name], expected[name], ROUNDED) for name in found))


def _published_name(name: str) -> str:
    """Name of a measure in the published code: Bleu_4, ROUGE_L."""
    return name.replace("BLEU", "Bleu").replace("-", "_")


def _tokens(
    texts: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Tokens of candidates and references, by the best tokenizer that is there."""
    tokenize, _ = tokenizer(brackets_stay=True)
    lines = iter(tokenize([*texts, *(text for entry in references for text in entry)]))
    return [next(lines) for _ in texts], [[next(lines) for _ in entry] for entry in references]


def ptb(case: Case) -> str | None:
    """Tokens of a caption or of several, by Java where it is and by the Python tokenizer."""
    given, output = case["input"], case["output"]
    texts = [given] if isinstance(given, str) else [text for own in given.values() for text in own]
    if isinstance(output, str):
        expected = [output]
    else:
        expected = [text for own in output.values() for text in own]
    bare = [
        without_punctuation(line, brackets_stay=True)
        for line in token_lines([" ".join(text.split()) for text in texts])
    ]
    tokenize, said = tokenizer(brackets_stay=True)
    return _first(
        _differs("Python tokens", bare, expected),
        None if said else _differs("Java tokens", tokenize(texts), expected),
    )


def caption_scores(case: Case) -> str | None:
    """Tokens, and scores of the whole set and of each picture."""
    given, output = case["input"], case["output"]
    candidates, references = _tokens(given["candidates"], given["references"])
    terms = np.array([captions.bleu_terms(*p) for p in zip(candidates, references, strict=True)])
    each: dict[str, Sequence[float]] = {
        f"Bleu_{n}": list(captions.bleu(terms, n)) for n in range(1, captions.LONGEST + 1)
    }
    each["CIDEr"] = captions.cider_values(candidates, references)
    each["ROUGE_L"] = [captions.rouge_l(*pair) for pair in zip(candidates, references, strict=True)]
    whole = {
        _published_name(one.name): one.total() / 100
        for one in captions.measures(candidates, references)
    }
    expected = output["tokens"]
    return _first(
        _differs("candidates", candidates, expected["candidates"]),
        _differs("references", references, expected["references"]),
        *(
            _far(f"{name} of picture {place}", value, scores["each"][place])
            for name, scores in output["scores"].items()
            for place, value in enumerate(each[name])
        ),
        *(_far(name, whole[name], s["corpus"]) for name, s in output["scores"].items()),
    )


def anls_case(case: Case) -> str | None:
    """ANLS of one answer."""
    given = case["input"]
    return _far("ANLS", anls.anls(given["prediction"], given["answers"]), case["output"])


def relaxed_accuracy_case(case: Case) -> str | None:
    """Relaxed accuracy of one answer."""
    given = case["input"]
    found = relaxed_accuracy.relaxed_match(given["prediction"], given["target"])
    return _differs("right", found, case["output"])


def grounding_parse(case: Case) -> str | None:
    """The box that an answer names; the older file has all answers in one object."""
    pairs = [(case["input"], case["output"])] if "input" in case else case.items()
    return _first(*(_differs(text, _sides(text), box) for text, box in pairs))


def _sides(answer: str) -> list[float | str]:
    return ["nan" if math.isnan(side) else side for side in boxes.parse_box(answer)]


def _overlap(given: Mapping[str, Any]) -> float:
    size = given["width"], given["height"]
    predicted = boxes.in_pixels(boxes.parse_box(given["pred_box"]), *size)
    x1, y1, x2, y2 = given["gt_box"]
    return boxes.iou(predicted, boxes.in_pixels((x1, y1, x2, y2), *size))


def grounding_iou(case: Case) -> str | None:
    """IoU of one box, or the accuracy of several."""
    given, output = case["input"], case["output"]
    if isinstance(given, list):
        right = [boxes.counts(_overlap(entry)) for entry in given]
        return _far("accuracy", float(np.mean(right)), output["accuracy"])
    overlap = _overlap(given)
    expected = math.nan if output["iou"] is None else output["iou"]
    return _first(
        _far("IoU", overlap, expected),
        _differs("counts", boxes.counts(overlap), output["counts"]),
    )


def ndcg_case(case: Case) -> str | None:
    """Ranks and NDCG of each question, and the mean; a batch of one, at which the published code
    raises, has a mean here."""
    if "value" in case:  # the older file: a round for each dialog, and the mean alone
        scores, relevance = [rounds[0] for rounds in case["scores"]], case["relevance"]
        output = {"ranks": [rounds[0] for rounds in case["ranks"]], **case["value"]}
    else:
        scores, relevance = case["input"]["scores"], case["input"]["relevance"]
        output = case["output"]
    ranks = [ndcg.ranks_of(row) for row in scores]
    values = [
        math.nan if (value := ndcg.ndcg(own, row)) is None else value
        for own, row in zip(ranks, relevance, strict=True)
    ]
    numbers = output.get("ndcg_of_each", values)
    expected = [math.nan if value is None else value for value in numbers]
    each = [
        _far(f"question {place}", *pair)
        for place, pair in enumerate(zip(values, expected, strict=True))
    ]
    if "ndcg" in output:
        mean = math.nan if output["ndcg"] is None else output["ndcg"]
        each.append(_far("NDCG", float(np.mean(values)), mean))
    return _first(_differs("ranks", ranks, output["ranks"]), *each)


def miou(case: Case) -> str | None:
    """Intersections, unions and their mean, in which absent classes count as 0."""
    if "pred_plus1" in case:  # the older file
        predictions, labels = [np.array(case["pred_plus1"]) - 1], [case["label"]]
        output = {"intersection": case["inter"], "union": case["union"]}
        classes = case["num_classes"]
    else:
        given, output = case["input"], case["output"]
        predictions = given["predictions"] if "predictions" in given else [given["prediction"]]
        labels = given["labels"] if "labels" in given else [given["label"]]
        classes = given["num_classes"]
    pairs = [
        mean_iou.overlaps(np.array(prediction), np.array(label), classes)
        for prediction, label in zip(predictions, labels, strict=True)
    ]
    both, union = (np.sum(counts, axis=0) for counts in zip(*pairs, strict=True))
    value = float(mean_iou.mean_iou(both, union, absent_classes_as_zero=True))
    return _first(
        _differs("intersection", both.tolist(), output.get("intersection", both.tolist())),
        _differs("union", union.tolist(), output.get("union", union.tolist())),
        _far("mean IoU", value, output.get("miou", value)),
    )


def ade20k_colour(case: Case) -> str | None:
    """Colours of labels, and the labels of those colours."""
    given, output = case["input"], case["output"]
    labels = np.arange(LABELS + 1) if isinstance(given, str) else np.array(given)
    try:
        colours = mean_iou.colours_of(labels)
    except IndexError:
        return _differs("colours", {"error": "IndexError"}, output)
    found = _differs("colours", colours.tolist(), output)
    return found or _differs("labels", mean_iou.labels_of(colours).tolist(), labels.tolist())


def frechet(case: Case) -> str | None:
    """Distance of two Gaussians."""
    given = case["input"]
    parts = [np.array(given[name], np.float64) for name in ("mu1", "sigma1", "mu2", "sigma2")]
    return _far("distance", frechet_distance(*parts), case["output"])


def picture(given: Mapping[str, Any]) -> np.ndarray:
    """A generated picture of a case, uint8 [height, width, channels]. Raises `ValueError` if its
    bytes have another hash."""
    x = np.arange(given["width"])[None, :, None]
    y = np.arange(given["height"])[:, None, None]
    c = np.arange(given["channels"])
    checks = (x // 8 + y // 8) % 2
    values = x * (3 + c) + y * (5 + 2 * c) + x * y // 7 + 40 * c * checks + 29 * given["k"]
    found = (values % 256).astype(np.uint8)
    if _hash(found) != given["sha256"]:
        raise ValueError("the picture is not that of the case")
    return found


def _hash(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def _outputs(case: Case) -> list[Mapping[str, Any]]:
    """Outputs under either version of Pillow."""
    return [case[key] for key in ("output", "output_with_pillow_13") if key in case]


def fid64(case: Case) -> str | None:
    """The 64-pixel picture that the published FID sees."""
    got = _hash(np.rint(small_pixels(picture(case["input"])) * 255).astype(np.uint8))
    expected = [output["uint8_sha256"] for output in _outputs(case)]
    return None if got in expected else f"pixels: expected {expected}, got {got}"


def frechet_features(case: Case) -> str | None:
    """Means of quarters of 64-pixel pictures as features, their Gaussians and distance."""
    sets = []
    for name in ("set1", "set2"):
        pixels = np.stack([small_pixels(picture(given)) for given in case["input"][name]])
        quarters = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(pixels), 2)
        sets.append(quarters.reshape(len(pixels), -1).double().numpy())
    gaussians = [Gaussian(features.shape[1]) for features in sets]
    for own, features in zip(gaussians, sets, strict=True):
        own.add(features)
    one, other = gaussians
    got = {
        "features1": sets[0],
        "features2": sets[1],
        "mu1": one.mean,
        "sigma1": one.covariance,
        "mu2": other.mean,
        "sigma2": other.covariance,
        "distance": frechet_distance(one.mean, one.covariance, other.mean, other.covariance),
    }
    found = [
        _first(
            *(
                _far(key, float(np.abs(got[key] - np.array(value)).max()), 0.0)
                for key, value in output.items()
            )
        )
        for output in _outputs(case)
    ]
    return None if None in found else found[0]


CHECKS: Mapping[str, Callable[[Case], str | None]] = {
    "vqa_normalise": vqa_normalise,
    "extract_answer": extract_answer,
    "vqa_accuracy": vqa_accuracy,
    "vizwiz_accuracy": vizwiz_accuracy,
    "ptb": ptb,
    "caption_scores": caption_scores,
    "anls": anls_case,
    "relaxed_accuracy": relaxed_accuracy_case,
    "grounding_parse": grounding_parse,
    "parse_box": grounding_parse,
    "grounding_iou": grounding_iou,
    "ndcg": ndcg_case,
    "miou": miou,
    "ade20k_colour": ade20k_colour,
    "frechet": frechet,
    "frechet_features": frechet_features,
    "fid64": fid64,
}
