"""Variational autoencoders for images: of dense layers, as in the IWAE paper, and of convolutions.

Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014. Burda, Grosse and Salakhutdinov, "Importance Weighted
Autoencoders", ICLR 2016, section 5 and the authors' code.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax.core.errors import InputError, require_positive
from dl_jax.models import ops

Initializer = Callable[..., jax.Array]  # (key, shape, dtype) -> array


def mean_image_bias(images: np.ndarray) -> Initializer:  # uint8 [N, H, W, C]
    """An initialiser for the bias [H W C] of an output layer: the logits of the mean image, clipped to [0.001, 0.999].

    With a small kernel the sigmoid of such a layer starts near the mean image.
    """
    mean = np.clip(images.mean(0).ravel() / 255, 0.001, 0.999)
    return lambda key, shape, dtype: jnp.asarray(np.log(mean / (1 - mean)), dtype)


class Autoencoder(nn.Module):
    """The base class of the autoencoders in this file; a subclass defines the encoder and the decoder.

    `apply(..., method=VAE.encode)` and `apply(..., method=VAE.decode)` call one of the two networks. A call of the
    module returns (logits of the pixels, mean, log variance), where the logits are decoded from the mean. Samples of z
    for training are drawn in `dl_jax.losses.latent`.

    Raises InputError for `latents` < 1, a layer without units, and images whose shape is not `shape`.
    """

    latents: int = 50  # L, the number of units of z
    shape: tuple[int, int, int] = (28, 28, 1)  # of an image: height, width, channels
    dtype: DTypeLike = jnp.float32

    def networks(self) -> tuple[nn.Module, nn.Module]:
        """The encoder, [B, H, W, C] -> [B, 2 L], and the decoder, [..., L] -> [..., H W C] or [..., H, W, C]."""
        raise NotImplementedError

    def setup(self) -> None:
        if self.latents < 1:
            raise InputError(f"{type(self).__name__} has {self.latents} latent units, expected 1 or more; 50 is usual")
        self.encoder, self.decoder = self.networks()

    def encode(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:  # [B, H, W, C] -> [B, L], [B, L]
        """The mean and the log variance of q(z | x)."""
        if image.shape[1:] != self.shape:
            raise InputError(
                f"{type(self).__name__} takes images of shape {self.shape}, not {image.shape[1:]}; "
                "resize them, or give the model another shape"
            )
        return _gaussian(self.encoder(image))

    def decode(self, z: jax.Array) -> jax.Array:  # [..., L] -> [..., H, W, C]
        """The logits of the pixels."""
        return self.decoder(z).astype(jnp.float32).reshape(*z.shape[:-1], *self.shape)

    def __call__(self, image: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
        mean, log_var = self.encode(image)
        return self.decode(mean), mean, log_var


class VAE(Autoencoder):
    """A VAE of dense tanh layers, the paper's model with one stochastic layer.

    `hidden` has the number of units of each layer, for the encoder and for the decoder alike. Kernels are initialised
    by Glorot's uniform rule, biases at zero; `output_bias` initialises the bias of the decoder's output layer.
    """

    hidden: tuple[int, ...] = (200, 200)
    output_bias: Initializer = nn.initializers.zeros

    def networks(self) -> tuple[nn.Module, nn.Module]:
        encoder = DenseEncoder(self.hidden, 2 * self.latents, self.dtype)
        return encoder, DenseDecoder(self.hidden, math.prod(self.shape), self.output_bias, self.dtype)


class TwoLayerVAE(VAE):
    """The paper's model with two stochastic layers: `top` units y above the `latents` units z, y -> z -> image.

    `top_hidden` has the tanh layers of q(y | z) and of p(z | y). A call decodes the mean of z given the mean of y.
    """

    latents: int = 100
    top: int = 50
    top_hidden: tuple[int, ...] = (100, 100)

    def setup(self) -> None:
        super().setup()
        require_positive({"top": self.top})
        networks = (
            DenseDecoder(self.top_hidden, 2 * n, nn.initializers.zeros, self.dtype) for n in (self.top, self.latents)
        )
        self.top_encoder, self.top_decoder = networks

    def encode_top(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:  # [..., L] -> [..., top] twice
        """The mean and the log variance of q(y | z)."""
        return _gaussian(self.top_encoder(z))

    def decode_top(self, y: jax.Array) -> tuple[jax.Array, jax.Array]:  # [..., top] -> [..., L] twice
        """The mean and the log variance of p(z | y)."""
        return _gaussian(self.top_decoder(y))

    def __call__(self, image: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
        mean, log_var = self.encode(image)
        return self.decode(self.decode_top(self.encode_top(mean)[0])[0]), mean, log_var


def _gaussian(outputs: jax.Array) -> tuple[jax.Array, jax.Array]:  # [..., 2 L] -> [..., L] twice
    """The mean and the log variance. The second half of a network's outputs is log σ, as in the authors' code."""
    mean, log_sigma = jnp.split(outputs.astype(jnp.float32), 2, -1)
    return mean, 2 * log_sigma


class DenseEncoder(nn.Module):
    """The encoder of `VAE`: image [B, H, W, C] -> [B, outputs]."""

    hidden: tuple[int, ...]
    outputs: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        x = tanh_layers(image.reshape(image.shape[0], -1), self.hidden, self.dtype)
        return nn.Dense(self.outputs, kernel_init=nn.initializers.glorot_uniform(), dtype=self.dtype)(x)


class DenseDecoder(nn.Module):
    """The decoder of `VAE`: z [..., L] -> [..., outputs]."""

    hidden: tuple[int, ...]
    outputs: int
    output_bias: Initializer
    dtype: DTypeLike

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        x = tanh_layers(z, self.hidden, self.dtype)
        init = {"kernel_init": nn.initializers.glorot_uniform(), "bias_init": self.output_bias}
        return nn.Dense(self.outputs, dtype=self.dtype, **init)(x)


def tanh_layers(x: jax.Array, hidden: Sequence[int], dtype: DTypeLike) -> jax.Array:  # [..., D] -> [..., units]
    """Dense layers with tanh. Call it within the `@nn.compact` method of a module, to which the layers then belong."""
    require_positive({"hidden": min(hidden, default=1)})
    for units in hidden:
        x = nn.tanh(nn.Dense(units, kernel_init=nn.initializers.glorot_uniform(), dtype=dtype)(x))
    return x


class ConvVAE(Autoencoder):
    """A VAE of convolutions, each of which halves the image, and transposed convolutions, each of which doubles it.

    `features` has the number of channels after each convolution. All kernels are 4 x 4 with stride 2, whose outputs
    overlap evenly (Odena, Dumoulin and Olah, "Deconvolution and Checkerboard Artifacts", Distill 2016). Raises
    InputError for an image whose height or width is not a multiple of 2 to the power of `len(features)`.
    """

    features: tuple[int, ...] = (32, 64)

    def networks(self) -> tuple[nn.Module, nn.Module]:
        require_positive({"features": min(self.features, default=0)})
        height, width, channels = self.shape
        factor = 2 ** len(self.features)
        if height % factor or width % factor:
            raise InputError(
                f"ConvVAE halves images {len(self.features)} times, but got shape {self.shape}, expected sides that "
                f"{factor} divides; pad them, or give fewer features"
            )
        smallest = (height // factor, width // factor, self.features[-1])
        backwards = (*reversed(self.features[:-1]), channels)
        encoder = ConvEncoder(self.features, 2 * self.latents, self.dtype)
        return encoder, ConvDecoder(smallest, backwards, self.dtype)


class ConvEncoder(nn.Module):
    """The encoder of `ConvVAE`: image [B, H, W, C] -> [B, outputs]."""

    features: tuple[int, ...]
    outputs: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        x = image
        for features in self.features:
            convolve = ops.conv_general_dilated
            x = nn.Conv(features, (4, 4), strides=(2, 2), dtype=self.dtype, conv_general_dilated=convolve)(x)
            x = nn.relu(x)  # [B, H / 2, W / 2, features]
        return nn.Dense(self.outputs, dtype=self.dtype)(x.reshape(x.shape[0], -1))


class ConvDecoder(nn.Module):
    """The decoder of `ConvVAE`: z [..., L] -> [..., H, W, C]."""

    smallest: tuple[int, int, int]  # output shape of the dense layer: height, width, features
    features: tuple[int, ...]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        x = nn.Dense(math.prod(self.smallest), dtype=self.dtype)(z).reshape(*z.shape[:-1], *self.smallest)
        for features in self.features:
            layer = nn.ConvTranspose(features, (4, 4), strides=(2, 2), dtype=self.dtype)
            x = layer(nn.relu(x))  # [..., 2 H, 2 W, features]
        return x


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Tiny instances with a batch of images each, for the tests of the whole zoo."""
    image = np.random.default_rng(0).random((3, 8, 12, 1), np.float32)
    size = {"latents": 5, "shape": (8, 12, 1)}
    models = {
        "VAE": VAE(hidden=(16, 12), **size),
        "TwoLayerVAE": TwoLayerVAE(hidden=(16, 12), top=3, top_hidden=(8, 7), **size),
        "ConvVAE": ConvVAE(features=(4, 6), **size),
    }
    return {name: (model, {"image": image}) for name, model in models.items()}


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """The paper's networks with one and two stochastic layers, whose layers' sizes give their numbers of parameters."""
    image = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    of = lambda *units: sum((i + 1) * o for i, o in itertools.pairwise(units))  # dense layers with biases
    one = of(784, 200, 200, 2 * 50) + of(50, 200, 200, 784)
    lower = of(784, 200, 200, 2 * 100) + of(100, 200, 200, 784)
    upper = of(100, 100, 100, 2 * 50) + of(50, 100, 100, 2 * 100)
    return {"VAE": (VAE(), {"image": image}, one), "TwoLayerVAE": (TwoLayerVAE(), {"image": image}, lower + upper)}
