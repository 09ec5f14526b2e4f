"""Loads images with boxes around their objects, under the names of TFDS, and generates such images from digits."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dl_jax.core.errors import InputError, require_positive
from dl_jax.core.ragged import Ragged, joined
from dl_jax.data.columns import BUDGET, Change, Columns, load_changed
from dl_jax.data.describe import Feature, info
from dl_jax.data.image import resized
from dl_jax.data.places import BOXES, LABELS, MAP, PRESENT
from dl_jax.data.records import Example

IMAGE = "image"
ROUNDING = 1e-5  # by which a box may lie outside of its image


def objects(
    name: str,
    split: str,
    *,
    height: int,
    width: int,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    budget: int = BUDGET,
) -> Columns:
    """Loads images as uint8 [N, height, width, C], with their boxes and labels as Ragged columns.

    "objects/bbox" is ymin, xmin, ymax, xmax of each object, float32, and "objects/label" its class, int32. Images are
    resized without aliasing (Pillow's bilinear), whatever their proportions; boxes are fractions of them and stay. They
    are decoded once and kept, as by `load`.

    Raises InputError for sizes below 1, where the set lacks one of the three columns, and as `load` does.
    """
    if height < 1 or width < 1:
        raise InputError(f"height={height}, width={width}: expected the sides of the images in pixels, 1 or more")
    features, columns = info(name, data_dir, cache_dir).features, (IMAGE, BOXES, LABELS)
    for column in columns:
        if column not in features:
            raise InputError(
                f"data set {name} has the columns {', '.join(features)}, expected {column!r}; choose a set of images "
                "with boxes"
            )
    image = features[IMAGE]
    if image.dtype != "uint8" or len(image.shape) != 3:
        found = f"{image.dtype} of shape {image.shape}"
        raise InputError(f"the images of data set {name} are {found}, expected uint8 [H, W, C]; choose another set")
    kept = {BOXES: features[BOXES], LABELS: features[LABELS]}

    def example(given: Example) -> Example:
        return {IMAGE: resized(given[IMAGE], height, width), **{column: given[column] for column in kept}}

    changed = {IMAGE: Feature((height, width, image.shape[-1]), "uint8"), **kept}
    change = Change(f"-objects-{height}x{width}", lambda _: changed, example)
    records = load_changed(name, split, change, data_dir, cache_dir, budget=budget)
    return {column: records[column] for column in columns}


def with_area(records: Mapping[str, Any]) -> Columns:
    """The records of `objects` without those boxes whose height or width is 0.

    Raises InputError where an image has another number of labels than of boxes.
    """
    boxes, labels = _paired(records)
    kept = (boxes.values[:, 2:] != boxes.values[:, :2]).all(1)
    rows = np.repeat(np.arange(len(boxes)), boxes.lengths)[kept]
    lengths = np.bincount(rows, minlength=len(boxes))
    return {**records, BOXES: joined(boxes.values[kept], lengths), LABELS: joined(labels.values[kept], lengths)}


def padded_objects(records: Mapping[str, Any], most: int, classes: int) -> dict[str, np.ndarray]:
    """The records of `objects` with `most` boxes for each image, and "objects/mask" bool [N, most], which are boxes.

    Boxes float32 [N, most, 4] and labels int32 [N, most] are 0 where there is none. Raises InputError where an image
    has more boxes or another number of labels, for a box that is outside of its image or has no area, and for a label
    outside of 0 .. classes - 1; the message names the image's row and the box.
    """
    boxes, labels = _paired(records)
    counts, values = boxes.lengths, boxes.values
    for row in np.flatnonzero(counts > most)[:1]:
        raise InputError(f"row {row} has {counts[row]} boxes, expected at most {most}; raise the number of boxes")
    inside = ((values >= -ROUNDING) & (values <= 1 + ROUNDING)).all(1)  # of a NaN, False
    _require("box", inside, boxes, "expected ymin, xmin, ymax, xmax as fractions of the image; divide by its sides")
    clipped = np.clip(values, 0, 1)
    area = (clipped[:, :2] < clipped[:, 2:]).all(1)
    _require("box", area, boxes, "expected ymin < ymax and xmin < xmax; leave it out")
    known = (labels.values >= 0) & (labels.values < classes)
    _require("label", known, labels, f"expected 0 to {classes - 1}; leave the box out, or raise the number of classes")
    return {
        **records,
        BOXES: boxes.of(clipped).padded(most)[:],
        LABELS: labels.padded(most)[:],
        PRESENT: np.arange(most) < counts[:, None],
    }


def _paired(records: Mapping[str, Any]) -> tuple[Any, Any]:  # Ragged boxes [N, n, 4], labels [N, n]
    boxes, labels = records[BOXES], records[LABELS]
    for row in np.flatnonzero(boxes.lengths != labels.lengths)[:1]:
        raise InputError(
            f"row {row} has {boxes.lengths[row]} boxes and {labels.lengths[row]} labels, expected one for each"
        )
    return boxes, labels


def _require(what: str, right: np.ndarray, column: Ragged, expected: str) -> None:
    for wrong in np.flatnonzero(~right)[:1]:
        row = int(np.searchsorted(column.offsets, wrong, "right")) - 1
        shown = np.array2string(column.values[wrong], separator=", ")
        raise InputError(f"{what} {wrong - column.offsets[row]} of row {row} is {shown}, {expected}")


def scenes(
    digits: Mapping[str, np.ndarray], n: int, seed: int, *, height: int = 48, width: int = 48, pasted: int = 3
) -> dict[str, np.ndarray]:
    """n images with `pasted` digits each, at random places and of random brightness, on a texture of waves and noise.

    `digits` are {"image": uint8 [N, S, S, 1], "label": int [N]}. A pixel belongs to a digit where the digit is brighter
    than a quarter. Returns {"image": uint8 [n, height, width, 1], "segmentation_mask": uint8 [n, height, width], 1 at
    digits}, and as `padded_objects` does the box around each digit and its label. Digits may cover others. Raises
    InputError where there is no digit, where digits are no square grey images of uint8 or larger than the image, and
    for `n` or `pasted` below 1.
    """
    require_positive({"the number of images": n, "the number of digits in an image": pasted})
    shape, dtype = digits["image"].shape, digits["image"].dtype
    if len(shape) != 4 or shape[1] != shape[2] or shape[3] != 1 or not shape[0] or dtype != np.uint8:
        raise InputError(
            f"digits {dtype} {shape}, expected uint8 [N, S, S, 1] with N of 1 or more: square grey images; convert them"
        )
    side = shape[1]
    if side > min(height, width):
        raise InputError(
            f"images of {height}x{width}, expected {side}x{side}, the size of a digit, or more; enlarge them"
        )
    rng = np.random.default_rng(seed)
    image, inside = textures(n, height, width, rng), np.zeros((n, height, width), np.uint8)
    boxes, labels = np.zeros((n, pasted, 4), np.float32), np.zeros((n, pasted), np.int32)
    for i in range(n):
        for k, chosen in enumerate(rng.integers(len(digits["image"]), size=pasted)):
            digit = digits["image"][chosen, ..., 0] / 255
            top, left = rng.integers((height - side + 1, width - side + 1))
            window = slice(top, top + side), slice(left, left + side)
            image[i][window] += digit * (rng.uniform(0.5, 1) - image[i][window])
            inside[i][window] |= digit > 0.25
            boxes[i, k], labels[i, k] = _around(digit > 0.25, top, left), digits["label"][chosen]
    boxes /= np.array([height, width, height, width], np.float32)
    present = boxes[..., 2] > boxes[..., 0]
    return {
        IMAGE: np.rint(255 * image).astype(np.uint8)[..., None],
        MAP: inside,
        BOXES: boxes,
        LABELS: labels * present,
        PRESENT: present,
    }  # fmt: skip


def _around(inside: np.ndarray, top: int, left: int) -> tuple[int, int, int, int]:
    """The box around the pixels inside, of a window at (top, left); zeros where there are none."""
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if not rows.size:
        return 0, 0, 0, 0
    return top + rows[0], left + columns[0], top + rows[-1] + 1, left + columns[-1] + 1


def textures(n: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:  # -> [n, H, W], in [0, 1]
    """Four waves of random directions, frequencies and phases, and noise."""
    angle, phase = rng.uniform(0, 2 * np.pi, (2, n, 4, 1, 1))
    frequency = rng.uniform(0.2, 1.2, (n, 4, 1, 1))  # radians per pixel
    rows, columns = np.mgrid[:height, :width]
    waves = np.sin(frequency * (np.cos(angle) * rows + np.sin(angle) * columns) + phase).mean(1)
    return np.clip(0.5 + 0.5 * waves + 0.05 * rng.normal(size=waves.shape), 0, 1)
