"""Scores of benchmarks whose predictions are pictures: mean IoU of maps, FID, CLIP similarity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mmi_deploy.documents.images import FORMATS, MAX_PIXELS, read_rgb
from mmi_deploy.errors import DocumentError
from mmi_deploy.system.progress import Progress
from mmi_train.evaluation.benchmarks.predictions import Prediction, PredictionError
from mmi_train.evaluation.benchmarks.references import Reference
from mmi_train.evaluation.benchmarks.scores import Metrics, Options, Total
from mmi_train.evaluation.metrics import mean_iou
from mmi_train.evaluation.metrics.frechet import Gaussian, frechet_distance
from mmi_train.evaluation.metrics.intervals import Measure, mean_of

if TYPE_CHECKING:
    from torch import Tensor

# Pictures that a network sees at once.
_BATCH = 32


def segmentation(
    references: Sequence[Reference], predictions: Sequence[Prediction | None], options: Options
) -> Metrics:
    """Mean IoU and pixel accuracy of ADE20K's maps, in percent.

    A prediction is a map of labels (one channel, 0 = none), or one in ADE20K's colours. Pixels of a
    missing map are of no class.
    """
    classes = mean_iou.ADE20K_CLASSES
    terms = np.zeros((len(references), 2 * classes + 2))
    for place, (reference, prediction) in enumerate(zip(references, predictions, strict=True)):
        options.progress("reading maps", place, len(references))
        assert reference.picture is not None
        label = _labels(reference.picture)
        guess = np.zeros_like(label)
        if prediction is not None and prediction.image is not None:
            guess = _labels(prediction.image)
            if guess.shape != label.shape:
                raise PredictionError(
                    f"the map {prediction.image} has another size than {reference.id}",
                    expected=f"{label.shape[1]}x{label.shape[0]} pixels",
                    got=f"{guess.shape[1]}x{guess.shape[0]}",
                    fix="scale it, by nearest neighbours",
                )
        both, union = mean_iou.overlaps(guess.astype(np.int64) - 1, label, classes)
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


def _labels(path: Path) -> np.ndarray:
    """Labels [height, width] of a map with one channel, or of one in ADE20K's colours."""
    try:
        with Image.open(path, formats=FORMATS) as image:
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
    """FID of all drawn pictures against all real ones, and CLIP similarity of each to its own.

    Each is given if its network is in the folder of weights; FID is missed if neither is. Missing
    pictures have a similarity of 0; FID leaves them out.
    """
    from mmi_train.evaluation.metrics.clip_similarity import FOLDER
    from mmi_train.evaluation.metrics.inception import FILES

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
    real = [reference.picture for reference in references if reference.picture is not None]
    drawn = [one.image for one in predictions if one is not None and one.image is not None]
    if len(drawn) < 2:
        raise PredictionError("FID needs more pictures", expected="at least 2", got=len(drawn))

    def gaussian(paths: Sequence[Path], what: str, small: bool) -> Gaussian:
        found = Gaussian(FEATURES)
        for batch in _batches(paths, what, options.progress):
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
            gaussian(paths, f"features of {what} pictures", small)
            for paths, what in ((drawn, "drawn"), (real, "real"))
        ]
        value = frechet_distance(both[0].mean, both[0].covariance, both[1].mean, both[1].covariance)
        metrics.append(Total(name, value))
    return metrics


def _similarity(
    references: Sequence[Reference], predictions: Sequence[Prediction | None], options: Options
) -> Measure:
    from mmi_train.evaluation.metrics.clip_similarity import Clip, similarities

    clip = Clip(options.weights)
    there = [
        (place, reference.picture, prediction.image)
        for place, (reference, prediction) in enumerate(zip(references, predictions, strict=True))
        if prediction is not None and prediction.image is not None and reference.picture
    ]
    values = [0.0] * len(references)
    real = _batches([one[1] for one in there], "embeddings of pictures", options.progress)
    drawn = _batches([one[2] for one in there], "embeddings of pictures", options.progress)
    places = iter(place for place, _, _ in there)
    for batch, own in zip(real, drawn, strict=True):
        for value in similarities(clip.embed(batch), clip.embed(own)):
            values[next(places)] = value
    return mean_of("CLIP similarity", values, scale=1.0)


def _batches(paths: Sequence[Path], what: str, progress: Progress) -> Iterator[list[np.ndarray]]:
    """Pictures, uint8 [height, width, 3] each, some at a time."""
    for start in range(0, len(paths), _BATCH):
        progress(what, start, len(paths))
        yield [read_rgb(path) for path in paths[start : start + _BATCH]]
