"""Augmentations: (key, batch) -> batch, on the device, inside the jitted step.

Each function here takes hyper-parameters and returns an augmentation of `batch["image"]`, float32 [B, H, W, C] with
values in [0, 1]. All but `noise` keep the values in [0, 1].

Geometric augmentations change only batch["image"]. They raise InputError if the batch has a column in image coordinates
(boxes, masks, keypoints). Pixels from outside the image are 0.

Each example has its own random draws, which depend only on the key and its position in the global batch. So the result
is the same on any number of devices, and no device needs the rows of another.

A hyper-parameter that is drawn is an interval `(low, high)`, and the draw is uniform in it; `(v, v)` is always v.
Invalid hyper-parameters raise InputError, those that depend on the image's size when the function is first traced.
"""

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dl_jax.core.errors import InputError
from dl_jax.core.leaves import leaf_name
from dl_jax.core.step import Array, Batch

Augmentation = Callable[[Array, Batch], Batch]
Interval = tuple[float, float]

# Words in the names of columns with image coordinates, as in TFDS: "objects/bbox", "keypoints_2d".
PLACES = re.compile(r"[a-z]*box(es)?|(coord(inate)?|corner|keypoint|landmark|point|polygon)s?|joints|xywh|xyxy|cxcywh")
# Words in the names of columns with a value for each pixel, where they have two axes or more beside the batch's.
MAPS = re.compile(r"(depth|flow|heatmap|image|label|mask|segmentation)s?|disparity|normals|saliency")
TOKENS = {"attention", "attn", "causal", "padding"}  # a mask with one of these words in its name is one of tokens
REC601 = (0.299, 0.587, 0.114)  # luminance of red, green and blue


def compose(*augmentations: Augmentation) -> Augmentation:
    """Applies the augmentations in order with independent keys."""

    def augment(key: Array, batch: Batch) -> Batch:
        keys = jax.random.split(key, len(augmentations))
        for augmentation, k in zip(augmentations, keys, strict=True):
            batch = augmentation(k, batch)
        return batch

    return augment


# Geometry


def flip() -> Augmentation:
    """Flips each image horizontally with probability 1/2."""

    def transform(key: Array, images: Array) -> Array:
        flipped = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
        return jnp.where(flipped, images[:, :, ::-1], images)

    return _geometric(transform)


def pad_and_crop(padding: int) -> Augmentation:
    """Pads with `padding` zeros on every side and crops a random window of the original size.

    Each of the (2 * padding + 1)**2 windows is equally likely: a jitter by whole pixels. With 4 pixels it is CIFAR's
    usual augmentation (He et al. 2016, Deep residual learning, section 4.2).
    """
    if padding < 0:
        raise InputError(f"padding={padding}: expected a number of pixels, 0 or more")

    def transform(key: Array, images: Array) -> Array:
        b, h, w, c = images.shape
        if padding >= min(h, w):
            raise InputError(f"padding={padding}: expected less than the {h}x{w} image, or a window may miss it")
        padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        corners = jax.random.randint(key, (b, 2), 0, 2 * padding + 1)
        # A slice per example: on a CPU faster than a gather with index arithmetic.
        return jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), (h, w, c)))(padded, corners)

    return _geometric(transform)


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
        _checked("degrees", degrees),
        _checked("scale", scale, scale[0] > 0, "above 0"),
        _checked("squeeze", squeeze, squeeze[0] > 0, "above 0"),
        _checked("shear", shear),
        _checked("translate", translate),
        translate,
    )

    def transform(key: Array, images: Array) -> Array:
        low, high = jnp.array(intervals, jnp.float32).T
        draws = jax.random.uniform(key, (len(images), len(intervals)), minval=low, maxval=high)
        return resample(images, _source_of(*draws.T))

    return _geometric(transform)


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


def resample(images: Array, source: Array) -> Array:
    """Bilinear resampling at affinely mapped points, 0 outside: [B, H, W, C], [B, 2, 3] -> [B, H, W, C].

    `source @ (x, y, 1)` is the point (x, y) from which the result's pixel (x, y) is read; both in pixels from the
    image's centre, x to the right and y downwards.
    """
    b, h, w, c = images.shape
    centre_x, centre_y = (w - 1) / 2, (h - 1) / 2
    x, y = jnp.arange(w) - centre_x, (jnp.arange(h) - centre_y)[:, None]
    m = source[..., None, None]  # no matrix product: accelerators round its operands to bfloat16
    columns = _neighbours(m[:, 0, 0] * x + m[:, 0, 1] * y + m[:, 0, 2] + centre_x, w)
    rows = _neighbours(m[:, 1, 0] * x + m[:, 1, 1] * y + m[:, 1, 2] + centre_y, h)
    # Four gathers of single pixels that fuse into one loop; each example gathers from itself alone, so that devices
    # which share the batch exchange nothing. Padding, stacked neighbours and 2x2 windows were slower on a CPU.
    take = jax.vmap(lambda image, index: image.at[index].get(mode="promise_in_bounds"))
    pixels = images.reshape(b, h * w, c)
    result = jnp.zeros_like(images)
    for row, row_weight in rows:
        for column, column_weight in columns:
            result += (row_weight * column_weight)[..., None] * take(pixels, row * w + column)
    return result


