"""Functions from loss to loss, which nest in any order.

A `Loss` is `(variables, batch, key) -> (scalar, (collections, metrics))`.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from dl_jax.core.errors import InputError
from dl_jax.core.leaves import Where, at_least_float32, chosen, is_kernel, is_real
from dl_jax.core.step import Array, Batch, Loss, Metrics, Tree
from dl_jax.losses.classification import smooth_labels


def with_params(loss: Loss, f: Callable[[Tree], Tree]) -> Loss:
    """Loss of the network whose parameters are `f(params)`: fake quantisation, masks, low-rank updates.

    The gradient is that of `params`, through `f`.
    """
    return lambda variables, batch, key: loss({**variables, "params": f(variables["params"])}, batch, key)


def with_batch(loss: Loss, f: Callable[[Array, Batch], Batch]) -> Loss:
    """Loss on the batch `f(key, batch)`: an augmentation on the device. `f` and `loss` get independent keys."""

    def on_batch(variables: Tree, batch: Batch, key: Array) -> tuple[Array, tuple[Tree, Metrics]]:
        key_f, key = jax.random.split(key)
        return loss(variables, f(key_f, batch), key)

    return on_batch


def label_smoothing(loss: Loss, classes: int, smoothing: float) -> Loss:
    """Replaces integer labels [B, ...] by smoothed probabilities [B, ..., C] before `loss`.

    `loss` must accept probabilities, as `classify.loss` does; the true label is then `batch["label"].argmax(-1)`.
    Raises InputError, when traced, as `smooth_labels` does.
    """
    return with_batch(loss, lambda key, batch: {**batch, "label": smooth_labels(batch["label"], classes, smoothing)})


def weighted_sum(terms: Mapping[str, tuple[float, Loss]]) -> Loss:
    """Σ weight · loss over `{name: (weight, loss)}`.

    The metrics contain the unweighted value of each term under `name`, and the term's metrics under `name/metric`.
    Each term has its own key and sees the collections as they were before the step. If several terms return a
    collection, its floating-point leaves are averaged, so that running statistics move once per step; other leaves,
    such as counters, are those of the last term. Raises InputError where there is no term.
    """
    if not terms:
        raise InputError("weighted_sum: no terms, expected {name: (weight, loss)}; give at least one")

    def total(variables: Tree, batch: Batch, key: Array) -> tuple[Array, tuple[Tree, Metrics]]:
        values, returned, metrics = [], {}, {}
        for key_term, (name, (weight, loss)) in zip(jax.random.split(key, len(terms)), terms.items(), strict=True):
            value, (new, inner) = loss(variables, batch, key_term)
            values.append(weight * at_least_float32(value))
            for collection, tree in new.items():
                returned.setdefault(collection, []).append(tree)
            metrics |= {name: value, **{f"{name}/{k}": v for k, v in inner.items()}}
        collections = {collection: jax.tree.map(_averaged, *trees) for collection, trees in returned.items()}
        return sum(values[1:], values[0]), (collections, metrics)

    return total


def _averaged(first: Array, *rest: Array) -> Array:
    """The mean of floating-point leaves; of others the last."""
    return sum(rest, first) / (1 + len(rest)) if rest and is_real(first) else (first, *rest)[-1]


def l2(loss: Loss, weight: float, where: Where = is_kernel) -> Loss:
    """loss + weight/2 · Σ w² over the chosen parameters: its gradient is weight · w.

    This enters Adam's moments; for decoupled decay use `optax.adamw`. Raises InputError for a negative weight.
    """
    return elastic_net(loss, 0, weight, where)


def l1(loss: Loss, weight: float, where: Where = is_kernel) -> Loss:
    """loss + weight · Σ |w| over the chosen parameters; the gradient at 0 is 0.

    Weights become small but not exactly zero; exact zeros need `optim.proximal_elastic_net`. Raises InputError for a
    negative weight.
    """
    return elastic_net(loss, weight, 0, where)


def elastic_net(loss: Loss, l1: float, l2: float, where: Where = is_kernel) -> Loss:
    """loss + l1 · Σ |w| + l2/2 · Σ w² over the chosen parameters (Zou & Hastie 2005, up to the ½).

    Raises InputError for a negative weight and, when traced, where `where` chooses nothing.
    """
    require_penalties("elastic_net", l1, l2)

    def penalised(variables: Tree, batch: Batch, key: Array) -> tuple[Array, tuple[Tree, Metrics]]:
        value, aux = loss(variables, batch, key)
        value = at_least_float32(value)
        params = variables["params"]
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(chosen(params, where)), strict=True)
        weights = [at_least_float32(w) for w, yes in pairs if yes]
        if l1:
            value += l1 * sum(jnp.sum(w * jnp.sign(w)) for w in weights)  # the slope of jnp.abs at 0 is 1, of this 0
        if l2:
            value += l2 / 2 * sum(jnp.sum(w**2) for w in weights)
        return value, aux

    return penalised


def require_penalties(name: str, l1: float, l2: float) -> None:
    """Raises InputError, in the name of the function `name`, for a negative penalty.

    With one the loss would be unbounded below.
    """
    for kind, weight in {"l1": l1, "l2": l2}.items():
        if not weight >= 0:
            raise InputError(f"{name}: {kind} weight is {weight}, expected 0 or more; use 0 for none")
