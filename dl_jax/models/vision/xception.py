"""Xception: depthwise-separable convolutions with residual connections.

Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", CVPR 2017, figure 5. Strided convolutions and
poolings are padded with one pixel on every side, as other networks here are; those of Keras are padded on one side
only where the image is even, and its first two convolutions are not padded.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax.core.errors import InputError, require_positive
from dl_jax.models import ops
from dl_jax.models.layers import batch_norm, conv, require_image


class SeparableConv(nn.Module):
    """A 3x3 convolution of each map by itself, a 1x1 convolution of all, and BatchNorm: [B, H, W, C] -> [..., maps].

    Nothing stands between the two convolutions (section 4.7 of the paper).
    """

    maps: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = conv(x.shape[-1], 3, groups=x.shape[-1], dtype=self.dtype, name="depthwise")(x)
        x = conv(self.maps, 1, dtype=self.dtype, name="pointwise")(x)
        return batch_norm(train, dtype=self.dtype)(x)


class Block(nn.Module):
    """`activation` and a separable convolution for each of `maps`, and a shortcut: [B, H, W, C] -> [B, H', W', maps].

    With `pooled`, the block ends in a max pooling 3x3 with stride 2, so that H' is ceil(H / 2), and the shortcut is a
    1x1 convolution with stride 2 and BatchNorm.
    """

    maps: tuple[int, ...]
    pooled: bool
    activated: bool  # whether `activation` precedes the first convolution
    activation: Callable[[jax.Array], jax.Array]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = x
        for i, maps in enumerate(self.maps):
            y = self.activation(y) if i or self.activated else y
            y = SeparableConv(maps, self.dtype)(y, train)
        if self.pooled:
            y = ops.max_pool(y, 3, 2, 1)
            x = conv(self.maps[-1], 1, 2, dtype=self.dtype, name="shortcut")(x)
            x = batch_norm(train, dtype=self.dtype, name="shortcut_norm")(x)
        return x + y


class Xception(nn.Module):
    """Entry, middle and exit flow: image [B, H, W, C] -> float32 logits [B, classes].

    The defaults are the paper's, for images of 299 x 299 pixels; `SmallXception` is for those of 28 or 32. Convolutions
    start as in He et al. 2015.

    Raises InputError for an image smaller than the product of the strides or with other channels than the parameters
    have, where a number of maps or of classes or the stride is below 1, and where `middle` is below 0.
    """

    stem: tuple[int, int] = (32, 64)  # maps of the two dense convolutions
    stride: int = 2  # of the first
    entry: tuple[int, ...] = (128, 256, 728)  # maps of the blocks of the entry flow, each of which halves the image
    middle: int = 8  # blocks of the middle flow
    exit: tuple[int, int, int] = (1024, 1536, 2048)  # maps of the last block, and of the two convolutions after it
    classes: int = 1000
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool) -> jax.Array:
        maps = min(*self.stem, *self.entry, *self.exit)
        require_positive({"a number of maps": maps, "stride": self.stride, "classes": self.classes})
        if self.middle < 0:
            raise InputError(f"middle is {self.middle}, expected a number of blocks, 0 or more; give 0 for none")
        require_image(self, image, self.stride * 2 ** (len(self.entry) + 1))

        def block(x: jax.Array, maps: tuple[int, ...], name: str, pooled: bool, activated: bool = True) -> jax.Array:
            return Block(maps, pooled, activated, self.activation, self.dtype, name=name)(x, train)

        x = conv(self.stem[0], 3, self.stride, dtype=self.dtype, name="stem_conv")(image)
        x = self.activation(batch_norm(train, dtype=self.dtype)(x))
        x = self.activation(batch_norm(train, dtype=self.dtype)(conv(self.stem[1], 3, dtype=self.dtype)(x)))
        for i, maps in enumerate(self.entry):
            x = block(x, (maps, maps), f"entry_{i}", pooled=True, activated=i > 0)
        for i in range(self.middle):
            x = block(x, (x.shape[-1],) * 3, f"middle_{i}", pooled=False)
        x = block(x, (x.shape[-1], self.exit[0]), "exit", pooled=True)
        for maps in self.exit[1:]:
            x = self.activation(SeparableConv(maps, self.dtype)(x, train))
        return nn.Dense(self.classes, dtype=self.dtype)(x.mean((1, 2))).astype(jnp.float32)


SmallXception = functools.partial(
    Xception, stem=(16, 32), stride=1, entry=(64, 128), middle=2, exit=(192, 256, 384), classes=10
)


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """A tiny instance with a batch of images, for the tests of the whole zoo."""
    image = np.random.default_rng(0).random((3, 4, 6, 2), np.float32)
    model = Xception(stem=(3, 4), stride=1, entry=(), middle=0, exit=(6, 7, 8), classes=5)
    return {"Xception": (model, {"image": image})}


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """The paper's network; its parameters stand in Table 3."""
    return {"Xception": (Xception(), {"image": jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)}, 22_855_952)}
