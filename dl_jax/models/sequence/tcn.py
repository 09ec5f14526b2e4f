"""The temporal convolutional network (Bai, Kolter & Koltun 2018, arXiv:1803.01271, section 3)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax.core.errors import require_positive, require_probability
from dl_jax.models import ops

small = nn.initializers.normal(0.01)  # of all weights: the paper's supplement, A.1


class CausalConv(nn.Module):
    """A dilated convolution over the present and the past, [B, T, C] -> [B, T, features], with a normalised weight.

    The kernel is scale · v / |v|, one norm and scale per output channel (Salimans & Kingma 2016, arXiv:1602.07868).
    """

    features: int
    taps: int
    dilation: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        direction = self.param("kernel", small, (self.taps, x.shape[-1], self.features))
        norm = jnp.sqrt((direction**2).sum((0, 1)))  # [features]
        scale = self.param("scale", lambda key: norm)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        past = (self.taps - 1) * self.dilation
        x = ops.conv_general_dilated(
            x.astype(self.dtype),
            (direction * (scale / norm)).astype(self.dtype),
            window_strides=(1,),
            padding=((past, 0),),
            rhs_dilation=(self.dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        return x + bias.astype(self.dtype)


class Block(nn.Module):
    """Two causal convolutions, each with ReLU and dropout, beside a shortcut; then ReLU (figure 1b)."""

    features: int
    taps: int
    dilation: int
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = x
        for _ in range(2):
            y = nn.relu(CausalConv(self.features, self.taps, self.dilation, self.dtype)(y))
            y = nn.Dropout(self.dropout, broadcast_dims=(1,), deterministic=not train)(y)  # drops whole channels
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, dtype=self.dtype, kernel_init=small)(x)
        return nn.relu(x + y)


class TCN(nn.Module):
    """Causal convolutions with dilations 1, 2, 4 ..., and a linear layer: x [B, T, D] -> float32 [B, T, outputs].

    Output t depends on the last `receptive_field` inputs up to t. hidden: channels. levels: residual blocks. taps: of
    each kernel. dropout: probability that a channel of a sequence is dropped in training (needs the random stream
    "dropout").

    Raises InputError for no channels, blocks or taps, and for a dropout outside [0, 1).
    """

    outputs: int
    hidden: int
    levels: int
    taps: int
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        require_positive({"hidden": self.hidden, "levels": self.levels, "taps": self.taps})
        require_probability({"dropout": self.dropout})
        for level in range(self.levels):
            x = Block(self.hidden, self.taps, 2**level, self.dropout, self.dtype)(x, train=train)
        return nn.Dense(self.outputs, dtype=self.dtype, kernel_init=small)(x).astype(jnp.float32)

    @property
    def receptive_field(self) -> int:
        """Steps: 1 and, in each of two convolutions per level, (taps − 1) · dilation more."""
        return 1 + 2 * (self.taps - 1) * (2**self.levels - 1)


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """A tiny instance with a batch of inputs, for the tests of the whole zoo."""
    x = np.random.default_rng(0).standard_normal((3, 9, 4), np.float32)
    return {"TCN": (TCN(outputs=3, hidden=5, levels=2, taps=3, dropout=0.5), {"x": x})}
