"""Metrics that are exact over every example: each returns `(sum, weight)`, which `core.evaluate` adds up and divides.

The result does not depend on the batch size, nor on the padding of the last batch, whose mask is 0. Under `jax.vmap`
over seeds each sum and weight gets a leading [S].
"""

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax import losses
from dl_jax.core.errors import InputError
from dl_jax.core.step import Array
from dl_jax.losses.inputs import at_least_float32, class_numbers


def masked(values: Array, mask: Array) -> tuple[Array, Array]:  # [B, ...], [B] or [B, ...] -> [], []
    """Sum of `values` times `mask`, and sum of the mask over the same elements.

    The mask is 1 for what counts and 0 for padding (or any non-negative weight); it may lack trailing axes of `values`,
    [B] for [B, T], and then counts once for each element. What it hides may be NaN. Raises InputError where its shape
    is not the beginning of the values' shape.
    """
    weights = _weights(mask, values.shape)
    return jnp.sum(jnp.where(weights == 0, 0, at_least_float32(values) * weights)), jnp.sum(weights)


def accuracy(logits: Array, labels: Array, mask: Array) -> tuple[Array, Array]:  # [B, ..., C], int [B, ...], mask
    """Fraction in [0, 1] of labels with the largest logit; of equal logits the first one counts."""
    losses.require_labels("accuracy", logits, labels)
    return masked(logits.argmax(-1) == labels, mask)


def error_rate(logits: Array, labels: Array, mask: Array) -> tuple[Array, Array]:  # [B, ..., C], int [B, ...], mask
    """1 − accuracy: a fraction in [0, 1], not per cent."""
    losses.require_labels("error_rate", logits, labels)
    return masked(logits.argmax(-1) != labels, mask)


def top_k(logits: Array, labels: Array, mask: Array, k: int) -> tuple[Array, Array]:  # [B, ..., C], int [B, ...], mask
    """Fraction in [0, 1] of labels among the k largest logits; of equal logits the first ones count.

    Raises InputError where k is not in [1, C].
    """
    if not 1 <= k <= logits.shape[-1]:
        raise InputError(
            f"top_k: k is {k}, expected 1 to {logits.shape[-1]}, the number of classes; choose a smaller k"
        )
    losses.require_labels("top_k", logits, labels)
    best = jax.lax.top_k(logits, k)[1]  # [B, ..., k]
    return masked((best == labels[..., None]).any(-1), mask)


def cross_entropy(logits: Array, labels: Array, mask: Array) -> tuple[Array, Array]:  # [B, ..., C], int [B, ...], mask
    """Mean negative log likelihood in nats per label (per token where labels are [B, T])."""
    return masked(losses.cross_entropy(logits, labels), mask)


def perplexity(nats: np.ndarray | float) -> np.ndarray:
    """exp of a mean cross-entropy in nats. Apply it to the evaluated one: a mean of perplexities is another number."""
    with np.errstate(over="ignore"):  # a diverged model's perplexity is infinite
        return np.exp(np.asarray(nats, np.float64))


def confusion_matrix(logits: Array, labels: Array, mask: Array) -> tuple[Array, Array]:
    """Joint frequencies [C, C] of (label, prediction), row: label, column: the largest logit. All of them sum to 1.

    logits [B, ..., C], labels int [B, ...]. The weight [1, 1] is the number of labels, as for `accuracy`, so the trace
    equals the accuracy; times the number of labels in the split this gives the exact counts (round to the nearest).
    """
    losses.require_labels("confusion_matrix", logits, labels)
    classes, weights = logits.shape[-1], _weights(mask, labels.shape)
    rows = jax.nn.one_hot(class_numbers(labels, classes).ravel(), classes) * weights.reshape(-1, 1)  # [N, C]
    columns = jax.nn.one_hot(logits.argmax(-1).ravel(), classes)  # [N, C]
    return jnp.matmul(rows.T, columns, precision=jax.lax.Precision.HIGHEST), jnp.sum(weights).reshape(1, 1)


def _weights(mask: Array, shape: tuple[int, ...]) -> Array:  # [B] or [B, ...] -> float32 [B, ...], or float64
    if mask.shape != shape[: mask.ndim]:
        raise InputError(
            f"masked: mask {mask.shape} for values {shape}, expected {shape} or its leading axes; "
            "give one weight per example or per element"
        )
    return at_least_float32(jnp.broadcast_to(mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim)), shape))
