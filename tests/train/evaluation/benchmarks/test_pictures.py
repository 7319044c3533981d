"""Benchmarks of pictures: maps of ADE20K, FID and CLIP similarity with networks from a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from mmi_deploy.errors import MmiError
from mmi_deploy.system.files import sha256_of
from mmi_train.data.readers.pictures import FilePicture
from mmi_train.evaluation.benchmarks.report import Questions
from mmi_train.evaluation.benchmarks.scores import Options
from mmi_train.evaluation.benchmarks.table import benchmark
from mmi_train.evaluation.metrics import inception
from mmi_train.evaluation.metrics.clip_similarity import FOLDER, Reranker
from mmi_train.evaluation.metrics.frechet import Gaussian, frechet_distance
from mmi_train.evaluation.metrics.mean_iou import colours_of
from train.data.readers.trees import npy, png, put
from train.evaluation.benchmarks.clip_folder import tiny_clip

LABELS = np.array([[1, 1, 0, 150], [1, 2, 2, 150]], np.uint8)


def save(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def predictions(folder: Path, images: Mapping[str, Path]) -> Path:
    path = folder / "predictions.jsonl"
    lines = [json.dumps({"id": name, "image": str(image)}) for name, image in images.items()]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def ade20k(tmp_path: Path) -> Questions:
    """Two maps of labels, in the folder that the archive unpacks to."""
    folder = tmp_path / "data" / "ADEChallengeData2016" / "annotations" / "validation"
    for number in (1, 2):
        save(folder / f"ADE_val_{number:08d}.png", LABELS)
    return Questions.of(benchmark("ade20k"), tmp_path / "data", None)


def test_maps_are_scored_as_labels_and_as_colours(ade20k: Questions, tmp_path: Path) -> None:
    guess = np.array([[1, 2, 7, 150], [1, 2, 2, 0]], np.uint8)
    path = predictions(
        tmp_path,
        {
            "ADE_val_00000001": save(tmp_path / "1.png", guess),
            "ADE_val_00000002": save(tmp_path / "2.png", colours_of(guess)),
        },
    )
    found = ade20k.report(path)
    # Classes 1, 2 and 150: 2 of 3, 2 of 3, and 1 of 2 pixels.
    assert found.metrics == pytest.approx(
        {"mIoU": 100 * (2 / 3 + 2 / 3 + 1 / 2) / 3, "pixel accuracy": 100 * 5 / 7}
    )
    published = ade20k.report(path, Options(frozenset({"absent-classes-as-zero"})))
    assert published.metrics["mIoU"] == pytest.approx(found.metrics["mIoU"] * 3 / 150)


def test_a_missing_map_is_of_no_class(ade20k: Questions, tmp_path: Path) -> None:
    path = predictions(tmp_path, {"ADE_val_00000001": save(tmp_path / "1.png", LABELS)})
    found = ade20k.report(path)
    assert found.metrics == pytest.approx({"mIoU": 50, "pixel accuracy": 50})
    assert found.missing == 1


VIST = {
    "val_formatted.json": {
        "annotations": {
            "s2": [{"image_id": "21", "sequence_index": 0, "caption": "a"}],
            "s1": [
                {"image_id": "12", "sequence_index": 4, "caption": "b"},
                {"image_id": "11", "sequence_index": 1, "caption": "a"},
            ],
        }
    },
    "val.story-in-sequence.json": {
        "annotations": [
            [
                {
                    "story_id": name,
                    "photo_flickr_id": image,
                    "worker_arranged_photo_order": place,
                    "text": "a",
                }
            ]
            for name, image, place in (("s1", "11", "1"), ("s1", "12", "4"), ("s2", "21", "0"))
        ],
        "images": [],
    },
}


@pytest.mark.parametrize("name", VIST)
def test_a_story_asks_for_its_last_picture(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(VIST[name]))
    for image in ("11", "12", "21"):
        save(tmp_path / "val_images" / f"{image}.png", LABELS)
    found = Questions.of(benchmark("vist"), tmp_path, None).references
    assert [(one.id, one.pictures) for one in found] == [
        ("s1", (FilePicture(str(tmp_path), "val_images/12.png"),)),
        ("s2", (FilePicture(str(tmp_path), "val_images/21.png"),)),
    ]
    assert "12" in found[0].other_ids
    (tmp_path / "val_images" / "11.png").unlink()
    left = Questions.of(benchmark("vist"), tmp_path, None)
    assert [one.id for one in left.references] == ["s2"]
    assert left.left_out == {"picture is missing": 1}


def test_narratives_are_numbered_and_name_their_pictures(tmp_path: Path) -> None:
    lines = [{"dataset_id": "mscoco_val2017", "image_id": n, "caption": "a"} for n in ("7", "7")]
    path = tmp_path / "coco_val_captions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    found = Questions.of(benchmark("ln-coco"), tmp_path, None).references
    picture = (FilePicture(str(tmp_path), "val2017/000000000007.jpg"),)
    assert [(one.id, one.pictures) for one in found] == [("0", picture), ("1", picture)]
    assert not found[0].other_ids  # one picture has both


def test_faulty_maps_are_one_line(ade20k: Questions, tmp_path: Path) -> None:
    small = predictions(tmp_path, {"ADE_val_00000001": save(tmp_path / "1.png", LABELS[:, :3])})
    with pytest.raises(MmiError, match="expected 4x2 pixels; got 3x2"):
        ade20k.report(small)
    with pytest.raises(MmiError, match="cannot read the map"):
        ade20k.report(predictions(tmp_path, {"ADE_val_00000001": tmp_path / "none.png"}))
    with pytest.raises(MmiError, match="lacks annotations/training/ of"):
        Questions.of(benchmark("ade20k"), tmp_path / "data", "training")


@pytest.fixture
def coco(tmp_path: Path) -> Questions:
    """Three pictures of MS-COCO, with two captions each."""
    rng = np.random.default_rng(1)
    captions = [{"image_id": n, "id": n, "caption": "a"} for n in (7, 5, 9, 7, 5, 9)]
    folder = tmp_path / "data"
    for number in (5, 7, 9):
        picture = rng.integers(0, 256, (60, 80, 3)).astype(np.uint8)
        save(folder / "val2014" / f"COCO_val2014_{number:012d}.jpg", picture)
    (folder / "captions_val2014.json").write_text(json.dumps({"annotations": captions}))
    return Questions.of(benchmark("coco-t2i"), folder, None)


def real_pictures(questions: Questions) -> dict[str, Path]:
    return {one.id: one.pictures[0].path for one in questions.references}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with random weights of Inception, taken for the right ones."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    path = folder / inception.FILES[0]
    torch.save(inception.Inception().state_dict(), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "BYTES", path.stat().st_size)
        patch.setattr(inception, "SHA256", sha256_of(path))
        yield folder
    path.unlink()  # 95 MB


class MeanColours(torch.nn.Module):
    """Mean colours of the quarters of a picture, in place of Inception's 2048 features."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def test_fid_of_the_same_pictures_is_0(
    coco: Questions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inception, "load_inception", lambda folder: MeanColours())
    monkeypatch.setattr(inception, "FEATURES", 12)
    pictures = real_pictures(coco)
    assert list(pictures) == ["7", "5", "9"]
    path = predictions(tmp_path, pictures)
    options = Options(frozenset({"fid-64"}))
    same = coco.report(path, options).metrics
    assert same == pytest.approx({"FID": 0, "FID, 64 pixels": 0}, abs=1e-5)
    black = save(tmp_path / "black.png", np.zeros((60, 80, 3), np.uint8))
    other = coco.report(predictions(tmp_path, {**pictures, "5": black}))
    assert other.metrics["FID"] > 1e-3 and other.intervals == {}


