"""A small detector of objects: maps of their centres, sizes and offsets, at a quarter of the image's resolution.

The outputs are those of CenterNet (Zhou, Wang and Krähenbühl 2019, "Objects as points", arXiv:1904.07850, section 3),
whose networks are larger. Between them and the image stand residual blocks on a contracting path and, as in a U-Net, an
expanding one that joins the maps of each level.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax.core.errors import InputError, require_positive
from dl_jax.models import layers
from dl_jax.models.layers import dense
from dl_jax.models.vision.resnet import Block, basic
from dl_jax.models.vision.unet import UpConv

STRIDE = 4  # pixels of a cell's side
PRIOR = 0.1  # the heat with which training begins, as in CenterNet's code


class HeatMapDetector(nn.Module):
    """Image [B, H, W, C] -> {"heat": logits [B, H / 4, W / 4, classes], "size" and "offset": [B, H / 4, W / 4, 2]}.

    All are float32. `detect.targets` says what they mean, with the heat as σ(logits). `maps` has the number of maps at
    a quarter, an eighth, .. of the resolution; there are half as many of the first at a half of it.

    Raises InputError for an image whose sides 4 does not divide, or with another number of channels than the
    parameters, and for fewer than one level, map or class, or two maps at a quarter.
    """

    classes: int
    maps: tuple[int, ...] = (32, 64, 128)
    head: int = 64  # maps of the hidden layer of each output
    normalise: Callable[[jax.Array], jax.Array] = lambda image: image  # of the image, such as `layers.Normalise`
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        first = self.maps[0] // 2 if self.maps else 0
        require_positive({"maps": min((first, *self.maps)), "classes": self.classes, "head": self.head})
        layers.require_image(self, image, STRIDE)
        if image.shape[1] % STRIDE or image.shape[2] % STRIDE:
            raise InputError(
                f"image of {image.shape[1]} x {image.shape[2]} pixels, expected sides that {STRIDE} divides; resize or "
                "pad it"
            )
        x = self.normalise(image).astype(self.dtype)
        x = layers.conv(first, 3, 2, dtype=self.dtype, name="stem_conv")(x)
        x = self.activation(layers.batch_norm(train, dtype=self.dtype, name="stem_norm")(x))
        levels = []
        for level, maps in enumerate(self.maps):
            x = self.block(maps, 2, f"down_{level}")(x, train=train)  # [B, H / 2^(level + 2), .., maps], rounded up
            levels.append(x)
        for level in reversed(range(len(levels) - 1)):
            _, height, width, maps = levels[level].shape
            x = UpConv(maps, self.dtype, name=f"up_conv_{level}")(x)[:, :height, :width]
            x = self.block(maps, 1, f"up_{level}")(jnp.concatenate([levels[level], x], -1), train=train)
        return {
            "heat": self.output(x, "heat", self.classes, float(np.log(PRIOR / (1 - PRIOR)))),
            "size": self.output(x, "size", 2, 0.0),
            "offset": self.output(x, "offset", 2, 0.5),
        }

    def block(self, maps: int, stride: int, name: str) -> Block:
        return Block(
            basic(maps, stride),
            projection=True,
            residual=True,
            zero_scale=False,
            drop_path=0.0,
            activation=self.activation,
            dtype=self.dtype,
            name=name,
        )

    def output(self, x: jax.Array, name: str, maps: int, start: float) -> jax.Array:
        """A layer of 3x3 pixels and one of single pixels: [B, H, W, C] -> float32 [B, H, W, maps]."""
        x = self.activation(layers.conv(self.head, 3, dtype=self.dtype, name=f"{name}_conv")(x))
        bias = nn.initializers.constant(start)
        return dense(maps, bias_init=bias, dtype=self.dtype, name=name)(x).astype(jnp.float32)


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """A tiny instance with a batch of images, for the tests of the whole zoo. Its levels have 1x3 and 1x2 cells."""
    image = np.random.default_rng(0).random((3, 4, 12, 1), np.float32)
    return {"HeatMapDetector": (HeatMapDetector(3, (8, 6), head=4), {"image": image})}


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """The instance with the default sizes, for three classes and colour images; its parameters by hand.

    A 3x3 convolution of a to b maps has 9 a b, a projection a b, and a normalisation 2 b. So the stem has 432 + 32; the
    contracting blocks of 16 to 32, 32 to 64 and 64 to 128 maps have 9 (a b + b b) + a b + 6 b, which is 14,528, 57,728
    and 230,144; the transposed convolutions 4 a b + b, 32,832 and 8,224; the expanding blocks, of 128 to 64 and 64 to
    32 maps, 119,168 and 29,888; and the outputs 3 * 9 * 32 * 64 + 64 * 7 + 7, 55,751.
    """
    image = jax.ShapeDtypeStruct((1, 120, 160, 3), jnp.float32)
    return {"HeatMapDetector": (HeatMapDetector(3), {"image": image}, 548_727)}
