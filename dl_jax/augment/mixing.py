"""Mixtures of two examples and of their labels.

An example is mixed with the one before it in the batch, the first with the last. A batch is in random order, so this is
a random partner, and devices that share a batch pass on one example instead of all of them. Each example has its own
draw, where the papers' code draws once for a batch.

The labels become probabilities [B, classes], as `classify.loss` and `losses.soft_cross_entropy` take them. Labels that
are probabilities already are mixed as they are, so that label smoothing goes outside:
`losses.label_smoothing(losses.with_batch(loss, mixup(...)), classes, 0.1)`. A label outside of 0 .. classes - 1 gives
NaN in its own row and in that of the example after it.
"""

import jax
import jax.numpy as jnp

from dl_jax import losses
from dl_jax.augment.base import Augmentation, checked_integer, finite, images_of, require_unplaced
from dl_jax.core.errors import InputError
from dl_jax.core.step import Array, Batch


def mixup(alpha: float, classes: int) -> Augmentation:
    """lambda x + (1 - lambda) x' of images and labels, with lambda from Beta(alpha, alpha).

    Zhang, Cisse, Dauphin and Lopez-Paz 2018, mixup: Beyond empirical risk minimization. Raises InputError for a batch
    without labels, or with boxes, masks or keypoints.
    """
    _check(alpha, classes)

    def augment(key: Array, batch: Batch) -> Batch:
        require_unplaced(batch)
        images = images_of(batch)
        kept = jax.random.beta(key, alpha, alpha, (len(images), 1, 1, 1))
        mixed = kept * images + (1 - kept) * _other(images)
        return {**batch, "image": mixed, "label": _mixed_labels(batch, classes, kept[:, 0, 0])}

    return augment


def cutmix(alpha: float, classes: int) -> Augmentation:
    """A rectangle of another image, and labels in proportion to the areas.

    The rectangle has the image's proportions and the area 1 - lambda, with lambda from Beta(alpha, alpha). Its centre
    is any pixel, so that part of it may lie outside; the labels follow what is seen of it (Yun et al. 2019, CutMix,
    section 3.1). Raises InputError for a batch without labels, or with boxes, masks or keypoints.
    """
    _check(alpha, classes)

    def augment(key: Array, batch: Batch) -> Batch:
        require_unplaced(batch)
        images = images_of(batch)
        b, h, w, _ = images.shape
        key_area, key_centre = jax.random.split(key)
        side = jnp.sqrt(1 - jax.random.beta(key_area, alpha, alpha, (b, 1)))
        sides = jnp.floor(side * jnp.array([h, w])).astype(jnp.int32)  # [B, 2]
        first = jax.random.randint(key_centre, (b, 2), 0, jnp.array([h, w])) - sides // 2
        row, column = jnp.arange(h) - first[:, :1], jnp.arange(w) - first[:, 1:]
        rows, columns = (row >= 0) & (row < sides[:, :1]), (column >= 0) & (column < sides[:, 1:])
        mixed = jnp.where(rows[:, :, None, None] & columns[:, None, :, None], _other(images), images)
        kept = 1 - rows.sum(1, keepdims=True) * columns.sum(1, keepdims=True) / (h * w)
        return {**batch, "image": mixed, "label": _mixed_labels(batch, classes, kept)}

    return augment


def _other(rows: Array) -> Array:
    return jnp.roll(rows, 1, 0)


def _mixed_labels(batch: Batch, classes: int, kept: Array) -> Array:  # int [B] or float [B, classes], [B, 1]
    if "label" not in batch:
        raise InputError(
            f"batch with the columns {', '.join(batch)}: expected labels to mix in column 'label'; mix classification "
            "batches only"
        )
    labels = batch["label"]
    if jnp.issubdtype(labels.dtype, jnp.integer):
        labels = losses.smooth_labels(labels, classes, 0)
    if labels.shape != (len(kept), classes):
        raise InputError(
            f"labels {labels.shape}: expected one class number per example, or probabilities {(len(kept), classes)}; "
            "mix classification batches only"
        )
    return kept * labels + (1 - kept) * _other(labels)


def _check(alpha: float, classes: int) -> None:
    if not (finite(alpha) and alpha > 0):
        raise InputError(f"alpha={alpha}: expected a parameter of the Beta distribution, above 0")
    checked_integer("classes", classes, "a number of classes")
