"""Brightness, contrast, saturation and hue."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dl_jax.augment.base import Augmentation, Interval, checked, compose, on_images
from dl_jax.core.errors import InputError
from dl_jax.core.step import Array

REC601 = (0.299, 0.587, 0.114)  # luminance of red, green and blue

# Colour. Haeberli and Voorhies 1994, Image processing by interpolation and extrapolation: factor * image +
# (1 - factor) * base, where the base is black, the mean luminance, or each pixel's luminance. Factor 0 is the base, 1
# the image, and above 1 leads away from the base.


def brightness(factor: Interval) -> Augmentation:
    """factor * image, clipped to [0, 1]. Factors are 0 or more."""
    return _colour(checked("brightness", factor, _not_negative, "0 or more"), lambda images, f: f * images)


def contrast(factor: Interval) -> Augmentation:
    """Clips mean + factor * (image - mean) to [0, 1], where mean is the image's mean luminance.

    Factors are 0 or more. The mean luminance does not change unless values are clipped. Luminance is Rec. 601's for 3
    channels, otherwise the mean of the channels.
    """
    interval = checked("contrast", factor, _not_negative, "0 or more")
    return _colour(interval, lambda images, f: blend(luminance(images.mean((1, 2), keepdims=True)), images, f))


def saturation(factor: Interval) -> Augmentation:
    """Clips grey + factor * (image - grey) to [0, 1], where grey is the pixel's luminance (Rec. 601).

    Factors are 0 or more; 0 gives a grey image.
    """
    interval = checked("saturation", factor, _not_negative, "0 or more")
    return _colour(interval, lambda images, f: blend(luminance(_rgb(images)), images, f))


def hue(turns: Interval) -> Augmentation:
    """The hue of HSV turned around the colour circle by -0.5 to 0.5 turns; 1/3 takes red to green.

    Saturation and value stay (Smith 1978, Color gamut transform pairs).
    """
    interval = checked("hue", turns, lambda low, high: low >= -0.5 and high <= 0.5, "in [-0.5, 0.5]")
    return _colour(interval, lambda images, f: _turned(_rgb(images), f))


def colour_jitter(
    *, brightness_factor: Interval, contrast_factor: Interval, saturation_factor: Interval, hue_turns: Interval
) -> Augmentation:
    """`brightness`, `contrast`, `saturation` and `hue` of RGB images, always in this order."""
    return compose(
        brightness(brightness_factor), contrast(contrast_factor), saturation(saturation_factor), hue(hue_turns)
    )


def blend(base: Array, images: Array, factor: Array) -> Array:
    return factor * images + (1 - factor) * base


def luminance(images: Array) -> Array:
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


def _colour(interval: Interval, adjust: Callable[[Array, Array], Array]) -> Augmentation:
    """`adjust(images, draws [B, 1, 1, 1])` with one draw per example, clipped to [0, 1]."""

    def transform(key: Array, images: Array) -> Array:
        draws = jax.random.uniform(key, (len(images), 1, 1, 1), minval=interval[0], maxval=interval[1])
        return jnp.clip(adjust(images, draws), 0, 1)

    return on_images(transform)


def _not_negative(low: float, high: float) -> bool:
    return low >= 0


def _rgb(images: Array) -> Array:
    if images.shape[-1] != 3:
        raise InputError(f"images {images.shape}: saturation and hue need 3 channels; use them for RGB images only")
    return images
