"""The shipped model, exported, answers questions about drawn scenes in the files of VQAv2."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from exports import SHIPPED, Exported
from mmi_deploy.cli.app import run
from mmi_deploy.documents.document import Draw, Text, document_of
from mmi_deploy.documents.document import Image as GivenImage
from mmi_deploy.documents.images import to_pixels
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.runtime.events import ImageDone
from mmi_deploy.runtime.generation import generate
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime
from mmi_train.data.document import ImagePart, TextPart
from mmi_train.data.readers.data_set import Settings, picture_of
from mmi_train.data.readers.registry import open_set
from mmi_train.data.synthetic import tasks
from mmi_train.data.synthetic.world import easy
from mmi_train.evaluation.benchmarks.table import BENCHMARKS
from mmi_train.evaluation.metrics.clip_similarity import Reranker
from mmi_train.evaluation.metrics.ndcg import ndcg, ranks_of
from mmi_train.model.generation import score_options
from train.data.readers.trees import npy, png, put
from train.evaluation.benchmarks.clip_folder import tiny_clip

QUESTIONS = 40
BROKEN, MISSING = 3, 4


def write_questions(folder: Path, count: int, rng: np.random.Generator) -> Path:
    """VQAv2's validation split, a question about a drawn scene for each picture."""
    questions, annotations, files = [], [], {}
    for number in range(count):
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
        file = BytesIO()
        Image.fromarray(image.image).save(file, "PNG")
        files[f"val2014/COCO_val2014_{number:012d}.jpg"] = file.getvalue()
    return put(
        folder,
        {
            "v2_OpenEnded_mscoco_val2014_questions.json": {"questions": questions},
            "v2_mscoco_val2014_annotations.json": {"annotations": annotations},
            **files,
        },
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of which one has a broken picture, and another has none."""
    folder = tmp_path_factory.mktemp("vqav2")
    write_questions(folder, QUESTIONS, np.random.default_rng(7))
    pictures = folder / "val2014"
    (pictures / f"COCO_val2014_{BROKEN:012d}.jpg").write_bytes(b"\x89PNG and no more")
    (pictures / f"COCO_val2014_{MISSING:012d}.jpg").unlink()
    return folder


@pytest.fixture
def words(exported_once: Callable[[str], Exported], data: Path, tmp_path: Path) -> list[str]:
    """The command; its answers go to answers.jsonl."""
    folder = exported_once(SHIPPED).bundle.folder
    asked = ["evaluate", str(folder), "--benchmark", "vqav2", "--data", str(data)]
    return [*asked, "--prompt", "chat", "--threads", "1", "-o", str(tmp_path / "answers.jsonl")]


def pororo(folder: Path, sentence: str) -> Path:
    """PororoSV with one story in its test split, a frame of 64 pixels a picture."""
    frames = [f"Ep_1_0/{number}.png" for number in range(6)]
    ids = np.empty(3, object)
    ids[:] = [[0], [], [1, 9]]
    files: dict[str, Any] = {
        "descriptions.npy": npy(np.array({f"Ep_1_0/{n}": [sentence] for n in range(6)}, object)),
        "img_cache4.npy": npy(np.array(frames[:2])),
        "following_cache4.npy": npy(np.array([frames[1:5], frames[2:6]])),
        "train_seen_unseen_ids.npy": npy(ids),
    }
    shades = {frame: png(40 * n, 64, 64) for n, frame in enumerate(frames)}
    return put(folder, files | shades)


@pytest.mark.slow
def test_answers_are_written_scored_and_continued(
    words: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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

    # A copy of a picture is the same one; another under its name is not.
    picture = data / f"val2014/COCO_val2014_{0:012d}.jpg"
    content, times = picture.read_bytes(), picture.stat()
    picture.write_bytes(content)
    assert picture.stat().st_mtime_ns != times.st_mtime_ns and run(words) == 0
    other = bytearray(content)
    other[-20] ^= 1
    try:
        picture.write_bytes(bytes(other))
        capsys.readouterr()
        assert run(words) == 2
        assert "was replaced since question 1000 was answered" in capsys.readouterr().err
    finally:
        picture.write_bytes(content)

    # The model folder answers the same through PyTorch.
    part = tmp_path / "pytorch.jsonl"
    folder = ["evaluate", "assets/tiny", *words[2:-1], str(part)]
    assert run([*folder, "--shard", "1/10"]) == 0
    own = {one["id"]: one["text"] for one in map(json.loads, part.read_text().splitlines())}
    assert len(own) == 4 and own.items() <= answered.items()
    assert run([*folder, "--slots", "2"]) == 2
    assert "--slots is of bundles, and PyTorch runs the model folder" in capsys.readouterr().err

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
            ["--benchmark", "ade20k", "--beams", "3"],
            "--beams is of texts; got ade20k, whose answers are none",
        ),
        (
            ["--beams", "9"],
            "with 9 beams, and there is room for 8. give --beams 8, or",
        ),
        (["--benchmark", "visdial", "--beams", "2"], "--beams is of texts"),
        (["--benchmark", "vqa2"], "the nearest one is vqav2"),
        (["--prompt", "visdial"], "asks for what the set has not: caption, history"),
        (["--against", "/nowhere"], "there is no file /nowhere to compare with"),
        (["--published", "nonsense"], "nonsense"),
        (["--candidates", "8"], "--candidates is of coco-t2i and ln-coco"),
        (["--count", "3"], "--count is of drawn scenes, which are measured without --benchmark"),
        (["--steps", "3"], "--steps is of a model folder"),
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


def test_malformed_entries_are_refused_before_the_first_answer(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = '{"image_id": 1}\n{"image_id": 2, "caption": "draw: a red square on white."}\n'
    data = put(
        tmp_path / "ln", {"coco_val_captions.jsonl": captions, "val2017/000000000002.jpg": 9}
    )
    assert run([*words, "--benchmark", "ln-coco", "--data", str(data), "--prompt", "draw"]) == 2
    assert "coco_val_captions.jsonl is not of the published form" in capsys.readouterr().err
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.slow
def test_a_story_is_drawn_from_its_own_pictures(
    exported_once: Callable[[str], Exported], tmp_path: Path
) -> None:
    """Four pictures, each in the context of those drawn before: the same as one document."""
    tree = pororo(tmp_path / "data", "the red square moves down.")
    out, bundle = tmp_path / "drawn.jsonl", exported_once(SHIPPED).bundle.folder
    words = [str(bundle), "--benchmark", "pororo", "--data", str(tree), "-o", str(out)]
    assert run(["evaluate", *words, "--threads", "1"]) == 0
    (line,) = map(json.loads, out.read_text().splitlines())  # the other id is of no story
    assert line["id"] == "1" and len(line["images"]) == 4
    (sample,) = open_set("pororo", tree, Settings(split="test")).samples()
    first = GivenImage(np.asarray(Image.fromarray(picture_of(sample.pictures[0])).resize((64, 64))))
    assert sample.pictures[0].picture.load().shape[:2] == (64, 64)
    text = Text(sample.parts[0].text)  # type: ignore[union-attr]
    parts = [text, first, *(part for _ in range(4) for part in (text, Draw()))]
    runtime = Runtime.open(bundle, threads=1)
    options = GenerationOptions(max_tokens=0, max_images=0, guidance=3.5, seed=0)
    events = generate(runtime, document_of(*parts), options)
    expected = [event.rgb for event in events if isinstance(event, ImageDone)]
    runtime.close()
    for name, rgb in zip(line["images"], expected, strict=True):
        levels = np.asarray(Image.open(tmp_path / name)).astype(int) - rgb
        assert np.abs(levels).max() <= 1  # with other rows in the run


@pytest.mark.slow
def test_of_candidates_the_one_nearest_to_the_caption_is_kept(
    exported_once: Callable[[str], Exported],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Three pictures of a caption; the choice is that of test_pictures."""
    caption = "draw: a red square at top center on white."
    name = "COCO_val2014_000000000007.jpg"
    annotations = [{"image_id": 7, "id": 1, "caption": caption}]
    captions = {"images": [{"id": 7, "file_name": name}], "annotations": annotations}
    data = put(tmp_path / "data", {"captions_val2014.json": captions, f"val2014/{name}": 90})
    weights = tiny_clip(tmp_path / "weights")
    bundle, outs = str(exported_once(SHIPPED).bundle.folder), []
    words = ["evaluate", bundle, "--benchmark", "coco-t2i", "--data", str(data), "--threads", "1"]
    asked: list[tuple[str, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        for best in (0, 2):

            def choose(self: Reranker, caption: str, pictures: Any, best: int = best) -> int:
                asked.append((caption, len({picture.tobytes() for picture in pictures})))
                return best

            patch.setattr(Reranker, "__call__", choose)
            outs.append(tmp_path / f"best{best}.jsonl")
            more = ["--candidates", "3", "--weights", str(weights), "-o", str(outs[-1])]
            assert run([*words, *more]) == 0
    assert asked == [(caption, 3)] * 2
    assert run([*words, "-o", str(tmp_path / "one.jsonl")]) == 0
    first, third, one = (
        np.asarray(Image.open(path.parent / json.loads(path.read_text())["image"]))
        for path in (*outs, tmp_path / "one.jsonl")
    )
    assert np.array_equal(first, one), "the first candidate is the picture without a choice"
    assert not np.array_equal(first, third)
    assert run([*words, "--candidates", "2", "-o", str(tmp_path / "x.jsonl")]) == 2
    assert "no folder of weights holds no clip-vit-large-patch14/" in capsys.readouterr().err


def test_every_benchmark_has_a_reader_of_its_name() -> None:
    from mmi_train.data.readers.registry import DATA_SETS

    assert BENCHMARKS.keys() <= DATA_SETS.keys()
    for name, row in BENCHMARKS.items():
        assert row.splits[0] in DATA_SETS[name].reader.splits, name
