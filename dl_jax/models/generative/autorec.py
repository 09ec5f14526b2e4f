"""AutoRec, an autoencoder of ratings (Sedhain, Menon, Sanner & Xie 2015, "AutoRec: Autoencoders meet collaborative
filtering").
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax.core.errors import require_positive, require_probability
from dl_jax.models.layers import require_values


class AutoRec(nn.Module):
    """Ratings [B, D] of items by users, or of users for items, 0 where unknown -> float32 guesses of all [B, D].

    W σ(V (r − m) + μ) + b + m on what is known (equation 2), where m is `middle`, so that what is not known is as if it
    were m. With dropout a known rating is at times as if unknown in training. Raises InputError for no hidden units, a
    probability outside [0, 1), and ratings of another number than the parameters are for.
    """

    hidden: int
    middle: float = 3.0  # a rating that says nothing
    dropout: float = 0.0  # probability that a rating is dropped in training
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, rating: jax.Array, *, train: bool) -> jax.Array:
        require_positive({"hidden": self.hidden})
        require_probability({"dropout": self.dropout})
        require_values(self, rating, ("Dense_0",))
        x = jnp.where(rating > 0, rating.astype(jnp.float32) - self.middle, 0)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.sigmoid(nn.Dense(self.hidden, dtype=self.dtype)(x))
        return self.middle + nn.Dense(rating.shape[-1], dtype=self.dtype)(x).astype(jnp.float32)


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Tiny instances with a batch of inputs each, for the tests of the whole zoo."""
    rating = np.random.default_rng(0).integers(0, 6, (3, 9)).astype(np.float32)
    return {"AutoRec": (AutoRec(hidden=5, dropout=0.5), {"rating": rating})}


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """I-AutoRec for MovieLens 1M, with 6,040 users and 500 hidden units; its layers' sizes give the number."""
    rating = jax.ShapeDtypeStruct((1, 6040), jnp.float32)
    return {"AutoRec": (AutoRec(500), {"rating": rating}, 6041 * 500 + 501 * 6040)}
