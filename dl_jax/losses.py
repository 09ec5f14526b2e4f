"""Per-example losses, and functions from loss to loss.

A per-example loss is computed in float32 or better, whatever the dtype of the network's output, and is not averaged:
the caller takes the mean, or masks it first. A `Loss` is `(variables, batch, key) -> (scalar, (collections, metrics))`
and every function from loss to loss returns one, so they nest in any order.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from dl_jax.errors import InputError
from dl_jax.step import Array, Batch, Loss, Metrics, Tree

Where = Callable[[jax.tree_util.KeyPath, Array], bool]  # chooses parameters by path, shape and dtype, never by value


def squared_error(predictions: Array, targets: Array) -> Array:  # [B, ...], [B, ...] -> [B]
    """Mean over each example's elements of (prediction - target)².

    Raises InputError where the shapes differ: [B, 1] against [B] would broadcast to [B, B].
    """
    _require_same_shape("squared_error", predictions, targets)
    return _mean_per_example(optax.squared_error(_float32(predictions), _float32(targets)))


def huber(predictions: Array, targets: Array, delta: float = 1.0) -> Array:  # [B, ...], [B, ...] -> [B]
    """Mean over each example's elements of e²/2 where |e| ≤ delta, else delta·|e| − delta²/2; e = prediction − target.

    Value and slope are continuous at |e| = delta (Huber 1964, "Robust Estimation of a Location Parameter").
    Raises InputError where the shapes differ or delta is not positive.
    """
    if not delta > 0:
        raise InputError(f"huber: delta is {delta}, expected a positive error size; use squared_error for none")
    _require_same_shape("huber", predictions, targets)
    return _mean_per_example(optax.huber_loss(_float32(predictions), _float32(targets), delta=delta))


def cross_entropy(logits: Array, labels: Array) -> Array:  # [B, ..., C], int [B, ...] -> [B, ...]
    """−log softmax(logits)[label], in nats; one value for each label, so that tokens can be masked.

    A label outside [0, C) gives NaN, never a plausible number. Raises InputError where shapes or dtypes do not fit.
    """
    require_labels("cross_entropy", logits, labels)
    classes = logits.shape[-1]
    labels = jnp.where(labels < 0, classes, labels)  # Optax would read -1 as the last class
    return optax.softmax_cross_entropy_with_integer_labels(_float32(logits), labels)


def soft_cross_entropy(logits: Array, targets: Array) -> Array:  # [B, ..., C], [B, ..., C] -> [B, ...]
    """−Σ targets · log softmax(logits), in nats; targets are probabilities. 0 · log 0 is 0.

    Raises InputError where the shapes differ.
    """
    _require_same_shape("soft_cross_entropy", logits, targets)
    return optax.safe_softmax_cross_entropy(_float32(logits), _float32(targets))


def smooth_labels(labels: Array, classes: int, smoothing: float) -> Array:  # int [B, ...] -> [B, ..., C]
    """Targets for `soft_cross_entropy`: (1 − smoothing) on the label plus smoothing / C on every class.

    Szegedy et al. 2016 (arXiv:1512.00567), section 7. A label outside [0, C) gives NaN. Raises InputError where
    smoothing is outside [0, 1) or labels are not integers.
    """
    if not 0 <= smoothing < 1:
        raise InputError(f"smooth_labels: smoothing is {smoothing}, expected a fraction in [0, 1); 0.1 is usual")
    _require_integers("smooth_labels", labels)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, classes), smoothing)
    known = (labels >= 0) & (labels < classes)
    return jnp.where(known[..., None], targets, jnp.nan)


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
    """`loss` sees batch["label"] as probabilities [B, ..., C], by `smooth_labels`, instead of integers [B, ...].

    `loss` then calls `soft_cross_entropy`; the true label is still `batch["label"].argmax(-1)`.
    """
    return with_batch(loss, lambda key, batch: {**batch, "label": smooth_labels(batch["label"], classes, smoothing)})


def weighted_sum(terms: Mapping[str, tuple[float, Loss]]) -> Loss:
    """Σ weight · loss over `{name: (weight, loss)}`.

    Metrics hold each term's own value under its name, before weighting, and its metrics under "name/metric". Each term
    gets its own key, and sees the collections that the terms before it returned, so that none of two updates of the
    same batch statistics is lost. Raises InputError where there is no term.
    """
    if not terms:
        raise InputError("weighted_sum: no terms, expected {name: (weight, loss)}; give at least one")

    def total(variables: Tree, batch: Batch, key: Array) -> tuple[Array, tuple[Tree, Metrics]]:
        values, collections, metrics = [], {}, {}
        for key_term, (name, (weight, loss)) in zip(jax.random.split(key, len(terms)), terms.items(), strict=True):
            value, (new, inner) = loss({**variables, **collections}, batch, key_term)
            values.append(weight * value)
            collections = {**collections, **new}
            metrics |= {name: value, **{f"{name}/{k}": v for k, v in inner.items()}}
        return sum(values[1:], values[0]), (collections, metrics)

    return total


def is_kernel(path: jax.tree_util.KeyPath, leaf: Array) -> bool:
    """Whether a parameter is a weight matrix or filter: Flax names these `kernel`. Biases and norm scales are not."""
    return jax.tree_util.keystr(path[-1:], simple=True) == "kernel"


def chosen(params: Tree, where: Where) -> Tree:
    """`params` with a bool in place of each leaf: what `where` chooses. Also a mask for Optax: `adamw(mask=...)`.

    Raises InputError where that is nothing: a penalty or transform without effect is a mistake in the predicate.
    """
    mask = jax.tree_util.tree_map_with_path(lambda path, leaf: bool(where(path, leaf)), params)
    if not any(jax.tree.leaves(mask)):
        paths = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree.leaves_with_path(params)]
        raise InputError(
            f"`where` chooses none of the {len(paths)} parameters ({', '.join([*paths[:4], '...'][: len(paths)])}), "
            "expected at least one; give a predicate (path, leaf) -> bool that fits these names"
        )
    return mask


def l2(loss: Loss, weight: float, where: Where = is_kernel) -> Loss:
    """loss + weight/2 · Σ w² over the chosen parameters: its gradient is weight · w.

    This enters Adam's moments; for decoupled decay use `optax.adamw`. Raises InputError for a negative weight.
    """
    return elastic_net(loss, 0, weight, where)


def l1(loss: Loss, weight: float, where: Where = is_kernel) -> Loss:
    """loss + weight · Σ |w| over the chosen parameters; the gradient at 0 is 0.

    Weights come near zero, not to it: exact zeros need `optim.proximal_elastic_net`. Raises InputError for a negative
    weight.
    """
    return elastic_net(loss, weight, 0, where)


def elastic_net(loss: Loss, l1: float, l2: float, where: Where = is_kernel) -> Loss:
    """loss + l1 · Σ |w| + l2/2 · Σ w² over the chosen parameters (Zou & Hastie 2005, up to the ½).

    Raises InputError for a negative weight and, when traced, where `where` chooses nothing.
    """
    require_penalties("elastic_net", l1, l2)

    def penalised(variables: Tree, batch: Batch, key: Array) -> tuple[Array, tuple[Tree, Metrics]]:
        value, aux = loss(variables, batch, key)
        params = variables["params"]
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(chosen(params, where)), strict=True)
        weights = [_float32(w) for w, yes in pairs if yes]
        if l1:
            value += l1 * sum(jnp.sum(w * jnp.sign(w)) for w in weights)  # the slope of jnp.abs at 0 is 1, of this 0
        if l2:
            value += l2 / 2 * sum(jnp.sum(w**2) for w in weights)
        return value, aux

    return penalised


def require_labels(name: str, logits: Array, labels: Array) -> None:  # [B, ..., C], int [B, ...]
    """Raises InputError, in the name of the function `name`, unless each row of logits has one integer label."""
    if logits.shape[:-1] != labels.shape:
        raise InputError(
            f"{name}: labels {labels.shape} for logits {logits.shape}, expected {logits.shape[:-1]}; "
            "give one class number per example"
        )
    _require_integers(name, labels)


def require_penalties(name: str, l1: float, l2: float) -> None:
    """Raises InputError, in the name of the function `name`, for a negative penalty: it has no minimum."""
    for kind, weight in {"l1": l1, "l2": l2}.items():
        if not weight >= 0:
            raise InputError(f"{name}: {kind} weight is {weight}, expected 0 or more; use 0 for none")


def _float32(x: Array) -> Array:
    """At least float32: bf16 sums and integer differences lose digits."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _mean_per_example(values: Array) -> Array:  # [B, ...] -> [B]
    return values.mean(tuple(range(1, values.ndim)))


def _require_same_shape(name: str, predictions: Array, targets: Array) -> None:
    if predictions.shape != targets.shape:
        raise InputError(
            f"{name}: predictions {predictions.shape}, targets {targets.shape}, expected equal shapes; "
            "reshape one of them"
        )


def _require_integers(name: str, labels: Array) -> None:
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise InputError(
            f"{name}: labels are {labels.dtype}, expected integers; give probabilities to soft_cross_entropy"
        )
