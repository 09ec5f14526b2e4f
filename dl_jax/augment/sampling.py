"""Resampling, bilinear or by the nearest pixel: at any points, at affinely mapped ones, of windows to another size."""

import jax
import jax.numpy as jnp

from dl_jax.augment.base import Colour, colour_for
from dl_jax.core.step import Array


def resample(images: Array, source: Array, fill: Colour = 0.0) -> Array:
    """Bilinear resampling at affinely mapped points, `fill` outside: [B, H, W, C], [B, 2, 3] -> [B, H, W, C].

    `source @ (x, y, 1)` is the point (x, y) from which the result's pixel (x, y) is read; both in pixels from the
    image's centre, x to the right and y downwards.
    """
    return resample_at(images, *affine_places(source, *images.shape[1:3]), fill)


def affine_places(source: Array, h: int, w: int) -> tuple[Array, Array]:  # [B, 2, 3] -> [B, H, W] each
    """The rows and columns that the pixels of an image of h x w are read from, in pixels from the first."""
    centre_x, centre_y = (w - 1) / 2, (h - 1) / 2
    x, y = jnp.arange(w) - centre_x, (jnp.arange(h) - centre_y)[:, None]
    m = source[..., None, None]  # no matrix product: accelerators round its operands to bfloat16
    columns = m[:, 0, 0] * x + m[:, 0, 1] * y + m[:, 0, 2] + centre_x
    rows = m[:, 1, 0] * x + m[:, 1, 1] * y + m[:, 1, 2] + centre_y
    return rows, columns


def resample_at(images: Array, rows: Array, columns: Array, fill: Colour = 0.0) -> Array:
    """Bilinear resampling, `fill` outside: [B, H, W, C] at the points `rows`, `columns` [B, H, W] -> [B, H, W, C].

    A point is given in pixels from the first, so that (0, 0) is the centre of the pixel in the upper left corner.
    """
    b, h, w, c = images.shape
    # Four gathers of single pixels that fuse into one loop; each example gathers from itself alone, so that devices
    # which share the batch exchange nothing. Padding, stacked neighbours and 2x2 windows were slower on a CPU.
    take = jax.vmap(lambda image, index: image.at[index].get(mode="promise_in_bounds"))
    pixels = images.reshape(b, h * w, c)
    down, across = _neighbours(rows, h), _neighbours(columns, w)
    inside = (down[0][1] + down[1][1]) * (across[0][1] + across[1][1])  # [B, H, W]
    result = (1 - inside)[..., None] * colour_for(images, fill)
    for row, row_weight in down:
        for column, column_weight in across:
            result += (row_weight * column_weight)[..., None] * take(pixels, row * w + column)
    return result


def nearest_at(maps: Array, rows: Array, columns: Array) -> Array:
    """The values of the nearest pixels, 0 outside: [B, H, W, C] at `rows`, `columns` [B, H', W'] -> [B, H', W', C].

    Points are given as to `resample_at`. Halfway between two pixels the later one counts.
    """
    b, h, w, c = maps.shape
    row, column = (jnp.floor(places + 0.5).astype(jnp.int32) for places in (rows, columns))
    inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
    index = jnp.where(inside, row * w + column, 0)
    found = jax.vmap(lambda pixels, index: pixels.at[index].get(mode="promise_in_bounds"))(
        maps.reshape(b, h * w, c), index
    )
    return jnp.where(inside[..., None], found, jnp.zeros((), maps.dtype))


def _neighbours(position: Array, size: int) -> list[tuple[Array, Array]]:
    """The indices before and after each position, kept inside [0, size), and their weights, 0 where that moved them."""
    before = jnp.floor(position)
    fraction = position - before
    before = before.astype(jnp.int32)
    return [
        (jnp.clip(index, 0, size - 1), jnp.where((index >= 0) & (index < size), weight, 0))
        for index, weight in ((before, 1 - fraction), (before + 1, fraction))
    ]


def resize_windows(images: Array, top: Array, left: Array, height: Array, width: Array, size: int) -> Array:
    """Windows of [B, H, W, C], whole pixels [B] each, resized to [B, size, size, C].

    Bilinear, with a triangle as wide as the pixels of the result where that is smaller, so that nothing aliases; the
    pixels outside a window have no part in it. Pillow and torchvision resize like this.
    """
    _, h, w, _ = images.shape
    down, across = _triangles(top, height, h, size), _triangles(left, width, w, size)
    # As products with dense matrices, which accelerators like. The default would round the operands to bfloat16.
    rows = jnp.einsum("bih,bhwc->biwc", down, images, precision="highest")
    return jnp.einsum("bjw,biwc->bijc", across, rows, precision="highest")


def nearest_windows(maps: Array, top: Array, left: Array, height: Array, width: Array, size: int) -> Array:
    """As `resize_windows`, but each pixel of the result has the value of one: of that which its centre lies in."""
    rows, columns = (
        first[:, None] + (2 * jnp.arange(size) + 1) * length[:, None] // (2 * size)
        for first, length in ((top, height), (left, width))
    )  # whole numbers, [B, size]
    return jax.vmap(lambda each, row, column: each[row[:, None], column])(maps, rows, columns)


def _triangles(first: Array, length: Array, n: int, size: int) -> Array:
    """The weights of n pixels in each of `size` pixels, which divide up [first, first + length): [B, size, n]."""
    first, length = first[:, None, None], length[:, None, None]
    pixel, pitch = jnp.arange(n), length / size
    centre = first + (jnp.arange(size)[:, None] + 0.5) * pitch
    weight = jnp.maximum(1 - jnp.abs(pixel + 0.5 - centre) / jnp.maximum(pitch, 1), 0)
    weight = jnp.where((pixel >= first) & (pixel < first + length), weight, 0)
    return weight / weight.sum(-1, keepdims=True)