def _neighbours(position: Array, size: int) -> list[tuple[Array, Array]]:
    """The indices before and after each position, kept inside [0, size), and their weights, 0 where that moved them."""
    before = jnp.floor(position)
    fraction = position - before
    before = before.astype(jnp.int32)
    return [
        (jnp.clip(index, 0, size - 1), jnp.where((index >= 0) & (index < size), weight, 0))
        for index, weight in ((before, 1 - fraction), (before + 1, fraction))
    ]


def _source_of(degrees: Array, scale: Array, squeeze: Array, shear: Array, right: Array, down: Array) -> Array:
    """The inverse of the distortion that `affine` describes: draws [B] each -> [B, 2, 3] for `resample`."""
    cos, sin = jnp.cos(jnp.deg2rad(degrees)), jnp.sin(jnp.deg2rad(degrees))
    xx, xy = (cos + shear * sin) / (scale * squeeze), (shear * cos - sin) / (scale * squeeze)
    yx, yy = sin * squeeze / scale, cos * squeeze / scale
    x = jnp.stack([xx, xy, -xx * right - xy * down], -1)
    y = jnp.stack([yx, yy, -yx * right - yy * down], -1)
    return jnp.stack([x, y], 1)


# Colour. Haeberli and Voorhies 1994, Image processing by interpolation and extrapolation: factor * image +
# (1 - factor) * base, where the base is black, the mean luminance, or each pixel's luminance. Factor 0 is the base, 1
# the image, and above 1 leads away from the base.


def brightness(factor: Interval) -> Augmentation:
    """factor * image, clipped to [0, 1]. Factors are 0 or more."""
    return _colour(_checked("brightness", factor, factor[0] >= 0, "0 or more"), lambda images, f: f * images)


def contrast(factor: Interval) -> Augmentation:
    """Clips mean + factor * (image - mean) to [0, 1], where mean is the image's mean luminance.

    Factors are 0 or more. The mean luminance does not change unless values are clipped. Luminance is Rec. 601's for 3
    channels, otherwise the mean of the channels.
    """
    interval = _checked("contrast", factor, factor[0] >= 0, "0 or more")
    return _colour(interval, lambda images, f: _blend(_luminance(images.mean((1, 2), keepdims=True)), images, f))


def saturation(factor: Interval) -> Augmentation:
    """Clips grey + factor * (image - grey) to [0, 1], where grey is the pixel's luminance (Rec. 601).

    Factors are 0 or more; 0 gives a grey image.
    """
    interval = _checked("saturation", factor, factor[0] >= 0, "0 or more")
    return _colour(interval, lambda images, f: _blend(_luminance(_rgb(images)), images, f))


def hue(turns: Interval) -> Augmentation:
    """The hue of HSV turned around the colour circle by -0.5 to 0.5 turns; 1/3 takes red to green.

    Saturation and value stay (Smith 1978, Color gamut transform pairs).
    """
    interval = _checked("hue", turns, turns[0] >= -0.5 and turns[1] <= 0.5, "in [-0.5, 0.5]")
    return _colour(interval, lambda images, f: _turned(_rgb(images), f))


def colour_jitter(
    *, brightness_factor: Interval, contrast_factor: Interval, saturation_factor: Interval, hue_turns: Interval
) -> Augmentation:
    """`brightness`, `contrast`, `saturation` and `hue` of RGB images, always in this order."""
    return compose(
        brightness(brightness_factor), contrast(contrast_factor), saturation(saturation_factor), hue(hue_turns)
    )


def _blend(base: Array, images: Array, factor: Array) -> Array:
    return factor * images + (1 - factor) * base


def _luminance(images: Array) -> Array:
    """[B, H, W, C] -> [B, H, W, 1]."""
    if images.shape[-1] != 3:
        return images.mean(-1, keepdims=True)
    red, green, blue = jnp.split(images, 3, -1)
    return REC601[0] * red + REC601[1] * green + REC601[2] * blue


