"""The multi-layer perceptron."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax.core.errors import require_positive, require_probability
from dl_jax.models.layers import batch_norm, require_values


class MLP(nn.Module):
    """Hidden dense layers, and a linear layer: image [B, H, W, C] -> float32 logits [B, classes].

    Hidden layers are followed by `activation` and dropout, which uses the random stream "dropout". Raises InputError
    for a probability outside [0, 1), for a layer without units, and for images of another size than the parameters.
    """

    hidden: tuple[int, ...]  # units of each hidden layer
    classes: int = 10
    dropout: float = 0.0  # probability that a hidden unit is dropped in training
    input_dropout: float = 0.0  # probability that a pixel is dropped in training
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()  # of every layer
    batch_norm: bool = False  # between each hidden layer, which then has no bias, and its activation
    norm_logits: bool = False  # whether the logits are normalised over the batch too; their layer then has no bias
    residual: bool = False  # a hidden layer as wide as the one before adds to it
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool) -> jax.Array:
        require_positive({"hidden": min(self.hidden, default=1), "classes": self.classes})
        require_probability({"dropout": self.dropout, "input_dropout": self.input_dropout})
        require_values(self, image, ("Dense_0",))
        x = image.reshape(image.shape[0], -1)  # [B, H * W * C]
        x = nn.Dropout(self.input_dropout, deterministic=not train)(x)
        for units in self.hidden:
            y = nn.Dense(units, use_bias=not self.batch_norm, dtype=self.dtype, kernel_init=self.kernel_init)(x)
            y = batch_norm(train, dtype=self.dtype)(y) if self.batch_norm else y
            y = nn.Dropout(self.dropout, deterministic=not train)(self.activation(y))
            x = x + y if self.residual and x.shape == y.shape else y
        last = nn.Dense(self.classes, use_bias=not self.norm_logits, dtype=self.dtype, kernel_init=self.kernel_init)
        logits = last(x).astype(jnp.float32)
        return batch_norm(train)(logits) if self.norm_logits else logits


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Tiny instances with a batch of inputs each, for the tests of the whole zoo."""
    image = np.random.default_rng(0).random((3, 8, 8, 1), np.float32)
    deep = MLP(hidden=(12, 12), activation=nn.sigmoid, batch_norm=True, norm_logits=True, residual=True)
    return {
        "MLP": (MLP(hidden=(12, 12), classes=5, dropout=0.5), {"image": image}),
        "DeepMLP": (deep, {"image": image}),
    }


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """The teacher of Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), section 3; its layers' sizes give the number."""
    image = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    return {"MLP": (MLP((1200, 1200)), {"image": image}, 785 * 1200 + 1201 * 1200 + 1201 * 10)}
