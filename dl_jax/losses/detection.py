"""Losses of heat maps in which objects are peaks."""

import jax
import jax.numpy as jnp

from dl_jax.core.leaves import at_least_float32
from dl_jax.core.step import Array
from dl_jax.losses.inputs import require_same_shape

ALPHA, BETA = 2, 4  # of CenterNet's experiments


def peak_focal(logits: Array, heat: Array) -> Array:  # [B, ...], [B, ...] -> [B]
    """The penalty-reduced focal loss of each example's heat maps, added up over all elements; in nats.

    −(1 − p)² log p where the heat is 1, else −(1 − heat)⁴ p² log(1 − p), with p = σ(logit): Zhou, Wang and Krähenbühl
    2019, arXiv:1904.07850, equation 1, which divides the sum by the number of objects. Raises InputError where the
    shapes differ.
    """
    require_same_shape("peak_focal", logits, heat)
    logits, heat = at_least_float32(logits), at_least_float32(heat)
    p, log_p, log_rest = jax.nn.sigmoid(logits), jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    at_peaks = jax.nn.sigmoid(-logits) ** ALPHA * log_p
    elsewhere = (1 - heat) ** BETA * p**ALPHA * log_rest
    return -jnp.where(heat == 1, at_peaks, elsewhere).sum(tuple(range(1, logits.ndim)))
