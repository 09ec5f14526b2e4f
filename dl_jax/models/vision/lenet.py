"""The LeNets: LeNet-5 as published, its Caffe variants and LeNet-300-100.

LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition", Proceedings of the IEEE
86(11), 1998, section II. The Caffe variant and LeNet-300-100 are the networks of the pruning papers: Han, Pool, Tran
and Dally, "Learning both weights and connections for efficient neural networks", NIPS 2015, section 4.1.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax.core.errors import InputError, require_positive
from dl_jax.core.leaves import at_least_float32
from dl_jax.losses import require_labels
from dl_jax.losses.inputs import class_numbers
from dl_jax.models import layers, ops
from dl_jax.models.vision.mlp import MLP

# Table I: for each of the 16 maps of C3, the maps of S2 that it is connected to.
C3_INPUTS = (
    *((0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5)),
    *((0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5)),
    *((0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5)),
    (0, 1, 2, 3, 4, 5),
)

# The digits 0 to 9 as 7 x 12 pixels, as they are commonly read from Figure 3 (the paper prints no numbers). "#" is ink
# (+1), "." is paper (-1).
DIGITS = """
.#####. ...##.. .#####. ####### .#####. .#####. ..####. ####### .#####. .#####.
....... ..###.. ....... .....## ....... ....... .##.... .....## ##...## ##..###
..###.. .####.. .#####. ....##. ....... ####### ##..... .....## ##...## ##...##
.##.##. ...##.. ##...## ...##.. .##..## ##..... ##..... ....##. ##...## ##...##
##...## ...##.. #....## ..####. .##..## ##..... ######. ...##.. .#####. ##..###
##...## ...##.. ....##. .....## ###..## .####.. ###..## ...##.. ##...## .######
##...## ...##.. ..###.. .....## ##...## ..####. ##...## ..##... ##...## .....##
##...## ...##.. .##.... .....## ##...## .....## ##...## ..##... ##...## .....##
.##.##. ...##.. ##..... ##...## ##..### ##...## ###..## ..##... ##...## ....##.
..###.. .###### ####### .#####. .###### .#####. .#####. ..##... .#####. .####..
....... ....... ....... ....... .....## ....... ....... ....... ....... .......
....... ....... ....... ....... .....## ....... ....... ....... ....... .......
"""


def digit_codes() -> np.ndarray:
    """The target of the layer F6 for each digit, [10, 84] in {-1, +1}: the pixels of `DIGITS`, row by row."""
    columns = zip(*(line.split() for line in DIGITS.strip().splitlines()), strict=True)
    return np.array([[1.0 if pixel == "#" else -1.0 for pixel in "".join(rows)] for rows in columns], np.float32)


def squash(x: jax.Array) -> jax.Array:
    """The paper's sigmoid f(a) = A tanh(S a), with f(1) = 1 and f(-1) = -1 (equation 6 and appendix A)."""
    return 1.7159 * jnp.tanh(2 / 3 * x)


def fan_in_uniform(fan_in: int | np.ndarray) -> nn.initializers.Initializer:
    """An initialiser that draws uniformly from [-2.4 / F, 2.4 / F], where F is the fan-in of the unit (appendix A)."""

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -2.4, 2.4) / fan_in

    return init


