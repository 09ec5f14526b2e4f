"""Loads, checks and enlarges the images of a data set."""

from collections.abc import Collection, Mapping

import numpy as np

from dl_jax.core.errors import InputError
from dl_jax.data.columns import load


def grey_images(name: str, split: str, *, size: int = 28, classes: int = 10) -> dict[str, np.ndarray]:
    """Loads grey images of size x size, or 8x8, which are enlarged; labels are int [N].

    Returns {"image": uint8 [N, size, size, 1], "label"}. The bundled digits are 8x8. Raises InputError for other shapes
    or dtypes, and for labels outside 0 .. classes - 1.
    """
    records = load(name, split)
    check_images(records, name, sizes=(8, size))
    check_labels(records, name, classes)
    return {"image": enlarge(records["image"], size), "label": records["label"]}


def enlarge(images: np.ndarray, size: int) -> np.ndarray:
    """Scales by the largest integer factor that fits (nearest neighbour) and centres on zeros.

    Takes uint8 [N, H, W, C] and returns [N, size, size, C]. 8x8 becomes 24x24 within 28x28; images of that size already
    are returned as they are. Raises InputError for images larger than `size`.
    """
    n, height, width, channels = images.shape
    factor = size // max(height, width)
    if factor < 1:
        raise InputError(f"images are {height}x{width}, expected at most {size}x{size}: choose a set of smaller images")
    if height == width == size:
        return images
    top, left = (size - factor * height) // 2, (size - factor * width) // 2
    out = np.zeros((n, size, size, channels), images.dtype)
    out[:, top : top + factor * height, left : left + factor * width] = images.repeat(factor, 1).repeat(factor, 2)
    return out


def check_images(records: Mapping[str, np.ndarray], name: str, sizes: Collection[int], channels: int = 1) -> None:
    """Raises InputError unless column `image` is uint8 [N, S, S, channels], S one of `sizes`; `name` is the set's."""
    wanted = f"uint8 images of {' or '.join(f'{size}x{size}x{channels}' for size in sizes)}"
    if "image" not in records:
        raise InputError(f"data set {name} has the columns {', '.join(records)}, expected {wanted} in column 'image'")
    image = records["image"]
    if image.dtype != np.uint8 or image.shape[1:] not in [(size, size, channels) for size in sizes]:
        found = f"{image.dtype} of shape {'x'.join(map(str, image.shape[1:]))}"
        raise InputError(f"the images of data set {name} are {found}, expected {wanted}; choose another --dataset")


def check_labels(records: Mapping[str, np.ndarray], name: str, classes: int) -> None:
    """Raises InputError unless column `label` is integer [N] within 0 .. classes - 1; `name` is the set's."""
    if "label" not in records:
        raise InputError(
            f"data set {name} has the columns {', '.join(records)}, expected class labels in column 'label'"
        )
    label = records["label"]
    if label.ndim != 1 or not np.issubdtype(label.dtype, np.integer):
        raise InputError(
            f"the labels of data set {name} are {label.dtype} of shape {label.shape}, expected one integer per "
            "example; choose another --dataset"
        )
    wrong = np.flatnonzero((label < 0) | (label >= classes))
    if wrong.size:
        raise InputError(
            f"label {label[wrong[0]]} of example {wrong[0]} of data set {name} ({wrong.size} invalid labels): expected "
            f"0 to {classes - 1}; leave out the examples without a label, or set the number of classes"
        )
