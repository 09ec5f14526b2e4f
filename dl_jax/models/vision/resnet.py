"""Residual networks: those of CIFAR (20 to 110 layers) and of ImageNet (18 to 152 layers).

He, Zhang, Ren and Sun, "Deep residual learning for image recognition", CVPR 2016: Table 1 and section 4.2. The networks
for ImageNet are of version 1.5, as PyTorch has them: in a bottleneck, the 3 x 3 convolution has the stride.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax.core.errors import InputError, require_positive, require_probability
from dl_jax.models import layers, ops

Convolution = tuple[int, int, int]  # maps, size of the kernel, stride


def basic(maps: int, stride: int) -> tuple[Convolution, ...]:
    """The convolutions of a block of two layers (Figure 5, left)."""
    return (maps, 3, stride), (maps, 3, 1)


def bottleneck(maps: int, stride: int) -> tuple[Convolution, ...]:
    """The convolutions of a block of three layers, which returns 4 * `maps` maps (Figure 5, right; version 1.5)."""
    return (maps, 1, 1), (maps, 3, stride), (4 * maps, 1, 1)


class Block(nn.Module):
    """A residual block, f(x + F(x)): [B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), maps].

    F is a sequence of convolutions, each with batch normalisation, and f the activation. Where F changes the number of
    maps or has a stride, x is replaced by a projection, a strided 1 x 1 convolution with batch normalisation (the
    paper's option B), or else by its strided pixels with maps of zeros on both sides (option A).
    """

    convolutions: tuple[Convolution, ...]
    projection: bool
    residual: bool
    zero_scale: bool
    drop_path: float  # probability that an example skips F in training
    activation: Callable[[jax.Array], jax.Array]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y, last = x, len(self.convolutions)
        for i, (maps, size, stride) in enumerate(self.convolutions, 1):
            y = layers.conv(maps, size, stride, dtype=self.dtype, name=f"conv{i}")(y if i == 1 else self.activation(y))
            scale_init = nn.initializers.zeros if self.zero_scale and i == last else nn.initializers.ones
            y = layers.batch_norm(train, scale_init=scale_init, dtype=self.dtype, name=f"norm{i}")(y)
        if self.residual:
            y = nn.Dropout(self.drop_path, broadcast_dims=(1, 2, 3), deterministic=not train)(y)
            y = y + self.shortcut(x, y.shape[-1], train)
        return self.activation(y)

    def shortcut(self, x: jax.Array, maps: int, train: bool) -> jax.Array:
        """x [B, H, W, C], in the shape of F(x)."""
        stride = max(stride for *_, stride in self.convolutions)
        if x.shape[-1] == maps and stride == 1:
            return x
        if self.projection:
            x = layers.conv(maps, 1, stride, dtype=self.dtype, name="conv_shortcut")(x)
            return layers.batch_norm(train, dtype=self.dtype, name="norm_shortcut")(x)
        new = maps - x.shape[-1]
        return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))


class Residual(nn.Module, kw_only=True):
    """What the networks for CIFAR and ImageNet have in common. Drop-path uses the random stream "dropout"."""

    zero_scale: bool = False  # the last scale of each block starts at zero, and the block as the identity
    drop_path: float = 0.0  # probability that an example skips the last block in training
    normalise: Callable[[jax.Array], jax.Array] = lambda image: image  # of the image, such as `layers.Normalise`
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dtype: DTypeLike = jnp.float32

    def stem(self, image: jax.Array, maps: int, size: int, stride: int, train: bool) -> jax.Array:
        """The first convolution: [B, H, W, C] -> [B, H / stride, W / stride, maps]."""
        require_probability({"drop_path": self.drop_path})
        image = self.normalise(image).astype(self.dtype)
        x = layers.conv(maps, size, stride, dtype=self.dtype, name="stem_conv")(image)
        return self.activation(layers.batch_norm(train, dtype=self.dtype, name="stem_norm")(x))

    def stages(
        self,
        x: jax.Array,  # [B, H, W, width]
        blocks: tuple[int, ...],  # of each stage
        convolutions: Callable[[int, int], tuple[Convolution, ...]],  # of a block, from maps and stride
        *,
        projection: bool,
        residual: bool,
        train: bool,
    ) -> jax.Array:
        """The blocks of a network. Each stage but the first halves the image and doubles the maps.

        The probability of skipping a block grows linearly over the blocks, to `drop_path` at the last: Huang, Sun, Liu,
        Sedra and Weinberger, "Deep networks with stochastic depth", ECCV 2016, equation 4. Here each example skips on
        its own, and F(x) is divided by the probability of its being kept, so that nothing changes in evaluation.
        """
        width, done = x.shape[-1], 0
        for stage, count in enumerate(blocks):
            for i in range(count):
                done += 1
                block = Block(
                    convolutions(width * 2**stage, 2 if stage and i == 0 else 1),
                    projection=projection,
                    residual=residual,
                    zero_scale=self.zero_scale,
                    drop_path=self.drop_path * done / sum(blocks),
                    activation=self.activation,
                    dtype=self.dtype,
                    name=f"stage{stage + 1}_block{i}",
                )
                x = block(x, train=train)
        return x

    def head(self, x: jax.Array, classes: int) -> jax.Array:
        """The mean over the pixels and a linear layer: [B, H, W, C] -> float32 [B, classes]."""
        return nn.Dense(classes, dtype=self.dtype, name="head")(x.mean((1, 2))).astype(jnp.float32)


class CifarResNet(Residual):
    """The ResNet of CIFAR with 6 n + 2 layers: image [B, H, W, C] -> float32 logits [B, classes].

    `residual=False` leaves out the shortcuts, which is the paper's plain network. Shortcuts have no parameters
    (option A).

    Raises InputError for a depth that is not 6 n + 2, for an image smaller than 4 x 4 pixels or with another number of
    channels than the parameters, for `drop_path` outside [0, 1), and for `drop_path` or `zero_scale` without
    shortcuts.
    """

    depth: int = 20
    classes: int = 10
    width: int = 16  # maps of the first stage
    residual: bool = True

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool) -> jax.Array:
        blocks, rest = divmod(self.depth - 2, 6)
        if rest or blocks < 1:
            raise InputError(f"depth is {self.depth}, expected 6 n + 2; give 20, 32, 44, 56 or 110")
        require_positive({"width": self.width, "classes": self.classes})
        if not self.residual and (self.drop_path or self.zero_scale):
            raise InputError("drop_path and zero_scale need shortcuts; leave them out or set residual")
        layers.require_image(self, image, 4)
        x = self.stem(image, self.width, 3, 1, train)
        x = self.stages(x, (blocks,) * 3, basic, projection=False, residual=self.residual, train=train)
        return self.head(x, self.classes)  # of [B, H / 4, W / 4, 4 * width]


class ResNet(Residual):
    """The ResNet of ImageNet, version 1.5: image [B, H, W, C] -> float32 logits [B, classes].

    The fields default to ResNet-50.

    Raises InputError for an image smaller than the strides multiplied (32 x 32 pixels for four stages) or with another
    number of channels than the parameters, and for `drop_path` outside [0, 1).
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)  # of each stage
    convolutions: Callable[[int, int], tuple[Convolution, ...]] = bottleneck  # of a block, from maps and stride
    classes: int = 1000
    width: int = 64  # maps of the first stage

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool) -> jax.Array:
        require_positive({"blocks": min(self.blocks, default=0), "width": self.width, "classes": self.classes})
        layers.require_image(self, image, 2 ** (len(self.blocks) + 1))
        x = ops.max_pool(self.stem(image, self.width, 7, 2, train), 3, 2, 1)  # [B, H / 4, W / 4, width]
        x = self.stages(x, self.blocks, self.convolutions, projection=True, residual=True, train=train)
        return self.head(x, self.classes)  # of [B, H / 32, W / 32, C]


