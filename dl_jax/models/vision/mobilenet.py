"""Networks of depthwise-separable convolutions: MobileNet v1 and v2.

Howard et al., "MobileNets: efficient convolutional neural networks for mobile vision applications", 2017
(arXiv:1704.04861), Table 1. Sandler, Howard, Zhu, Zhmoginov and Chen, "MobileNetV2: inverted residuals and linear
bottlenecks", CVPR 2018, Tables 1 and 2.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax.core.errors import require_positive, require_probability
from dl_jax.models import layers


def multiple_of_8(maps: float) -> int:
    """The multiple of 8 nearest to `maps`, from 8 on, but the next where more than a tenth would be lost."""
    nearest = max(8, int(maps + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * maps else nearest + 8


def _layer(
    x: jax.Array, maps: int, size: int, stride: int, name: str, groups: int = 1, *, train: bool, dtype: DTypeLike
) -> jax.Array:
    """A convolution with batch normalisation, within the `__call__` of a network."""
    x = layers.conv(maps, size, stride, groups=groups, dtype=dtype, name=f"{name}_conv")(x)
    return layers.batch_norm(train, dtype=dtype, name=f"{name}_norm")(x)


class MobileNetV1(nn.Module):
    """MobileNet, version 1: image [B, H, W, C] -> float32 logits [B, classes].

    A block is a depthwise 3 x 3 and a 1 x 1 convolution, each with batch normalisation and a ReLU (Figure 3, right).
    With `separable=False` it is a dense 3 x 3 convolution instead, which is "Conv MobileNet" in Table 4.

    Raises InputError for an image smaller than the strides multiplied (32 x 32 pixels in the published network) or with
    another number of channels than the parameters, and for a width, a number of maps or of classes or a stride that is
    not above 0.
    """

    stem: tuple[int, int] = (32, 2)  # maps and stride of the dense convolution that comes first
    blocks: tuple[tuple[int, int], ...] = (  # maps and stride of each
        *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
        *((512, 1),) * 5,
        *((1024, 2), (1024, 1)),
    )
    classes: int = 1000
    width: float = 1.0  # the width multiplier alpha: every layer has this share of its maps, and 8 or more
    separable: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool) -> jax.Array:
        least = {"a number in stem": min(self.stem), "a number in blocks": min(map(min, self.blocks), default=1)}
        require_positive({**least, "width": self.width, "classes": self.classes})
        layers.require_image(self, image, math.prod(stride for _, stride in (self.stem, *self.blocks)))
        layer = functools.partial(_layer, train=train, dtype=self.dtype)
        scaled = [(max(8, round(self.width * maps)), stride) for maps, stride in (self.stem, *self.blocks)]
        x = nn.relu(layer(image.astype(self.dtype), scaled[0][0], 3, scaled[0][1], "stem"))
        for i, (maps, stride) in enumerate(scaled[1:]):
            if self.separable:
                x = nn.relu(layer(x, x.shape[-1], 3, stride, f"block{i}_depthwise", groups=x.shape[-1]))
                x = nn.relu(layer(x, maps, 1, 1, f"block{i}_pointwise"))
            else:
                x = nn.relu(layer(x, maps, 3, stride, f"block{i}"))
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x.mean((1, 2))).astype(jnp.float32)


# A small one for images of 28 or 32 pixels.
SmallMobileNet = functools.partial(
    MobileNetV1, stem=(16, 1), blocks=((32, 1), (64, 2), (64, 1), (128, 2), (128, 1)), classes=10
)


class InvertedResidual(nn.Module):
    """Expansion, depthwise 3 x 3, linear projection: [B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), maps].

    The input is added where it has the shape of the output.
    """

    maps: int
    stride: int
    expansion: int  # of the number of maps, by a 1 x 1 convolution; there is none for 1
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        layer = functools.partial(_layer, train=train, dtype=self.dtype)
        y, wide = x, self.expansion * x.shape[-1]
        if self.expansion > 1:
            y = nn.relu6(layer(y, wide, 1, 1, "expand"))
        y = nn.relu6(layer(y, wide, 3, self.stride, "depthwise", groups=wide))
        y = layer(y, self.maps, 1, 1, "project")
        return x + y if self.stride == 1 and x.shape[-1] == self.maps else y


class MobileNetV2(nn.Module):
    """MobileNet, version 2: image [B, H, W, C] -> float32 logits [B, classes].

    As in torchvision, numbers of maps are rounded to multiples of 8, and dropout comes before the classifier; it uses
    the random stream "dropout".

    Raises InputError for an image smaller than the strides multiplied (32 x 32 pixels in the published network) or with
    another number of channels than the parameters, for a width, a number of maps, of blocks or of classes, an expansion
    or a stride that is not above 0, and for a dropout outside [0, 1).
    """

    groups: tuple[tuple[int, int, int, int], ...] = (  # Table 2: expansion, maps, blocks, stride of the first of them
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    last: int = 1280  # maps before the classifier, which a width below 1 leaves as they are
    classes: int = 1000
    width: float = 1.0  # the width multiplier: every layer has this share of its maps
    dropout: float = 0.2
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool) -> jax.Array:
        least = {"a number in groups": min(map(min, self.groups), default=1), "last": self.last}
        require_positive({**least, "width": self.width, "classes": self.classes})
        require_probability({"dropout": self.dropout})
        layers.require_image(self, image, 2 * math.prod(stride for *_, stride in self.groups))
        layer = functools.partial(_layer, train=train, dtype=self.dtype)
        x = nn.relu6(layer(image.astype(self.dtype), multiple_of_8(32 * self.width), 3, 2, "stem"))
        for group, (expansion, maps, blocks, stride) in enumerate(self.groups):
            for i in range(blocks):
                block = InvertedResidual(
                    multiple_of_8(maps * self.width),
                    1 if i else stride,
                    expansion,
                    self.dtype,
                    name=f"group{group}_block{i}",
                )
                x = block(x, train=train)
        x = nn.relu6(layer(x, multiple_of_8(self.last * max(1.0, self.width)), 1, 1, "last")).mean((1, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Tiny instances with a batch of inputs each, for the tests of the whole zoo."""
    image = np.random.default_rng(0).random((3, 8, 8, 3), np.float32)
    return {
        "MobileNetV1": (MobileNetV1(stem=(8, 2), blocks=((12, 2),), classes=5), {"image": image}),
        "MobileNetV2": (
            MobileNetV2(groups=((2, 8, 1, 1),), last=16, classes=5, width=0.25),
            {"image": image},
        ),
    }


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """The published instances, with the shapes of their inputs and their number of parameters.

    Version 1 has as many as timm's `mobilenetv1_100`; Table 4 of its paper gives 4.2 million, and 29.3 million for the
    dense network, whose number is our own count. The small ones are ours. Those of version 2 are of torchvision's
    `mobilenet_v2` with a `width_mult` of 1 and 1.4; Table 4 of its paper gives 3.4 and 6.9 million.
    """
    inputs = {"image": jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.dtype(jnp.float32))}
    models = {
        "MobileNetV1": (MobileNetV1(), 4_231_976),
        "ConvMobileNet": (MobileNetV1(separable=False), 29_294_088),
        "MobileNetV2": (MobileNetV2(), 3_504_872),
        "MobileNetV2_140": (MobileNetV2(width=1.4), 6_108_776),
    }
    maps = [(16, 32), (32, 64), (64, 64), (64, 128), (128, 128)]
    ends = 9 * 16 + 2 * 16 + 129 * 10  # the first convolution with its normalisation, and the linear layer
    separable = sum((9 + 2) * before + (before + 2) * after for before, after in maps)
    dense = sum((9 * before + 2) * after for before, after in maps)
    small = {"image": jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.dtype(jnp.float32))}
    return {
        **{name: (model, inputs, count) for name, (model, count) in models.items()},
        "SmallMobileNet": (SmallMobileNet(), small, ends + separable),
        "SmallConvMobileNet": (SmallMobileNet(separable=False), small, ends + dense),
    }
