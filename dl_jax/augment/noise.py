"""Noise, and squares that are left out."""

import jax
import jax.numpy as jnp

from dl_jax.augment.base import Augmentation, Colour, checked_fill, checked_integer, colour_for, finite, on_images
from dl_jax.core.errors import InputError
from dl_jax.core.step import Array


def noise(sigma: float) -> Augmentation:
    """Gaussian noise of standard deviation `sigma` on every value.

    The result is not clipped, so the noise has mean 0 in black and white regions too (Sietsma and Dow 1991, Creating
    artificial neural networks that generalize).
    """
    if not (finite(sigma) and sigma >= 0):
        raise InputError(f"sigma={sigma}: expected a standard deviation, 0 or more")
    return on_images(lambda key, images: images + sigma * jax.random.normal(key, images.shape))


def cutout(size: int, fill: Colour = 0.0) -> Augmentation:
    """Sets a square of `size` x `size` pixels to the colour `fill` in every example.

    Its centre is any pixel, so that part of the square may lie outside (DeVries and Taylor 2017, Improved
    regularization of convolutional neural networks with cutout, section 3.2). The paper applies it after
    normalisation, where 0 is the mean; here `fill` is the mean. Boxes and masks stay valid and are passed through.
    """
    checked_integer("size", size, "the square's side in pixels")
    checked_fill(fill)

    def transform(key: Array, images: Array) -> Array:
        b, h, w, _ = images.shape
        if size > min(h, w):
            raise InputError(f"size={size}: expected a square no larger than the {h}x{w} image")
        first = jax.random.randint(key, (b, 2), 0, jnp.array([h, w])) - size // 2
        row, column = jnp.arange(h) - first[:, :1], jnp.arange(w) - first[:, 1:]  # [B, H], [B, W] within the square
        rows, columns = (row >= 0) & (row < size), (column >= 0) & (column < size)
        return jnp.where(rows[:, :, None, None] & columns[:, None, :, None], colour_for(images, fill), images)

    return on_images(transform)
