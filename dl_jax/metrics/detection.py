"""COCO's average precision of boxes that were found in images."""

from typing import NamedTuple

import numpy as np

from dl_jax.core.errors import InputError, require_positive

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # IoU from which a box is found
RECALLS = np.linspace(0, 1, 101)
MOST = 100  # boxes of an image and a class that count, the surest ones


class Boxes(NamedTuple):
    """Boxes of N images, padded to M each."""

    boxes: np.ndarray  # ymin, xmin, ymax, xmax, in any unit [N, M, 4]
    labels: np.ndarray  # int [N, M]
    present: np.ndarray  # bool [N, M], which of them are boxes


def average_precision(found: Boxes, scores: np.ndarray, true: Boxes, classes: int) -> np.ndarray:
    """The average precision of each class at each IoU .50, .55 .. .95, as fractions, float64 [classes, 10].

    These are the numbers of pycocotools' COCOeval for boxes of all areas and 100 of an image: its AP is `np.nanmean` of
    them all, AP50 that of the first column. A class without true boxes has NaN. From the highest score on, each found
    box takes the true box of its image and class that overlaps most with it, of those that are left and overlap
    enough. The precision is the largest at this recall or a higher one, averaged over 101 recalls. Of equal scores the
    first go first. No true box is difficult or stands for a crowd.

    Args:
      found: the boxes that were found; their number M may differ from that of the true ones.
      scores: of the boxes that were found, [N, M]; the higher the surer.
      true: the boxes that are there.
      classes: the number of classes.

    Raises InputError for no classes, where shapes do not fit, for labels outside of 0 .. classes - 1, for true boxes
    without area, and for boxes or scores that are not finite.
    """
    require_positive({"classes": classes})
    found, true = (Boxes(*map(np.asarray, each)) for each in (found, true))
    scores = np.asarray(scores, np.float64)
    _check("found", found, classes)
    _check("true", true, classes)
    if scores.shape != found.labels.shape or len(found.labels) != len(true.labels):
        raise InputError(
            f"average_precision: boxes found {found.boxes.shape} with scores {scores.shape}, true boxes "
            f"{true.boxes.shape}; expected one score for each, and as many images"
        )
    if not np.isfinite(scores[found.present]).all():
        raise InputError("average_precision: a score is not finite, expected numbers; look for a NaN in the network")
    if (true.boxes[true.present][:, :2] >= true.boxes[true.present][:, 2:]).any():
        raise InputError(
            "average_precision: a true box has no area, expected ymin < ymax and xmin < xmax; leave it out"
        )
    return np.array([_of_class(found, scores, true, label) for label in range(classes)]).reshape(classes, -1)


def _of_class(found: Boxes, scores: np.ndarray, true: Boxes, label: int) -> np.ndarray:  # -> [10]
    mine = found.present & (found.labels == label)
    there = true.present & (true.labels == label)
    if not there.any():
        return np.full(len(THRESHOLDS), np.nan)
    sure, hits = [], []
    for image in np.flatnonzero(mine.any(1)):
        order = np.flatnonzero(mine[image])
        order = order[np.argsort(-scores[image][order], kind="stable")][:MOST]
        overlaps = pairwise_iou(found.boxes[image][order], true.boxes[image][there[image]])
        sure.append(scores[image][order])
        hits.append(_hits(overlaps))
    if not hits:
        return np.zeros(len(THRESHOLDS))
    order = np.argsort(-np.concatenate(sure), kind="stable")
    hit = np.concatenate(hits)[order]  # [D, 10]
    right = hit.cumsum(0)
    precision = right / (np.arange(1, len(hit) + 1)[:, None] + np.spacing(1))
    best = np.maximum.accumulate(precision[::-1])[::-1]
    padded = np.concatenate([best, np.zeros((1, len(THRESHOLDS)))])  # recalls that are not reached
    recall = right / there.sum()
    return np.array([padded[np.searchsorted(recall[:, t], RECALLS), t].mean() for t in range(len(THRESHOLDS))])


def _hits(overlaps: np.ndarray) -> np.ndarray:  # [D, G], the surest first -> bool [D, 10]
    """Which boxes take a true one, at each threshold."""
    free = np.ones((len(THRESHOLDS), overlaps.shape[1]), bool)
    hits = np.zeros((len(overlaps), len(THRESHOLDS)), bool)
    for row, hit in zip(overlaps, hits, strict=True):
        enough = np.where(free & (row >= THRESHOLDS[:, None]), row, -1.0)
        last = enough.shape[1] - 1 - enough[:, ::-1].argmax(1) if enough.size else np.zeros(len(hit), int)
        hit[:] = enough.max(1, initial=-1.0) >= 0  # of equal overlaps, COCO takes the last
        free[np.flatnonzero(hit), last[hit]] = False
    return hits


def pairwise_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:  # [N, 4], [M, 4] -> float64 [N, M]
    """The intersection over the union, in float64, where `detect.iou` is for devices."""
    a, b = np.asarray(boxes, np.float64)[:, None], np.asarray(others, np.float64)[None]
    area = lambda sides: np.maximum(sides, 0).prod(-1)
    both = area(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]))
    union = area(a[..., 2:] - a[..., :2]) + area(b[..., 2:] - b[..., :2]) - both
    return np.divide(both, union, out=np.zeros_like(union), where=union > 0)


def _check(name: str, given: Boxes, classes: int) -> None:
    if given.boxes.shape != (*given.labels.shape, 4) or given.labels.ndim != 2:
        raise InputError(
            f"average_precision: {name} boxes {given.boxes.shape} and labels {given.labels.shape}, expected (N, M, 4) "
            "and (N, M)"
        )
    if given.present.shape != given.labels.shape or given.present.dtype != bool:
        raise InputError(
            f"average_precision: {name} boxes {given.boxes.shape} are present where {given.present.dtype} "
            f"{given.present.shape} says, expected bools {given.labels.shape}"
        )
    labels = given.labels[given.present]
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        raise InputError(
            f"average_precision: {name} labels from {labels.min()} to {labels.max()}, expected 0 to {classes - 1}"
        )
    if not np.isfinite(given.boxes[given.present]).all():
        raise InputError(f"average_precision: a {name} box is not finite, expected numbers; look for a NaN in it")
