"""Every evaluation set in its published format: how its questions are read, and what they score."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmi_deploy.errors import MmiError
from mmi_train.evaluation.benchmarks.report import Questions, Report
from mmi_train.evaluation.benchmarks.scores import Options
from mmi_train.evaluation.benchmarks.table import BENCHMARKS, benchmark
from mmi_train.evaluation.metrics import caption_tokens


def ten(*answers: str) -> list[dict[str, Any]]:
    """Ten answers of people: the given ones, the last repeated."""
    given = [*answers, *[answers[-1]] * (10 - len(answers))]
    return [{"answer": text, "answer_confidence": "yes"} for text in given]


def images(captions: Mapping[int, Sequence[str]], **more: Any) -> dict[str, Any]:
    """Captions in COCO's form."""
    return {
        "images": [{"id": n, "file_name": f"{n:012d}.jpg", **more} for n in captions],
        "annotations": [
            {"id": 10 * n + k, "image_id": n, "caption": text}
            for n, texts in captions.items()
            for k, text in enumerate(texts)
        ],
    }


@pytest.fixture(autouse=True)
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores with the Python tokenizer, whatever is installed: starting Java takes a second."""
    monkeypatch.setattr(caption_tokens, "java_archive", lambda name: None)


CAPTIONS = {
    31: ("a red boat on the calm lake", "a boat floats on a lake near the hill"),
    47: ("two goats climb a steep hill", "goats on a hill of grey stones"),
}

RELEVANCE = [0.0, 1.0, 0.5, 0.0]

PAGE = {"image": "documents/a.png", "question": "?"}


def dialogs(*image_ids: int, rounds: int = 3) -> dict[str, Any]:
    """Dialogs of the file of Visual Dialog, each turn with four options."""
    turn = {"question": 0, "answer": 0, "answer_options": [0, 1, 2, 3], "gt_index": 1}
    found = [{"image_id": n, "caption": "?", "dialog": [turn] * rounds} for n in image_ids]
    answers = ["yes", "no", "two", "red"]
    return {"data": {"dialogs": found, "questions": ["why"], "answers": answers}}


@dataclass(frozen=True)
class Set:
    """Files of a small set, predictions, and metrics that they must give."""

    files: Mapping[str, Any]
    predictions: Sequence[Mapping[str, Any]]
    metrics: Mapping[str, float]
    split: str | None = None
    missing: int = 0


def texts(**answers: str) -> list[dict[str, Any]]:
    """Predictions of texts by id."""
    return [{"id": name.removeprefix("_"), "text": text} for name, text in answers.items()]


SETS = {
    "okvqa": Set(
        {
            "OpenEnded_mscoco_val2014_questions.json": {
                "questions": [{"question_id": 61, "image_id": 6, "question": "why"}]
            },
            "mscoco_val2014_annotations.json": {
                "annotations": [
                    {"question_id": 61, "image_id": 6, "answers": ten("race", "race", "racing")}
                ]
            },
        },
        texts(_61="race"),
        {"accuracy": 60},
    ),
    "textvqa": Set(
        {
            "TextVQA_0.5.1_val.json": {
                "data": [
                    {
                        "question_id": 34602,
                        "image_id": "a",
                        "question": "?",
                        "answers": ["nokia"] * 10,
                    }
                ]
            }
        },
        texts(_34602="nokia"),
        {"accuracy": 100},
    ),
    "textvqa, as VQA": Set(
        {
            "textvqa_val_questions.json": {
                "questions": [
                    {"question_id": 3, "image_id": "a", "image": "a.jpg", "question": "?"}
                ]
            },
            "textvqa_val_annotations.json": {
                "annotations": [{"question_id": 3, "answers": ten("exit", "stop")}]
            },
        },
        texts(_3="exit"),
        {"accuracy": 30},
    ),
    "vizwiz": Set(
        {
            "annotations/val.json": [
                {
                    "image": "VizWiz_val_00000007.jpg",
                    "answers": ten("soup", "can"),
                    "question": "?",
                },
                {"image": "VizWiz_val_00000009.jpg", "answers": ten("grey"), "question": "?"},
            ]
        },
        texts(**{"VizWiz_val_00000007.jpg": "soup", "VizWiz_val_00000009.jpg": "Grey."}),
        {"accuracy": 65},
    ),
    "gqa": Set(
        {
            "testdev_balanced_questions.json": {
                "201307251": {"imageId": "n1", "question": "?", "answer": "no"},
                "201307252": {"imageId": "n1", "question": "?", "answer": "table"},
            }
        },
        texts(_201307251="No.", _201307252="chair"),
        {"accuracy": 50},
    ),
    "docvqa": Set(
        {
            "val_v1.0_withQT.json": {
                "data": [
                    {"questionId": 337, **PAGE, "answers": ["May 5", "5 May"]},
                    {"questionId": 338, **PAGE, "answers": ["total"]},
                ]
            }
        },
        texts(_337="may  5"),
        {"ANLS": 50},
        missing=1,
    ),
    "infovqa": Set(
        {
            "infographicVQA_val_v1.0.json": {
                "data": [
                    {
                        "questionId": 5,
                        "image_local_name": "1.jpg",
                        "question": "?",
                        "answers": ["12345678"],
                    }
                ]
            }
        },
        texts(_5="12345679"),
        {"ANLS": 87.5},
    ),
    "stvqa": Set(
        {
            "train_task_3.json": {
                "data": [
                    {
                        "question_id": 12,
                        "file_path": "a/b.jpg",
                        "question": "?",
                        "answers": ["coca cola"],
                    }
                ]
            }
        },
        texts(_12="Coca Cola"),
        {"ANLS": 100},
        split="train",
    ),
    "chartqa": Set(
        {
            "test/test_human.json": [{"imgname": "1.png", "query": "?", "label": "40"}],
            "test/test_augmented.json": [
                {"imgname": "2.png", "query": "?", "label": "0.5"},
                {"imgname": "3.png", "query": "?", "label": "Blue"},
            ],
        },
        texts(_0="41.9", _1="0.53", _2="blue"),
        {
            "relaxed accuracy": 200 / 3,
            "relaxed accuracy, human": 100,
            "relaxed accuracy, augmented": 50,
        },
    ),
    "visdial": Set(
        {
            "visdial_1.0_val.json": dialogs(185, 186),
            "visdial_1.0_val_dense_annotations.json": [
                {"image_id": 185, "round_id": 3, "gt_relevance": RELEVANCE}
            ],
        },
        [{"id": 185, "scores": [-1.0, -2.5, -0.5, -9.0]}],
        # Of the two ranks that count, 0.5 and 0 are shown; 1 and 0.5 would be best.
        {"NDCG": 100 * 0.5 / (1 + 0.5 / np.log2(3))},
    ),
    "refcoco+": Set(
        {
            "annotations/refcoco+_testA.jsonl": "".join(
                json.dumps(
                    {"image": "a.jpg", "sent": "it", "bbox": box, "width": 640, "height": 480}
                )
                + "\n"
                for box in ([64, 48, 320, 240], [0, 0, 640, 480], [10, 10, 20, 20])
            )
        },
        [
            {"id": 0, "text": "(100,100)(500,500)</box>"},
            {"id": 1, "text": "(000,000)(706,706)"},
            {"id": 2, "text": "over there"},
        ],
        {"IoU@0.5": 100 / 3},
        split="testA",
    ),
    "refcocog": Set(
        {
            "refs(umd).p": pickle.dumps(
                [
                    {
                        "ann_id": 11,
                        "image_id": 21,
                        "split": "val",
                        "sentences": [
                            {"sent": sentence, "sent_id": id}
                            for id, sentence in ((5, "a"), (6, "b"))
                        ],
                    }
                ]
            ),
            "instances.json": {
                "images": [{"id": 21, "file_name": "a.jpg", "width": 100, "height": 50}],
                # Corners (10, 5) and (50, 25) of 100 x 50 pixels: (100,100)(500,500) of 1000.
                "annotations": [{"id": 11, "image_id": 21, "bbox": [10.0, 5.0, 40.0, 20.0]}],
            },
        },
        # The second box covers 0.4 x 0.19 of the 0.4 x 0.4 that are asked for.
        [{"id": 5, "text": "(100,100)(500,499)"}, {"id": 6, "text": "(100,100)(500,290)"}],
        {"IoU@0.5": 50},
        split="val",
    ),
    "flickr30k": Set(
        {"test1k.token.coco_format": images(CAPTIONS)},
        texts(_31=CAPTIONS[31][0], _47=CAPTIONS[47][1]),
        {"BLEU-4": 100, "ROUGE-L": 100},
    ),
    "nocaps": Set(
        {"nocaps_val_4500_captions.json": images(CAPTIONS, domain="near-domain")},
        texts(_31="", _47=CAPTIONS[47][1]),
        {"ROUGE-L": 50},
    ),
    "coco-caption": Set(
        {
            "annotations/coco_karpathy_test.json": [
                {
                    "image": f"val2014/COCO_val2014_{number:012d}.jpg",
                    "image_id": f"coco_test_{number}",
                    "caption": list(captions),
                }
                for number, captions in CAPTIONS.items()
            ]
        },
        texts(_31=CAPTIONS[31][0], _47=CAPTIONS[47][1]),
        {"BLEU-4": 100, "ROUGE-L": 100},
    ),
    "image2paragraph": Set(
        {
            "paragraphs_v1.json": [
                {"image_id": number, "url": "x/VG_100K/1.jpg", "paragraph": captions[0]}
                for number, captions in CAPTIONS.items()
            ],
            "test_split.json": [47],
        },
        texts(_47=CAPTIONS[47][0]),
        {"BLEU-4": 100, "ROUGE-L": 100},
    ),
}


def write(folder: Path, files: Mapping[str, Any]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, bytes | str) else json.dumps(content)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def predictions(folder: Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    path = folder / "predictions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def report(name: str, folder: Path, options: Options | None = None) -> Report:
    """The report of a set of `SETS`, its files written into `folder`."""
    one = SETS[name]
    row = benchmark(name.partition(",")[0])
    questions = Questions.of(row, write(folder / "data", one.files), one.split)
    return questions.report(predictions(folder, one.predictions), options)


def plain(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics without the name of the tokenizer."""
    return {name.removesuffix(", python tokens"): value for name, value in metrics.items()}


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_read_and_scored(name: str, tmp_path: Path) -> None:
    found = report(name, tmp_path)
    expected = SETS[name].metrics
    values = plain(found.metrics)
    assert {key: values[key] for key in expected} == pytest.approx(expected, abs=1e-6)
    assert found.missing == SETS[name].missing
    assert found.remarks == [] or found.missing
    for key, (low, high) in found.intervals.items():
        assert low - 1e-9 <= found.metrics[key] <= high + 1e-9


