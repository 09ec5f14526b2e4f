"""A convolutional network on the waveform (Dai, Dai, Qu, Li & Das 2017, arXiv:1610.00087, section 2)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax.core.errors import InputError, require_positive, require_probability
from dl_jax.models import ops
from dl_jax.models.layers import batch_norm, valid_steps


class WaveCNN(nn.Module):
    """Convolutions and maxima of samples, and the mean over time: wave float [B, N] -> logits float32 [B, classes].

    Each convolution is followed by batch normalisation, ReLU and the maximum of every `pool` steps; the first has long
    kernels and a stride, as a bank of filters has, and the others 3 taps. `lengths`, int [B], are the numbers of
    samples; those after them have no effect. Dropout acts on the mean and uses the random stream "dropout". The default
    sizes are those of the paper's M5, which has waves of 8 kHz.

    Raises InputError for waves that are not [B, N], for sizes below 1, a dropout outside [0, 1), and lengths that are
    not int [B] or not in [1, N]. A traced length of 0, which cannot be checked, gives NaN.
    """

    classes: int
    maps: tuple[int, ...] = (128, 128, 256, 512)  # of each convolution
    taps: int = 80  # of the first convolution
    stride: int = 4  # of the first convolution, in samples
    pool: int = 4  # steps of which the maximum is taken, after each convolution
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, wave: jax.Array, lengths: jax.Array | None = None, *, train: bool) -> jax.Array:
        require_positive({name: getattr(self, name) for name in ("classes", "taps", "stride", "pool")})
        require_positive({"the number of convolutions": len(self.maps), "the least maps": min(self.maps, default=0)})
        require_probability({"dropout": self.dropout})
        if wave.ndim != 2 or 0 in wave.shape:
            raise InputError(f"waves of shape {wave.shape}, expected [B, N], one or more of each; reshape them")
        valid = valid_steps(lengths, wave)
        x = jnp.where(valid, wave, 0)[..., None].astype(self.dtype)
        for i, maps in enumerate(self.maps):
            taps, stride = (self.taps, self.stride) if i == 0 else (3, 1)
            # Padded alike for every N, so that a step is the same in a longer batch: ceil(N / stride) steps.
            x = nn.Conv(
                maps,
                (taps,),
                stride,
                padding=(((taps - 1) // 2, taps // 2),),
                use_bias=False,
                dtype=self.dtype,
                conv_general_dilated=ops.conv_general_dilated,
                name=f"conv_{i}",
            )(x)
            valid = valid[:, ::stride]
            x = batch_norm(train, dtype=self.dtype, name=f"norm_{i}")(x, mask=valid[..., None])
            x = jnp.where(valid[..., None], nn.relu(x), 0)
            x, valid = _pool(x, self.pool), valid[:, :: self.pool]
        x = x.sum(1) / valid.sum(1, keepdims=True).astype(self.dtype)  # what is not valid is 0
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, dtype=self.dtype, name="output")(x).astype(jnp.float32)


def _pool(x: jax.Array, window: int) -> jax.Array:  # [B, T, C] -> [B, ceil(T / window), C]
    """The maximum over windows next to each other, of values of 0 or more."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % window), (0, 0)))
    return ops.max_over(x.reshape(x.shape[0], -1, window, x.shape[-1]), 2)


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """A tiny instance with a batch of inputs, for the tests of the whole zoo."""
    wave = np.random.default_rng(0).standard_normal((3, 75), np.float32)
    inputs = {"wave": wave, "lengths": np.array([75, 5, 40], np.int32)}
    return {"WaveCNN": (WaveCNN(3, (4, 6), taps=8, stride=2, pool=3, dropout=0.5), inputs)}


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """M5 (table 1 of the paper) for ten classes, whose layers' sizes give its number of parameters."""
    wave = {"wave": jax.ShapeDtypeStruct((1, 32_000), jnp.float32)}
    kernels = 80 * 128 + 3 * (128 * 128 + 128 * 256 + 256 * 512)
    return {"WaveCNN": (WaveCNN(10), wave, kernels + 2 * (128 + 128 + 256 + 512) + 513 * 10)}
