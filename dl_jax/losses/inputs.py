"""What every loss does to its inputs: the type it computes in, and shapes that must agree."""

import jax.numpy as jnp

from dl_jax.core.errors import InputError
from dl_jax.core.step import Array


def class_numbers(labels: Array, classes: int) -> Array:  # int [...] of any size -> int32 [...], int64 for 8 bytes
    """Labels as int32 (int64 for 64-bit labels), with every label outside [0, classes) replaced by `classes`.

    That index is out of range: a loss that gathers with it gives NaN, and it never equals a prediction. Without this,
    JAX would read -1 as the last class, and a uint8 or int8 might not hold `classes`.
    """
    labels = jnp.asarray(labels)
    known = (labels >= 0) & (labels <= min(classes - 1, int(jnp.iinfo(labels.dtype).max)))
    return jnp.where(known, labels.astype(jnp.int64 if labels.dtype.itemsize == 8 else jnp.int32), classes)


def require_same_shape(name: str, predictions: Array, targets: Array) -> None:
    if predictions.shape != targets.shape:
        raise InputError(
            f"{name}: predictions {predictions.shape}, targets {targets.shape}, expected equal shapes; "
            "reshape one of them"
        )
