"""Distillation: a student learns what a teacher answers, or what its layers compute.

Answers are the probabilities of all classes, including the wrong ones (`loss`). Layers are compared through a linear
regressor (`hints`) or by where on the image they are active (`attention_transfer`). For these, `apply` returns
(logits, features), a tuple of arrays, and a batch has those of the teacher. Any function may do so; of a Flax module:

    student, teacher = (inspect.with_outputs(model.apply, "stage2_block0", "stage3_block0") for model in (small, large))

    def see(key, batch):  # the teacher's features, computed with the batch
        return {**batch, "teacher_features": teacher(trained, classify.to_unit(batch["image"]), train=False)[1]}

    loss = losses.weighted_sum({
        "hard": (1.0, losses.with_params(classify.loss(small.apply), distill.without_regressors)),
        "hints": (0.1, losses.with_batch(distill.hints(student), see)),
    })
    params = {**params, distill.REGRESSORS: distill.regressors(key, [(16, 64), (32, 128)])}
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax import classify, losses
from dl_jax.core.errors import InputError
from dl_jax.core.leaves import at_least_float32
from dl_jax.core.step import Array, Batch, Loss, Tree

REGRESSORS = "regressors"  # among the parameters


def soft(student_logits: Array, teacher_logits: Array, temperature: float) -> Array:  # [B, ..., C] twice -> [B, ...]
    """T² · cross-entropy between softmax(teacher / T) and softmax(student / T), in nats.

    The factor T² compensates for gradients that shrink as 1/T²; the ratio to the hard-label loss then does not depend
    on T (Hinton, Vinyals & Dean 2015, arXiv:1503.02531, section 2). The teacher gets no gradient. Raises InputError
    where the numbers of classes differ or are below two, and where the temperature is not positive.
    """
    _require_temperature("soft", temperature)
    if student_logits.shape[-1] != teacher_logits.shape[-1]:
        raise InputError(
            f"soft: the student has {student_logits.shape[-1]} classes and the teacher {teacher_logits.shape[-1]}, "
            "expected the same; train both on the same labels"
        )
    if student_logits.shape[-1] < 2:
        raise InputError(
            f"soft: logits of shape {student_logits.shape}, expected two classes or more on the last axis; a single "
            "logit z of two classes becomes jnp.concatenate([0 * z, z], -1)"
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
        logits = classify.as_logits(logits)
        return soft(logits, batch["teacher_logits"], temperature).mean(), (collections, {})

    return follow


def hint(student: Array, teacher: Array, regressor: Tree) -> Array:  # [B, ..., C], [B, ..., D] -> [B]
    """½ ‖teacher − (student · kernel + bias)‖², the sum over an example's positions and channels.

    It is FitNets' hint with a linear regressor, which has the same kernel [C, D] at all positions: a 1 x 1 convolution
    on images (Romero et al. 2015, arXiv:1412.6550, equation 3). The teacher gets no gradient. Raises InputError where
    the shapes do not fit.
    """
    kernel, bias = regressor["kernel"], regressor["bias"]
    if kernel.shape != (student.shape[-1], teacher.shape[-1]) or student.shape[:-1] != teacher.shape[:-1]:
        raise InputError(
            f"hint: the student's layer is {student.shape}, the teacher's {teacher.shape} and the regressor "
            f"{kernel.shape}, expected equal positions and a regressor (channels of the student, of the teacher); "
            "choose layers of equal size"
        )
    guess = at_least_float32(student) @ at_least_float32(kernel) + at_least_float32(bias)
    errors = at_least_float32(jax.lax.stop_gradient(teacher)) - guess
    return 0.5 * (errors**2).sum(tuple(range(1, errors.ndim)))


def regressors(key: Array, channels: Sequence[tuple[int, int]]) -> list[dict[str, Array]]:
    """Regressors for pairs of layers with these channels, (student, teacher). They are parameters to train along."""
    kernels = map(jax.nn.initializers.lecun_normal(), jax.random.split(key, len(channels)), channels)
    return [{"kernel": kernel, "bias": jnp.zeros(kernel.shape[1])} for kernel in kernels]


def without_regressors(params: Tree) -> Tree:
    """The student's own parameters, for `losses.with_params` around a loss of the student, and after training."""
    return {name: each for name, each in params.items() if name != REGRESSORS}


