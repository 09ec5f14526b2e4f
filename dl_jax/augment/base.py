"""What every augmentation is made of: the contract, composition, and checks of batches and hyper-parameters."""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax.core.errors import InputError, one_line
from dl_jax.core.leaves import at_least_float32, leaf_name
from dl_jax.core.step import Array, Batch
from dl_jax.data.places import BOXES, MAP, PRESENT, lies_in_the_image

Augmentation = Callable[[Array, Batch], Batch]
Interval = tuple[float, float]
Colour = float | Sequence[float]  # one value for all channels, or one for each

LOST = 0.1  # a box of which no more than this part of its area is in the image has left it


def up_to(most: float, rest: float = 0.0) -> Interval:
    """The interval of `most` on both sides of `rest`."""
    return rest - most, rest + most


def compose(*augmentations: Augmentation) -> Augmentation:
    """Applies the augmentations in order with independent keys."""

    def augment(key: Array, batch: Batch) -> Batch:
        keys = jax.random.split(key, len(augmentations))
        for augmentation, k in zip(augmentations, keys, strict=True):
            batch = augmentation(k, batch)
        return batch

    return augment


def on_images(transform: Callable[[Array, Array], Array]) -> Augmentation:
    """The augmentation for a function (key, images) -> images that changes no coordinates."""
    return lambda key, batch: {**batch, "image": transform(key, images_of(batch))}


def images_of(batch: Batch) -> Array:
    """batch["image"]. Raises InputError unless it is float32 [B, H, W, C]."""
    images = batch["image"]
    if images.ndim != 4 or images.dtype != jnp.float32:
        raise InputError(
            f"images {images.shape} of {images.dtype}: augmentations expect float32 [B, H, W, C] in [0, 1]; "
            "convert and scale them first"
        )
    return jnp.asarray(images)


class Move(NamedTuple):
    """One draw of a geometric transform for a batch: functions that move images, maps of labels, and points alike.

    Maps are of any type, and are read at the nearest pixel. Where a function is None, the transform does not move what
    it is for.
    """

    images: Callable[[Array], Array]  # float32 [B, H, W, C] -> [B, H', W', C]
    maps: Callable[[Array], Array] | None = None  # [B, H, W, C] -> [B, H', W', C]
    points: Callable[[Array], Array] | None = None  # y, x as fractions of the image [B, N, 2] -> those of the new one


def geometric(draw: Callable[[Array, Array], Move]) -> Augmentation:
    """The augmentation for a function (key, images) -> `Move`, which draws a geometric transform.

    It moves `batch["image"]`, and by the same draw the columns BOXES with PRESENT, and MAP, as the package says.
    Raises InputError where shapes or types of these do not fit, and, as `require_unplaced` does, for any other column
    with image coordinates, and for one of these that the transform cannot move.
    """

    def augment(key: Array, batch: Batch) -> Batch:
        images = images_of(batch)
        move = draw(key, images)
        moved = {"image": move.images(images)}
        if move.points is not None and {BOXES, PRESENT} <= batch.keys():
            moved[BOXES], moved[PRESENT] = moved_boxes(move.points, *_boxes_of(batch))
        if move.maps is not None and MAP in batch and jnp.shape(batch[MAP])[1:3] == images.shape[1:3]:
            labels = jnp.asarray(batch[MAP])  # [B, H, W, ...]
            flat = move.maps(labels.reshape(*images.shape[:3], -1))
            moved[MAP] = flat.reshape(*flat.shape[:3], *labels.shape[3:])
        require_unplaced({name: column for name, column in batch.items() if name not in moved})
        return {**batch, **moved}

    return augment


