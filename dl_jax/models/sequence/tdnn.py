"""A time-delay network (Waibel et al. 1989; with dilated layers, Peddinti, Povey & Khudanpur 2015, Interspeech)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax.core.errors import InputError, require_positive, require_probability
from dl_jax.models import ops
from dl_jax.models.layers import batch_norm, dense, require_features, valid_steps


class TDNN(nn.Module):
    """Dilated convolutions over time and a linear layer: frames [B, T, D] -> logits float32 [B, T, classes].

    The logits of each frame are for connectionist temporal classification, where one class is the blank. Each
    convolution is followed by batch normalisation if wanted, ReLU, and dropout, which uses the random stream "dropout".
    `lengths`, int [B], are the numbers of frames; those after them have no effect on the logits of the others, and
    their own logits mean nothing. What lies outside of a recording counts as 0.

    Raises InputError for frames that are not [B, T, D], for other D than the parameters have, for sizes below 1, a
    dropout outside [0, 1), and lengths that are not int [B] or not in [1, T].
    """

    classes: int
    hidden: int = 32  # channels of each convolution
    layers: tuple[tuple[int, int], ...] = ((3, 1), (5, 2), (5, 4))  # taps and dilation of each, in frames
    normalise: bool = True  # whether batch normalisation follows each convolution
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, frames: jax.Array, lengths: jax.Array | None = None, *, train: bool) -> jax.Array:
        require_positive({"classes": self.classes, "hidden": self.hidden, "the number of layers": len(self.layers)})
        require_positive({"the least of taps and dilations": min((n for each in self.layers for n in each), default=0)})
        require_probability({"dropout": self.dropout})
        if frames.ndim != 3 or 0 in frames.shape:
            raise InputError(f"frames of shape {frames.shape}, expected [B, T, D], one or more of each; reshape them")
        require_features(self, frames, ("conv_0",))
        valid = valid_steps(lengths, frames)[..., None]
        x = jnp.where(valid, frames, 0).astype(self.dtype)
        for i, (taps, dilation) in enumerate(self.layers):
            reach = (taps - 1) * dilation
            x = nn.Conv(
                self.hidden,
                (taps,),
                padding=((reach // 2, reach - reach // 2),),
                kernel_dilation=dilation,
                use_bias=not self.normalise,
                dtype=self.dtype,
                conv_general_dilated=ops.conv_general_dilated,
                name=f"conv_{i}",
            )(x)
            if self.normalise:
                x = batch_norm(train, dtype=self.dtype, name=f"norm_{i}")(x, mask=valid)
            x = jnp.where(valid, nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x)), 0)
        return dense(self.classes, dtype=self.dtype, name="output")(x).astype(jnp.float32)

    @property
    def receptive_field(self) -> int:
        """The number of frames that a logit depends on."""
        return 1 + sum((taps - 1) * dilation for taps, dilation in self.layers)


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """A tiny instance with a batch of inputs, for the tests of the whole zoo."""
    frames = np.random.default_rng(0).standard_normal((3, 9, 4), np.float32)
    inputs = {"frames": frames, "lengths": np.array([9, 1, 6], np.int32)}
    return {"TDNN": (TDNN(3, hidden=6, layers=((3, 1), (3, 2)), dropout=0.5), inputs)}


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """The default sizes, for 30 classes and 23 mel bins, with the number that these give."""
    frames = {"frames": jax.ShapeDtypeStruct((1, 100, 23), jnp.float32)}
    convolutions = (3 * 23 + 2 * 5 * 32) * 32
    return {"TDNN": (TDNN(30), frames, convolutions + 3 * 2 * 32 + 33 * 30)}
