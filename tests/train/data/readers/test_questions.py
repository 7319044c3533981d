"""Sets of questions: each reader on a tree of its published format, with the format's odd cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmi_deploy.errors import MmiError
from mmi_train.data.readers import question_tables
from train.data.readers.trees import checked, lines, opened, png, put, shown

ONE_WORD = "Please provide an accurate answer within one word. The answer is:"
ASKS = "Based on the image, please answer the question."


def asked(data: Any) -> list[tuple[Any, str, tuple[str, ...], Any]]:
    """Id, picture, answers and learned answer of every sample."""
    found = []
    for sample in data.samples():
        last = shown(sample)[-1]
        learned = last[0] if isinstance(last, list) else None
        found.append((sample.id, sample.pictures[0].picture.name, sample.answers, learned))
    return found


def vqa_answers(*answers: str) -> list[dict[str, Any]]:
    return [
        {"answer": answer, "answer_confidence": "yes", "answer_id": number}
        for number, answer in enumerate(answers, 1)
    ]


@pytest.mark.parametrize(("name", "stem"), [("vqav2", "v2_"), ("okvqa", "")])
def test_pairs_of_questions_and_annotations(
    name: str, stem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [
        {"image_id": 402, "question": "Where?", "question_id": 4002},
        {"image_id": 401, "question": "Who is it ?", "question_id": 4001},
        {"image_id": 401, "question": "Again?", "question_id": 4001},
        {"image_id": 401, "question": "Never answered?", "question_id": 4003},
    ]
    annotations = [
        {
            "question_id": 4001,
            "image_id": 401,
            "question_type": "who",
            "answer_type": "other",
            "multiple_choice_answer": "cat",
            "answers": vqa_answers("dog", "cat", "cat"),
        },
        {"question_id": 4002, "image_id": 402, "answers": vqa_answers("here", "there")},
        {"question_id": 9, "image_id": 402, "answers": []},
    ]
    tree = put(
        tmp_path,
        {
            f"{stem}OpenEnded_mscoco_val2014_questions.json": {"questions": questions},
            f"{stem}mscoco_val2014_annotations.json": {"annotations": annotations},
            "val2014/COCO_val2014_000000000401.jpg": 1,
            "images/val2014/COCO_val2014_000000000402.jpg": 2,
        },
    )
    data = opened(name, tree, split="val")
    assert asked(data) == [
        (4001, "val2014/COCO_val2014_000000000401.jpg", ("dog", "cat", "cat"), " cat"),
        (4002, "images/val2014/COCO_val2014_000000000402.jpg", ("here", "there"), " here"),
    ]
    assert shown(data.sample(0))[0] == ASKS and shown(data.sample(0))[2] == (
        f"Who is it ? {ONE_WORD}"
    )
    assert data.sample(0).about == {"question_type": "who", "answer_type": "other", "image_id": 401}
    found = checked(name, tree, capsys)
    assert found["skipped"] == {
        "question id occurs twice": 1,
        "annotation without a question": 1,
        "no answer": 1,
    }
    assert found["documents"][0]["answers"] == ["dog", "cat", "cat"]


def test_a_test_split_has_no_answers(tmp_path: Path) -> None:
    tree = put(
        tmp_path,
        {
            "v2_OpenEnded_mscoco_test-dev2015_questions.json": {
                "questions": [{"image_id": 1, "question": "Q?", "question_id": 10}]
            },
            "test2015/COCO_test2015_000000000001.jpg": 1,
        },
    )
    data = opened("vqav2", tree)
    assert data.split == "test-dev"
    assert asked(data) == [(10, "test2015/COCO_test2015_000000000001.jpg", (), None)]


@pytest.mark.parametrize("official", [True, False])
def test_textvqa(official: bool, tmp_path: Path) -> None:
    entry = {"image_id": "t1", "question": "Q?", "question_id": 1, "answers": ["a", "b"]}
    files: dict[str, Any] = {"TextVQA_0.5.1_val.json": {"data": [entry]}}
    if not official:
        files = {
            "textvqa_val_questions.json": {"questions": [entry | {"image": "t1.jpg"}]},
            "textvqa_val_annotations.json": {
                "annotations": [{"question_id": 1, "answers": vqa_answers("a", "b")}]
            },
        }
    data = opened("textvqa", put(tmp_path, files | {"train_images/t1.jpg": 1}))
    assert asked(data) == [(1, "train_images/t1.jpg", ("a", "b"), " a")]


@pytest.mark.parametrize("inner", ["", "ChartQA Dataset/"])
def test_chartqa(inner: str, tmp_path: Path) -> None:
    tree = put(
        tmp_path,
        {
            f"{inner}val/val_human.json": [{"imgname": "1.png", "query": "Q?", "label": "0.57"}],
            f"{inner}val/val_augmented.json": [
                {"imgname": "1.png", "query": "R?", "label": 3},
                {"imgname": "1.png"},
            ],
            f"{inner}val/png/1.png": 4,
        },
    )
    data = opened("chartqa", tree)
    name = f"{inner}val/png/1.png"
    assert asked(data) == [
        ("human-0", name, ("0.57",), " 0.57"),
        ("augmented-0", name, ("3",), " 3"),
    ]
    assert data.sample(0).about == {"kind": "human"}
    assert data.skipped == {"entry is malformed": 1}
    (tree / f"{inner}val/val_augmented.json").unlink()
    with pytest.raises(MmiError, match="lacks val/val_augmented.json"):
        opened("chartqa", tree)


@pytest.mark.parametrize("ending", ["_withQT", ""])
def test_docvqa(ending: str, tmp_path: Path) -> None:
    entry = {
        "questionId": 337,
        "question": "Date?",
        "question_types": ["form"],
        "image": "documents/ffbf0023_4.png",
        "answers": ["1 May", "May 1"],
    }
    tree = put(
        tmp_path,
        {
            f"val_v1.0{ending}.json": {"data": [entry, entry]},
            "val/images/ffbf0023_4.png": 1,
            "test_v1.0.json": {"data": [{k: v for k, v in entry.items() if k != "answers"}]},
            "test/documents/ffbf0023_4.png": 1,
        },
    )
    data = opened("docvqa", tree)
    assert asked(data) == [(337, "val/images/ffbf0023_4.png", ("1 May", "May 1"), " 1 May")]
    assert data.skipped == {"question id occurs twice": 1}
    test = opened("docvqa", tree, split="test")
    assert asked(test) == [(337, "test/documents/ffbf0023_4.png", (), None)]


@pytest.mark.parametrize(
    "file", ["infographicsVQA_train_v1.0.json", "infographicVQA_train_v1.0.json"]
)
def test_infovqa(file: str, tmp_path: Path) -> None:
    entry = {"questionId": 6, "question": "Q?", "image_local_name": "3.jpeg", "answers": ["x"]}
    tree = put(
        tmp_path,
        {
            file: {"data": [entry, entry | {"questionId": 7, "answers": []}]},
            "infographicsvqa_images/3.jpeg": 1,
        },
    )
    data = opened("infovqa", tree)
    assert asked(data) == [(6, "infographicsvqa_images/3.jpeg", ("x",), " x")]
    assert data.skipped == {"no answer": 1}


def test_stvqa_has_two_ways_to_name_a_picture(tmp_path: Path) -> None:
    entries = [
        {"question_id": 7, "question": "Q?", "answers": ["a"], "file_path": "coco-text/C_1.jpg"},
        {"question": "R?", "answers": ["b", "c"], "dataset": "vg", "file_name": "2.jpg"},
    ]
    tree = put(
        tmp_path,
        {
            "train_task_3.json": {"data": entries},
            "train_images/coco-text/C_1.jpg": 1,
            "vg/2.jpg": 2,
        },
    )
    assert asked(opened("stvqa", tree)) == [
        (7, "train_images/coco-text/C_1.jpg", ("a",), " a"),
        (1, "vg/2.jpg", ("b", "c"), " b"),
    ]


def test_estvqa_leaves_chinese_out(tmp_path: Path) -> None:
    entries = [
        {
            "image": "a.jpg",
            "annotation": [
                {"question_id": 0, "question": "Number?", "answer": 53, "evidence": ["53"]},
                {"question_id": 1, "question": "号码是多少?", "answer": "53"},
            ],
        },
        {"image": "b.jpg", "annotation": {"question": "Name?", "answer": "中国"}},
        {"image": "b.jpg"},
    ]
    tree = put(tmp_path, {"annotations/train.json": entries, "images/train/a.jpg": 1})
    data = opened("estvqa", tree)
    assert asked(data) == [("a.jpg-0", "images/train/a.jpg", ("53",), " 53")]
    assert data.skipped == {"question is Chinese": 2, "entry is malformed": 1}


def test_ocrvqa_keeps_its_splits_in_one_file(tmp_path: Path) -> None:
    def book(split: int, **more: Any) -> dict[str, Any]:
        return {"questions": ["Who?", "What?"], "answers": ["A B", "C"], "split": split} | more

    tree = put(
        tmp_path,
        {
            "dataset.json": {
                "0006469": book(1),
                "1": book(3),
                "2": book(1, answers=["one"]),
                "3": {"split": "x"},
            },
            "images/0006469.png": 1,
        },
    )
    data = opened("ocrvqa", tree)
    assert asked(data) == [
        ("0006469-0", "images/0006469.png", ("A B",), " A B"),
        ("0006469-1", "images/0006469.png", ("C",), " C"),
    ]
    assert data.skipped == {"questions and answers differ in number": 1, "entry is malformed": 1}
    assert [one[0] for one in asked(opened("ocrvqa", tree, split="test"))] == ["1-0", "1-1"]


def test_dvqa_takes_an_even_share_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(question_tables.Dvqa, "most", 2)
    entries = [
        {"image": "bar_train_00000001.png", "question": f"{n}?", "answer": "yes", "question_id": n}
        for n in range(5)
    ]
    tree = put(
        tmp_path,
        {
            "train_qa.json": entries,
            "val_easy_qa.json": entries,
            "images/bar_train_00000001.png": 1,
        },
    )
    data = opened("dvqa", tree)
    assert [one[0] for one in asked(data)] == [0, 2]
    assert data.skipped == {"beyond 2 questions": 3}
    assert len(opened("dvqa", tree, split="val_easy")) == 5


def test_gqa(tmp_path: Path) -> None:
    entry = {"imageId": "n161313", "question": "Is it red?", "answer": "no", "isBalanced": True}
    tree = put(
        tmp_path,
        {
            "testdev_balanced_questions.json": {
                "201307251": entry,
                "2": entry | {"isBalanced": False},
            },
            "images/n161313.jpg": 1,
        },
    )
    data = opened("gqa", tree)
    assert asked(data) == [("201307251", "images/n161313.jpg", ("no",), " no")]
    assert data.skipped == {"question is not balanced": 1}


@pytest.mark.parametrize("place", ["", "annotations/"])
def test_vizwiz(place: str, tmp_path: Path) -> None:
    entry = {
        "image": "VizWiz_val_00000003.jpg",
        "question": "What is it?",
        "answers": [{"answer": "a can", "answer_confidence": "no"}, {"answer": "unanswerable"}],
        "answer_type": "other",
        "answerable": 1,
    }
    tree = put(tmp_path, {f"{place}val.json": [entry], "val/VizWiz_val_00000003.jpg": 1})
    data = opened("vizwiz", tree)
    assert asked(data) == [(3, "val/VizWiz_val_00000003.jpg", ("a can", "unanswerable"), " a can")]
    assert "respond with 'Unanswerable'" in shown(data.sample(0))[2]
    assert data.sample(0).about["image"] == "VizWiz_val_00000003.jpg"


@pytest.mark.parametrize("name", ["chartqa", "gqa", "docvqa", "vqav2", "textvqa", "ocrvqa"])
def test_converted_lines_are_read_for_every_set(name: str, tmp_path: Path) -> None:
    entries = lines(
        {"image": "a.png", "question": "Q?", "question_id": 5, "answer": "x"},
        {"image": "a.png", "question": "R?", "answer": ["y", "z"]},
        {"image": 3},
    )
    tree = put(tmp_path, {f"{name}_val.jsonl": entries + "{broken\n", "images/a.png": 1})
    data = opened(name, tree, split="val")
    found = asked(data)
    assert [(one[0], one[2]) for one in found] == [(5, ("x",)), (1, ("y", "z"))]
    assert data.skipped == {"entry is malformed": 2}


def test_a_picture_of_many_pixels_is_refused_unopened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = bytearray(png())
    header[16:24] = (60_000).to_bytes(4, "big") * 2
    entry = {"image": "VizWiz_val_00000001.jpg", "question": "Q?", "answers": []}
    tree = put(
        tmp_path,
        {
            "test.json": [entry],
            "test/VizWiz_val_00000001.jpg": bytes(header),
        },
    )
    found = checked("vizwiz", tree, capsys)
    assert found["samples"] == 0 and found["skipped"] == {"picture is broken": 1}


def test_llava_rounds_are_samples_with_the_picture(tmp_path: Path) -> None:
    conversations = [
        {
            "id": "000000033471",
            "image": "coco/train2017/000000033471.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "A bus."},
                {"from": "human", "value": "Which colour?"},
                {"from": "gpt", "value": "Red."},
            ],
        },
        {
            "id": "t",
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
        },
        {
            "id": "o",
            "image": "ocr_vqa/images/1.jpg",
            "conversations": [{"from": "human", "value": "?"}],
        },
        {
            "id": "p",
            "image": "ocr_vqa/images/1.jpg",
            "conversations": [
                {"from": "human", "value": "Title?\n<image>"},
                {"from": "gpt", "value": "B {image}"},
            ],
        },
    ]
    tree = put(
        tmp_path,
        {
            "llava_v1_5_mix665k.json": conversations,
            "coco/train2017/000000033471.jpg": 1,
            "ocr_vqa/images/1.png": 2,
        },
    )
    data = opened("llava-665k", tree)
    first, second, third = data.samples()
    assert (first.id, second.id, third.id) == ("000000033471", "000000033471", "p")
    assert shown(second) == [
        ASKS,
        "<coco/train2017/000000033471.jpg>",
        "Which colour?. The answer is:",
        [" Red."],
    ]
    assert shown(third)[1:] == ["<ocr_vqa/images/1.png>", "Title?. The answer is:", [" B {image}"]]
    assert data.skipped == {"conversation without a picture": 1, "entry is malformed": 1}
    (sample, *_) = opened("llava-665k", tree, prompt="chat").samples()
    assert shown(sample) == ["<coco/train2017/000000033471.jpg>", "What is it?", [" A bus."]]


@pytest.mark.parametrize("beside", [True, False])
def test_llavar_is_taken_without_llava_150k(beside: bool, tmp_path: Path) -> None:
    def talk(image: str) -> dict[str, Any]:
        turns = [{"from": "human", "value": "<image>\nQ?"}, {"from": "gpt", "value": "A."}]
        return {"id": image, "image": image, "conversations": turns}

    own = "000000000009.jpg" if beside else "000001234567.jpg"
    files: dict[str, Any] = {
        "llava_instruct_150k_llavar_16k.json": [talk("000000000025.jpg"), talk(own)],
        f"coco/train2017/{own}": 1,
    }
    if beside:
        files["llava_instruct_150k.json"] = [talk("000000000025.jpg")]
    data = opened("llavar", put(tmp_path, files))
    assert [one[1] for one in asked(data)] == [f"coco/train2017/{own}"]
    assert data.skipped == {"conversation is of LLaVA-150K": 1}
