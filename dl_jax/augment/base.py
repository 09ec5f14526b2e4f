"""What every augmentation is made of: the contract, composition, and checks of batches and hyper-parameters."""

from collections.abc import Callable, Sequence
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax.core.errors import InputError, one_line
from dl_jax.core.leaves import leaf_name
from dl_jax.core.step import Array, Batch
from dl_jax.data.places import lies_in_the_image

Augmentation = Callable[[Array, Batch], Batch]
Interval = tuple[float, float]
Colour = float | Sequence[float]  # one value for all channels, or one for each


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


def geometric(transform: Callable[[Array, Array], Array]) -> Augmentation:
    """The augmentation for a geometric transform (key, images) -> images, which changes no other column.

    Raises InputError as `require_unplaced` does.
    """

    def augment(key: Array, batch: Batch) -> Batch:
        require_unplaced(batch)
        return on_images(transform)(key, batch)

    return augment


def require_unplaced(batch: Batch) -> None:
    """Raises InputError for a column that lies in the coordinates of the images (`lies_in_the_image`)."""
    for path, leaf in jax.tree_util.tree_leaves_with_path({**batch, "image": None}):
        name, shape = leaf_name(path), jnp.shape(leaf)
        if lies_in_the_image(name, len(shape)):
            raise InputError(
                f"column {name!r} of shape {shape} has image coordinates, which this augmentation does not transform; "
                "remove the column, transform both, or rename it if it holds something else"
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
