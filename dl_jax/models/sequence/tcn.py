"""The temporal convolutional network (Bai, Kolter & Koltun 2018, arXiv:1803.01271, section 3)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax.core.errors import InputError, require_positive, require_probability
from dl_jax.models import ops
from dl_jax.models.layers import dense, require_features

small = nn.initializers.normal(0.01)  # initialises all weights (the paper's supplement, A.1)


class CausalConv(nn.Module):
    """A causal, dilated convolution with weight normalisation: [B, T, C] -> [B, T, features].

    The kernel is scale · v / |v|, with one norm and scale per output channel (Salimans & Kingma 2016,
    arXiv:1602.07868). Where v is 0, as if |v| were 1, so that value and gradient are finite.
    """

    features: int
    taps: int
    dilation: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        direction = self.param("kernel", small, (self.taps, x.shape[-1], self.features))
        square = (direction**2).sum((0, 1))  # [features]
        norm = jnp.sqrt(jnp.where(square == 0, 1, square))  # the root of 0 has no gradient
        scale = self.param("scale", lambda key: jnp.sqrt(square))
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
    """A residual block: two causal convolutions, each followed by ReLU and dropout, a shortcut, and ReLU (figure 1b).

    Takes [B, T, C] and returns [B, T, features].
    """

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
            x = dense(self.features, dtype=self.dtype, kernel_init=small)(x)
        return nn.relu(x + y)


class TCN(nn.Module):
    """Residual blocks with dilations 1, 2, 4 ..., and a linear layer: x [B, T, D] -> float32 [B, T, outputs].

    Output t depends on inputs t - receptive_field + 1 to t. Dropout uses the random stream "dropout". Raises InputError
    where `hidden`, `levels` or `taps` is below 1, for a dropout outside [0, 1), for x that is not [B, T, D], and for
    another D than the parameters have.
    """

    outputs: int
    hidden: int  # channels of each convolution
    levels: int  # residual blocks
    taps: int  # size of each kernel
    dropout: float = 0.0  # probability that a channel of a sequence is dropped in training
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        require_positive({"hidden": self.hidden, "levels": self.levels, "taps": self.taps})
        require_probability({"dropout": self.dropout})
        if x.ndim != 3 or 0 in x.shape:
            raise InputError(f"x of shape {x.shape}, expected [B, T, D], one or more of each; reshape it")
        require_features(self, x, ("Block_0", "CausalConv_0"))
        for level in range(self.levels):
            x = Block(self.hidden, self.taps, 2**level, self.dropout, self.dtype)(x, train=train)
        return dense(self.outputs, dtype=self.dtype, kernel_init=small)(x).astype(jnp.float32)

    @property
    def receptive_field(self) -> int:
        """The number of input steps that an output depends on."""
        # The current step, and (taps − 1) · dilation more for each of the two convolutions of a level.
        return 1 + 2 * (self.taps - 1) * (2**self.levels - 1)


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """A tiny instance with a batch of inputs, for the tests of the whole zoo."""
    x = np.random.default_rng(0).standard_normal((3, 9, 4), np.float32)
    return {"TCN": (TCN(outputs=3, hidden=5, levels=2, taps=3, dropout=0.5), {"x": x})}


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """The paper's network for chorales of 88 keys (Table 2 of the supplement), whose layers' sizes give its count.

    The paper rounds it to 300 thousand (Table 1).
    """
    x = jax.ShapeDtypeStruct((1, 129, 88), jnp.float32)
    convolutions = (3 * 88 + 2) * 150 + 3 * (3 * 150 + 2) * 150  # kernel, scale and bias of each map
    return {"TCN": (TCN(88, 150, levels=2, taps=3, dropout=0.5), {"x": x}, convolutions + 89 * 150 + 151 * 88)}
