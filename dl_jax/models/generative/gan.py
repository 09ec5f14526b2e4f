"""The generator and the discriminator of the original generative adversarial nets, for grey images.

Goodfellow, Pouget-Abadie, Mirza, Xu, Warde-Farley, Ozair, Courville and Bengio, "Generative Adversarial Nets",
NIPS 2014, section 5 and the authors' code. Kernels are initialised uniformly in [-spread, spread], biases at zero.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax.core.errors import require_positive, require_probability
from dl_jax.models import ops
from dl_jax.models.layers import require_values


def symmetric(spread: float) -> Callable[..., jax.Array]:
    """An initialiser (key, shape, dtype) -> array that draws uniformly from [-spread, spread]."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -spread, spread)


class Generator(nn.Module):
    """ReLU layers and a sigmoid output layer that map noise [B, Z] to images [B, H, W, C] with pixels in [0, 1].

    `output_bias` initialises the bias of the output layer, for example to the logits of the mean image. Raises
    InputError for a layer without units.
    """

    hidden: tuple[int, ...] = (1200, 1200)
    shape: tuple[int, int, int] = (28, 28, 1)  # of an image: height, width, channels
    spread: float = 0.05
    output_bias: Callable[..., jax.Array] = nn.initializers.zeros
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, noise: jax.Array, *, train: bool) -> jax.Array:
        require_positive({"hidden": min(self.hidden, default=1)})
        x, init = noise, symmetric(self.spread)
        for units in self.hidden:
            x = nn.relu(nn.Dense(units, kernel_init=init, dtype=self.dtype)(x))
        x = nn.Dense(math.prod(self.shape), kernel_init=init, bias_init=self.output_bias, dtype=self.dtype)(x)
        return nn.sigmoid(x.astype(jnp.float32)).reshape(-1, *self.shape)


class Discriminator(nn.Module):
    """Maxout layers (Goodfellow et al. 2013), in which a unit is the maximum of `pieces` linear functions.

    Takes images [B, H, W, C] and returns the logits [B] that each is a real image. In training, `dropout` is the
    probability that a hidden unit is dropped and `input_dropout` the probability that a pixel is; both use the random
    stream "dropout". Raises InputError for a probability outside [0, 1), a layer without units, `pieces` < 1, and
    images of another size than the parameters.
    """

    hidden: tuple[int, ...] = (240, 240)
    pieces: int = 5
    dropout: float = 0.5
    input_dropout: float = 0.2
    spread: float = 0.005
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool) -> jax.Array:
        require_positive({"hidden": min(self.hidden, default=1), "pieces": self.pieces})
        require_probability({"dropout": self.dropout, "input_dropout": self.input_dropout})
        require_values(self, image, ("Dense_0",))
        init = symmetric(self.spread)
        x = image.reshape(image.shape[0], -1)  # [B, H * W * C]
        x = nn.Dropout(self.input_dropout, deterministic=not train)(x)
        for units in self.hidden:
            x = nn.Dense(units * self.pieces, kernel_init=init, dtype=self.dtype)(x)
            x = ops.max_over(x.reshape(-1, units, self.pieces), -1)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(1, kernel_init=init, dtype=self.dtype)(x)[:, 0].astype(jnp.float32)


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Tiny instances with a batch of inputs each, for the tests of the whole zoo."""
    rng = np.random.default_rng(0)
    noise, image = rng.normal(size=(3, 6)).astype(np.float32), rng.random((3, 8, 8, 1), np.float32)
    return {
        "Generator": (Generator(hidden=(16, 12), shape=(8, 8, 1), spread=0.3), {"noise": noise}),
        "Discriminator": (Discriminator(hidden=(12, 8), pieces=3, spread=0.3), {"image": image}),
    }


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """The networks of the authors' code for MNIST, whose layers' sizes give their numbers of parameters."""
    noise, image = jax.ShapeDtypeStruct((1, 100), jnp.float32), jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    pieces = 5 * 240  # linear functions of a maxout layer
    return {
        "Generator": (Generator(), {"noise": noise}, 101 * 1200 + 1201 * 1200 + 1201 * 784),
        "Discriminator": (Discriminator(), {"image": image}, 785 * pieces + 241 * pieces + 241),
    }
