"""RandAugment: some operations of one strength, drawn for each example.

Each of the operations is computed for the whole batch, and each example takes its own; the geometric operations share
one resampling, and the blends one blend. A `jax.lax.switch` for each example would compute all branches as well where
it is mapped, over the examples or over seeds, and without sharing. In a loop over the examples it computes one branch,
which is less work for a CPU, but an accelerator would work on one image at a time.
"""

import functools

import jax
import jax.numpy as jnp

from dl_jax.augment.base import Augmentation, Colour, Move, checked_fill, checked_integer, finite, geometric
from dl_jax.augment.colour import blend, luminance
from dl_jax.augment.sampling import resample
from dl_jax.core.errors import InputError
from dl_jax.core.step import Array

OPERATIONS = (
    "identity",
    "auto_contrast",
    "equalize",
    "rotate",
    "solarize",
    "saturation",
    "posterize",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
STRONGEST = 30  # magnitude


def rand_augment(operations: int = 2, magnitude: float = 9, fill: Colour = 0.5) -> Augmentation:
    """Applies `operations` of the 14 operations in turn, drawn with replacement, all of the same magnitude 0 to 30.

    Cubuk, Zoph, Shlens and Le 2020, RandAugment: Practical automated data augmentation. At 30, in proportion below it:
    rotation by 30 degrees, shear by 0.3, translation by 150 / 331 of the side, and factors of 1 plus or minus 0.9 for
    contrast, brightness, saturation and sharpness, each in either direction; `posterize` leaves 4 bits, and `solarize`
    inverts all values. These ranges are torchvision's. Shears are about the centre, and `fill` is seen outside. Values
    are integers, 0 to 255, to `equalize` and `posterize`.
    """
    checked_integer("operations", operations, "a number of operations")
    checked_fill(fill)
    if not (finite(magnitude) and 0 <= magnitude <= STRONGEST):
        raise InputError(f"magnitude={magnitude}: expected 0 to {STRONGEST}")

    def transform(key: Array, images: Array) -> Array:
        key_operation, key_sign = jax.random.split(key)
        shape = len(images), operations
        drawn = jax.random.randint(key_operation, shape, 0, len(OPERATIONS))
        sign = jax.random.rademacher(key_sign, shape, jnp.float32)
        for i in range(operations):
            images = operated(images, drawn[:, i], sign[:, i] * (magnitude / STRONGEST), fill)
        return images

    return geometric(lambda key, images: Move(functools.partial(transform, key)))


def operated(images: Array, operation: Array, strength: Array, fill: Colour = 0.5) -> Array:
    """Each image after one operation: [B, H, W, C], the index in OPERATIONS int [B], strength [B] in [-1, 1]."""
    is_ = lambda name: operation == OPERATIONS.index(name)  # [B]
    if_ = lambda name, value: jnp.where(is_(name), value, 0)
    images = resample(images, _source(if_, strength, *images.shape[1:3]), fill)
    wide = lambda each: each[:, None, None, None]
    base = wide(is_("contrast")) * luminance(images.mean((1, 2), keepdims=True))
    base += wide(is_("saturation")) * luminance(images) + wide(is_("sharpness")) * _smoothed(images)
    factor = sum(if_(name, 0.9 * strength) for name in ("contrast", "brightness", "saturation", "sharpness"))
    images = jnp.clip(blend(base, images, 1 + wide(factor)), 0, 1)
    images = jnp.where(wide(is_("solarize")) & (images >= 1 - wide(jnp.abs(strength))), 1 - images, images)
    images = jnp.where(wide(is_("posterize")), _posterized(images, wide(jnp.abs(strength))), images)
    images = jnp.where(wide(is_("auto_contrast")), _stretched(images), images)
    return jnp.where(wide(is_("equalize")), _equalized(images), images)


def _source(if_, strength: Array, height: int, width: int) -> Array:
    """The affine maps [B, 2, 3] for `resample` of the geometric operations, of which an example has one at most."""
    angle = if_("rotate", jnp.deg2rad(30 * strength))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    right, down = (if_(f"translate_{axis}", 150 / 331 * strength) for axis in "xy")
    x = jnp.stack([cos, if_("shear_x", 0.3 * strength) - sin, right * width], -1)
    y = jnp.stack([if_("shear_y", 0.3 * strength) + sin, cos, down * height], -1)
    return jnp.stack([x, y], 1)


def _smoothed(images: Array) -> Array:
    """Pillow's SMOOTH: the mean over 3x3 pixels, in which the middle counts five times; the border stays."""
    _, h, w, _ = images.shape
    around = sum(images[:, i : h - 2 + i, j : w - 2 + j] for i in range(3) for j in range(3))
    return images.at[:, 1:-1, 1:-1].set((around + 4 * images[:, 1:-1, 1:-1]) / 13)


def _posterized(images: Array, strength: Array) -> Array:
    """Values with 8 to 4 bits; what the lower bits said is cut off."""
    step = 2 ** jnp.round(4 * strength)
    return jnp.floor(jnp.round(255 * images) / step) * step / 255


def _stretched(images: Array) -> Array:
    """The values of each channel stretched to [0, 1]; a channel of one value stays."""
    low, high = images.min((1, 2), keepdims=True), images.max((1, 2), keepdims=True)
    return jnp.where(high > low, (images - low) / jnp.where(high > low, high - low, 1), images)


def _equalized(images: Array) -> Array:
    """Values mapped so that a channel's 256 are equally frequent, as far as they can be: Pillow's equalize."""
    b, h, w, c = images.shape
    values = jnp.moveaxis(jnp.round(255 * images).astype(jnp.int32), -1, 1).reshape(b, c, h * w)
    count = jax.lax.platform_dependent(values, cpu=counted, default=counted_by_digits)
    brightest = jnp.take_along_axis(count, values.max(-1, keepdims=True), -1)
    step = (h * w - brightest) // 255
    table = (step // 2 + jnp.cumsum(count, -1) - count) // jnp.maximum(step, 1)
    table = jnp.where(step > 0, jnp.minimum(table, 255), jnp.arange(256))
    found = jax.lax.platform_dependent(table, values, cpu=looked_up, default=looked_up_by_digits)
    return jnp.moveaxis(found.reshape(b, c, h, w), 1, -1) / jnp.float32(255)


# The histogram int [B, C, 256] of values int [B, C, HW], and the entries of a table int [B, C, 256] at these values.
# Accelerators are slow at scatters and gathers, so there they are products with the two hexadecimal digits of a value,
# exact also in bfloat16. On a CPU this would take seven times as long.


def counted(values: Array) -> Array:
    return jax.vmap(jax.vmap(lambda each: jnp.zeros(256, jnp.int32).at[each].add(1)))(values)


def counted_by_digits(values: Array) -> Array:
    high, low = _digits(values)
    return jnp.einsum("bcnh,bcnl->bchl", high, low).reshape(*values.shape[:2], 256).astype(jnp.int32)


def looked_up(table: Array, values: Array) -> Array:
    return jnp.take_along_axis(table, values, -1)


def looked_up_by_digits(table: Array, values: Array) -> Array:
    high, low = _digits(values)
    rows = jnp.einsum("bcnh,bchl->bcnl", high, table.reshape(*table.shape[:2], 16, 16).astype(jnp.float32))
    return (rows * low).sum(-1).astype(jnp.int32)


def _digits(values: Array) -> tuple[Array, Array]:  # [B, C, HW, 16] each
    return jax.nn.one_hot(values // 16, 16), jax.nn.one_hot(values % 16, 16)
