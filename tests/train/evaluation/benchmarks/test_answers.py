"""The shipped model, exported, answers questions about drawn scenes in the files of VQAv2."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from exports import SHIPPED, Exported
from mmi_deploy.cli.app import run
from mmi_deploy.documents.images import to_pixels
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_train.data.document import ImagePart, TextPart
from mmi_train.data.synthetic import tasks
from mmi_train.data.synthetic.world import easy
from mmi_train.evaluation.benchmarks.table import BENCHMARKS
from mmi_train.evaluation.metrics.ndcg import ndcg, ranks_of
from mmi_train.model.generation import score_options
from train.data.readers.trees import put

QUESTIONS = 40
BROKEN, MISSING = 3, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VQAv2's validation split, one question a picture; picture 3 is broken, 4 is not there."""
    rng, questions, annotations, files = np.random.default_rng(7), [], [], {}
    for number in range(QUESTIONS):
        image, asked, answer = tasks.question_document(rng, easy()).parts
        assert isinstance(image, ImagePart)
        assert isinstance(asked, TextPart) and isinstance(answer, TextPart)
        key = {"image_id": number, "question_id": 1000 + number}
        questions.append({**key, "question": asked.text})
        # Where all people agree the challenge compares to the letter; the model writes full stops.
        answers = [{"answer": answer.text.rstrip(".")}] * 9 + [{"answer": "no idea"}]
        kinds = {"question_type": "what", "answer_type": "other"}
        annotations.append(
            {**key, **kinds, "multiple_choice_answer": answer.text, "answers": answers}
        )
        png = BytesIO()
        Image.fromarray(image.image).save(png, "PNG")
        files[f"val2014/COCO_val2014_{number:012d}.jpg"] = png.getvalue()
    files[f"val2014/COCO_val2014_{BROKEN:012d}.jpg"] = b"\x89PNG and no more"
    del files[f"val2014/COCO_val2014_{MISSING:012d}.jpg"]
    return put(
        tmp_path_factory.mktemp("vqav2"),
        {
            "v2_OpenEnded_mscoco_val2014_questions.json": {"questions": questions},
            "v2_mscoco_val2014_annotations.json": {"annotations": annotations},
            **files,
        },
    )


@pytest.fixture
def words(exported_once: Callable[[str], Exported], data: Path, tmp_path: Path) -> list[str]:
    """The command; its answers go to answers.jsonl."""
    folder = exported_once(SHIPPED).bundle.folder
    asked = ["evaluate", str(folder), "--benchmark", "vqav2", "--data", str(data)]
    return [*asked, "--prompt", "chat", "--threads", "1", "-o", str(tmp_path / "answers.jsonl")]


