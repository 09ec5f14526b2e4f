"""Flips, crops, and affine maps."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dl_jax.augment.base import (
    Augmentation,
    Colour,
    Interval,
    Move,
    checked,
    checked_fill,
    checked_integer,
    colour_for,
    geometric,
)
from dl_jax.augment.sampling import affine_places, nearest_at, nearest_windows, resample, resize_windows
from dl_jax.core.errors import InputError
from dl_jax.core.step import Array


def flip(*, vertical: bool = False) -> Augmentation:
    """Flips each image with probability 1/2: left and right, or with `vertical` top and bottom."""
    axis = 1 if vertical else 2

    def draw(key: Array, images: Array) -> Move:
        flipped = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
        pixels = lambda each: jnp.where(flipped, jnp.flip(each, axis), each)
        chosen = flipped[..., 0] & (jnp.arange(2) == axis - 1)  # of y and x, [B, 1, 2]
        return Move(pixels, pixels, lambda points: jnp.where(chosen, 1 - points, points))

    return geometric(draw)


def pad_and_crop(padding: int, fill: Colour = 0.0) -> Augmentation:
    """Pads with `padding` pixels of the colour `fill` on every side and crops a random window of the original size.

    Each of the (2 * padding + 1)**2 windows is equally likely: a jitter by whole pixels. With 4 pixels it is CIFAR's
    usual augmentation (He et al. 2016, Deep residual learning, section 4.2), which pads images whose mean has been
    subtracted with zeros: here with `fill` as the mean, because a model normalises for itself.
    """
    checked_integer("padding", padding, "a number of pixels", least=0)
    checked_fill(fill)

    def draw(key: Array, images: Array) -> Move:
        b, h, w, _ = images.shape
        if padding >= min(h, w):
            raise InputError(f"padding={padding}: expected less than the {h}x{w} image, or a window may miss it")
        corners = jax.random.randint(key, (b, 2), 0, 2 * padding + 1)

        def pixels(each: Array, colour: Array) -> Array:
            around = jnp.full((b, h + 2 * padding, w + 2 * padding, each.shape[-1]), colour)
            padded = around.at[:, padding : padding + h, padding : padding + w].set(each)
            # A slice per example: on a CPU faster than a gather with index arithmetic.
            cut = lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), (h, w, image.shape[-1]))
            return jax.vmap(cut)(padded, corners)

        return Move(
            lambda images: pixels(images, colour_for(images, fill)),
            lambda maps: pixels(maps, jnp.zeros((), maps.dtype)),
            lambda points: points + (padding - corners)[:, None] / jnp.array([h, w]),
        )

    return geometric(draw)


def centre_crop(size: int) -> Augmentation:
    """The `size` x `size` pixels in the middle; of an odd rest one pixel more is cut off below and to the right."""
    checked_integer("size", size, "a number of pixels")

    def draw(key: Array, images: Array) -> Move:
        _, h, w, _ = images.shape
        if size > min(h, w):
            raise InputError(f"size={size}: expected a window no larger than the {h}x{w} image")
        top, left = (h - size) // 2, (w - size) // 2
        pixels = lambda each: each[:, top : top + size, left : left + size]
        return Move(pixels, pixels, _within(jnp.array([[top, left]]), jnp.full((1, 2), size), h, w))

    return geometric(draw)


def resized_crop(size: int, scale: Interval = (0.08, 1.0), ratio: Interval = (3 / 4, 4 / 3)) -> Augmentation:
    """A random window of each image, resized to `size` x `size`.

    The window's area is a fraction `scale` of the image, and its width / height is drawn from `ratio`, uniform in the
    logarithm (Szegedy et al. 2015, Going deeper with convolutions, section 6). The rule is torchvision's
    RandomResizedCrop: the first of ten draws whose window fits, else the middle with the nearest ratio. It is resized
    without aliasing (`sampling.resize_windows`). A stream of images of different sizes does this as it decodes them,
    with `data.resized_crop`.
    """
    checked_integer("size", size, "a number of pixels")
    checked("scale", scale, lambda low, high: low > 0 and high <= 1, "in (0, 1]")
    checked("ratio", ratio, _positive, "above 0")

    def draw(key: Array, images: Array) -> Move:
        _, h, w, _ = images.shape
        top, left, height, width = window = random_windows(key, len(images), h, w, scale, ratio)
        return Move(
            lambda images: resize_windows(images, *window, size),
            lambda maps: nearest_windows(maps, *window, size),
            _within(jnp.stack([top, left], -1), jnp.stack([height, width], -1), h, w),
        )

    return geometric(draw)


def random_windows(
    key: Array, b: int, height: int, width: int, scale: Interval, ratio: Interval
) -> tuple[Array, Array, Array, Array]:
    """The windows of `resized_crop` in images of `height` x `width`: top, left, height and width, int32 [B] each."""
    low = jnp.array([scale[0], math.log(ratio[0])], jnp.float32)
    high = jnp.array([scale[1], math.log(ratio[1])], jnp.float32)
    key_shape, key_place = jax.random.split(key)
    part, log_ratio = jnp.moveaxis(jax.random.uniform(key_shape, (b, 10, 2), minval=low, maxval=high), -1, 0)  # [B, 10]
    area, drawn = part * height * width, jnp.exp(log_ratio)
    sides = jnp.round(jnp.sqrt(jnp.stack([area / drawn, area * drawn], -1))).astype(jnp.int32)  # [B, 10, 2]
    fits = ((sides > 0) & (sides <= jnp.array([height, width]))).all(-1)
    nearest = min(max(width / height, ratio[0]), ratio[1])
    middle = jnp.array([min(height, round(width / nearest)), min(width, round(height * nearest))])
    first = jnp.take_along_axis(sides, fits.argmax(1)[:, None, None], 1)[:, 0]  # [B, 2]
    some = fits.any(1)[:, None]
    side = jnp.where(some, first, middle)
    room = jnp.array([height, width]) - side
    place = jax.random.uniform(key_place, (b, 2))
    corner = jnp.where(some, jnp.minimum(jnp.floor(place * (room + 1)).astype(jnp.int32), room), room // 2)
    return corner[:, 0], corner[:, 1], side[:, 0], side[:, 1]


def affine(
    *,
    degrees: Interval = (0.0, 0.0),
    scale: Interval = (1.0, 1.0),
    squeeze: Interval = (1.0, 1.0),
    shear: Interval = (0.0, 0.0),
    translate: Interval = (0.0, 0.0),
) -> Augmentation:
    """A random affine transform about the centre, with one bilinear resampling.

    Its parts, in the order in which they act, are `scale` (factor > 0, above 1 enlarges) and `squeeze` (factor > 0 on
    the width, its inverse on the height), horizontal `shear` (pixels to the right per pixel upwards), rotation by
    `degrees` (counter-clockwise) and `translate` (pixels, one draw to the right and one downwards).

    Without `degrees` it is the family of LeCun et al. 1998, Gradient-based learning applied to document
    recognition, section III: translations, scaling, squeezing and horizontal shearing. The paper gives no ranges.
    """
    intervals = (
        checked("degrees", degrees),
        checked("scale", scale, _positive, "above 0"),
        checked("squeeze", squeeze, _positive, "above 0"),
        checked("shear", shear),
        checked("translate", translate),
        translate,
    )

    def draw(key: Array, images: Array) -> Move:
        low, high = jnp.array(intervals, jnp.float32).T
        draws = jax.random.uniform(key, (len(images), len(intervals)), minval=low, maxval=high)
        source = _source_of(*draws.T)
        places = affine_places(source, *images.shape[1:3])
        return Move(
            lambda images: resample(images, source),
            lambda maps: nearest_at(maps, *places),
            lambda points: _mapped(points, source, *images.shape[1:3]),
        )

    return geometric(draw)


def rotate(degrees: Interval) -> Augmentation:
    """A rotation about the centre, counter-clockwise, bilinear."""
    return affine(degrees=degrees)


def scale(factor: Interval) -> Augmentation:
    """A change of size about the centre, bilinear. Above 1 enlarges; the image's shape stays."""
    return affine(scale=factor)


