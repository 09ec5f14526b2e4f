"""Masks of padded sequences: which steps of a batch are valid."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dl_jax.core.errors import InputError
from dl_jax.core.step import Array


def from_lengths(lengths: Any, steps: int, batch: int | None = None) -> Array:  # int [B] -> bool [B, T]
    """Whether each of T = `steps` steps is valid, for sequences of these lengths; the padding after them is False.

    Raises InputError where the lengths are not whole numbers with one axis, not `batch` many (where it is given), or
    outside [1, T]. Lengths that are traced cannot be checked; those above T count as T, and those below 1 as 0. Of a
    sequence without a valid step, a recurrent layer keeps the first state; what attends to it or takes the maximum of
    its steps is NaN, or has gradients that are.
    """
    lengths = lengths if hasattr(lengths, "dtype") else np.asarray(lengths)
    shape, kind = np.shape(lengths), jnp.result_type(lengths)
    if len(shape) != 1 or batch not in (None, shape[0]) or not jnp.issubdtype(kind, jnp.integer):
        expected = "with one axis" if batch is None else f"({batch},)"
        raise InputError(f"lengths are {kind} {shape}, expected whole numbers {expected}; give one for each sequence")
    if not isinstance(lengths, Tracer) and lengths.size:
        known = np.asarray(lengths)  # within jax.jit, a minimum of a constant would be traced
        for length in (known.min(), known.max()):
            if not 1 <= length <= steps:
                raise InputError(
                    f"a sequence has length {length}, expected 1 to {steps}, the steps of the batch; trim or pad it"
                )
    return jnp.arange(steps) < jnp.asarray(lengths)[:, None]