def test_every_benchmark_of_texts_has_a_set_here() -> None:
    written = {name.partition(",")[0] for name in SETS} | {"vqav2", "refcoco"}
    assert {row.name for row in BENCHMARKS.values() if row.kind != "image"} == written


@pytest.mark.parametrize("name", sorted({key.partition(",")[0] for key in SETS}))
def test_a_missing_file_is_named_with_its_source(name: str, tmp_path: Path) -> None:
    with pytest.raises(MmiError, match=r"lacks .* of the data set .*Get it from \w"):
        Questions.of(benchmark(name), tmp_path, None)


@pytest.mark.parametrize("name", SETS)
def test_files_of_another_form_are_one_line(name: str, tmp_path: Path) -> None:
    one = SETS[name]
    other = {"info": [1]}
    wrong = {path: pickle.dumps(other) if path.endswith(".p") else other for path in one.files}
    with pytest.raises(
        MmiError, match="is not what the data set publishes|published form|has no question"
    ):
        Questions.of(benchmark(name.partition(",")[0]), write(tmp_path, wrong), one.split)


def test_samples_have_the_numbers_of_the_published_readers(tmp_path: Path) -> None:
    """Those follow the annotations, whatever the order of the questions."""
    files = {
        "OpenEnded_mscoco_val2014_questions.json": {
            "questions": [{"question_id": n, "image_id": 1, "question": "?"} for n in (5, 6)]
        },
        "mscoco_val2014_annotations.json": {
            "annotations": [{"question_id": n, "answers": ten("x")} for n in (6, 5)]
        },
    }
    found = Questions.of(benchmark("okvqa"), write(tmp_path, files), None)
    assert [one.id for one in found.references] == ["6", "5"]