class Subsampling(nn.Module):
    """The layers S2 and S4: sums of 2 x 2 inputs, times a trainable scale, plus a trainable bias, for each map.

    Takes [B, H, W, C] and returns [B, H / 2, W / 2, C].
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        maps = image.shape[-1]
        scale = self.param("scale", fan_in_uniform(4), (maps,))
        bias = self.param("bias", nn.initializers.zeros, (maps,))
        return ops.sum_pool(image, 2) * scale.astype(self.dtype) + bias.astype(self.dtype)


class TableConv(nn.Module):
    """The layer C3: a 5 x 5 convolution in which each output map is connected to some of the input maps only.

    `inputs` lists the input maps of each output map. The parameter `kernel` holds one 5 x 5 kernel per connection,
    [5, 5, 60] in the order of `inputs`. Takes [B, H, W, C] and returns [B, H - 4, W - 4, len(inputs)].
    """

    inputs: tuple[tuple[int, ...], ...]
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        maps_in, maps_out = image.shape[-1], len(self.inputs)
        slots = np.array([i * maps_out + o for o, sources in enumerate(self.inputs) for i in sources])
        fan_in = np.array([25 * len(sources) for sources in self.inputs for _ in sources])
        kernel = self.param("kernel", fan_in_uniform(fan_in), (5, 5, len(slots)))
        bias = self.param("bias", nn.initializers.zeros, (maps_out,))
        place = np.eye(maps_in * maps_out, dtype=np.float32)[slots]  # one-hot rows: the product copies each kernel
        dense = jnp.matmul(kernel, place, precision="highest").reshape(5, 5, maps_in, maps_out).astype(self.dtype)
        image = ops.conv_general_dilated(image, dense, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return image + bias.astype(self.dtype)


class LeNet5(nn.Module):
    """LeNet-5 as published, with 60,000 parameters: image [B, 28, 28, 1] or [B, 32, 32, 1] -> logits [B, 10].

    Intensities from 0 (background) to 1 (ink) are mapped to the paper's levels, -0.1 to 1.175, and an image of 28
    pixels is padded with two pixels of background on each side. Every layer up to F6, including the subsampling layers,
    is followed by `squash`. A logit is minus the squared Euclidean distance between the output of F6 and the fixed code
    of the class (equation 7). Weights are initialised as in appendix A, biases at zero.

    Raises InputError for another image shape, and for `classes` other than 10, as only digits have codes here.
    """

    classes: int = 10
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool) -> jax.Array:
        if self.classes != 10:
            raise InputError(f"LeNet5 has output codes for 10 digits, not {self.classes} classes; use LeNetCaffe")
        if image.shape[1:] not in ((28, 28, 1), (32, 32, 1)):
            raise InputError(
                f"LeNet5 takes images of shape (28, 28, 1) or (32, 32, 1), not {image.shape[1:]}; resize them first"
            )
        border = (32 - image.shape[1]) // 2
        x = jnp.pad(image, ((0, 0), (border, border), (border, border), (0, 0)))
        x = (1.275 * x - 0.1).astype(self.dtype)  # [B, 32, 32, 1]
        c1 = nn.Conv(
            features=6,
            kernel_size=(5, 5),
            padding="VALID",
            dtype=self.dtype,
            kernel_init=fan_in_uniform(25),
            conv_general_dilated=ops.conv_general_dilated,
            name="C1",
        )
        x = squash(c1(x))  # [B, 28, 28, 6]
        x = squash(Subsampling(self.dtype, name="S2")(x))  # [B, 14, 14, 6]
        x = squash(TableConv(C3_INPUTS, self.dtype, name="C3")(x))  # [B, 10, 10, 16]
        x = squash(Subsampling(self.dtype, name="S4")(x))  # [B, 5, 5, 16]
        x = x.reshape(x.shape[0], 400)  # C5's 5 x 5 kernels cover the whole of S4, so C5 is a dense layer
        x = squash(nn.Dense(120, dtype=self.dtype, kernel_init=fan_in_uniform(400), name="C5")(x))
        x = squash(nn.Dense(84, dtype=self.dtype, kernel_init=fan_in_uniform(120), name="F6")(x))
        return -((x.astype(jnp.float32)[:, None] - digit_codes()) ** 2).sum(-1)


def map_loss(logits: jax.Array, labels: jax.Array, rubbish: float) -> jax.Array:
    """The paper's discriminative criterion (equation 9): y_D + log(exp(-j) + sum_i exp(-y_i)) for y = -logits.

    Takes logits [B, classes] and int labels [B], and returns losses [B] in float32 or better, NaN where a label is
    outside [0, classes). `rubbish` is the paper's constant j > 0, the penalty of a class for images of no digit: it
    keeps penalties that are already large from growing further. The paper gives no value for it. Raises InputError
    where shapes or dtypes do not fit.
    """
    require_labels("map_loss", logits, labels)
    logits, labels = at_least_float32(logits), class_numbers(labels, logits.shape[-1])
    others = jnp.concatenate([logits, jnp.full_like(logits[:, :1], -rubbish)], -1)
    return jax.nn.logsumexp(others, -1) - jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]


class LeNetCaffe(nn.Module):
    """LeNet-5 as Caffe ships it, 20C5-MP2-50C5-MP2-500-10: image [B, H, W, C] -> logits [B, classes].

    Only the hidden dense layer has a ReLU. There are 431,080 parameters for images of 28 x 28 pixels and 10 classes.
    Kernels are initialised uniformly in ±sqrt(3 / fan-in), Caffe's "xavier".

    Raises InputError for an image smaller than 16 x 16 pixels or with other channels or another size than the
    parameters are for, and for a layer without units.
    """

    classes: int = 10
    maps: tuple[int, int] = (20, 50)  # of each convolution
    hidden: int = 500  # units of the hidden dense layer
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool) -> jax.Array:
        require_positive({"maps": min(self.maps), "hidden": self.hidden, "classes": self.classes})
        layers.require_image(self, image, 16, ("Conv_0",))
        init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
        conv = functools.partial(
            nn.Conv,
            kernel_size=(5, 5),
            padding="VALID",
            dtype=self.dtype,
            kernel_init=init,
            conv_general_dilated=ops.conv_general_dilated,
        )
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=init)
        x = ops.max_pool(conv(self.maps[0])(image), 2)  # [B, 12, 12, maps] of 28 x 28 pixels
        x = ops.max_pool(conv(self.maps[1])(x), 2)  # [B, 4, 4, maps]
        layers.require_values(self, x, ("Dense_0",))
        x = nn.relu(dense(self.hidden)(x.reshape(x.shape[0], -1)))
        return dense(self.classes)(x).astype(jnp.float32)


class NormalisedLeNet(nn.Module):
    """The LeNet of Li and Liu 2016 (arXiv:1605.04711), 32C5-MP2-64C5-MP2-512FC: image [B, H, W, C] -> [B, classes].

    Each convolution and the hidden dense layer are followed by batch normalisation and a ReLU, and have no bias.
    Convolutions are not padded. Kernels are initialised as those of `LeNetCaffe`. There are 582,634 parameters for grey
    images of 28 x 28 pixels and 10 classes.

    Raises InputError as `LeNetCaffe` does, and for a layer without units.
    """

    maps: tuple[int, int] = (32, 64)  # of each convolution
    hidden: int = 512  # units of the hidden dense layer
    classes: int = 10
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool) -> jax.Array:
        require_positive({"maps": min(self.maps), "hidden": self.hidden, "classes": self.classes})
        layers.require_image(self, image, 16, ("Conv_0",))
        init, x = nn.initializers.variance_scaling(1.0, "fan_in", "uniform"), image
        for maps in self.maps:
            conv = nn.Conv(
                maps,
                (5, 5),
                padding="VALID",
                use_bias=False,
                kernel_init=init,
                dtype=self.dtype,
                conv_general_dilated=ops.conv_general_dilated,
            )
            x = ops.max_pool(nn.relu(layers.batch_norm(train, dtype=self.dtype)(conv(x))), 2)  # [B, (H - 4) / 2, ...]
        layers.require_values(self, x, ("Dense_0",))
        x = nn.Dense(self.hidden, use_bias=False, kernel_init=init, dtype=self.dtype)(x.reshape(x.shape[0], -1))
        x = nn.relu(layers.batch_norm(train, dtype=self.dtype)(x))
        return nn.Dense(self.classes, kernel_init=init, dtype=self.dtype)(x).astype(jnp.float32)


LeNet300 = functools.partial(MLP, hidden=(300, 100))  # LeNet-300-100: 266,610 parameters for 28 x 28 pixels


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Tiny instances with a batch of inputs each, for the tests of the whole zoo."""
    image = np.random.default_rng(0).random((3, 28, 28, 1), np.float32)
    models = {
        "LeNet5": LeNet5(),
        "LeNetCaffe": LeNetCaffe(),
        "NormalisedLeNet": NormalisedLeNet((4, 6), 8),
        "LeNet300": LeNet300(),
    }
    return {name: (model, {"image": image}) for name, model in models.items()}


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """The instances of the papers.

    The number of LeNet-5 is that of LeCun et al., section II.B. Those of the others are the sizes of Caffe's
    `lenet_train_test.prototxt` and of 784-300-100-10; Han et al. round them to 431 and 267 thousand (Table 1). Li and
    Liu give none: theirs follows from the layers.
    """
    image = {"image": jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)}
    return {
        "LeNet5": (LeNet5(), image, 60_000),
        "LeNetCaffe": (LeNetCaffe(), image, 431_080),
        "NormalisedLeNet": (NormalisedLeNet(), image, 25 * 32 + 64 + 800 * 64 + 128 + 1024 * 512 + 1024 + 513 * 10),
        "LeNet300": (LeNet300(), image, 266_610),
    }
