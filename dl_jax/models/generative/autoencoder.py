"""An autoencoder of dense layers, as deep embedded clustering begins with.

Xie, Girshick and Farhadi, "Unsupervised Deep Embedding for Clustering Analysis", ICML 2016, section 3.2.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax.core.errors import InputError, require_positive


class DenseAutoencoder(nn.Module):
    """Dense ReLU layers to a code and, in reverse, back to the pixels: image [B, H, W, C] -> [B, H, W, C].

    The code and the pixels are linear. `apply(..., method=DenseAutoencoder.encode)` gives the code [B, latents], and
    `method=DenseAutoencoder.decode` images of codes. Raises InputError for a layer without units, and for images whose
    shape is not `shape`.
    """

    hidden: tuple[int, ...] = (500, 500, 2000)  # units of the encoder's layers
    latents: int = 10  # L, the units of the code
    shape: tuple[int, int, int] = (28, 28, 1)  # of an image: height, width, channels
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        require_positive({"hidden": min(self.hidden, default=1), "latents": self.latents})
        self.encoder = dense_layers((*self.hidden, self.latents), self.dtype)
        self.decoder = dense_layers((*reversed(self.hidden), math.prod(self.shape)), self.dtype)

    def encode(self, image: jax.Array) -> jax.Array:  # [B, H, W, C] -> [B, L]
        if image.shape[1:] != self.shape:
            raise InputError(
                f"DenseAutoencoder takes images of shape {self.shape}, not {image.shape[1:]}; resize them, or give the "
                "model another shape"
            )
        return forward(self.encoder, image.reshape(len(image), -1))

    def decode(self, code: jax.Array) -> jax.Array:  # [B, L] -> [B, H, W, C]
        return forward(self.decoder, code).reshape(len(code), *self.shape)

    def __call__(self, image: jax.Array, *, train: bool) -> jax.Array:
        return self.decode(self.encode(image))


def dense_layers(units: Sequence[int], dtype: DTypeLike) -> list[nn.Dense]:
    return [nn.Dense(n, dtype=dtype) for n in units]


def forward(layers: Sequence[nn.Dense], x: jax.Array) -> jax.Array:  # [B, D] -> [B, units of the last layer]
    """The float32 result of dense layers with ReLU between them."""
    *hidden, last = layers
    for layer in hidden:
        x = nn.relu(layer(x))
    return last(x).astype(jnp.float32)


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """A tiny instance with a batch of images, for the tests of the whole zoo."""
    image = np.random.default_rng(0).random((3, 6, 5, 1), np.float32)
    return {"DenseAutoencoder": (DenseAutoencoder((12, 9), 4, (6, 5, 1)), {"image": image})}


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """The paper's network, whose layers' sizes give its number of parameters."""
    image = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    encoder = 785 * 500 + 501 * 500 + 501 * 2000 + 2001 * 10
    decoder = 11 * 2000 + 2001 * 500 + 501 * 500 + 501 * 784
    return {"DenseAutoencoder": (DenseAutoencoder(), {"image": image}, encoder + decoder)}
