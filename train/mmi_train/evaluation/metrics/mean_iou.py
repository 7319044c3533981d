"""Mean IoU of segmentation maps, and the colours in which a model draws ADE20K's classes."""

from __future__ import annotations

import numpy as np

from mmi_train.data.readers.ade20k import LABELS, LEVELS, STEP, label_colours

# Added to unions by the published code, so that absent classes do not divide by zero.
_PUBLISHED_EPSILON = 1e-10


def colours_of(labels: np.ndarray) -> np.ndarray:
    """Colour map, uint8 [height, width, 3], of labels [height, width]. Raises `IndexError` for a
    label that has no colour."""
    if labels.size and int(labels.min()) < 0:
        raise IndexError(f"label {labels.min()} has no colour")
    return label_colours()[labels]


def labels_of(colours: np.ndarray) -> np.ndarray:
    """Labels, uint8 [height, width], of the nearest colours in a map, uint8 [height, width, 3]."""
    # Channels of the grid are independent: the nearest colour has the nearest value in each.
    rounded = np.rint((255 - colours.astype(np.float64)) / STEP).clip(0, LEVELS - 1).astype(int)
    label = 1 + rounded @ np.array([LEVELS**2, LEVELS, 1])
    table = label_colours().astype(np.float64)
    pixels = colours.astype(np.float64)
    beyond = label > LABELS  # the grid has 216 colours
    if beyond.any():
        distances = ((pixels[beyond][:, None] - table[1:]) ** 2).sum(-1)
        label[beyond] = 1 + distances.argmin(-1)
    nearest = table[label]
    black = (pixels**2).sum(-1) < ((pixels - nearest) ** 2).sum(-1)
    return np.where(black, 0, label).astype(np.uint8)


def overlaps(
    prediction: np.ndarray, label: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of intersection and union of each class, int64 [classes] each.

    prediction: classes from 0; other values are no class. label: classes from 1; pixels with
    another value do not count.
    """
    shown = label.astype(np.int64) - 1
    if prediction.shape != label.shape:
        raise ValueError(f"a map of {prediction.shape} for labels of {label.shape}")
    labelled = shown >= 0
    guessed = prediction.astype(np.int64)[labelled]
    shown = shown[labelled]
    both = _histogram(shown[guessed == shown], classes)
    return both, _histogram(guessed, classes) + _histogram(shown, classes) - both


def _histogram(values: np.ndarray, classes: int) -> np.ndarray:
    inside = values[(values >= 0) & (values < classes)]
    return np.bincount(inside, minlength=classes)


def mean_iou(
    intersection: np.ndarray, union: np.ndarray, *, absent_classes_as_zero: bool = False
) -> np.ndarray:
    """Mean over classes of intersection / union, [..., classes] each; NaN without any class.

    Classes that neither maps nor labels show are left out. absent_classes_as_zero: they count as
    0, as in the published code.
    """
    if absent_classes_as_zero:
        return np.asarray((intersection / (union + _PUBLISHED_EPSILON)).mean(-1))
    present = union > 0
    ratios = np.divide(intersection, union, out=np.zeros(union.shape), where=present)
    with np.errstate(invalid="ignore"):
        return np.asarray(ratios.sum(-1) / present.sum(-1))
