"""Evaluation metrics that return a pair `(sum, weight)`, which `core.evaluate` adds up over batches and divides.

The quotient is exact: it does not depend on the batch size, nor on the padding of the last batch, whose mask is 0.
Under `jax.vmap` over seeds each sum and weight gets a leading axis [S]. `mask` is [B] or [B, ...], 1 for what counts
and 0 for padding. All raise InputError where the shapes of the labels or the mask do not fit.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax import losses
from dl_jax.core.errors import InputError, require_positive
from dl_jax.core.leaves import at_least_float32
from dl_jax.core.step import Array
from dl_jax.losses.inputs import class_numbers


def masked(values: Array, mask: Array) -> tuple[Array, Array]:  # [B, ...], [B] or [B, ...] -> [], []
    """The sum of `values` times `mask`, and the sum of the mask over the same elements.

    The mask is 1 for elements that count and 0 for padding, or any non-negative weight. It may lack trailing axes of
    `values`, such as [B] for values [B, T]; it is then broadcast over them. Values where the mask is 0 may be NaN.
    Raises InputError where the shape of the mask is not the beginning of the shape of the values.
    """
    weights = _weights(mask, values.shape)
    return jnp.sum(jnp.where(weights == 0, 0, at_least_float32(values) * weights)), jnp.sum(weights)


def accuracy(logits: Array, labels: Array, mask: Array) -> tuple[Array, Array]:  # [B, ..., C], int [B, ...], mask
    """The fraction in [0, 1] of labels whose logit is the largest; of equal logits the first counts as the largest."""
    losses.require_labels("accuracy", logits, labels)
    return masked(logits.argmax(-1) == labels, mask)


def error_rate(logits: Array, labels: Array, mask: Array) -> tuple[Array, Array]:  # [B, ..., C], int [B, ...], mask
    """The error rate, 1 − accuracy, as a fraction in [0, 1], not in per cent."""
    losses.require_labels("error_rate", logits, labels)
    return masked(logits.argmax(-1) != labels, mask)


def top_k(logits: Array, labels: Array, mask: Array, k: int) -> tuple[Array, Array]:  # [B, ..., C], int [B, ...], mask
    """The top-k accuracy: the fraction in [0, 1] of labels among the k largest logits, the first of equal logits first.

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
    """The mean cross-entropy in nats per label (per token where labels are [B, T])."""
    return masked(losses.cross_entropy(logits, labels), mask)


def perplexity(nats: np.ndarray | float) -> np.ndarray:
    """The perplexity, exp of a mean cross-entropy in nats.

    Apply it to the mean over the whole set: the mean of the perplexities of batches is another number.
    """
    with np.errstate(over="ignore"):  # a diverged model's perplexity is infinite
        return np.exp(np.asarray(nats, np.float64))


def confusion_matrix(logits: Array, labels: Array, mask: Array) -> tuple[Array, Array]:
    """The confusion matrix [C, C] as fractions that sum to 1; the row is the label, the column the largest logit.

    Takes logits [B, ..., C] and int labels [B, ...]. The weight [1, 1] is the number of labels, as for `accuracy`, so
    that the trace equals the accuracy. Multiplied by the number of labels in the split and rounded to the nearest
    integer, the fractions give the exact counts.
    """
    losses.require_labels("confusion_matrix", logits, labels)
    classes, weights = logits.shape[-1], _weights(mask, labels.shape)
    rows = jax.nn.one_hot(class_numbers(labels, classes).ravel(), classes) * weights.reshape(-1, 1)  # [N, C]
    columns = jax.nn.one_hot(logits.argmax(-1).ravel(), classes)  # [N, C]
    return jnp.matmul(rows.T, columns, precision=jax.lax.Precision.HIGHEST), jnp.sum(weights).reshape(1, 1)


def reliability(logits: Array, labels: Array, mask: Array, bins: int = 10) -> tuple[Array, Array]:
    """For each class and each bin of its probability, how probable the class was and how often it was right.

    Takes logits [B, ..., C] and int labels [B, ...]. The sums are [C, bins, 3], for the labels whose probability of the
    class, by softmax, is in the bin: their number, the sum of these probabilities, and how many are of the class. Bins
    are equally wide; each holds its lower end, the last holds 1, too. The weight [1, 1, 1] is the number of labels, as
    for `accuracy`. The quotients of the last two by the first are a reliability diagram of the class (Zadrozny & Elkan
    2002, "Transforming classifier scores into accurate multiclass probability estimates").

    Raises InputError as `accuracy` does, and for fewer than one bin.
    """
    losses.require_labels("reliability", logits, labels)
    require_positive({"bins": bins})
    classes, weights = logits.shape[-1], _weights(mask, labels.shape)
    weights = weights.reshape(-1, 1)
    probability = jax.nn.softmax(at_least_float32(logits)).reshape(-1, classes)  # [N, C]
    probability = jnp.where(weights > 0, probability, 0)  # padding may be NaN
    true = jax.nn.one_hot(class_numbers(labels, classes).ravel(), classes)
    counted = jnp.stack([jnp.ones_like(probability), probability, true], -1) * weights[..., None]  # [N, C, 3]
    place = jax.nn.one_hot(jnp.clip((probability * bins).astype(int), 0, bins - 1), bins)  # [N, C, bins]
    sums = jnp.einsum("ncb,nck->cbk", place, counted, precision=jax.lax.Precision.HIGHEST)
    return sums, jnp.sum(weights).reshape(1, 1, 1)


def calibration_error(reliability: np.ndarray) -> np.ndarray:  # [..., C, bins, 3] -> [...]
    """The classwise calibration error: how far a class's probability is from its frequency, by bin and class.

    Takes what the sums of `reliability` are once they are divided by their weight. The differences in each bin count by
    its labels, and are averaged over the classes (Kull et al. 2019, arXiv:1910.12656, section 2).
    """
    return np.abs(reliability[..., 1] - reliability[..., 2]).sum(-1).mean(-1)


def _weights(mask: Array, shape: tuple[int, ...]) -> Array:  # [B] or [B, ...] -> float32 [B, ...], or float64
    if mask.shape != shape[: mask.ndim]:
        raise InputError(
            f"masked: mask {mask.shape} for values {shape}, expected {shape} or its leading axes; "
            "give one weight per example or per element"
        )
    return at_least_float32(jnp.broadcast_to(mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim)), shape))
