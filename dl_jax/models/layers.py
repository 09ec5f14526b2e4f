"""Layers that networks share."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax import masks
from dl_jax.core.errors import InputError
from dl_jax.models import ops

# A dense layer for arrays of more than two axes: [..., C] -> [..., D].
dense = functools.partial(nn.Dense, dot_general=ops.dense_product)


def he_normal(
    key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32, out_sharding: Any = None
) -> jax.Array:
    """A kernel [kh, kw, C, D], normal with variance 2 / (kh kw D): He et al. 2015, section 2.2, backward case.

    They are drawn as one row: XLA takes more than twice as long to compile draws of arrays with four axes.
    """
    draws = jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)
    return math.sqrt(2 / (math.prod(shape[:-2]) * shape[-1])) * draws


def conv(
    maps: int,
    size: int,
    stride: int = 1,
    *,
    groups: int = 1,
    dtype: DTypeLike = jnp.float32,
    name: str | None = None,
) -> nn.Conv:
    """A convolution with square kernels: [B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), maps] for an odd size.

    It has no bias, and (size - 1) // 2 pixels of padding on every side, as PyTorch's networks have; "SAME" pads a
    strided convolution of an even image on one side only.
    """
    return nn.Conv(
        maps,
        (size, size),
        stride,
        padding=(size - 1) // 2,
        feature_group_count=groups,
        use_bias=False,
        kernel_init=he_normal,
        dtype=dtype,
        conv_general_dilated=ops.conv_general_dilated,
        name=name,
    )


def batch_norm(
    train: bool,
    *,
    scale_init: nn.initializers.Initializer = nn.initializers.ones,
    dtype: DTypeLike = jnp.float32,
    name: str | None = None,
) -> nn.BatchNorm:
    """Batch normalisation with PyTorch's defaults: running averages move by a tenth at each step, epsilon is 1e-5."""
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, scale_init=scale_init, name=name
    )


def require_image(module: nn.Module, image: jax.Array, smallest: int, first: tuple[str, ...] = ("stem_conv",)) -> None:
    """Raises InputError unless `image` is [B, H, W, C] with `smallest` pixels or more on each side, and C fits.

    C has to be the number of channels of the first convolution, the layer at path `first`, once `module` has
    parameters.
    """
    name = type(module).__name__
    if image.ndim != 4:
        raise InputError(f"{name} takes images [B, H, W, C], not an array of shape {image.shape}; reshape it")
    height, width, channels = image.shape[1:]
    if min(height, width) < smallest:
        raise InputError(
            f"image of {height} x {width} pixels, expected {smallest} x {smallest} or more, the smallest that {name} "
            "takes; enlarge it"
        )
    expected = _inputs_of(module, first)
    if expected not in (None, channels):
        raise InputError(
            f"image with {channels} channels, expected {expected} as in the parameters of {name}; convert it, or "
            "initialise the model for it"
        )


def require_video(module: nn.Module, video: jax.Array) -> None:
    """Raises InputError unless `video` is [B, T, H, W, C] with one frame or more."""
    name = type(module).__name__
    if video.ndim != 5:
        raise InputError(f"{name} takes videos [B, T, H, W, C], not an array of shape {video.shape}; reshape it")
    if video.shape[1] < 1:
        raise InputError(f"videos of {video.shape[1]} frames, expected 1 or more for {name}; give longer ones")


def require_values(module: nn.Module, x: jax.Array, first: tuple[str, ...]) -> None:
    """Raises InputError unless the examples of `x` [B, ...] have as many values as the dense layer at `first` takes."""
    values, expected = math.prod(x.shape[1:]), _inputs_of(module, first)
    if expected not in (None, values):
        raise InputError(
            f"examples of shape {x.shape[1:]} with {values} values, expected {expected} as in the parameters of "
            f"{type(module).__name__}; convert them, or initialise the model for them"
        )


def require_features(module: nn.Module, x: jax.Array, first: tuple[str, ...]) -> None:
    """Raises InputError unless the last axis of `x` has as many features as the layer at `first` takes."""
    expected = _inputs_of(module, first)
    if expected not in (None, x.shape[-1]):
        raise InputError(
            f"{x.shape[-1]} features in {x.shape}, expected {expected} as in the parameters of "
            f"{type(module).__name__}; convert them, or initialise the model for them"
        )


def _inputs_of(module: nn.Module, layer: tuple[str, ...]) -> int | None:
    """The channels or features that a layer takes, None before it has parameters."""
    if not module.has_variable("params", layer[0]):
        return None
    found = module.get_variable("params", layer[0])
    for name in layer[1:]:
        found = found[name]
    return found["kernel"].shape[-2]


def valid_steps(lengths: Any, x: jax.Array) -> jax.Array:  # int [B], [B, T, ...] -> bool [B, T]
    """Which steps of the sequences `x` are valid: those before each one's length, all where `lengths` is None.

    Raises InputError unless there is one length in [1, T] for each sequence. Lengths that are traced cannot be checked;
    `masks.from_lengths` says what they mean then.
    """
    batch, steps = x.shape[:2]
    if lengths is None:
        return jnp.ones((batch, steps), bool)
    return masks.from_lengths(lengths, steps, batch)


class Normalise(nn.Module):
    """(x - mean) / std of each channel: [B, H, W, C] in [0, 1] -> [B, H, W, C].

    As the first layer of a model it is part of what is exported, and pixels need no preparation elsewhere. It has no
    parameters. For ImageNet, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225) are customary.

    Raises InputError unless there are one mean and one standard deviation above 0 for each channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, x: jax.Array) -> jax.Array:
        if not (np.shape(self.mean) == np.shape(self.std) == x.shape[-1:] and all(std > 0 for std in self.std)):
            raise InputError(
                f"Normalise(mean={self.mean}, std={self.std}) of images {x.shape}: expected one mean and one std above "
                "0 for each channel; give those of the data set"
            )
        return (x - jnp.asarray(self.mean, x.dtype)) / jnp.asarray(self.std, x.dtype)
