"""Distillation: a student learns the probabilities that a teacher gives to all classes, including the wrong ones."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dl_jax import classify, losses
from dl_jax.core.errors import InputError
from dl_jax.core.leaves import at_least_float32
from dl_jax.core.step import Array, Batch, Loss, Tree


def soft(student_logits: Array, teacher_logits: Array, temperature: float) -> Array:  # [B, ..., C] twice -> [B, ...]
    """T² · cross-entropy between softmax(teacher / T) and softmax(student / T), in nats.

    The factor T² compensates for gradients that shrink as 1/T²; the ratio to the hard-label loss then does not depend
    on T (Hinton, Vinyals & Dean 2015, arXiv:1503.02531, section 2). The teacher gets no gradient. Raises InputError
    where the numbers of classes differ or the temperature is not positive.
    """
    _require_temperature("soft", temperature)
    if student_logits.shape[-1] != teacher_logits.shape[-1]:
        raise InputError(
            f"soft: the student has {student_logits.shape[-1]} classes and the teacher {teacher_logits.shape[-1]}, "
            "expected the same; train both on the same labels"
        )
    targets = jax.nn.softmax(at_least_float32(jax.lax.stop_gradient(teacher_logits)) / temperature)
    return temperature**2 * losses.soft_cross_entropy(at_least_float32(student_logits) / temperature, targets)


def loss(apply: Callable[..., Any], temperature: float) -> Loss:
    """The mean of `soft` over a batch of `image` and `teacher_logits` [B, C].

    Combine it with `classify.loss` by `losses.weighted_sum`. `apply` is as in `classify.loss`; changed collections are
    returned. Raises InputError where the temperature is not positive.
    """
    _require_temperature("loss", temperature)

    def follow(variables: Tree, batch: Batch, key: Array):
        logits, collections = classify.in_training(apply, variables, batch, key)
        return soft(logits, batch["teacher_logits"], temperature).mean(), (collections, {})

    return follow


def matched_bias(logits: np.ndarray, group: np.ndarray, frequency: float) -> float:  # [N, C], bool [C]
    """The bias to add to the logits of `group` so that a fraction `frequency` of the N examples is classified into it.

    It corrects a class prior learned from an unbalanced set. Raises InputError where `group` contains none or all of
    the classes, or `frequency` is outside [0, 1].
    """
    if not 0 < np.count_nonzero(group) < logits.shape[1]:
        raise InputError(
            f"matched_bias: group has {np.count_nonzero(group)} of {logits.shape[1]} classes, expected 1 to "
            f"{logits.shape[1] - 1}"
        )
    if not 0 <= frequency <= 1:
        raise InputError(f"matched_bias: frequency is {frequency}, expected a fraction in [0, 1]")
    return float(np.quantile(margins(logits, group), frequency))


def margins(logits: np.ndarray, group: np.ndarray) -> np.ndarray:  # [N, C], bool [C] -> [N]
    """Largest logit outside `group` minus largest inside, [N]: with a larger bias the example moves into the group."""
    logits = at_least_float32(logits)
    return logits[:, ~group].max(1) - logits[:, group].max(1)


def fewest_errors(logits: np.ndarray, group: np.ndarray, labels: np.ndarray) -> int:  # [N, C], bool [C], int [N]
    """The smallest number of errors over all biases added to the classes in `group`, found exactly.

    The bias is tuned on the examples that are scored; use it only to compare with papers that did the same.
    """
    logits = at_least_float32(logits)
    best = lambda classes: np.where(classes, logits, -np.inf).argmax(1) == labels  # [N], right if the group wins or not
    right_inside, right_outside = best(group), best(~group)
    led = margins(logits, group)
    order = led.argsort()  # a rising bias moves example after example into the group, equal margins together
    gained = np.cumsum(right_inside[order].astype(int) - right_outside[order])[np.diff(led[order], append=np.inf) > 0]
    return int(len(labels) - right_outside.sum() - max(0, gained.max()))


def _require_temperature(name: str, temperature: float) -> None:
    if not temperature > 0:
        raise InputError(f"{name}: temperature is {temperature}, expected a positive number; 1 leaves the logits alone")
