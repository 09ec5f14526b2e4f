"""What every augmentation is made of: the contract, composition, and checks of batches and hyper-parameters."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from dl_jax.core.errors import InputError
from dl_jax.core.leaves import leaf_name
from dl_jax.core.step import Array, Batch
from dl_jax.data.places import lies_in_the_image

Augmentation = Callable[[Array, Batch], Batch]
Interval = tuple[float, float]
Colour = float | Sequence[float]  # one value for all channels, or one for each


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


def checked(name: str, interval: Interval, valid: bool = True, limits: str = "both finite") -> Interval:
    """`interval`. Raises InputError unless its ends are finite and in order, and `valid`, which `limits` describes."""
    low, high = interval
    if not (valid and -math.inf < low <= high < math.inf):
        raise InputError(f"{name}={interval}: expected an interval (low, high) with low <= high, {limits}")
    return interval


def checked_size(size: int) -> int:
    """`size`. Raises InputError unless it is 1 or more."""
    if size < 1:
        raise InputError(f"size={size}: expected a number of pixels, 1 or more")
    return size