def hints(apply: Callable[..., Any]) -> Loss:
    """The mean over a batch of `hint`, summed over pairs of layers: batch["teacher_features"] and those of `apply`.

    The parameters have the regressors under `REGRESSORS`, and `apply` sees the others. Raises InputError where the
    numbers of layers differ or their shapes do not fit.
    """

    def follow(variables: Tree, batch: Batch, key: Array):
        params = variables["params"]
        found, collections = _features(apply, {**variables, "params": without_regressors(params)}, batch, key)
        pairs = _paired("hints", found, batch["teacher_features"], params.get(REGRESSORS, []))
        return jnp.stack([hint(*pair).mean() for pair in pairs]).sum(), (collections, {})

    return follow


def attention(features: Array) -> Array:  # [B, ..., C] -> [B, P]
    """The map of activity over P positions, Σ_c |A_c|², divided by its norm. A map of zeros stays one.

    Zagoruyko & Komodakis 2017, arXiv:1612.03928, section 3.1, with p = 2.
    """
    activity = (at_least_float32(features) ** 2).sum(-1).reshape(features.shape[0], -1)
    norm = _norm(activity)
    return activity / jnp.where(norm > 0, norm, 1)[:, None]


def attention_distance(student: Array, teacher: Array) -> Array:  # [B, ..., C], [B, ..., D] -> [B]
    """½ ‖attention(student) − attention(teacher)‖, a term of the paper's equation 2 without the factor β.

    The teacher gets no gradient. Raises InputError where the positions differ.
    """
    if student.shape[:-1] != teacher.shape[:-1]:
        raise InputError(
            f"attention_distance: the student's layer is {student.shape} and the teacher's {teacher.shape}, expected "
            "equal positions; choose layers of equal size"
        )
    return 0.5 * _norm(attention(student) - attention(jax.lax.stop_gradient(teacher)))


def attention_transfer(apply: Callable[..., Any]) -> Loss:
    """The mean over a batch of `attention_distance`, summed over pairs of layers as in `hints`; no regressors."""

    def follow(variables: Tree, batch: Batch, key: Array):
        found, collections = _features(apply, variables, batch, key)
        pairs = _paired("attention_transfer", found, batch["teacher_features"])
        return jnp.stack([attention_distance(*pair).mean() for pair in pairs]).sum(), (collections, {})

    return follow


def _features(apply: Callable[..., Any], variables: Tree, batch: Batch, key: Array) -> tuple[Any, Tree]:
    """The features of a batch in training, and the collections that changed."""
    found, collections = classify.in_training(apply, variables, batch, key)
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], tuple | list)):
        raise InputError(
            f"`apply` returns a {type(found).__name__}, expected (logits, features) with a tuple of arrays; wrap it in "
            "`inspect.with_outputs`"
        )
    return found[1], collections


def _paired(name: str, *layers: Sequence[Any]) -> list[tuple[Any, ...]]:
    """The layers of student and teacher, and the regressors, side by side."""
    counts = [len(each) for each in layers]
    if len(set(counts)) > 1 or not counts[0]:
        kinds = ("student", "teacher", "regressors")
        found = ", ".join(f"{kind} {count}" for kind, count in zip(kinds, counts, strict=False))
        raise InputError(f"{name}: numbers of layers are {found}; expected as many of each, one or more; pair them up")
    return list(zip(*layers, strict=True))


def _norm(x: Array) -> Array:  # [B, P] -> [B]
    """The Euclidean norm, whose gradient at 0 is 0, and not NaN."""
    squares = (x**2).sum(-1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


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
