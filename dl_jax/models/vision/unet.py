"""The U-Net, which labels every pixel of an image.

Ronneberger, Fischer and Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015, figure 1.
Convolutions are padded, so that logits have the size of the image; the paper's lose two pixels each, and it crops the
maps that skip a level and labels the middle of the image. The parameters are the same.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax.core.errors import InputError, require_positive
from dl_jax.models import ops
from dl_jax.models.layers import dense, require_image
from dl_jax.models.products import matrix_product

he_fan_in = nn.initializers.variance_scaling(2.0, "fan_in", "normal")  # the paper's sqrt(2 / N), section 3


class UpConv(nn.Module):
    """A transposed convolution 2x2 with stride 2: [B, H, W, C] -> [B, 2 H, 2 W, maps].

    The windows do not overlap, so it is one matrix product to the four pixels of each window. A forward and backward
    pass on one core of a CPU is 6 to 16 times faster than that of `nn.ConvTranspose`, a forward pass 1.1 to 1.8 times.
    """

    maps: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (2, 2, channels, self.maps))
        bias = self.param("bias", nn.initializers.zeros, (self.maps,))
        kernel = kernel.astype(self.dtype).transpose(2, 0, 1, 3).reshape(channels, 4 * self.maps)
        x = matrix_product(x.astype(self.dtype), kernel).reshape(batch, height, width, 2, 2, self.maps)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * height, 2 * width, self.maps)
        return x + bias.astype(self.dtype)


class Convolutions(nn.Module):
    """Two 3x3 convolutions, each followed by `activation`: [B, H, W, C] -> [B, H, W, maps].

    With a `condition` [B, D], a linear function of it is added to the maps of the first one.
    """

    maps: int
    activation: Callable[[jax.Array], jax.Array]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array | None) -> jax.Array:
        for i in range(2):
            convolve = ops.conv_general_dilated
            layer = nn.Conv(self.maps, (3, 3), kernel_init=he_fan_in, dtype=self.dtype, conv_general_dilated=convolve)
            x = layer(x)
            if condition is not None and i == 0:
                x += nn.Dense(self.maps, dtype=self.dtype, name="condition")(condition)[:, None, None]
            x = self.activation(x)
        return x


class UNet(nn.Module):
    """A contracting and an expanding path: image [B, H, W, C] -> float32 logits of each pixel, [B, H, W, classes].

    `maps` has the number of maps at each level, from the whole image to the smallest; each level halves the height and
    the width. The paper's network has 31,030,658 parameters for grey images and two classes. All levels may depend on
    a `condition` [B, D] of each image, such as the time of a diffusion.

    Raises InputError for an image whose sides 2 to the power of `len(maps) - 1` does not divide, for another
    number of channels than the parameters, and for a level without maps.
    """

    maps: tuple[int, ...] = (64, 128, 256, 512, 1024)
    classes: int = 2
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, condition: jax.Array | None = None, *, train: bool) -> jax.Array:
        require_positive({"maps": min(self.maps, default=0), "classes": self.classes})
        factor = 2 ** (len(self.maps) - 1)
        require_image(self, image, factor, ("down_0", "Conv_0"))
        if image.shape[1] % factor or image.shape[2] % factor:
            raise InputError(
                f"image of {image.shape[1]} x {image.shape[2]} pixels, expected sides that {factor} divides, as UNet "
                f"halves them {len(self.maps) - 1} times; pad it, or give fewer maps"
            )
        skips, x = [], image
        for level, maps in enumerate(self.maps):
            x = ops.max_pool(x, 2) if level else x
            x = Convolutions(maps, self.activation, self.dtype, name=f"down_{level}")(x, condition)
            skips.append(x)  # [B, H / 2^level, W / 2^level, maps]
        for level in reversed(range(len(self.maps) - 1)):
            x = UpConv(self.maps[level], self.dtype, name=f"up_conv_{level}")(x)
            x = jnp.concatenate([skips[level], x], -1)
            x = Convolutions(self.maps[level], self.activation, self.dtype, name=f"up_{level}")(x, condition)
        return dense(self.classes, dtype=self.dtype, name="logits")(x).astype(jnp.float32)


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """A tiny instance with a batch of images, for the tests of the whole zoo."""
    image = np.random.default_rng(0).random((3, 4, 6, 1), np.float32)
    return {"UNet": (UNet((3, 4)), {"image": image})}


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """The paper's network, with the parameters of github.com/jakeret/tf_unet for 5 layers, 64 features and 2 classes.

    The common 31,031,685 belongs to a Keras version with one more convolution, to one class.
    """
    return {"UNet": (UNet(), {"image": jax.ShapeDtypeStruct((1, 512, 512, 1), jnp.float32)}, 31_030_658)}
