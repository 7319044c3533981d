"""VQAv2 through the command line: scores, comparison, submission, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mmi_deploy.cli.app import run

Mmi = Callable[..., tuple[int, str, str]]

# Question id -> ten answers, and a prediction with its accuracy by the rules of the challenge.
QUESTIONS = {
    9001: (["yes"] * 9 + ["no"], "yes", 1.0),
    9002: (["two"] * 2 + ["2"] + ["3"] * 7, "2", 0.9),
    9003: (["a red kite"] * 2 + ["kite"] * 8, "Red kite.", 0.6),
    9004: (["left"] * 10, "right", 0.0),
    9005: (["tower"] + ["house"] * 9, "the tower!", 0.3),
}
SCORE = 100 * (1.0 + 0.9 + 0.6 + 0.0 + 0.3) / 5


def write_set(folder: Path) -> Path:
    """The annotation files of VQAv2 in the published form, each in a folder of its own."""
    questions = [
        {"image_id": 7, "question": f"question {number}?", "question_id": number}
        for number in QUESTIONS
    ]
    annotations = [
        {
            "image_id": 7,
            "question_id": number,
            "question_type": "what",
            "answer_type": "other" if number % 2 else "number",
            "multiple_choice_answer": answers[0],
            "answers": [
                {"answer": text, "answer_confidence": "yes", "answer_id": place}
                for place, text in enumerate(answers, 1)
            ],
        }
        for number, (answers, _, _) in QUESTIONS.items()
    ]
    folder.mkdir(exist_ok=True)
    (folder / "annotations").mkdir()
    for name, key, value in (
        ("v2_OpenEnded_mscoco_val2014_questions.json", "questions", questions),
        ("annotations/v2_mscoco_val2014_annotations.json", "annotations", annotations),
        ("v2_OpenEnded_mscoco_test-dev2015_questions.json", "questions", questions),
    ):
        (folder / name).write_text(json.dumps({key: value}))
    return folder


def write_lines(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return path


@pytest.fixture
def mmi(capsys: pytest.CaptureFixture[str]) -> Mmi:
    """Runs `mmi evaluate`; returns the exit code and what was printed."""

    def call(*words: object) -> tuple[int, str, str]:
        code = run(["evaluate", *map(str, words)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_set(tmp_path / "data")


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    lines = [{"id": number, "text": text} for number, (_, text, _) in QUESTIONS.items()]
    return write_lines(tmp_path / "answers.jsonl", lines)


def test_the_accuracy_is_that_of_the_challenge(mmi: Mmi, data: Path, answers: Path) -> None:
    code, out, err = mmi("--predictions", answers, "--benchmark", "vqav2", "--data", data, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["metrics"] == pytest.approx(
        {
            "accuracy": SCORE,
            "accuracy, other": 100 * (1.0 + 0.6 + 0.3) / 3,
            "accuracy, number": 100 * (0.9 + 0.0) / 2,
        }
    )
    low, high = found["intervals"]["accuracy"]
    assert 0 <= low < SCORE < high <= 100
    del found["metrics"], found["intervals"]
    assert found == {"benchmark": "vqav2", "split": "val", "answered": 5, "missing": 0}


def test_answers_that_only_normalisation_makes_right_are_told_apart(
    mmi: Mmi, data: Path, tmp_path: Path
) -> None:
    """The official code normalises nothing where all ten people agree."""
    lines = [{"id": n, "text": t} for n, (_, t, _) in QUESTIONS.items()]
    lines[3]["text"] = "Left."
    path = write_lines(tmp_path / "a.jsonl", lines)
    _, out, _ = mmi("--predictions", path, "--benchmark", "vqav2", "--data", data, "--json")
    metrics = json.loads(out)["metrics"]
    assert metrics["accuracy"] == pytest.approx(SCORE)
    assert metrics["accuracy, always normalised"] == pytest.approx(SCORE + 20)


def test_missing_answers_are_wrong_and_said(mmi: Mmi, data: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"id": "9001", "text": "yes"}])
    words = ("--predictions", path, "--benchmark", "vqav2", "--data", data)
    code, out, err = mmi(*words, "--json")
    found = json.loads(out)
    assert (code, found["answered"], found["missing"]) == (0, 1, 4)
    assert found["metrics"]["accuracy"] == pytest.approx(20)
    assert err == f"{path}: 4 of 5 questions have no prediction; they count as wrong\n"
    assert "vqav2, val: 1 answered, 4 missing" in mmi(*words)[1]


def test_numbers_of_samples_are_ids_too(mmi: Mmi, data: Path, tmp_path: Path) -> None:
    lines = [{"id": n, "text": t} for n, (_, t, _) in enumerate(QUESTIONS.values())]
    path = write_lines(tmp_path / "a.jsonl", lines)
    _, out, err = mmi("--predictions", path, "--benchmark", "vqav2", "--data", data, "--json")
    assert json.loads(out)["metrics"]["accuracy"] == pytest.approx(SCORE)
    assert "ids are taken as numbers of samples, from 0" in err


def test_two_files_are_compared_on_the_same_questions(
    mmi: Mmi, data: Path, answers: Path, tmp_path: Path
) -> None:
    wrong = [{"id": n, "text": "none of it"} for n in QUESTIONS]
    other = write_lines(tmp_path / "other.jsonl", wrong)
    words = ("--predictions", answers, "--benchmark", "vqav2", "--data", data)
    code, out, _ = mmi(*words, "--against", other, "--json")
    found = json.loads(out)["against"]
    one = found["differences"]["accuracy"]
    assert code == 0 and found["metrics"]["accuracy"] == 0
    assert one["value"] == pytest.approx(SCORE) and one["verdict"] == "higher"
    assert 0 < one["interval"][0] < SCORE < one["interval"][1]
    same = json.loads(mmi(*words, "--against", answers, "--json")[1])["against"]["differences"]
    assert same["accuracy"] == {"value": 0, "interval": [0, 0], "verdict": "not told apart"}
    assert "not told apart" in mmi(*words, "--against", answers)[1]


def test_a_measure_that_differs_in_one_file_alone_is_compared(
    mmi: Mmi, data: Path, answers: Path, tmp_path: Path
) -> None:
    lines = [{"id": n, "text": t} for n, (_, t, _) in QUESTIONS.items()]
    lines[3]["text"] = "Left."
    other, out = write_lines(tmp_path / "other.jsonl", lines), tmp_path / "compared.json"
    words = ("--predictions", answers, "--benchmark", "vqav2", "--data", data, "--against", other)
    code, printed, err = mmi(*words, "--json", "-o", out)
    assert (
        code == 0 and f"wrote {out}" in err and json.loads(out.read_text()) == json.loads(printed)
    )
    found = json.loads(printed)["against"]
    assert found["differences"]["accuracy, always normalised"]["value"] == pytest.approx(-20)
    assert (found["answers"], found["different"], found["band"]["levels"]) == (5, 1, None)
    assert mmi(*words, "-o", out)[0] == 2  # it would be lost
    assert "or of --against" in mmi(*words[:-2], "-o", tmp_path / "x.json")[2]


def test_a_split_without_answers_becomes_a_submission(
    mmi: Mmi, data: Path, answers: Path, tmp_path: Path
) -> None:
    words = ("--predictions", answers, "--benchmark", "vqav2", "--data", data)
    words = (*words, "--split", "test-dev")
    code, _, err = mmi(*words)
    assert code == 2 and "answers of the test-dev split of vqav2 are not published" in err
    assert "--submission" in err
    written = tmp_path / "submission.json"
    assert mmi(*words, "--submission", written)[:2] == (0, "")
    assert json.loads(written.read_text()) == [
        {"question_id": number, "answer": text} for number, (_, text, _) in QUESTIONS.items()
    ]
    assert mmi(*words, "--submission", written)[0] == 2  # it would be lost


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([{"id": 5, "text": "yes"}], "no id of"),
        ([{"id": 9001, "text": "a"}, {"id": "9001", "text": "b"}], "lines 1 and 2 of"),
        (['{"id": 9001, "text": "yes"'], "line 1 of"),
        (["[9001]"], "is no JSON object"),
        ([{"text": "yes"}], "has no id"),
        ([{"id": 9001, "answer": "yes"}], 'has no "text"'),
        ([], "holds no prediction"),
    ],
)
def test_faulty_predictions_are_one_line(
    mmi: Mmi, data: Path, tmp_path: Path, lines: list[Any], says: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", lines)
    code, out, err = mmi("--predictions", path, "--benchmark", "vqav2", "--data", data)
    assert (code, out, err.count("\n")) == (2, "", 1) and says in err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("--benchmark", "vqa2"), "there is no benchmark vqa2. the nearest one is vqav2"),
        (("--split", "testdev"), "vqav2 has no split testdev; expected val, train, test-dev, test"),
        (
            ("--split", "train"),
            "lacks v2_OpenEnded_mscoco_train2014_questions.json of the data set vqav2. Get it from",
        ),
        (("--data", "nowhere"), "there is no folder nowhere"),
        (("--published", "extract"), "the nearest one is extract-answer"),
    ],
)
def test_faulty_options_are_one_line(
    mmi: Mmi, data: Path, answers: Path, change: tuple[str, str], says: str
) -> None:
    words = {"--predictions": answers, "--benchmark": "vqav2", "--data": data} | dict([change])
    code, out, err = mmi(*(word for pair in words.items() for word in pair))
    assert (code, out, err.count("\n")) == (2, "", 1) and says in err


def test_options_that_belong_together(mmi: Mmi, answers: Path) -> None:
    assert "add --predictions FILE" in mmi("--against", answers)[2]
    assert "the model assets/tiny too" in mmi("assets/tiny", "--predictions", answers)[2]
    assert "--predictions needs --benchmark NAME" in mmi("--predictions", answers)[2]


ASKED = {"question_id": 1, "image_id": 7, "question": "?"}


def test_damaged_annotations_are_one_line(mmi: Mmi, data: Path, answers: Path) -> None:
    words = ("--predictions", answers, "--benchmark", "vqav2", "--data", data)
    path = data / "v2_OpenEnded_mscoco_val2014_questions.json"
    for content, says in (
        ('{"questions": [', "is not whole JSON"),
        ('{"data": []}', "is not what the data set publishes; expected an object with a list"),
        (json.dumps({"questions": [{"question_id": 1}]}), "is not of the published form"),
        (json.dumps({"questions": [ASKED, ASKED]}), "two questions of the id 1"),
        ('{"questions": []}', "has no question"),
    ):
        path.write_text(content)
        code, _, err = mmi(*words)
        assert (code, err.count("\n")) == (2, 1) and says in err


def test_answers_are_scored_without_torch_and_pictures_say_that_they_need_it(
    data: Path, answers: Path, tmp_path: Path
) -> None:
    def call(*words: object) -> subprocess.CompletedProcess[str]:
        script = "import sys; sys.modules['torch'] = None\n"
        script += "from mmi_deploy.cli.app import main; main()"
        return subprocess.run(
            [sys.executable, "-c", script, "evaluate", "--predictions", *map(str, words)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=False,
        )

    found = call(answers, "--benchmark", "vqav2", "--data", data, "--json")
    assert json.loads(found.stdout)["metrics"]["accuracy"] == pytest.approx(SCORE), found.stderr
    captions = {"annotations": [{"image_id": 7, "caption": "a"}]}
    (data / "captions_val2014.json").write_text(json.dumps(captions))
    path = write_lines(tmp_path / "p.jsonl", [{"id": 7, "image": "a.png"}])
    found = call(path, "--benchmark", "coco-t2i", "--data", data)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.endswith("install it with: pip install 'mmi_deploy[train]'\n")
