"""The network of a denoising diffusion: a U-Net that is told the time.

Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, appendix B. The embedding of the time is
as in the paper; the U-Net is that of `models.vision.unet`, without residual blocks, normalisation and attention.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax.core.errors import InputError, require_positive
from dl_jax.models.vision.unet import UNet


def sinusoids(time: jax.Array, size: int) -> jax.Array:  # [B] -> [B, size]
    """Sines, then cosines, of `time` at size / 2 frequencies from 1 to 1/10,000 (Vaswani et al. 2017, section 3.5).

    Raises InputError for a size that is not 2, 4, 6, ...
    """
    if size < 2 or size % 2:
        raise InputError(f"an embedding of {size} numbers, expected an even number of 2 or more; change it by one")
    frequencies = 10_000.0 ** (-jnp.arange(size // 2) / max(size // 2 - 1, 1))
    angles = time[:, None] * frequencies  # [B, size / 2]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def to_blocks(image: jax.Array, side: int) -> jax.Array:  # [B, H, W, C] -> [B, H / side, W / side, side² C]
    """Square blocks of pixels as channels. Raises InputError for a height or width that `side` does not divide."""
    require_positive({"patch": side})
    batch, height, width, channels = image.shape
    if height % side or width % side:
        raise InputError(
            f"image of {height} x {width} pixels, expected sides that patch={side} divides; pad it, or give 1"
        )
    x = image.reshape(batch, height // side, side, width // side, side, channels).swapaxes(2, 3)
    return x.reshape(batch, height // side, width // side, -1)


def from_blocks(blocks: jax.Array, side: int) -> jax.Array:  # [B, H, W, side² C] -> [B, side H, side W, C]
    """The inverse of `to_blocks`."""
    batch, height, width, _ = blocks.shape
    x = blocks.reshape(batch, height, width, side, side, -1).swapaxes(2, 3)
    return x.reshape(batch, height * side, width * side, -1)


class Denoiser(nn.Module):
    """What a network of `diffusion` predicts: noisy images [B, H, W, C] and times [B] -> float32 [B, H, W, C].

    `maps` are those of the U-Net's levels. It sees blocks of `patch` x `patch` pixels as channels of one, which for two
    pixels takes a quarter of the operations (Hoogeboom, Heek and Salimans 2023, "simple diffusion", section 3.2). The
    time's embedding goes through two dense layers of `embedding` units and is the condition of all levels.

    Raises InputError as `UNet` does, for an odd `embedding`, and for images whose sides `patch` does not divide.
    """

    maps: tuple[int, ...] = (32, 64, 128)
    embedding: int = 128
    patch: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, time: jax.Array, *, train: bool) -> jax.Array:
        x = sinusoids(time, self.embedding)
        for _ in range(2):
            x = nn.silu(nn.Dense(self.embedding, dtype=self.dtype)(x))  # [B, embedding]
        blocks = to_blocks(image, self.patch)
        found = UNet(self.maps, blocks.shape[-1], nn.silu, self.dtype, name="unet")(blocks, x, train=train)
        return from_blocks(found, self.patch)


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """A tiny instance with a batch of images and times, for the tests of the whole zoo."""
    image = np.random.default_rng(0).random((3, 4, 6, 1), np.float32)
    return {"Denoiser": (Denoiser((3, 4), 6), {"image": image, "time": np.array([1, 5, 50], np.int32)})}


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """The network with its defaults, for which its layers' sizes give the number of parameters; no paper has it."""
    level = lambda inputs, maps: maps * (9 * inputs + 1 + 129 + 9 * maps + 1)  # two convolutions and the condition
    up = lambda inputs, maps: maps * (4 * inputs + 1) + level(2 * maps, maps)
    count = 2 * 129 * 128 + level(1, 32) + level(32, 64) + level(64, 128) + up(128, 64) + up(64, 32) + 33
    inputs = {
        "image": jax.ShapeDtypeStruct((1, 32, 32, 1), jnp.float32),
        "time": jax.ShapeDtypeStruct((1,), jnp.int32),
    }
    return {"Denoiser": (Denoiser(), inputs, count)}
