"""The multi-layer perceptron."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax.core.errors import require_positive, require_probability


class MLP(nn.Module):
    """Dense layers with ReLU and dropout, and a linear layer: image [B, H, W, C] -> float32 logits [B, classes].

    Dropout uses the random stream "dropout". Raises InputError for a probability outside [0, 1), and for a layer
    without units.
    """

    hidden: tuple[int, ...]  # units of each hidden layer
    classes: int = 10
    dropout: float = 0.0  # probability that a hidden unit is dropped in training
    input_dropout: float = 0.0  # probability that a pixel is dropped in training
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool) -> jax.Array:
        require_positive({"hidden": min(self.hidden, default=1), "classes": self.classes})
        require_probability({"dropout": self.dropout, "input_dropout": self.input_dropout})
        x = image.reshape(image.shape[0], -1)  # [B, H * W * C]
        x = nn.Dropout(self.input_dropout, deterministic=not train)(x)
        for units in self.hidden:
            x = nn.relu(nn.Dense(units, dtype=self.dtype)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, dtype=self.dtype)(x).astype(jnp.float32)


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """A tiny instance with a batch of inputs, for the tests of the whole zoo."""
    image = np.random.default_rng(0).random((3, 8, 8, 1), np.float32)
    return {"MLP": (MLP(hidden=(16, 12), classes=5, dropout=0.5), {"image": image})}
