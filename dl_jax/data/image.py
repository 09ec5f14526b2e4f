"""Loads, checks, enlarges and crops the images of a data set."""

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from urllib.parse import quote

import numpy as np

from dl_jax.core.errors import InputError
from dl_jax.data.columns import BUDGET, Change, load, load_changed
from dl_jax.data.describe import Feature, info
from dl_jax.data.places import lies_in_the_image
from dl_jax.data.records import Example


def images(
    name: str,
    split: str,
    *,
    size: int,
    channels: int = 3,
    columns: Sequence[str] = ("label",),
    classes: int | None = None,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    budget: int = BUDGET,
) -> dict[str, np.ndarray]:
    """Loads images of any sizes as uint8 [N, size, size, channels], with the columns `columns`.

    Each image is scaled down until its shorter side is `size`, without aliasing (Pillow's bilinear), and cropped at its
    centre; images of that size stay as they are. They are decoded once and kept, as by `load`. Labels are within
    0 .. classes - 1, by default the number of classes that the set declares.

    Raises InputError for smaller images, another number of channels, labels outside, fewer than one class, columns that
    the set does not have or that are in the coordinates of the images, such as boxes, and for "image" among `columns`;
    and as `load` does.
    """
    if size < 1:
        raise InputError(f"size={size}: expected the side of the images in pixels, 1 or more")
    if classes is not None and classes < 1:
        raise InputError(f"classes={classes}: expected 1 or more; leave it out for the number that the set declares")
    if isinstance(columns, str) or "image" in columns:
        raise InputError(
            f"columns={columns!r}: expected a tuple of names without 'image', which is always loaded; write ('label',)"
        )
    described = info(name, data_dir, cache_dir)
    _check_columns(described.features, name, ("image", *columns))
    wanted = Feature((size, size, channels), "uint8")
    fit = functools.partial(_fitted, name=name, size=size, channels=channels)
    change = Change(
        "-".join(["", f"{size}x{size}x{channels}", *(quote(column, "").replace("-", "%2D") for column in columns)]),
        lambda features: {"image": wanted, **{column: features[column] for column in columns}},
        lambda example: {"image": fit(example["image"]), **{column: example[column] for column in columns}},
    )
    records = load_changed(name, split, change, data_dir, cache_dir, budget=budget)
    count = described.classes if classes is None else classes
    if "label" in columns and count is not None:
        check_labels(records, name, count)
    return dict(records)


def _check_columns(features: Mapping[str, Feature], name: str, columns: Sequence[str]) -> None:
    for column in columns:
        if column not in features:
            raise InputError(f"data set {name} has the columns {', '.join(features)}, expected {column!r}")
        if column != "image" and lies_in_the_image(column, 1 + len(features[column].shape)):
            raise InputError(
                f"column {column!r} of data set {name} lies in the coordinates of the images, which are scaled and "
                "cropped, expected others; leave it out, or take both from `load`"
            )
    image = features["image"]
    if image.dtype != "uint8" or len(image.shape) != 3:
        found = f"{image.dtype} of shape {image.shape}"
        raise InputError(f"the images of data set {name} are {found}, expected uint8 [H, W, C]; choose another set")


def _fitted(image: np.ndarray, name: str, size: int, channels: int) -> np.ndarray:
    """uint8 [H, W, channels] -> [size, size, channels], as `images` says."""
    height, width, found = image.shape
    if found != channels:
        raise InputError(f"data set {name} has an image of {found} channels, expected {channels}: set the channels")
    if min(height, width) < size:
        raise InputError(
            f"data set {name} has an image of {height}x{width} pixels, expected {size}x{size} or more: choose a "
            "smaller size"
        )
    return scaled_centre(image, size)


def scaled_centre(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, C] scaled until its shorter side is `size`, and cropped at its centre: [size, size, C]."""
    height, width, _ = image.shape
    side = min(height, width)
    scaled = resized(image, round(height * size / side), round(width * size / side))
    top, left = (scaled.shape[0] - size) // 2, (scaled.shape[1] - size) // 2
    return scaled[top : top + size, left : left + size]


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, C] -> [height, width, C], bilinear without aliasing, as Pillow does it."""
    import PIL.Image

    if image.shape[:2] == (height, width):
        return image
    scale = lambda part: np.asarray(PIL.Image.fromarray(part).resize((width, height), PIL.Image.Resampling.BILINEAR))
    if image.shape[-1] == 3:
        return scale(image)
    return np.stack([scale(channel) for channel in np.moveaxis(image, -1, 0)], -1)  # alpha is a channel like others


def resized_crop(
    size: int, scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> Callable[[np.random.Generator, Example], Example]:
    """A transform for `streamed`: a random window of example["image"], resized to `size` x `size`, uint8.

    The window is that of `augment.resized_crop`: of an area uniform in `scale` of the image, and of a width / height
    that is log-uniform in `ratio`; the first of ten draws that fits, else the middle with the nearest ratio. Raises
    InputError for intervals that are not in order or not above 0, and for an example with boxes, masks or keypoints.
    """
    if size < 1 or not (0 < scale[0] <= scale[1] <= 1 and 0 < ratio[0] <= ratio[1] < math.inf):
        raise InputError(
            f"size={size}, scale={scale}, ratio={ratio}: expected 1 or more, an interval in (0, 1], and one above 0"
        )

    def crop(rng: np.random.Generator, example: Example) -> Example:
        for column, value in example.items():
            if column != "image" and lies_in_the_image(column, 1 + np.ndim(value)):
                raise InputError(
                    f"column {column!r} lies in the coordinates of the image, which is cropped, expected others; drop "
                    "it in a transform before"
                )
        image = example["image"]
        height, width = image.shape[:2]
        top, left, h, w = _random_window(rng, height, width, scale, ratio)
        return {**example, "image": resized(image[top : top + h, left : left + w], size, size)}

    return crop


def _random_window(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a window of an image."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        drawn = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(area / drawn)), round(math.sqrt(area * drawn))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    nearest = min(max(width / height, ratio[0]), ratio[1])
    h, w = min(height, round(width / nearest)), min(width, round(height * nearest))
    return (height - h) // 2, (width - w) // 2, h, w


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


def check_two_classes(labels: np.ndarray, name: str) -> None:  # int [N]
    """Raises InputError where all labels to learn from are the same; `name` is the set's."""
    if labels.size and (labels == labels[0]).all():
        raise InputError(
            f"all {len(labels)} examples of {name} to learn from have the label {labels[0]}, expected two classes or "
            "more; give a larger --train-split"
        )
