"""Losses: per-example ones, and functions from loss to loss.

A per-example loss is computed in float32 or wider, whatever the dtype of the network's output, and is not averaged; the
caller masks and averages. A `Loss` is `(variables, batch, key) -> (scalar, (collections, metrics))` and every function
from loss to loss returns one, so they nest in any order. `latent` contains the ELBO, importance-weighted bounds and
densities, `crf` linear chains of tags, and `ctc` labels without their places.
"""

from dl_jax.core.step import Loss
from dl_jax.losses.classification import (
    cross_entropy,
    focal,
    negative_sampling,
    require_labels,
    smooth_labels,
    soft_cross_entropy,
    squared_hinge,
)
from dl_jax.losses.combine import (
    elastic_net,
    l1,
    l2,
    label_smoothing,
    require_penalties,
    weighted_sum,
    with_batch,
    with_params,
)
from dl_jax.losses.detection import peak_focal
from dl_jax.losses.regression import gaussian_nll, huber, squared_error

__all__ = [
    "Loss",
    "cross_entropy",
    "elastic_net",
    "focal",
    "gaussian_nll",
    "huber",
    "l1",
    "l2",
    "label_smoothing",
    "negative_sampling",
    "peak_focal",
    "require_labels",
    "require_penalties",
    "smooth_labels",
    "soft_cross_entropy",
    "squared_error",
    "squared_hinge",
    "weighted_sum",
    "with_batch",
    "with_params",
]
