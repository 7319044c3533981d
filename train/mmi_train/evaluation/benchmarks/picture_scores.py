"""Scores of benchmarks whose predictions are pictures: mean IoU of maps, FID, CLIP similarity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mmi_deploy.documents.images import FORMATS, MAX_PIXELS, read_rgb
from mmi_deploy.errors import DocumentError
from mmi_deploy.system.files import open_regular
from mmi_deploy.system.progress import Progress
from mmi_train.data.readers.ade20k import LABELS
from mmi_train.data.readers.pictures import FilePicture, LabelMap, Picture
from mmi_train.evaluation.benchmarks.predictions import Prediction, PredictionError
from mmi_train.evaluation.benchmarks.references import Reference
from mmi_train.evaluation.benchmarks.scores import Metrics, Options, Total
from mmi_train.evaluation.metrics import mean_iou
from mmi_train.evaluation.metrics.frechet import Gaussian, frechet_distance
from mmi_train.evaluation.metrics.intervals import Measure
from mmi_train.evaluation.metrics.segmenter import Segmenter, scaled

if TYPE_CHECKING:
    from torch import Tensor

# Pictures that a network sees at once.
_BATCH = 32

# Relative difference of the proportions of a picture and its map that rounding explains.
_SKEWED = 0.02


def segmentation(
    references: Sequence[Reference], predictions: Sequence[Prediction | None], options: Options
) -> Metrics:
    """Mean IoU and pixel accuracy of ADE20K's maps, in percent.

    A prediction is a map of labels (one channel, 0 = none), or one in ADE20K's colours; with a
    segmenter it is a drawn picture, whose map the segmenter makes. Pixels of a missing map are of
    no class.
    """
    classes = LABELS
    terms = np.zeros((len(references), 2 * classes + 2))
    for place, (reference, prediction) in enumerate(zip(references, predictions, strict=True)):
        options.progress("reading maps", place, len(references))
        label = _real_labels(reference)
        guess: np.ndarray = np.full_like(label, -1)
        if prediction is not None and options.segmenter is not None:
            label, guess = _segmented(label, prediction, options.segmenter)
        elif prediction is not None:
            guess = _labels(_only(prediction, reference)) - 1
            if guess.shape != label.shape:
                raise PredictionError(
                    f"the map {prediction.images[0]} has another size than {reference.id}",
                    expected=f"{label.shape[1]}x{label.shape[0]} pixels",
                    got=f"{guess.shape[1]}x{guess.shape[0]}",
                    fix="scale it, by nearest neighbours; or, if it is a drawn picture, name what "
                    "makes its map with --segmenter",
                )
        both, union = mean_iou.overlaps(guess, label, classes)
        labelled = int(((label > 0) & (label <= classes)).sum())
        terms[place] = [*both, *union, both.sum(), labelled]
    as_zero = "absent-classes-as-zero" in options.published

    def miou(sums: np.ndarray) -> np.ndarray:
        both, union = sums[..., :classes], sums[..., classes : 2 * classes]
        return 100 * mean_iou.mean_iou(both, union, absent_classes_as_zero=as_zero)

    def pixels(sums: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return np.asarray(100 * sums[..., -2] / sums[..., -1])

    return [Measure("mIoU", terms, miou), Measure("pixel accuracy", terms, pixels)]


def _segmented(
    label: np.ndarray, prediction: Prediction, segmenter: Segmenter
) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and the segmenter's classes of a drawn picture at their size.

    A square picture is that of the map's centre, which the model was given; the labels returned are
    then those of the centre.
    """
    (path,) = prediction.images
    rgb = read_rgb(path)
    if rgb.shape[0] == rgb.shape[1]:
        side = min(label.shape)
        top, left = ((length - side) // 2 for length in label.shape)
        label = label[top : top + side, left : left + side]
    elif abs(rgb.shape[0] * label.shape[1] / (rgb.shape[1] * label.shape[0]) - 1) > _SKEWED:
        raise PredictionError(
            f"the picture {path} has other proportions than its map",
            expected=f"{label.shape[1]}x{label.shape[0]}, or a square of its centre",
            got=f"{rgb.shape[1]}x{rgb.shape[0]}",
        )
    return label, scaled(segmenter(rgb), *label.shape)


def _only(prediction: Prediction, reference: Reference) -> Path:
    """The one picture of a prediction."""
    if len(prediction.images) != 1:
        raise _other_number(prediction, reference, 1)
    return prediction.images[0]


def _other_number(prediction: Prediction, reference: Reference, expected: int) -> PredictionError:
    return PredictionError(
        f"the prediction of {reference.id} has another number of pictures",
        expected=expected,
        got=len(prediction.images),
    )


def _real_labels(reference: Reference) -> np.ndarray:
    """Labels of the real map, int64 [height, width], 0 for none."""
    (picture,) = reference.pictures
    if isinstance(picture, LabelMap):
        return picture.labels().astype(np.int64)
    return mean_iou.labels_of(picture.load()).astype(np.int64)


def _labels(path: Path) -> np.ndarray:
    """Labels [height, width] of a map with one channel, or of one in ADE20K's colours."""
    try:
        with open_regular(path) as file, Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DocumentError(
                    f"the map {path} is too large", expected=f"at most {MAX_PIXELS} pixels"
                )
            if image.mode in ("1", "L", "P", "I", "I;16"):
                return np.asarray(image).astype(np.int64)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DocumentError(f"cannot read the map {path}: {error}") from None
    return mean_iou.labels_of(read_rgb(path)).astype(np.int64)


def drawn_pictures(
    references: Sequence[Reference], predictions: Sequence[Prediction | None], options: Options
) -> Metrics:
    """FID of all drawn pictures against all real ones, and CLIP similarity of each to its own; of a
    story, the mean over its pictures.

    Each is given if its network is in the folder of weights; FID is missed if neither is. Missing
    pictures have a similarity of 0; FID leaves them out.
    """
    from mmi_train.evaluation.metrics.clip_similarity import FOLDER
    from mmi_train.evaluation.metrics.inception import FILES

    for reference, prediction in zip(references, predictions, strict=True):
        if prediction is not None and len(prediction.images) != len(reference.pictures):
            raise _other_number(prediction, reference, len(reference.pictures))
    folder = options.weights
    similar = folder is not None and (folder / FOLDER).is_dir()
    distance = folder is not None and any((folder / name).is_file() for name in FILES)
    metrics: Metrics = []
    if distance or not similar:
        metrics += _distances(references, predictions, options)
    if similar:
        metrics.append(_similarity(references, predictions, options))
    return metrics


def _distances(
    references: Sequence[Reference], predictions: Sequence[Prediction | None], options: Options
) -> Metrics:
    import torch

    from mmi_train.evaluation.metrics.inception import (
        FEATURES,
        as_published,
        as_tensorflow,
        load_inception,
    )
    from mmi_train.evaluation.metrics.published_fid import small_pixels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = load_inception(options.weights).to(device)
    real = [picture for reference in references for picture in reference.pictures]
    drawn = [_file(path) for one in predictions if one is not None for path in one.images]
    if len(drawn) < 2:
        raise PredictionError("FID needs more pictures", expected="at least 2", got=len(drawn))

    def gaussian(pictures: Sequence[Picture], what: str, small: bool) -> Gaussian:
        found = Gaussian(FEATURES)
        for batch in _batches(pictures, what, options.progress):
            inputs: list[Tensor] = [
                as_published(small_pixels(rgb)) if small else as_tensorflow(rgb) for rgb in batch
            ]
            with torch.inference_mode():
                found.add(network(torch.cat(inputs).to(device)).cpu().numpy())
        return found

    metrics: Metrics = []
    names = {"FID": False} | ({"FID, 64 pixels": True} if "fid-64" in options.published else {})
    for name, small in names.items():
        both = [
            gaussian(pictures, f"features of {what} pictures", small)
            for pictures, what in ((drawn, "drawn"), (real, "real"))
        ]
        value = frechet_distance(both[0].mean, both[0].covariance, both[1].mean, both[1].covariance)
        metrics.append(Total(name, value))
    return metrics


def _similarity(
    references: Sequence[Reference], predictions: Sequence[Prediction | None], options: Options
) -> Measure:
    from mmi_train.evaluation.metrics.clip_similarity import Clip, similarities

    clip = Clip(options.weights)
    pairs = [
        (place, picture, _file(path))
        for place, (reference, prediction) in enumerate(zip(references, predictions, strict=True))
        if prediction is not None
        for picture, path in zip(reference.pictures, prediction.images, strict=True)
    ]
    terms = np.zeros((len(references), 2))  # sums of similarities, and numbers of pictures
    terms[:, 1] = [len(reference.pictures) for reference in references]
    real = _batches([one[1] for one in pairs], "embeddings of pictures", options.progress)
    drawn = _batches([one[2] for one in pairs], "embeddings of pictures", options.progress)
    places = iter(place for place, _, _ in pairs)
    for batch, own in zip(real, drawn, strict=True):
        for value in similarities(clip.embed(batch), clip.embed(own)):
            terms[next(places), 0] += value
    return Measure("CLIP similarity", terms, lambda sums: np.asarray(sums[..., 0] / sums[..., 1]))


def _file(path: Path) -> Picture:
    return FilePicture("", str(path))


def _batches(
    pictures: Sequence[Picture], what: str, progress: Progress
) -> Iterator[list[np.ndarray]]:
    """Pictures, uint8 [height, width, 3] each, some at a time."""
    for start in range(0, len(pictures), _BATCH):
        progress(what, start, len(pictures))
        yield [picture.load() for picture in pictures[start : start + _BATCH]]