@pytest.mark.slow
def test_answers_are_written_scored_and_continued(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert (report["answered"], report["missing"]) == (QUESTIONS - 2, 2)
    # Its model card has 91 % of such answers; the two that are missing count as wrong.
    assert report["metrics"]["accuracy"] > 75
    used = {"beams": 3, "length_penalty": 0.0, "min_tokens": 0, "max_tokens": 10}  # as published
    assert report["generation"] == {**used, "repetition_penalty": 1.0}
    assert "answered with beams 3, length_penalty 0" in printed.err
    out = tmp_path / "answers.jsonl"
    lines = out.read_text().splitlines()
    answered = {json.loads(line)["id"]: json.loads(line)["text"] for line in lines}
    assert answered.keys() == {1000 + n for n in range(QUESTIONS)} - {1000 + BROKEN, 1000 + MISSING}

    # Killed within a line: what is whole stays, the rest is answered again, and equally.
    out.write_text("\n".join(lines[:20]) + "\n" + lines[20][:30])
    assert run(words) == 0
    printed = capsys.readouterr()
    assert f"20 of {QUESTIONS} questions: answered before" in printed.err
    assert "1 question without an answer: picture is missing" in printed.err
    assert "1 question without an answer: picture is broken" in printed.err
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert {one["id"]: one["text"] for one in again} == answered
    assert f"{report['metrics']['accuracy']:.2f}" in printed.out

    # Two shards together are the whole.
    both = []
    for shard in ("1/2", "2/2"):
        part = tmp_path / f"part{shard[0]}.jsonl"
        assert run([*words[:-1], str(part), "--shard", shard]) == 0
        both += part.read_text().splitlines()
    assert {json.loads(line)["id"]: json.loads(line)["text"] for line in both} == answered
    assert "accuracy" not in capsys.readouterr().out

    # Greedy answers are a run of their own.
    assert run([*words, "--beams", "1"]) == 2
    assert "holds results of another run: beams differs" in capsys.readouterr().err

    # The same file does not take the answers of another run.
    assert run([*words, "--shard", "1/2"]) == 2
    assert "holds results of another run: shard differs" in capsys.readouterr().err


@pytest.mark.slow
def test_options_of_visual_dialog_are_scored_by_the_graphs(
    exported_once: Callable[[str], Exported], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores as PyTorch has them of each option after the whole dialogue; a rank for each."""
    shipped = exported_once(SHIPPED)
    texts = ["red", "the blue ring moves right", "blue cross", "two", "a circle on white"]
    questions = ["what color is the square", "where is the ring"]
    turns = [
        {"question": n, "answer": n, "answer_options": [*range(5)], "gt_index": n} for n in (0, 1)
    ]
    dialog = {"image_id": 5, "caption": "a red square on white", "dialog": turns}
    image = np.random.default_rng(5).integers(0, 256, (64, 64, 3), np.uint8)
    png = BytesIO()
    Image.fromarray(image).save(png, "PNG")
    data = put(
        tmp_path / "visdial",
        {
            "visdial_1.0_val.json": {
                "data": {"dialogs": [dialog], "questions": questions, "answers": texts}
            },
            "visdial_1.0_val_dense_annotations.json": [
                {"image_id": 5, "round_id": 2, "gt_relevance": [0.0, 1.0, 0.0, 0.5, 0.0]}
            ],
            "VisualDialog_val2018/VisualDialog_val2018_000000000005.jpg": png.getvalue(),
        },
    )
    out = tmp_path / "scores.jsonl"
    words = [str(shipped.bundle.folder), "--benchmark", "visdial", "--data", str(data)]
    words += ["--prompt", "chat", "-o", str(out), "--threads", "1", "--json"]
    assert run(["evaluate", *words]) == 0
    report = json.loads(capsys.readouterr().out)
    (line,) = (json.loads(line) for line in out.read_text().splitlines())
    tokenizer = Tokenizer.open(shipped.bundle.tokenizer, shipped.model.config.tokens)
    tokens = shipped.model.config.tokens
    prompt = [tokens.bos, tokens.boi, *[tokens.image] * shipped.model.config.visual_tokens]
    prompt += tokenizer.encode(questions[1])
    pixels = torch.from_numpy(to_pixels(image))[None]
    for text, score in zip(texts, line["scores"], strict=True):
        option = torch.tensor([tokenizer.encode(text)])
        slot = torch.tensor([0])
        whole = score_options(
            shipped.model, torch.tensor(prompt), pixels, slot, option, torch.ones_like(option)
        )
        assert abs(float(whole[0]) - score) < 1e-4 * max(abs(score), 1)
    best = ndcg(ranks_of(line["scores"]), [0.0, 1.0, 0.0, 0.5, 0.0])
    assert best is not None and abs(report["metrics"]["NDCG"] - 100 * best) < 1e-9


@pytest.mark.slow
def test_pictures_are_drawn_from_captions_and_kept(
    exported_once: Callable[[str], Exported],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scene = "a red square at top center and a blue cross at bottom right on white."
    captions = [
        {"image_id": 7, "id": 1, "caption": f"draw: {scene}"},
        {"image_id": 9, "id": 2, "caption": "draw: a blue cross at center on white."},
    ]
    images = [{"id": n, "file_name": f"COCO_val2014_{n:012d}.jpg"} for n in (7, 9)]
    files = {f"val2014/{one['file_name']}": 200 for one in images}
    data = put(
        tmp_path / "data",
        {"captions_val2014.json": {"images": images, "annotations": captions}, **files},
    )
    out = tmp_path / "drawn.jsonl"
    bundle = str(exported_once(SHIPPED).bundle.folder)
    words = [bundle, "--benchmark", "coco-t2i", "--data", str(data), "-o", str(out)]
    assert run(["evaluate", *words, "--threads", "1"]) == 0
    # Drawn and kept, but FID needs a network that is not here.
    assert "to score them: mmi evaluate --predictions" in capsys.readouterr().err
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["id"] for line in lines} == {7, 9}
    for line in lines:
        pixels = np.asarray(Image.open(tmp_path / line["image"]))
        assert pixels.shape == (64, 64, 3) and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 9


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--shard", "3/2"], "--shard cannot be read; expected 1/N to N/N, such as 2/8; got 3/2"),
        (["--prompt", "chatt"], "there is no prompt chatt"),
        (["--split", "train2"], "no split train2"),
        (
            ["--benchmark", "ade20k"],
            "a bundle cannot answer ade20k, which takes maps of labels",
        ),
        (
            ["--beams", "9"],
            "with 9 beams, and there are 8 rows in a run. give --beams 8, or",
        ),
        (["--benchmark", "visdial", "--beams", "2"], "--beams is of texts"),
        (["--benchmark", "vqa2"], "the nearest one is vqav2"),
        (["--prompt", "visdial"], "asks for what the set has not: caption, history"),
        (["--against", "/nowhere"], "there is no file /nowhere to compare with"),
        (["--published", "nonsense"], "nonsense"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(
    words: list[str], more: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected.lower() in line.lower()


@pytest.mark.parametrize("left_out", ["--data", "-o"])
def test_what_is_missing_is_named(
    words: list[str], left_out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    at = words.index(left_out)
    assert run([*words[:at], *words[at + 2 :]]) == 2
    assert f"--benchmark needs {left_out}" in capsys.readouterr().err


def test_an_empty_shard_is_no_error(words: list[str], tmp_path: Path) -> None:
    assert run([*words, "--shard", "50/50"]) == 0
    assert not (tmp_path / "answers.jsonl").read_text()


def test_samples_that_the_metrics_number_otherwise_are_refused_first(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = '{"image_id": 1}\n{"image_id": 2, "caption": "draw: a red square on white."}\n'
    data = put(
        tmp_path / "ln", {"coco_val_captions.jsonl": captions, "val2017/000000000002.jpg": 9}
    )
    assert run([*words, "--benchmark", "ln-coco", "--data", str(data), "--prompt", "draw"]) == 2
    assert "samples of ln-coco and its annotations do not fit" in capsys.readouterr().err
    assert not (tmp_path / "answers.jsonl").exists()


def test_every_benchmark_has_a_reader_of_its_name() -> None:
    from mmi_train.data.readers.registry import DATA_SETS

    assert BENCHMARKS.keys() <= DATA_SETS.keys()
    for name, row in BENCHMARKS.items():
        assert row.splits[0] in DATA_SETS[name].reader.splits, name
