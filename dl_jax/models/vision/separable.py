"""A small network of depthwise-separable convolutions, and its twin of dense ones.

The blocks are those of MobileNet: Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision
Applications", 2017 (arXiv:1704.04861), section 3.1 and Table 4, which compares the two.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax.core.errors import require_positive
from dl_jax.models.layers import batch_norm, conv, require_image


class SeparableNet(nn.Module):
    """A dense 3x3 convolution, blocks, and a linear layer on the mean: image [B, H, W, C] -> float32 [B, classes].

    A separable block is a 3x3 convolution of each map by itself, which has the stride, and a 1x1 convolution of all
    maps; a dense block is one 3x3 convolution. BatchNorm and `activation` follow every convolution. Convolutions start
    as in He et al. 2015.

    Raises InputError for an image smaller than the product of the strides or with other channels than the parameters
    have, and for a block of no maps or without a stride.
    """

    stem: int = 16  # maps of the first convolution
    blocks: tuple[tuple[int, int], ...] = ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1))  # maps and stride of each
    separable: bool = True
    classes: int = 10
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool) -> jax.Array:
        require_positive({"stem": self.stem, "blocks": min(map(min, self.blocks), default=1), "classes": self.classes})
        require_image(self, image, math.prod(stride for _, stride in self.blocks))

        def normed(x: jax.Array) -> jax.Array:
            return self.activation(batch_norm(train, dtype=self.dtype)(x))

        x = normed(conv(self.stem, 3, dtype=self.dtype, name="stem_conv")(image))  # [B, H, W, stem]
        for i, (maps, stride) in enumerate(self.blocks):
            if self.separable:
                each = x.shape[-1]
                x = normed(conv(each, 3, stride, groups=each, dtype=self.dtype, name=f"depthwise_{i}")(x))
                x = normed(conv(maps, 1, dtype=self.dtype, name=f"pointwise_{i}")(x))
            else:
                x = normed(conv(maps, 3, stride, dtype=self.dtype, name=f"dense_{i}")(x))
        return nn.Dense(self.classes, dtype=self.dtype)(x.mean((1, 2))).astype(jnp.float32)


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Tiny instances with a batch of images each, for the tests of the whole zoo."""
    image, blocks = np.random.default_rng(0).random((3, 4, 6, 2), np.float32), ((6, 2),)
    return {
        "SeparableNet": (SeparableNet(4, blocks), {"image": image}),
        "SeparableNetDense": (SeparableNet(4, blocks, separable=False), {"image": image}),
    }


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """The two networks that the experiment compares, whose parameters the layers' sizes give: no paper has them."""
    image = {"image": jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)}
    maps = [(16, 32), (32, 64), (64, 64), (64, 128), (128, 128)]
    ends = 9 * 16 + 2 * 16 + 129 * 10  # the first convolution with its BatchNorm, and the linear layer
    separable = sum((9 + 2) * before + (before + 2) * after for before, after in maps)
    dense = sum((9 * before + 2) * after for before, after in maps)
    return {
        "SeparableNet": (SeparableNet(), image, ends + separable),
        "SeparableNetDense": (SeparableNet(separable=False), image, ends + dense),
    }
