"""Classifiers of images: the loss and the evaluation that experiments on them have in common.

`apply` is a module's: (variables, image float32 [B, H, W, C] in [0, 1], train, rngs) -> logits [B, C]. Batches hold
`image`, uint8 as the sets do or float as augmentations leave it, and `label`.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from dl_jax import losses, metrics
from dl_jax.core.step import Array, Batch, Loss, Tree

Evaluation = Callable[[Tree, Batch, Array], dict[str, tuple[Array, Array]]]


def to_unit(image: Any) -> Array:  # [B, H, W, C]
    """Integer grey levels from 0 .. 255 to float32 [0, 1]; floats as they are."""
    return jnp.asarray(image, jnp.float32) / (255 if jnp.issubdtype(image.dtype, jnp.integer) else 1)


def unit(key: Array, batch: Batch) -> Batch:
    """`to_unit` on a batch: goes before the augmentations, for `losses.with_batch`."""
    return {**batch, "image": to_unit(batch["image"])}


def loss(apply: Callable[..., Any]) -> Loss:
    """Mean cross-entropy in nats; the metric `error` is the fraction of the batch that is misread."""

    def cross_entropy(variables: Tree, batch: Batch, key: Array):
        logits = apply(variables, to_unit(batch["image"]), train=True, rngs={"dropout": key})
        error = (logits.argmax(-1) != batch["label"]).mean()
        return losses.cross_entropy(logits, batch["label"]).mean(), ({}, {"error": error})

    return cross_entropy


def evaluation(apply: Callable[..., Any]) -> Evaluation:
    """For `core.evaluate.evaluator`: `error`, a fraction, and `nats`, the mean cross-entropy."""

    def evaluate(variables: Tree, batch: Batch, key: Array) -> dict[str, tuple[Array, Array]]:
        given = apply(variables, to_unit(batch["image"]), train=False), batch["label"], batch["mask"]
        return {"error": metrics.error_rate(*given), "nats": metrics.cross_entropy(*given)}

    return evaluate


def outputs(predict: Callable[[Any], Any], images: np.ndarray) -> np.ndarray:  # [N, H, W, C] -> [N, ...]
    """What `predict` answers, a thousand images at a time, on the host."""
    return np.concatenate([predict(images[i : i + 1000]) for i in range(0, len(images), 1000)])
