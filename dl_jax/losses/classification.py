"""Losses of class labels, one value for each label, computed in float32 or better and not averaged."""

import jax
import jax.numpy as jnp
import optax

from dl_jax.core.errors import InputError
from dl_jax.core.leaves import at_least_float32
from dl_jax.core.step import Array
from dl_jax.losses.inputs import class_numbers, require_same_shape


def cross_entropy(logits: Array, labels: Array) -> Array:  # [B, ..., C], int [B, ...] -> [B, ...]
    """−log softmax(logits)[label], in nats; one value for each label, so that tokens can be masked.

    A label outside [0, C) gives NaN, never a plausible number. Raises InputError where shapes or dtypes do not fit.
    """
    require_labels("cross_entropy", logits, labels)
    labels = class_numbers(labels, logits.shape[-1])
    return optax.softmax_cross_entropy_with_integer_labels(at_least_float32(logits), labels)


def soft_cross_entropy(logits: Array, targets: Array) -> Array:  # [B, ..., C], [B, ..., C] -> [B, ...]
    """−Σ targets · log softmax(logits), in nats; targets are probabilities. 0 · log 0 is 0.

    Raises InputError where the shapes differ.
    """
    require_same_shape("soft_cross_entropy", logits, targets)
    return optax.safe_softmax_cross_entropy(at_least_float32(logits), at_least_float32(targets))


def focal(logits: Array, labels: Array, gamma: float) -> Array:  # [B, ..., C], int [B, ...] -> [B, ...]
    """−(1 − p)^gamma log p, where p = softmax(logits)[label]: cross-entropy in which easy labels count less; in nats.

    The focal loss of Lin et al. 2017 (arXiv:1708.02002, equation 4), for C classes in place of two. With gamma 0 it is
    the cross-entropy. A label outside [0, C) gives NaN. Raises InputError where shapes or dtypes do not fit, for fewer
    than two classes, and where gamma is negative or not finite.
    """
    if not 0 <= gamma < float("inf"):
        raise InputError(f"focal: gamma is {gamma}, expected 0 or more; 0 is cross-entropy")
    nats, classes = cross_entropy(logits, labels), logits.shape[-1]
    if classes < 2:
        raise InputError(f"focal: logits {logits.shape} have {classes} classes, expected two or more")
    logits = at_least_float32(logits)
    others = jnp.where(jnp.arange(classes) == labels[..., None], -jnp.inf, logits)
    # log(1 - p) by itself: it is finite where 1 - p is rounded to 0, and so is its derivative.
    rest = jax.nn.logsumexp(others, -1) - jax.nn.logsumexp(logits, -1)
    return jnp.exp(gamma * rest) * nats


def squared_hinge(logits: Array, labels: Array) -> Array:  # [B, ..., C], int [B, ...] -> [B, ...]
    """Σ max(0, 1 − t · logit)² over the classes, where t is 1 for the label and −1 for the others.

    The loss of an L2-SVM of each class against the rest (Tang 2013, arXiv:1306.0239, section 2), one value for each
    label. A label outside [0, C) gives NaN. Raises InputError where shapes or dtypes do not fit.
    """
    require_labels("squared_hinge", logits, labels)
    classes = logits.shape[-1]
    labels = class_numbers(labels, classes)
    signs = 2 * jax.nn.one_hot(labels, classes) - 1  # [B, ..., C]
    values = jnp.sum(optax.hinge_loss(at_least_float32(logits), signs) ** 2, -1)
    return jnp.where(labels < classes, values, jnp.nan)


def negative_sampling(positive: Array, negative: Array) -> Array:  # [B, ...], [B, ..., K] -> [B, ...]
    """−log σ(positive) − Σ log σ(−negative) over the K scores of noise, in nats; one value for each positive score.

    The loss of skip-grams with negative sampling (Mikolov et al. 2013, arXiv:1310.4546, equation 4), where a score is
    the product of a word's vector with that of a context. It is least, on average, where a score is
    log(P(context | word) / (K P_noise(context))) (Levy & Goldberg 2014, section 3.1).

    Raises InputError where the shapes do not fit. Without noise, K = 0, the first term is left.
    """
    if negative.shape[:-1] != positive.shape or negative.ndim == 0:
        expected = ", ".join([*map(str, positive.shape), "K"])
        raise InputError(
            f"negative_sampling: scores of noise {negative.shape} for scores {positive.shape}, expected ({expected}); "
            "give K of them for each score"
        )
    positive, negative = at_least_float32(positive), at_least_float32(negative)
    return jax.nn.softplus(-positive) + jax.nn.softplus(negative).sum(-1)


def smooth_labels(labels: Array, classes: int, smoothing: float) -> Array:  # int [B, ...] -> [B, ..., C]
    """Targets for `soft_cross_entropy`: (1 − smoothing) on the label plus smoothing / C on every class.

    Szegedy et al. 2016 (arXiv:1512.00567), section 7. A label outside [0, C) gives NaN. Raises InputError where
    smoothing is outside [0, 1) or labels are not integers.
    """
    if not 0 <= smoothing < 1:
        raise InputError(f"smooth_labels: smoothing is {smoothing}, expected a fraction in [0, 1); 0.1 is usual")
    _require_integers("smooth_labels", labels)
    labels = class_numbers(labels, classes)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, classes), smoothing)
    return jnp.where((labels < classes)[..., None], targets, jnp.nan)


def require_labels(name: str, logits: Array, labels: Array) -> None:  # [B, ..., C], int [B, ...]
    """Raises InputError, in the name of the function `name`, unless each row of logits has one integer label."""
    if logits.shape[:-1] != labels.shape:
        raise InputError(
            f"{name}: labels {labels.shape} for logits {logits.shape}, expected {logits.shape[:-1]}; "
            "give one class number per example"
        )
    _require_integers(name, labels)


def _require_integers(name: str, labels: Array) -> None:
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise InputError(
            f"{name}: labels are {labels.dtype}, expected integers of any size; convert bools with .astype(int), and "
            "give probabilities to soft_cross_entropy"
        )
