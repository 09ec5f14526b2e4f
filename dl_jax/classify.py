"""Classifiers of images: the loss and the evaluation that experiments on them have in common.

`apply` is a module's: (variables, image float32 [B, H, W, C] in [0, 1], train, rngs) -> logits [B, classes]. Batches
have the columns `image`, uint8, or float32 in [0, 1] after augmentation, and `label`.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax import losses, metrics
from dl_jax.core.errors import InputError
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

    All collections except `params` are mutable if `apply` accepts `mutable`. Collections that are new or whose arrays
    changed in number, shape or type, such as values that a network sows, are left out, because a compiled step cannot
    carry them. Raises InputError where the network changes a collection and `apply` does not pass `mutable` on.
    """
    settings: dict[str, Any] = {"train": True, "rngs": {"dropout": key}}
    others = _Names(name for name in variables if name != "params")
    if others and _takes_mutable(apply):
        settings["mutable"] = others
    try:
        found = apply(variables, to_unit(batch["image"]), **settings)
    except Exception as e:
        if type(e).__name__ != "ModifyScopeVariableError":  # Flax's; this file works without Flax
            raise
        raise InputError(
            f"`apply` lets the network change none of its collections {', '.join(others)}, expected `mutable` to reach "
            "the module: let `apply` take **kwargs and pass them on to the module"
        ) from e
    match found:
        case tuple((logits, Mapping() as new)):
            return logits, {name: _like(variables[name], new[name]) for name in others if _fits(variables, new, name)}
        case logits:
            return logits, {}


@jax.tree_util.register_static
class _Names(tuple[str, ...]):
    """Names of collections, which a jitted `apply` takes whether or not it calls `mutable` static."""

    __slots__ = ()


def _fits(variables: Tree, new: Mapping[str, Tree], name: str) -> bool:
    """Whether the collection still holds arrays of the same names, shapes and types, so that a step can carry it."""
    return name in new and _arrays(new[name]) == _arrays(variables[name])


def _arrays(tree: Tree) -> list[tuple[Any, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(path, jnp.shape(leaf), jnp.result_type(leaf)) for path, leaf in leaves]


def _like(before: Tree, after: Tree) -> Tree:
    """`after` in the containers of `before`: Flax answers a FrozenDict with a dict."""
    return jax.tree.unflatten(jax.tree.structure(before), jax.tree.leaves(after))


def as_logits(found: Any) -> Array:
    """`found`, which `apply` returned. Raises InputError unless it is one array, such as logits [B, classes]."""
    if not hasattr(found, "shape"):
        raise InputError(
            f"`apply` returns a {type(found).__name__}, expected an array, such as logits [B, classes]; wrap it in a "
            "function that returns this array alone"
        )
    return found


def _takes_mutable(apply: Callable[..., Any]) -> bool:
    parameters = inspect.signature(apply).parameters
    return "mutable" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def loss(apply: Callable[..., Any]) -> Loss:
    """Mean cross-entropy in nats; the metric `error` is the fraction misclassified.

    batch["label"] is int [B], or float [B, classes] (label smoothing, mixup); the argmax is then the true class. The
    collections that `apply` changed are returned (`in_training`). Raises InputError where `apply` returns anything but
    an array, and where the shapes of labels and logits do not match.
    """

    def cross_entropy(variables: Tree, batch: Batch, key: Array):
        found, collections = in_training(apply, variables, batch, key)
        logits, label = as_logits(found), batch["label"]
        if jnp.issubdtype(label.dtype, jnp.floating):
            values, label = losses.soft_cross_entropy(logits, label), label.argmax(-1)
        else:
            values = losses.cross_entropy(logits, label)
        return values.mean(), (collections, {"error": (logits.argmax(-1) != label).mean()})

    return cross_entropy


def evaluation(apply: Callable[..., Any]) -> Evaluation:
    """A `metrics` function for `evaluator`; returns `error` and `nats` as (sum, weight).

    `error` is the fraction misclassified and `nats` the mean cross-entropy. No collection is changed. Raises
    InputError, when called, where `apply` returns anything but an array.
    """

    def evaluate(variables: Tree, batch: Batch, key: Array) -> dict[str, tuple[Array, Array]]:
        logits = as_logits(apply(variables, to_unit(batch["image"]), train=False))
        given = logits, batch["label"], batch["mask"]
        return {"error": metrics.error_rate(*given), "nats": metrics.cross_entropy(*given)}

    return evaluate


def outputs(predict: Callable[[Any], Any], images: np.ndarray) -> np.ndarray:  # [N, H, W, C] -> [N, ...]
    """Applies `predict` to chunks of 1000 images; returns NumPy [N, ...].

    Raises InputError where it returns anything but an array.
    """
    return np.concatenate([as_logits(predict(images[i : i + 1000])) for i in range(0, len(images), 1000)])