def test_weights_are_named_with_their_source(coco: Questions, tmp_path: Path) -> None:
    path = predictions(tmp_path, real_pictures(coco))
    get = rf"get it from https://\S+ \({inception.BYTES} bytes, SHA-256 {inception.SHA256}\)"
    with pytest.raises(MmiError, match=rf"give its folder with --weights DIR; {get}"):
        coco.report(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MmiError, match=rf"holds no {inception.FILES[0]}. {get}"):
        coco.report(path, Options(weights=tmp_path / "empty"))
    (tmp_path / "empty" / inception.FILES[1]).write_bytes(b"half of it")
    with pytest.raises(MmiError, match="is another file or damaged; got 10 bytes"):
        coco.report(path, Options(weights=tmp_path / "empty"))


def test_clip_similarity_is_the_cosine_to_the_real_picture(coco: Questions, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=8,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "weights" / FOLDER)
    pictures = real_pictures(coco)
    options = Options(weights=tmp_path / "weights")
    found = coco.report(predictions(tmp_path, pictures), options)
    assert found.metrics == pytest.approx({"CLIP similarity": 1}, abs=1e-6)
    del pictures["9"]
    black = save(tmp_path / "black.png", np.zeros((60, 80, 3), np.uint8))
    value = coco.report(predictions(tmp_path, {**pictures, "5": black}), options).metrics
    assert 0 < value["CLIP similarity"] < 2 / 3


def test_captions_and_pictures_are_as_near_as_clip_says(tmp_path: Path) -> None:
    """transformers' own model and preparation; a caption of more than 8 tokens is cut."""
    weights = tiny_clip(tmp_path)
    rng = np.random.default_rng(3)
    pictures = [rng.integers(0, 256, (20, 28, 3)).astype(np.uint8) for _ in range(5)]
    model = CLIPModel.from_pretrained(weights / FOLDER).eval()
    prepare = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    pixels = prepare(pictures, return_tensors="pt")["pixel_values"]
    chosen = set()
    for caption, ids in (
        ("a red ring", [0, 3, 4, 7, 1]),
        ("a blue square on white on white on white", [0, 3, 5, 6, 8, 9, 8, 1]),
        ("white white nothing", [0, 9, 9, 2, 1]),
    ):
        with torch.no_grad():
            scores = model(torch.tensor([ids]), pixels).logits_per_text[0]
        best = Reranker(weights)(caption, pictures)
        assert best == int(scores.argmax())
        chosen.add(best)
    assert len(chosen) > 1


