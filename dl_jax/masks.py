"""Masks of padded sequences: which steps of a batch are valid."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dl_jax.core.errors import InputError


def from_lengths(lengths: jax.Array | np.ndarray, steps: int) -> jax.Array:  # int [B] -> bool [B, steps]
    """Whether each step of each sequence is valid, which is so before the sequence's length.

    Raises InputError for lengths that are not int [B] or not in [1, steps]. Lengths that are traced cannot be checked;
    those above `steps` count as `steps`, and a sequence of length 0 or below has no valid step.
    """
    if len(np.shape(lengths)) != 1 or not jnp.issubdtype(jnp.result_type(lengths), jnp.integer):
        raise InputError(
            f"lengths are {jnp.result_type(lengths)} {np.shape(lengths)}, expected whole numbers [B]; give one for "
            "each sequence"
        )
    known = not isinstance(lengths, Tracer) and np.size(lengths)
    if known and ((low := np.min(lengths)) < 1 or (low := np.max(lengths)) > steps):
        raise InputError(f"a sequence has length {low}, expected 1 to {steps}, the steps of the batch; trim or pad it")
    return jnp.arange(steps) < jnp.asarray(lengths)[:, None]
