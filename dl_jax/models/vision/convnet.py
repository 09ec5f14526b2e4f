"""The plain convolutional network of textbooks: five convolutions, two poolings and three dense layers."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax.core.errors import require_positive
from dl_jax.models import ops
from dl_jax.models.layers import require_image

SIZES = (5, 5, 3, 3, 3)  # of the kernels
POOLED = (1, 4)  # the convolutions that a pooling follows


class ConvNet(nn.Module):
    """Convolutions 5x5, 5x5, pooling, 3x3, 3x3, 3x3, pooling, and dense layers: image [B, H, W, C] -> [B, classes].

    Every layer but the last is followed by `activation`. The logits are float32. Convolutions keep the height and the
    width, and each pooling halves them. Kernels are drawn with variance 2 / fan-in (He et al. 2015). There are 538,154
    parameters for grey images of 28 x 28 pixels and 10 classes.

    Raises InputError for an image below 4 x 4 pixels or with other channels than the parameters have, and for a layer
    without units.
    """

    maps: tuple[int, int, int, int, int] = (32, 32, 64, 64, 64)  # of each convolution
    hidden: tuple[int, int] = (128, 128)  # units of the first two dense layers
    classes: int = 10
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool) -> jax.Array:
        require_positive({"maps": min(self.maps), "hidden": min(self.hidden), "classes": self.classes})
        require_image(self, image, 4)
        init, x = nn.initializers.variance_scaling(2.0, "fan_in", "normal"), image
        for i, (maps, size) in enumerate(zip(self.maps, SIZES, strict=True)):
            convolution = nn.Conv(
                maps,
                (size, size),
                kernel_init=init,
                dtype=self.dtype,
                conv_general_dilated=ops.conv_general_dilated,
                name=f"conv_{i}" if i else "stem_conv",
            )
            x = self.activation(convolution(x))
            if i in POOLED:
                x = ops.max_pool(x, 2)
        x = x.reshape(x.shape[0], -1)  # [B, H / 4 * W / 4 * maps]
        for units in self.hidden:
            x = self.activation(nn.Dense(units, kernel_init=init, dtype=self.dtype)(x))
        return nn.Dense(self.classes, dtype=self.dtype)(x).astype(jnp.float32)


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """A tiny instance with a batch of images, for the tests of the whole zoo."""
    image = np.random.default_rng(0).random((3, 8, 12, 2), np.float32)
    return {"ConvNet": (ConvNet((4, 4, 5, 5, 6), (8, 7), classes=5, activation=nn.gelu), {"image": image})}


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """The instance of the benchmark, whose parameters the layers' sizes give: no paper has this network."""
    image = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    convolutions = 26 * 32 + (25 * 32 + 1) * 32 + (9 * 32 + 1) * 64 + 2 * (9 * 64 + 1) * 64
    return {"ConvNet": (ConvNet(), {"image": image}, convolutions + (7 * 7 * 64 + 1) * 128 + 129 * 128 + 129 * 10)}