def translate(pixels: Interval) -> Augmentation:
    """A shift by one draw to the right and another downwards, bilinear. `pad_and_crop` shifts by whole pixels."""
    return affine(translate=pixels)


def shear(slope: Interval) -> Augmentation:
    """A horizontal slant about the centre, bilinear: each row moves right by `slope` pixels per pixel upwards."""
    return affine(shear=slope)


def _within(corner: Array, sides: Array, height: int, width: int) -> Callable[[Array], Array]:
    """Points of an image as fractions of windows, whose corners and sides are in pixels, [B, 2] or [1, 2]."""
    return lambda points: (points * jnp.array([height, width]) - corner[:, None]) / sides[:, None]


def _mapped(points: Array, source: Array, height: int, width: int) -> Array:  # y, x [B, N, 2], [B, 2, 3] -> [B, N, 2]
    """Where the points of the image come to lie: `source`, which leads from there to the image, is inverted."""
    (a, b, right), (c, d, down) = (tuple(row[..., None] for row in jnp.moveaxis(source[:, i], -1, 0)) for i in (0, 1))
    y, x = (points[..., 0] - 0.5) * height - down, (points[..., 1] - 0.5) * width - right
    determinant = a * d - b * c
    new_y, new_x = (a * y - c * x) / determinant, (d * x - b * y) / determinant
    return jnp.stack([new_y / height, new_x / width], -1) + 0.5


def _positive(low: float, high: float) -> bool:
    return low > 0


def _source_of(degrees: Array, scale: Array, squeeze: Array, shear: Array, right: Array, down: Array) -> Array:
    """The inverse of the distortion that `affine` describes: draws [B] each -> [B, 2, 3] for `resample`."""
    cos, sin = jnp.cos(jnp.deg2rad(degrees)), jnp.sin(jnp.deg2rad(degrees))
    xx, xy = (cos + shear * sin) / (scale * squeeze), (shear * cos - sin) / (scale * squeeze)
    yx, yy = sin * squeeze / scale, cos * squeeze / scale
    x = jnp.stack([xx, xy, -xx * right - xy * down], -1)
    y = jnp.stack([yx, yy, -yx * right - yy * down], -1)
    return jnp.stack([x, y], 1)
