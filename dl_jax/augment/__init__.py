"""Augmentations: (key, batch) -> batch, on the device, inside the jitted step.

Each function here takes hyper-parameters and returns an augmentation of `batch["image"]`, float32 [B, H, W, C] with
values in [0, 1]. All but `noise` keep the values in [0, 1], to the rounding of float32. Two are for recordings:
`spec_augment` changes `batch["frames"]` and `white_noise` `batch["wave"]`, as far as `batch["length"]` says.

Geometric augmentations move boxes and label maps by the same draw as their image, under the names of TFDS:

- "objects/bbox", floats [B, N, 4], is ymin, xmin, ymax and xmax as fractions of the image, where "objects/mask", bool
  [B, N], is True. A box becomes the one around its moved corners, clipped to the image. One of which no more than a
  tenth of the area is left by one augmentation, or that has none, gets the mask False, and where the mask is False
  the numbers are 0. A box with a NaN stays, as NaN.
- "segmentation_mask", [B, H, W, ...] of any type and of the image's size, is read at the nearest pixel, 0 outside.

`elastic` and `barrel` move label maps only, `rand_augment` neither. A column in image coordinates that does not move,
such as keypoints, raises InputError. Pixels from outside the image are 0, or the colour `fill`, a value in [0, 1] or
one for each channel. `mixup` and `cutmix` also change batch["label"], to probabilities.

Each example has its own random draws, which depend only on the key and its position in the global batch. So the result
is the same on any number of devices, and no device needs the rows of another; to mix, it needs one.

A hyper-parameter that is drawn is an interval `(low, high)`, and the draw is uniform in it; `(v, v)` is always v.
Invalid hyper-parameters raise InputError, those that depend on the image's shape when the function is first traced.
"""

from dl_jax.augment.audio import spec_augment, white_noise
from dl_jax.augment.base import Augmentation, Colour, Interval, compose, up_to
from dl_jax.augment.colour import REC601, brightness, colour_jitter, contrast, hue, saturation
from dl_jax.augment.geometry import (
    affine,
    centre_crop,
    flip,
    pad_and_crop,
    resized_crop,
    rotate,
    scale,
    shear,
    translate,
)
from dl_jax.augment.mixing import cutmix, mixup
from dl_jax.augment.noise import cutout, noise
from dl_jax.augment.policy import rand_augment
from dl_jax.augment.sampling import resample
from dl_jax.augment.warp import barrel, elastic

__all__ = [
    "REC601",
    "Augmentation",
    "Colour",
    "Interval",
    "affine",
    "barrel",
    "brightness",
    "centre_crop",
    "colour_jitter",
    "compose",
    "contrast",
    "cutmix",
    "cutout",
    "elastic",
    "flip",
    "hue",
    "mixup",
    "noise",
    "pad_and_crop",
    "rand_augment",
    "resample",
    "resized_crop",
    "rotate",
    "saturation",
    "scale",
    "shear",
    "spec_augment",
    "translate",
    "up_to",
    "white_noise",
]
