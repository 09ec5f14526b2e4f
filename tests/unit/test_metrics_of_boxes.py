"""Average precision against pycocotools, and by hand."""

import contextlib
import io

import numpy as np
import pytest

from dl_jax import detect, metrics
from dl_jax.core.errors import InputError
from dl_jax.metrics import detection

CLASSES = 4


def case(seed):
    """Found and true boxes of some images. Corners are multiples of 1/16, so that some overlaps are at a threshold."""
    rng = np.random.default_rng(seed)
    images, most_true, most_found = rng.integers(1, 6), rng.integers(1, 8), rng.choice([1, 6, 30, 130])
    present = rng.random((images, most_true)) < rng.choice([0, 0.5, 0.9])
    shown = rng.random((images, most_found)) < rng.choice([0, 0.5, 1.0])
    present[rng.random(images) < 0.2], shown[rng.random(images) < 0.2] = False, False

    def boxes(n):
        corner, sides = rng.integers(0, 12, (images, n, 2)), rng.integers(1, 9, (images, n, 2))
        return np.concatenate([corner, corner + sides], -1) / 16

    true = metrics.Boxes(boxes(most_true), rng.integers(0, rng.integers(1, CLASSES), present.shape), present)
    near = rng.integers(0, most_true, shown.shape)  # many of the boxes found are near true ones
    at = lambda values: np.take_along_axis(values, near.reshape(near.shape + (1,) * (values.ndim - 2)), 1)
    moved = at(true.boxes) + rng.choice([0, 0, 0, 1 / 16], (*shown.shape, 4)) * [-1, -1, 1, 1]
    is_near = rng.random(shown.shape) < 0.7
    found = metrics.Boxes(
        np.where(is_near[..., None], moved, boxes(most_found)),
        np.where(is_near & (rng.random(shown.shape) < 0.9), at(true.labels), rng.integers(0, CLASSES, shown.shape)),
        shown,
    )
    scores = rng.choice([rng.random(shown.shape), rng.integers(0, 4, shown.shape) / 4])  # ties in half of the cases
    return found, scores, true


def coco_table(found, scores, true):
    """The precision that pycocotools averages, [classes, 10], NaN for its -1."""
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    xywh = lambda box: [float(box[1]), float(box[0]), float(box[3] - box[1]), float(box[2] - box[0])]
    places = lambda boxes: list(zip(*np.nonzero(boxes.present), strict=True))
    given, results = coco.COCO(), coco.COCO()
    common = {"images": [{"id": i} for i in range(len(true.labels))], "categories": [{"id": c} for c in range(CLASSES)]}
    entries = lambda boxes: [
        {"id": n, "image_id": int(i), "category_id": int(boxes.labels[i, j]), "bbox": xywh(boxes.boxes[i, j]),
         "area": float(np.prod(boxes.boxes[i, j, 2:] - boxes.boxes[i, j, :2])), "iscrowd": 0, "j": int(j)}
        for n, (i, j) in enumerate(places(boxes), 1)
    ]  # fmt: skip
    detections = entries(found)
    for entry in detections:
        entry["score"] = float(scores[entry["image_id"], entry["j"]])
    with contextlib.redirect_stdout(io.StringIO()):
        for each, annotations in ((given, entries(true)), (results, detections)):
            each.dataset = {**common, "annotations": annotations}
            each.createIndex()
        run = COCOeval(given, results, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    table = run.eval["precision"][:, :, :, 0, 2]  # thresholds, recalls, classes, of all areas, 100 boxes
    absent = (table == -1).all((0, 1))
    return np.where(absent[:, None], np.nan, table.mean(1).T), run.stats


@pytest.mark.parametrize("part", range(4))
def test_average_precision_is_that_of_pycocotools(part):
    for seed in range(40 * part, 40 * part + 40):
        given = case(seed)
        expected, stats = coco_table(*given)
        table = metrics.average_precision(*given, CLASSES)
        np.testing.assert_allclose(table, expected, rtol=0, atol=1e-9, err_msg=str(seed))
        if not np.isnan(table).all():
            np.testing.assert_allclose([np.nanmean(table), np.nanmean(table[:, 0])], stats[:2], rtol=0, atol=1e-9)


def test_the_cases_have_what_they_should():
    cases = [case(seed) for seed in range(160)]
    assert any(not true.present.any() for _, _, true in cases)
    assert any(not found.present.any() for found, _, _ in cases)
    assert any(((found.labels == 0) & found.present).sum(1).max() > detection.MOST for found, _, _ in cases)
    assert any(len(np.unique(scores)) < scores.size for _, scores, _ in cases)
    table = np.concatenate([metrics.average_precision(*each, CLASSES) for each in cases[:40]])
    assert np.isnan(table).any()
    assert ((table > 0.05) & (table < 0.95)).any()


def test_average_precision_by_hand():
    """Of two true boxes the surest found box is wrong, the second right: precision 1/2 up to a recall of 1/2."""
    true = metrics.Boxes(np.array([[[0, 0, 4, 4], [5, 5, 9, 9]]]), np.zeros((1, 2), int), np.ones((1, 2), bool))
    found = true._replace(boxes=np.array([[[0, 6, 4, 9], [5, 5, 9, 8]]]))  # the second overlaps by 3/4
    table = metrics.average_precision(found, np.array([[0.9, 0.8]]), true, 2)
    half = 51 / 101 / 2
    np.testing.assert_allclose(table[0], [half] * 6 + [0] * 4, atol=1e-12)
    assert np.isnan(table[1]).all()


def test_the_overlap_of_the_metric_is_that_of_the_device():
    found, _, true = case(5)
    expected = detect.iou(found.boxes[0].astype(np.float32), true.boxes[0].astype(np.float32))
    np.testing.assert_allclose(detection.pairwise_iou(found.boxes[0], true.boxes[0]), expected, atol=1e-6)


def one(box=(0.0, 0, 1, 1), label=0):
    return metrics.Boxes(np.array([[box]], float), np.array([[label]]), np.ones((1, 1), bool))


@pytest.mark.parametrize(
    ("found", "scores", "true", "message"),
    [
        (one(), [[0.5, 0.5]], one(), r"found \(1, 1, 4\) with scores \(1, 2\)"),
        (one(), [[np.nan]], one(), "a score is not finite"),
        (one((0, 0, np.inf, 1)), [[0.5]], one(), "a found box is not finite"),
        (one(), [[0.5]], one((0, 0, 0, 1)), "a true box has no area"),
        (one(label=4), [[0.5]], one(), "found labels from 4 to 4, expected 0 to 3"),
        (one(), [[0.5]], one(label=-1), "true labels from -1 to -1, expected 0 to 3"),
        (one()._replace(present=np.ones((1, 1))), [[0.5]], one(), "where float64"),
        (one()._replace(labels=np.zeros((1, 2), int)), [[0.5]], one(), r"found boxes \(1, 1, 4\) and labels \(1, 2\)"),
    ],
)
def test_what_cannot_be_scored_is_refused(found, scores, true, message):
    with pytest.raises(InputError, match=message) as error:
        metrics.average_precision(found, np.array(scores), true, CLASSES)
    assert "\n" not in str(error.value)


def test_there_must_be_classes():
    with pytest.raises(InputError, match="classes is 0"):
        metrics.average_precision(one(), np.array([[0.5]]), one(), 0)