def test_stories_are_scored_picture_by_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first picture of PororoSV is given, the four others are drawn."""
    monkeypatch.setattr(inception, "load_inception", lambda folder: MeanColours())
    monkeypatch.setattr(inception, "FEATURES", 12)
    frames = [f"Ep_1_0/{number}.png" for number in range(7)]
    ids = np.empty(3, object)
    ids[:] = [[], [], [0, 1, 2]]
    put(
        tmp_path / "data",
        {
            "descriptions.npy": npy(np.array({f"Ep_1_0/{n}": ["a"] for n in range(7)}, object)),
            "img_cache4.npy": npy(np.array(frames[:3])),
            "following_cache4.npy": npy(np.array([frames[n + 1 : n + 5] for n in range(3)])),
            "train_seen_unseen_ids.npy": npy(ids),
            **{frame: png(30 * n, 20, 20) for n, frame in enumerate(frames)},
        },
    )
    questions = Questions.of(benchmark("pororo"), tmp_path / "data", None)
    assert [(one.id, len(one.pictures)) for one in questions.references] == [
        ("0", 4), ("1", 4), ("2", 4)
    ]  # fmt: skip

    def lines(*stories: list[int]) -> Path:
        path = tmp_path / "p.jsonl"
        entries = [
            {"id": str(n), "images": [f"data/{frames[frame]}" for frame in story]}
            for n, story in enumerate(stories)
        ]
        path.write_text("\n".join(map(json.dumps, entries)))
        return path

    real = [[1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]]
    assert questions.report(lines(*real)).metrics == pytest.approx({"FID": 0}, abs=1e-5)
    black = questions.report(lines([0, 0, 0, 0], *real[1:])).metrics["FID"]
    # Without the network of FID, similarity is measured: one of three stories is another's.
    clip = Options(weights=tiny_clip(tmp_path / "weights"))
    assert black > 1e-3
    assert questions.report(lines(*real), clip).metrics == pytest.approx({"CLIP similarity": 1})
    two = questions.report(lines(*real[:2]), clip)
    assert two.missing == 1 and two.metrics["CLIP similarity"] == pytest.approx(2 / 3)
    with pytest.raises(MmiError, match="of 0 has another number of pictures; expected 4"):
        questions.report(lines([1, 2, 3], *real[1:]))


def test_a_pipe_in_place_of_a_map_is_refused(ade20k: Questions, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "map.png")
    with pytest.raises(MmiError, match="Not a regular file"):
        ade20k.report(predictions(tmp_path, {"ADE_val_00000001": tmp_path / "map.png"}))


def test_the_network_takes_the_weights_of_the_file(weights: Path) -> None:
    """As many parameters as Inception v3 without its classifiers (torchvision's documentation:
    27 161 264 with both), and features that depend on the picture."""
    network = inception.load_inception(weights)
    own = sum(parameter.numel() for parameter in network.parameters())
    fc, auxiliary = 2048 * 1000 + 1000, 3_326_696
    assert own == 27_161_264 - fc - auxiliary
    features = network(torch.cat([torch.zeros(1, 3, 299, 299), torch.ones(1, 3, 299, 299)]))
    assert features.shape == (2, inception.FEATURES)
    assert not torch.allclose(features[0], features[1])


def test_pictures_that_are_not_there_are_one_line(
    coco: Questions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inception, "load_inception", lambda folder: MeanColours())
    path = predictions(tmp_path, {"5": tmp_path / "no.png", "7": tmp_path / "no.png"})
    with pytest.raises(MmiError, match=r"no\.png"):
        coco.report(path)


def test_gaussians_are_those_of_all_features_at_once() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(1000.0, 1.0, (50, 4))
    parts = Gaussian(4)
    for part in np.array_split(features, 7):
        parts.add(part)
    assert parts.mean == pytest.approx(features.mean(0), abs=1e-10)
    assert parts.covariance == pytest.approx(np.cov(features, rowvar=False), abs=1e-10)


def test_the_distance_of_gaussians_on_one_axis_is_known() -> None:
    """(m1 - m2)² + (s1 - s2)² on each axis."""
    first, second = np.diag([4.0, 0.0]), np.diag([1.0, 9.0])
    value = frechet_distance(np.zeros(2), first, np.array([3.0, 0.0]), second)
    assert value == pytest.approx(9 + 1 + 9)


def test_pictures_are_scaled_as_in_tensorflow() -> None:
    """The first pixels of both sizes lie in one place; values beyond the last one repeat it."""
    row = np.arange(0, 200, 50, dtype=np.uint8)
    x = inception.as_tensorflow(np.repeat(row[None, :, None], 3, axis=2).repeat(2, axis=0))
    place = np.arange(inception.SIDE) * 4 / inception.SIDE
    expected = (np.interp(place, np.arange(4), row) - 128) / 128
    assert x.shape == (1, 3, 299, 299)
    assert x[0, 1, 150].numpy() == pytest.approx(expected, abs=1e-6)