ResNet18 = functools.partial(ResNet, (2, 2, 2, 2), basic)
ResNet34 = functools.partial(ResNet, (3, 4, 6, 3), basic)
ResNet50 = functools.partial(ResNet, (3, 4, 6, 3), bottleneck)
ResNet101 = functools.partial(ResNet, (3, 4, 23, 3), bottleneck)
ResNet152 = functools.partial(ResNet, (3, 8, 36, 3), bottleneck)


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Tiny instances with a batch of inputs each, for the tests of the whole zoo."""
    image = np.random.default_rng(0).random((3, 8, 8, 3), np.float32)
    return {
        "CifarResNet": (CifarResNet(depth=8, classes=5, width=4), {"image": image}),
        "ResNet": (ResNet(blocks=(1,), classes=5, width=4), {"image": image}),
    }


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """The published instances, with the shapes of their inputs and their number of parameters.

    The numbers for CIFAR are our own count; Table 6 of the paper rounds them to 0.27, 0.46, 0.66, 0.85 and 1.7 million.
    Those for ImageNet are of torchvision's `resnet18` to `resnet152`.
    """
    small, large = ({"image": jax.ShapeDtypeStruct((1, size, size, 3), jnp.dtype(jnp.float32))} for size in (32, 224))
    return {
        "ResNet20": (CifarResNet(20), small, 269_722),
        "ResNet32": (CifarResNet(32), small, 464_154),
        "ResNet44": (CifarResNet(44), small, 658_586),
        "ResNet56": (CifarResNet(56), small, 853_018),
        "ResNet110": (CifarResNet(110), small, 1_727_962),
        "ResNet18": (ResNet18(), large, 11_689_512),
        "ResNet34": (ResNet34(), large, 21_797_672),
        "ResNet50": (ResNet50(), large, 25_557_032),
        "ResNet101": (ResNet101(), large, 44_549_160),
        "ResNet152": (ResNet152(), large, 60_192_808),
    }
