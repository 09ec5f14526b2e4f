"""Classifiers of images: the loss and the evaluation that experiments on them have in common.

`apply` is a module's: (variables, image float32 [B, H, W, C] in [0, 1], train, rngs) -> logits [B, classes]. Batches
have the columns `image`, uint8, or float32 in [0, 1] after augmentation, and `label`.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from dl_jax import losses, metrics
from dl_jax.core.step import Array, Batch, Loss, Tree

Evaluation = Callable[[Tree, Batch, Array], dict[str, tuple[Array, Array]]]


def to_unit(image: Any) -> Array:  # [B, H, W, C]
    """Divides integer images by 255; casts floats to float32."""
    return jnp.asarray(image, jnp.float32) / (255 if jnp.issubdtype(image.dtype, jnp.integer) else 1)


def unit(key: Array, batch: Batch) -> Batch:
    """Applies `to_unit` to batch["image"], for `losses.with_batch`; compose it before augmentations."""
    return {**batch, "image": to_unit(batch["image"])}


def in_training(apply: Callable[..., Any], variables: Tree, batch: Batch, key: Array) -> tuple[Array, Tree]:
    """Logits [B, classes] of a batch in training, and the collections that `apply` changed, such as batch statistics.

    All collections except `params` are mutable if `apply` accepts `mutable`. Otherwise, or if there are none, the
    second result is {}.
    """
    settings: dict[str, Any] = {"train": True, "rngs": {"dropout": key}}
    others = [name for name in variables if name != "params"]
    if not others or not _takes_mutable(apply):
        return apply(variables, to_unit(batch["image"]), **settings), {}
    return apply(variables, to_unit(batch["image"]), **settings, mutable=others)


def _takes_mutable(apply: Callable[..., Any]) -> bool:
    parameters = inspect.signature(apply).parameters
    return "mutable" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def loss(apply: Callable[..., Any]) -> Loss:
    """Mean cross-entropy in nats; the metric `error` is the fraction misclassified.

    batch["label"] is int [B], or float [B, classes] (label smoothing, mixup); the argmax is then the true class. The
    collections that `apply` changed are returned (`in_training`). Raises InputError where the shapes of labels and
    logits do not match.
    """

    def cross_entropy(variables: Tree, batch: Batch, key: Array):
        logits, collections = in_training(apply, variables, batch, key)
        label = batch["label"]
        if jnp.issubdtype(label.dtype, jnp.floating):
            values, label = losses.soft_cross_entropy(logits, label), label.argmax(-1)
        else:
            values = losses.cross_entropy(logits, label)
        return values.mean(), (collections, {"error": (logits.argmax(-1) != label).mean()})

    return cross_entropy


def evaluation(apply: Callable[..., Any]) -> Evaluation:
    """A `metrics` function for `evaluator`; returns `error` and `nats` as (sum, weight).

    `error` is the fraction misclassified and `nats` the mean cross-entropy. No collection is changed.
    """

    def evaluate(variables: Tree, batch: Batch, key: Array) -> dict[str, tuple[Array, Array]]:
        given = apply(variables, to_unit(batch["image"]), train=False), batch["label"], batch["mask"]
        return {"error": metrics.error_rate(*given), "nats": metrics.cross_entropy(*given)}

    return evaluate


def outputs(predict: Callable[[Any], Any], images: np.ndarray) -> np.ndarray:  # [N, H, W, C] -> [N, ...]
    """Applies `predict` to chunks of 1000 images; returns NumPy [N, ...]."""
    return np.concatenate([predict(images[i : i + 1000]) for i in range(0, len(images), 1000)])