@pytest.mark.parametrize(
    "name", ["annotations/coco_karpathy_val_gt.json", "annotations/captions_val2014.json"]
)
def test_captions_of_coco_are_read_in_its_own_form(name: str, tmp_path: Path) -> None:
    found = Questions.of(
        benchmark("coco-caption"), write(tmp_path, {name: images(CAPTIONS)}), "val"
    )
    assert [(one.id, one.answers) for one in found.references] == [
        (str(number), captions) for number, captions in CAPTIONS.items()
    ]


def test_parts_of_chartqa_have_numbers_of_their_own(tmp_path: Path) -> None:
    questions = Questions.of(benchmark("chartqa"), write(tmp_path, SETS["chartqa"].files), None)
    names = {"human-0": "41.9", "augmented-0": "0.53", "augmented-1": "blue"}
    found = questions.report(predictions(tmp_path, texts(**names)))
    assert found.metrics["relaxed accuracy"] == pytest.approx(200 / 3) and not found.remarks


def test_missing_captions_lower_cider(tmp_path: Path) -> None:
    whole = plain(report("flickr30k", tmp_path).metrics)["CIDEr"]
    questions = Questions.of(benchmark("flickr30k"), tmp_path / "data", None)
    half = questions.report(predictions(tmp_path, SETS["flickr30k"].predictions[:1]))
    assert 0 < plain(half.metrics)["CIDEr"] < whole


