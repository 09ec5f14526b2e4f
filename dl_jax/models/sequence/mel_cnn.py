"""A convolutional network on log-mel frames, as on an image (Hershey et al. 2017, arXiv:1609.09430, section 3.2).

The paper's networks are those of images; this is a small one of the same kind.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax.core.errors import InputError, require_positive, require_probability
from dl_jax.models import ops
from dl_jax.models.layers import batch_norm, conv, require_features, valid_steps


class MelCNN(nn.Module):
    """Convolutions over time and frequency, and the mean over time: frames [B, T, D] -> logits float32 [B, classes].

    Each convolution has 3 x 3 taps and is followed by batch normalisation, ReLU and the maximum of 2 x 2 places. The
    mean over time keeps the frequencies apart. `lengths`, int [B], are the numbers of frames; those after them have no
    effect. Dropout acts on the mean and uses the random stream "dropout".

    Raises InputError for frames that are not [B, T, D], for other D than the parameters have, for sizes below 1, a
    dropout outside [0, 1), and lengths that are not int [B] or not in [1, T]. A traced length of 0, which cannot be
    checked, gives NaN.
    """

    classes: int
    maps: tuple[int, ...] = (16, 32, 64)  # of each convolution
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, frames: jax.Array, lengths: jax.Array | None = None, *, train: bool) -> jax.Array:
        require_positive({"classes": self.classes, "the number of convolutions": len(self.maps)})
        require_positive({"the least maps": min(self.maps, default=0)})
        require_probability({"dropout": self.dropout})
        if frames.ndim != 3 or 0 in frames.shape:
            raise InputError(f"frames of shape {frames.shape}, expected [B, T, D], one or more of each; reshape them")
        valid = valid_steps(lengths, frames)
        x = jnp.where(valid[..., None], frames, 0)[..., None].astype(self.dtype)
        for i, maps in enumerate(self.maps):
            x = conv(maps, 3, dtype=self.dtype, name=f"conv_{i}")(x)
            there = valid[..., None, None]
            x = batch_norm(train, dtype=self.dtype, name=f"norm_{i}")(x, mask=there)
            x = jnp.where(there, nn.relu(x), 0)
            x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))  # zeros are no maxima
            x, valid = ops.max_pool(x, 2), valid[:, ::2]
        x = x.sum(1) / valid.sum(1)[:, None, None].astype(self.dtype)  # [B, D', C]; what is not valid is 0
        x = x.reshape(x.shape[0], -1)
        require_features(self, x, ("output",))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, dtype=self.dtype, name="output")(x).astype(jnp.float32)


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """A tiny instance with a batch of inputs, for the tests of the whole zoo."""
    frames = np.random.default_rng(0).standard_normal((3, 9, 5), np.float32)
    return {"MelCNN": (MelCNN(3, (4, 6), dropout=0.5), {"frames": frames, "lengths": np.array([9, 1, 6], np.int32)})}


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """The default sizes, for ten classes and 40 mel bins, with the number that these give."""
    frames = {"frames": jax.ShapeDtypeStruct((1, 100, 40), jnp.float32)}
    kernels = 9 * (16 + 16 * 32 + 32 * 64)
    return {"MelCNN": (MelCNN(10), frames, kernels + 2 * (16 + 32 + 64) + (5 * 64 + 1) * 10)}
