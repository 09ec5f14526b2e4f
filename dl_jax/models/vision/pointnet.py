"""PointNet, for sets of points in space (Qi et al. 2017, arXiv:1612.00593)."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dl_jax.core.errors import InputError, require_positive, require_probability
from dl_jax.models import ops
from dl_jax.models.layers import batch_norm, dense, require_features


class Layers(nn.Module):
    """Dense layers for each row, each with batch normalisation and ReLU: [..., C] -> [..., last width]."""

    widths: Sequence[int]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        for width in self.widths:
            x = nn.relu(batch_norm(train, dtype=self.dtype)(dense(width, use_bias=False, dtype=self.dtype)(x)))
        return x


class Transform(nn.Module):
    """A matrix for each set of points, at the start near the identity: [B, N, C] -> float32 [B, C, C] (section 4.2).

    The paper starts at the identity itself, from where no gradient reaches the layers before the last one.
    """

    widths: Sequence[int]
    head: Sequence[int]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, points: jax.Array, *, train: bool) -> jax.Array:
        channels = points.shape[-1]
        x = ops.max_over(Layers(self.widths, self.dtype)(points, train=train), 1)
        x = Layers(self.head, self.dtype)(x, train=train)
        x = dense(channels**2, dtype=self.dtype, kernel_init=nn.initializers.normal(1e-3))(x)
        return jnp.eye(channels) + x.astype(jnp.float32).reshape(-1, channels, channels)


class PointNet(nn.Module):
    """A class of each set of points, in any order: points [B, N, 3] -> logits float32 [B, classes] (figure 2).

    Every point goes through the same layers, and the maximum over the points through the others. With `transforms`, the
    points are first multiplied by a matrix that a smaller network of the same kind reads from them, and so are their
    `local` features. All layers but the last have batch normalisation and ReLU, the last one dropout before it, which
    uses the random stream "dropout".

    The paper adds 0.001 ‖I - A Aᵀ‖² to the loss, where A are the matrices of the features, the output of the module
    "feature_transform":

        apply = inspect.with_outputs(model.apply, "feature_transform")
        logits, (matrices,) = apply(variables, points, train=False)

    Raises InputError for sizes below 1, a dropout outside [0, 1), and for points that are not [B, N, C] with
    one or more, where C is 3 or what the parameters are for.
    """

    classes: int = 40
    local: Sequence[int] = (64, 64)  # widths of the layers before the transform of the features
    widths: Sequence[int] = (64, 128, 1024)  # of those after it, and of the transforms'
    head: Sequence[int] = (512, 256)  # of those after the maximum
    transforms: bool = True
    dropout: float = 0.3
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, points: jax.Array, *, train: bool) -> jax.Array:
        require_positive({"classes": self.classes, "widths": min((*self.local, *self.widths, *self.head), default=0)})
        require_probability({"dropout": self.dropout})
        if points.ndim != 3 or not points.shape[1] * points.shape[2]:
            raise InputError(f"points are {points.shape}, expected [B, N, 3] with N of 1 or more; reshape them")
        require_features(self, points, ("input_layers", "Dense_0"))
        x = points
        for name, widths in (("input", self.local), ("feature", self.widths)):
            if self.transforms:
                transform = Transform(self.widths, self.head, self.dtype, name=f"{name}_transform")
                x = jnp.matmul(x.astype(self.dtype), transform(x, train=train).astype(self.dtype))
            x = Layers(widths, self.dtype, name=f"{name}_layers")(x, train=train)
        x = Layers(self.head, self.dtype, name="head")(ops.max_over(x, 1), train=train)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return dense(self.classes, dtype=self.dtype, name="logits")(x).astype(jnp.float32)


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """A tiny instance with a batch of sets of points, for the tests of the whole zoo."""
    points = np.random.default_rng(0).normal(size=(3, 6, 3)).astype(np.float32)
    return {"PointNet": (PointNet(4, (3, 4), (4, 5), (6,)), {"points": points})}


def published() -> dict[str, tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], int]]:
    """The paper's network for the 40 classes of ModelNet40, and without transforms.

    The paper gives 3.5 and 0.8 million parameters (table 6); the exact numbers are those of its layers' sizes.
    """
    points = {"points": jax.ShapeDtypeStruct((1, 1024, 3), jnp.float32)}
    layers = lambda first, *widths: sum((a + 2) * b for a, b in zip((first, *widths), widths, strict=False))
    plain = layers(3, 64, 64, 64, 128, 1024) + layers(1024, 512, 256) + 257 * 40
    transform = lambda n: layers(n, 64, 128, 1024) + layers(1024, 512, 256) + 257 * n**2
    return {
        "PointNet": (PointNet(), points, plain + transform(3) + transform(64)),
        "PointNetVanilla": (PointNet(transforms=False), points, plain),
    }