def test_published_rules_are_followed_when_asked_for(tmp_path: Path) -> None:
    data = write(tmp_path / "data", SETS["okvqa"].files)
    path = predictions(tmp_path, texts(_61="It is a race"))
    questions = Questions.of(benchmark("okvqa"), data, None)
    assert questions.report(path).metrics["accuracy"] == 0
    options = Options(frozenset({"extract-answer"}))
    assert questions.report(path, options).metrics["accuracy"] == pytest.approx(60)
    data = write(tmp_path / "flickr", SETS["flickr30k"].files)
    long = texts(_31=CAPTIONS[31][0] + ". It is red.", _47=CAPTIONS[47][1])
    questions, path = Questions.of(benchmark("flickr30k"), data, None), predictions(tmp_path, long)
    options = Options(frozenset({"first-sentence"}))
    assert plain(questions.report(path, options).metrics)["BLEU-4"] == pytest.approx(100)
    assert plain(questions.report(path).metrics)["BLEU-4"] < 90


def test_questions_that_alone_have_no_answer_are_left_out(tmp_path: Path) -> None:
    files = dict(SETS["okvqa"].files)
    files["OpenEnded_mscoco_val2014_questions.json"] = {
        "questions": [{"question_id": n, "image_id": 1, "question": "?"} for n in (61, 62)]
    }
    questions = Questions.of(benchmark("okvqa"), write(tmp_path, files), None)
    found = questions.report(predictions(tmp_path, texts(_61="race")))
    assert found.metrics["accuracy"] == pytest.approx(60) and found.missing == 0
    assert found.remarks == ["1 of 2 questions have no answer and are left out"]


def test_a_test_split_of_dialogs_asks_for_the_last_round(tmp_path: Path) -> None:
    value = dialogs(9)
    last = {"question": 0, "answer_options": [0, 1]}  # whose answer is not published
    value["data"]["dialogs"][0]["dialog"][2] = last
    data = write(tmp_path, {"visdial_1.0_test.json": value})
    questions = Questions.of(benchmark("visdial"), data, "test")
    path = predictions(tmp_path, [{"id": 9, "scores": [0.5, 2.0]}])
    assert json.loads(questions.submission(path)) == [
        {"image_id": 9, "round_id": 3, "ranks": [2, 1]}
    ]
    with pytest.raises(MmiError, match="are not published"):
        questions.report(path)


def test_a_metric_without_a_value_is_null(tmp_path: Path) -> None:
    """People may find no option of a dialog relevant."""
    files = dict(SETS["visdial"].files)
    judged = {"image_id": 185, "round_id": 3, "gt_relevance": [0.0] * 4}
    files["visdial_1.0_val_dense_annotations.json"] = [judged]
    questions = Questions.of(benchmark("visdial"), write(tmp_path, files), None)
    path = predictions(tmp_path, [{"id": 185, "scores": [1.0, 2.0, 3.0, 4.0]}])
    found = questions.report(path, against=path).as_json()
    assert found["metrics"] == {"NDCG": None} and found["intervals"] == {"NDCG": [None, None]}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_meteor_without_java_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MmiError, match=r"needs Java .* pip install 'mmi_deploy\[evaluate\]'"):
        report("flickr30k", tmp_path, Options(meteor=True))


def test_options_of_a_dialog_must_all_be_ranked(tmp_path: Path) -> None:
    questions = Questions.of(benchmark("visdial"), write(tmp_path, SETS["visdial"].files), None)
    ranks = predictions(tmp_path, [{"id": 185, "ranks": [3, 1, 2, 4]}])
    assert questions.report(ranks).metrics["NDCG"] == pytest.approx(100)
    assert json.loads(questions.submission(ranks)) == [
        {"image_id": 185, "round_id": 3, "ranks": [3, 1, 2, 4]}
    ]
    for line, says in (
        ({"id": 185, "ranks": [1, 2]}, "expected 4 scores; got 2"),
        ({"id": 185, "ranks": [1, 2, 2, 4]}, "not 1 to 4, each once"),
        ({"id": 185, "scores": "best"}, 'has no "scores"'),
    ):
        with pytest.raises(MmiError, match=says):
            questions.report(predictions(tmp_path, [line]))


@pytest.mark.parametrize(
    ("name", "file", "value"),
    [
        ("coco-t2i", "captions_val2014.json", {"annotations": [{"image_id": "x"}]}),
        ("coco-caption", "coco_karpathy_test.json", [{"image": "a_1.jpg", "caption": [1, None]}]),
        (
            "refcoco",
            "refcoco_val.jsonl",
            {"image": "a.jpg", "bbox": [10**400, 0, 1, 1], "width": 2},
        ),
        ("ln-coco", "coco_val_captions.jsonl", {"image_id": float("inf"), "caption": "a"}),
    ],
)
def test_values_that_no_set_holds_end_in_one_line(
    name: str, file: str, value: Any, tmp_path: Path
) -> None:
    (tmp_path / file).write_text(json.dumps(value) + "\n")
    with pytest.raises(MmiError, match="is not of the published form") as said:
        Questions.of(benchmark(name), tmp_path, None)
    assert "\n" not in str(said.value)
