"""What every loss does to its inputs: the type it computes in, and shapes that must agree."""

import jax.numpy as jnp

from dl_jax.core.errors import InputError
from dl_jax.core.step import Array


def at_least_float32(x: Array) -> Array:
    """At least float32: bf16 sums and integer differences lose digits."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def require_same_shape(name: str, predictions: Array, targets: Array) -> None:
    if predictions.shape != targets.shape:
        raise InputError(
            f"{name}: predictions {predictions.shape}, targets {targets.shape}, expected equal shapes; "
            "reshape one of them"
        )
