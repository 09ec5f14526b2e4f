"""Distortions that bend straight lines: elastic ones, and those of a lens."""

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax.augment.base import Augmentation, Colour, Interval, Move, checked, checked_fill, finite, geometric
from dl_jax.augment.sampling import nearest_at, resample_at
from dl_jax.core.errors import InputError
from dl_jax.core.step import Array


def elastic(alpha: float, sigma: float, fill: Colour = 0.0) -> Augmentation:
    """Elastic distortion: every pixel is read from a place of its own, and neighbours from neighbouring places.

    The displacements, one field to the right and one downwards, are uniform in [-1, 1] at each pixel, smoothed by a
    Gaussian of standard deviation `sigma` pixels, and multiplied by `alpha` pixels (Simard, Steinkraus and Platt 2003,
    Best practices for convolutional neural networks, section 2, whose best values on MNIST were 34 and 4). After the
    smoothing a displacement has a standard deviation of about alpha / (6 sigma) pixels.
    """
    if not (finite(alpha, sigma) and alpha >= 0 and sigma > 0):
        raise InputError(f"alpha={alpha}, sigma={sigma}: expected finite numbers of pixels, 0 or more and above 0")
    checked_fill(fill)

    def draw(key: Array, images: Array) -> Move:
        b, h, w, _ = images.shape
        field = jax.random.uniform(key, (b, 2, h, w), minval=-1, maxval=1)
        # The default precision would round the displacements to bfloat16 on accelerators.
        field = jnp.einsum("ih,bdhw,jw->bdij", _gaussian(h, sigma), field, _gaussian(w, sigma), precision="highest")
        rows, columns = jnp.arange(h)[:, None] + alpha * field[:, 0], jnp.arange(w) + alpha * field[:, 1]
        return _read_at(rows, columns, fill)

    return geometric(draw)


def _read_at(rows: Array, columns: Array, fill: Colour) -> Move:  # [B, H, W] each
    """Images and maps that are read at these places. Boxes stay out: where lines bend, corners are not enough."""
    return Move(
        lambda images: resample_at(images, rows, columns, fill),
        lambda maps: nearest_at(maps, rows, columns),
    )


def _gaussian(n: int, sigma: float) -> np.ndarray:
    """The matrix [n, n] that smooths n values, taken as 0 outside; the Gaussian is cut off at four sigmas."""
    reach = int(4 * sigma + 0.5)
    kernel = np.exp(-((np.arange(-reach, reach + 1) / sigma) ** 2) / 2)
    away = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    return np.where(away <= reach, (kernel / kernel.sum())[reach + np.minimum(away, reach)], 0).astype(np.float32)


def barrel(strength: Interval, fill: Colour = 0.0) -> Augmentation:
    """The distortion of a lens about the image's centre: barrel for strengths above 0, pincushion for those below.

    What lies at r (1 + strength r^2) comes to lie at r, in units of half the diagonal (Brown 1966, Decentering
    distortion of lenses, the first radial term). Strengths are above -1/3, where a pixel would appear twice.
    """
    interval = checked("strength", strength, lambda low, high: low > -1 / 3, "above -1/3")
    checked_fill(fill)

    def draw(key: Array, images: Array) -> Move:
        b, h, w, _ = images.shape
        draws = jax.random.uniform(key, (b, 1, 1), minval=interval[0], maxval=interval[1])
        y, x = (jnp.arange(h) - (h - 1) / 2)[:, None], jnp.arange(w) - (w - 1) / 2
        farther = draws * (x**2 + y**2) * (4 / (h**2 + w**2))
        # Written as a change of the pixel's own place, which is exact where the strength is 0.
        return _read_at(jnp.arange(h)[:, None] + farther * y, jnp.arange(w) + farther * x, fill)

    return geometric(draw)