def _turned(images: Array, turns: Array) -> Array:
    """The hexcone of HSV, in sextants of the colour circle: red lies at 0, green at 2, blue at 4."""
    red, green, blue = (images[..., channel] for channel in range(3))  # planes: 8 times faster on a CPU than maxima and
    value = jnp.maximum(jnp.maximum(red, green), blue)  # remainders along the channels
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    divisor = jnp.where(chroma > 0, chroma, 1)  # a grey pixel has no hue; its chroma of 0 keeps it as it is
    hue = jnp.where(
        value == red,
        (green - blue) / divisor,
        jnp.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    # A channel is at the value within one sextant of its own place on the circle and lowest from two onwards.
    away = hue[..., None] + 6 * turns - jnp.array([0.0, 2.0, 4.0])  # [B, H, W, 3]
    away = jnp.abs(away - 6 * jnp.round(away / 6))
    return value[..., None] - chroma[..., None] * jnp.clip(away - 1, 0, 1)


# Noise


def noise(sigma: float) -> Augmentation:
    """Gaussian noise of standard deviation `sigma` on every value.

    The result is not clipped, so the noise has mean 0 in black and white regions too (Sietsma and Dow 1991, Creating
    artificial neural networks that generalize).
    """
    if not 0 <= sigma < math.inf:
        raise InputError(f"sigma={sigma}: expected a standard deviation, 0 or more")
    return _on_images(lambda key, images: images + sigma * jax.random.normal(key, images.shape))


def cutout(size: int) -> Augmentation:
    """Sets a square of `size` x `size` pixels to 0 in every example.

    Its centre is any pixel, so that part of the square may lie outside (DeVries and Taylor 2017, Improved
    regularization of convolutional neural networks with cutout, section 3.2). To follow the paper, apply it after
    normalisation, where 0 is the mean. Boxes and masks stay valid and are passed through.
    """
    if size < 1:
        raise InputError(f"size={size}: expected the square's side in pixels, 1 or more")

    def transform(key: Array, images: Array) -> Array:
        b, h, w, _ = images.shape
        if size > min(h, w):
            raise InputError(f"size={size}: expected a square no larger than the {h}x{w} image")
        first = jax.random.randint(key, (b, 2), 0, jnp.array([h, w])) - size // 2
        row, column = jnp.arange(h) - first[:, :1], jnp.arange(w) - first[:, 1:]  # [B, H], [B, W] within the square
        rows, columns = (row >= 0) & (row < size), (column >= 0) & (column < size)
        return jnp.where(rows[:, :, None, None] & columns[:, None, :, None], 0, images)

    return _on_images(transform)


def _on_images(transform: Callable[[Array, Array], Array]) -> Augmentation:
    """The augmentation for a function (key, images) -> images that changes no coordinates."""

    def augment(key: Array, batch: Batch) -> Batch:
        images = batch["image"]
        if images.ndim != 4 or images.dtype != jnp.float32:
            raise InputError(
                f"images {images.shape} of {images.dtype}: augmentations expect float32 [B, H, W, C] in [0, 1]; "
                "convert and scale them first"
            )
        return {**batch, "image": transform(key, jnp.asarray(images))}

    return augment


def _geometric(transform: Callable[[Array, Array], Array]) -> Augmentation:
    """The augmentation for a geometric transform (key, images) -> images, which changes no other column.

    Raises InputError for a column (a) whose name contains a word of PLACES, or (b) whose name contains a word of MAPS
    and that has two or more axes beside the batch's. Shapes do not decide: 8x8 features are no map of an 8x8 image, and
    a depth map may have half the image's size.
    """

    def augment(key: Array, batch: Batch) -> Batch:
        for path, leaf in jax.tree_util.tree_leaves_with_path({**batch, "image": None}):
            name, shape = leaf_name(path), jnp.shape(leaf)
            if _lies_in_the_image(name, len(shape)):
                raise InputError(
                    f"column {name!r} of shape {shape} has image coordinates, which this geometric augmentation does "
                    "not transform; remove the column, transform both, or rename it if it holds something else"
                )
        return _on_images(transform)(key, batch)

    return augment


def _lies_in_the_image(name: str, axes: int) -> bool:
    """Whether a column of this name holds places in the image, or a value for each pixel, the batch's axis included."""
    words = {word.lower() for word in re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+", name)}
    maps = words - {"mask", "masks"} if words & TOKENS else words
    return any(map(PLACES.fullmatch, words)) or (axes > 2 and any(map(MAPS.fullmatch, maps)))


def _colour(interval: Interval, adjust: Callable[[Array, Array], Array]) -> Augmentation:
    """`adjust(images, draws [B, 1, 1, 1])` with one draw per example, clipped to [0, 1]."""

    def transform(key: Array, images: Array) -> Array:
        draws = jax.random.uniform(key, (len(images), 1, 1, 1), minval=interval[0], maxval=interval[1])
        return jnp.clip(adjust(images, draws), 0, 1)

    return _on_images(transform)


def _rgb(images: Array) -> Array:
    if images.shape[-1] != 3:
        raise InputError(f"images {images.shape}: saturation and hue need 3 channels; use them for RGB images only")
    return images


def _checked(name: str, interval: Interval, valid: bool = True, limits: str = "both finite") -> Interval:
    low, high = interval
    if not (valid and -math.inf < low <= high < math.inf):
        raise InputError(f"{name}={interval}: expected an interval (low, high) with low <= high, {limits}")
    return interval