def moved_boxes(points: Callable[[Array], Array], boxes: Array, present: Array) -> tuple[Array, Array]:
    """The boxes [B, N, 4] around the moved corners of `boxes`, clipped to the image, and which are left, bool [B, N].

    A box of which no more than the part LOST lies in the image is not left, and neither is one without area. Where
    there is no box, the numbers are 0.
    """
    b, n, _ = boxes.shape
    given = at_least_float32(boxes)
    corners = points(given[..., jnp.array([[0, 1], [0, 3], [2, 1], [2, 3]])].reshape(b, 4 * n, 2)).reshape(b, n, 4, 2)
    whole = jnp.concatenate([corners.min(2), corners.max(2)], -1)
    clipped = jnp.clip(whole, 0, 1)
    rounded = clipped.astype(boxes.dtype)
    flat = (given[..., 2:] <= given[..., :2]) | (rounded[..., 2:] <= rounded[..., :2])  # before or now
    # Written so that a box with a NaN is left, and seen.
    left = present & ~((_area(clipped) <= LOST * _area(whole)) | flat.any(-1))
    return jnp.where(left[..., None], rounded, 0), left


def _area(boxes: Array) -> Array:  # [..., 4] -> [...]
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _boxes_of(batch: Batch) -> tuple[Array, Array]:
    boxes, present = jnp.asarray(batch[BOXES]), jnp.asarray(batch[PRESENT])
    b = len(batch["image"])
    fits = boxes.ndim == 3 and boxes.shape[::2] == (b, 4) and present.shape == boxes.shape[:2]
    if not (fits and jnp.issubdtype(boxes.dtype, jnp.floating) and present.dtype == bool):
        raise InputError(
            f"columns {BOXES!r} {boxes.dtype} {boxes.shape} and {PRESENT!r} {present.dtype} {present.shape}: expected "
            f"floats ({b}, N, 4), fractions of the image, and bools ({b}, N), which of them are boxes; pad all images "
            "to N boxes"
        )
    return boxes, present


def require_unplaced(batch: Batch) -> None:
    """Raises InputError for a column that lies in the coordinates of the images (`lies_in_the_image`)."""
    for path, leaf in jax.tree_util.tree_leaves_with_path({**batch, "image": None}):
        name, shape = leaf_name(path), jnp.shape(leaf)
        if lies_in_the_image(name, len(shape)):
            others = f"; flips, crops and affine maps move it with {PRESENT!r} beside it" if name == BOXES else ""
            raise InputError(
                f"column {name!r} of shape {shape} has image coordinates, which this augmentation does not transform; "
                f"remove the column, transform both, or rename it if it holds something else{others}"
            )


def finite(*numbers: object) -> bool:
    """Whether all of `numbers` are finite real numbers, and neither arrays nor other objects."""
    arrays = [np.asarray(number) for number in numbers]
    return all(array.ndim == 0 and array.dtype.kind in "iuf" and np.isfinite(array) for array in arrays)


def checked(
    name: str,
    interval: Interval,
    valid: Callable[[float, float], bool] = lambda low, high: True,
    limits: str = "both finite",
) -> Interval:
    """`interval`. Raises InputError unless its ends are finite, in order and `valid`, which `limits` describes."""
    if not (np.shape(interval) == (2,) and finite(*interval) and interval[0] <= interval[1] and valid(*interval)):
        raise InputError(f"{name}={one_line(interval)}: expected an interval (low, high) with low <= high, {limits}")
    return interval


def checked_integer(name: str, value: int, what: str, least: int = 1) -> int:
    """`value`. Raises InputError unless it is an integer of `least` or more; `what` says what it is."""
    if not (isinstance(value, Integral) and value >= least):
        raise InputError(f"{name}={value}: expected {what}, an integer of {least} or more")
    return value


def checked_fill(fill: Colour) -> Colour:
    """`fill`. Raises InputError unless it is one value in [0, 1], or a sequence of such values."""
    if not (np.ndim(fill) < 2 and np.size(fill) and all(finite(each) and 0 <= each <= 1 for each in np.ravel(fill))):
        raise InputError(
            f"fill={one_line(fill)}: expected a value in [0, 1], or one for each channel; scale it as the images are"
        )
    return fill


def colour_for(images: Array, fill: Colour) -> Array:
    """`fill` as an array [] or [C] for images [B, H, W, C]. Raises InputError for another number of values."""
    colour = jnp.asarray(fill, images.dtype)
    if colour.shape not in ((), images.shape[-1:]):
        raise InputError(
            f"fill={one_line(fill)}: expected one value, or one for each channel of images {images.shape}; give "
            f"{images.shape[-1]} values"
        )
    return colour
