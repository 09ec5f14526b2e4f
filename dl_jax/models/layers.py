"""Layers that image networks share."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from dl_jax.models import ops

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015, section 2.2, backward case


def conv(
    maps: int,
    size: int,
    stride: int = 1,
    *,
    groups: int = 1,
    use_bias: bool = False,
    dtype: DTypeLike = jnp.float32,
    name: str | None = None,
) -> nn.Conv:
    """A convolution with square kernels: [B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), maps] for an odd size.

    It is padded with (size - 1) // 2 pixels on every side, as PyTorch's networks are; "SAME" pads a strided convolution
    of an even image on one side only.
    """
    return nn.Conv(
        maps,
        (size, size),
        stride,
        padding=(size - 1) // 2,
        feature_group_count=groups,
        use_bias=use_bias,
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


class Normalise(nn.Module):
    """(x - mean) / std of each channel: [B, H, W, C] in [0, 1] -> [B, H, W, C].

    As the first layer of a model it is part of what is exported, and pixels need no preparation elsewhere. It has no
    parameters. For ImageNet, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225) are customary.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, x: Array) -> Array:
        return (x - jnp.asarray(self.mean, x.dtype)) / jnp.asarray(self.std, x.dtype)
