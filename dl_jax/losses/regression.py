"""Per-example losses of numbers, computed in float32 or better and not averaged over the batch."""

import jax.numpy as jnp
import optax

from dl_jax.core.errors import InputError
from dl_jax.core.leaves import at_least_float32
from dl_jax.core.step import Array
from dl_jax.losses.inputs import require_same_shape


def squared_error(predictions: Array, targets: Array) -> Array:  # [B, ...], [B, ...] -> [B]
    """Mean over each example's elements of (prediction - target)².

    Raises InputError where the shapes differ: [B, 1] against [B] would broadcast to [B, B].
    """
    require_same_shape("squared_error", predictions, targets)
    return _mean_per_example(optax.squared_error(at_least_float32(predictions), at_least_float32(targets)))


def huber(predictions: Array, targets: Array, delta: float = 1.0) -> Array:  # [B, ...], [B, ...] -> [B]
    """Mean over each example's elements of e²/2 where |e| ≤ delta, else delta·|e| − delta²/2; e = prediction − target.

    Value and slope are continuous at |e| = delta (Huber 1964, "Robust Estimation of a Location Parameter").
    Raises InputError where the shapes differ or delta is not positive.
    """
    if not delta > 0:
        raise InputError(
            f"huber: delta is {delta}, expected more than 0; for a purely quadratic loss use squared_error / 2"
        )
    require_same_shape("huber", predictions, targets)
    return _mean_per_example(optax.huber_loss(at_least_float32(predictions), at_least_float32(targets), delta=delta))


def gaussian_nll(mean: Array, variance: Array, targets: Array) -> Array:  # [B, ...], three times -> [B]
    """Mean over each example's elements of −log N(target; mean, variance), in nats, with the constant log(2π) / 2.

    The variance is positive; a network gives it as the softplus of an output, plus a small number. Raises InputError
    where the shapes differ.
    """
    require_same_shape("gaussian_nll", mean, targets)
    require_same_shape("gaussian_nll", variance, targets)
    mean, variance, targets = map(at_least_float32, (mean, variance, targets))
    return _mean_per_example((jnp.log(2 * jnp.pi * variance) + (targets - mean) ** 2 / variance) / 2)


def _mean_per_example(values: Array) -> Array:  # [B, ...] -> [B]
    return values.mean(tuple(range(1, values.ndim)))
