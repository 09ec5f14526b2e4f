"""Optimiser parts that Optax lacks: a schedule, gradient transformations for Optax chains, and early stopping."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax.core.errors import InputError, nearest, require_positive
from dl_jax.core.leaves import Where, at_least_float32, chosen, is_kernel
from dl_jax.core.recorder import Measurements, StopRule
from dl_jax.core.step import Array, Tree
from dl_jax.losses import require_penalties


def warmup_cosine(peak: float, steps: int, warmup: float = 0.05, final: float = 0.0) -> optax.Schedule:
    """A learning rate schedule over `steps` steps: linear warm-up to `peak`, then cosine decay to `final`.

    `warmup` is the fraction of the steps in which the rate rises. With w = round(warmup · steps), the rate at step s is
    peak · (s + 1) / (w + 1) up to step w, so that it is not 0 at step 0. After that it is
    final + (peak − final)/2 · (1 + cos(π (s − w) / (steps − w))) (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5),
    and from s = steps on it is `final`.

    Raises InputError where `peak` is not positive, `steps` < 1 or `warmup` is outside [0, 1).
    """
    require_positive({"the learning rate": peak})
    if steps < 1:
        raise InputError(f"warmup_cosine: steps is {steps}, expected 1 or more; give the length of the run")
    if not 0 <= warmup < 1:
        raise InputError(f"warmup_cosine: warmup is {warmup}, expected a fraction of the run in [0, 1); 0.05 is usual")
    w = min(round(warmup * steps), steps - 1)
    return optax.warmup_cosine_decay_schedule(peak / (w + 1), peak, w, steps, final)


def clipped_sgd(
    peak: float, steps: int, momentum: float, clip: float, warmup: float = 0.05
) -> optax.GradientTransformation:
    """SGD with momentum for a run of `steps` at the rates of `warmup_cosine`, after clipping the gradient's norm.

    `clip` is the largest Euclidean norm of the whole gradient. Raises InputError as `warmup_cosine` does.
    """
    sgd = optax.sgd(warmup_cosine(peak, steps, warmup), momentum)
    return optax.chain(optax.clip_by_global_norm(clip), sgd)


def frozen(tx: optax.GradientTransformation, where: Where) -> optax.GradientTransformation:
    """Applies `tx` to all parameters except those that `where` chooses, which stay bit-identical.

    Frozen parameters have no optimiser state. Wrap the whole chain, so that weight decay does not change them either.
    Raises InputError, at init, where `where` chooses no parameter.
    """
    # Adding -0.0 changes no number. optax.set_to_zero adds 0.0, and -0.0 + 0.0 is 0.0.
    keep = optax.stateless(lambda updates, params: jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates))

    def labels(params: Tree) -> Tree:
        return jax.tree.map(lambda yes: "frozen" if yes else "trained", chosen(params, where))

    return optax.partition({"trained": tx, "frozen": keep}, labels)


class ProximalState(NamedTuple):
    """State of `proximal_elastic_net`."""

    step: Array  # int32 []


def proximal_elastic_net(
    learning_rate: optax.ScalarOrSchedule, l1: float, l2: float = 0.0, where: Where = is_kernel
) -> optax.GradientTransformation:
    """Applies the proximal operator of t · (l1 · Σ |w| + l2/2 · Σ w²) to the updated weights. Put it last in the chain.

    w ← sign(z) · max(|z| − t·l1, 0) / (1 + t·l2), where z = w + update and t is the learning rate (Parikh & Boyd 2014,
    "Proximal Algorithms", section 6.5). Its zeros are exact. After `optax.sgd(t)` this is proximal gradient descent
    (ISTA, Beck & Teboulle 2009) and has the minimiser of `losses.elastic_net`. After an adaptive optimiser it is a
    decoupled shrinkage, like the weight decay of AdamW.

    Raises InputError where `l1` or `l2` is negative and, at init, where `where` chooses no parameter.
    """
    require_penalties("proximal_elastic_net", l1, l2)

    def init(params: Tree) -> ProximalState:
        chosen(params, where)
        return ProximalState(jnp.zeros([], jnp.int32))

    def update(updates: Tree, state: Any, params: Tree | None = None) -> tuple[Tree, ProximalState]:
        if params is None:
            raise ValueError(
                "proximal_elastic_net: update got no params, expected the current parameters; "
                "call tx.update(..., params)"
            )
        t = jnp.asarray(learning_rate(state.step) if callable(learning_rate) else learning_rate)

        def shrink(p: Array, u: Array, yes: bool) -> Array:
            if not yes:
                return u
            z = at_least_float32(p) + at_least_float32(u)
            new = jnp.sign(z) * jnp.maximum(jnp.abs(z) - t * l1, 0) / (1 + t * l2)
            return (new - p).astype(jnp.promote_types(p.dtype, u.dtype))  # p + (0 - p) is exactly 0

        updates = jax.tree.map(shrink, params, updates, chosen(params, where))
        return updates, ProximalState(state.step + 1)

    return optax.GradientTransformation(init, update)


def max_norm(limit: float, where: Where = is_kernel) -> optax.GradientTransformation:
    """Limits the Euclidean norm of each unit's incoming weights to `limit` after an update. Put it last in the chain.

    A unit is an index of the last axis of a kernel. Weights of a larger norm are scaled to the norm `limit` (Srebro &
    Shraibman 2005; with dropout Hinton et al. 2012, arXiv:1207.0580, section 2). Raises InputError where `limit` is
    not positive and, at init, where `where` chooses no parameter.
    """
    if not limit > 0:
        raise InputError(f"max_norm: limit is {limit}, expected a positive norm; leave the transform out for none")

    def init(params: Tree) -> optax.EmptyState:
        chosen(params, where)
        return optax.EmptyState()

    def update(updates: Tree, state: Any, params: Tree | None = None) -> tuple[Tree, optax.EmptyState]:
        if params is None:
            raise ValueError(
                "max_norm: update got no params, expected the current parameters; call tx.update(..., params)"
            )

        def project(p: Array, u: Array, yes: bool) -> Array:
            if not yes:
                return u
            new = at_least_float32(p) + at_least_float32(u)  # [..., units]
            squares = jnp.sum(new**2, axis=tuple(range(new.ndim - 1)), keepdims=True)
            over = squares > limit**2
            shrunk = new * limit * jax.lax.rsqrt(jnp.where(over, squares, 1.0)) - p
            return jnp.where(over, shrunk.astype(jnp.promote_types(p.dtype, u.dtype)), u)

        return jax.tree.map(project, params, updates, chosen(params, where)), state

    return optax.GradientTransformation(init, update)


class AverageState(NamedTuple):
    """State of `averaged`."""

    step: Array  # int32 []
    average: Tree  # like the parameters


def averaged(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the weights, which `average` returns. Put it last in the chain.

    After step t = 0, 1, ... the average moves by 1 - min(decay, (1 + t) / (10 + t)) towards the updated weights, so
    that the first weights are soon forgotten (TensorFlow's ExponentialMovingAverage with `num_updates`). The updates
    are left as they are. Raises InputError where `decay` is outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise InputError(f"averaged: decay is {decay}, expected a number in [0, 1); 0.999 is usual")

    def init(params: Tree) -> AverageState:
        return AverageState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.asarray, params))

    def update(updates: Tree, state: Any, params: Tree | None = None) -> tuple[Tree, AverageState]:
        if params is None:
            raise ValueError(
                "averaged: update got no params, expected the current parameters; call tx.update(..., params)"
            )
        rate = 1 - jnp.minimum(decay, (1 + state.step) / (10 + state.step))
        move = lambda mean, p: (mean + rate * (at_least_float32(p) - mean)).astype(mean.dtype)
        return updates, AverageState(
            state.step + 1, jax.tree.map(move, state.average, optax.apply_updates(params, updates))
        )

    return optax.GradientTransformation(init, update)


def average(opt_state: Tree) -> Tree:
    """The average of the weights in the state of a chain with `averaged`."""
    return optax.tree.get(opt_state, "average")


class Stopping(NamedTuple):
    """State of `early_stopping`: numpy arrays, [] or [S], saved with the training state."""

    best: np.ndarray  # float32, the best measurement; infinite before the first finite one
    best_step: np.ndarray  # int32, its step; -1 before the first finite measurement
    waited: np.ndarray  # int32, number of measurements since the best one
    stopped: np.ndarray  # bool


def early_stopping(
    metric: str, patience: int, min_delta: float = 0.0, *, mode: Literal["min", "max"], seeds: int | None = None
) -> StopRule:
    """Stops after `patience` measurements in a row that do not improve the best one by more than `min_delta`.

    `metric` names the measurement, and `mode` says whether its lowest or its highest value is best. NaN and infinity
    are never an improvement. `seeds` is the number S of seeds under `per_seed`: the measurement is then [S], each seed
    stops independently, and the state is [S] from the start, so that a checkpoint can be restored into it. Comparisons
    are made in float32, the type in which the best value is saved, so that a resumed run decides as an uninterrupted
    one.

    Raises InputError where `patience` < 1, `min_delta` < 0 or `mode` is unknown, and in `update` where the metric was
    not measured or has another shape.
    """
    if patience < 1:
        raise InputError(f"early_stopping: patience is {patience}, expected 1 or more measurements without improvement")
    if not min_delta >= 0:
        raise InputError(f"early_stopping: min_delta is {min_delta}, expected 0 or more, in the unit of the metric")
    if mode not in ("min", "max"):
        raise InputError(f"early_stopping: mode is {mode!r}, expected 'min' or 'max'")
    sign = np.float32(1 if mode == "min" else -1)
    shape = () if seeds is None else (seeds,)

    def init() -> Stopping:
        return Stopping(
            best=np.full(shape, sign * np.inf, np.float32),
            best_step=np.full(shape, -1, np.int32),
            waited=np.zeros(shape, np.int32),
            stopped=np.zeros(shape, bool),
        )

    def update(state: Stopping, measured: Measurements, step: int) -> Stopping:
        value = _measured(measured, metric, shape)
        before = np.asarray(state.best, np.float32)
        stopped = np.asarray(state.stopped)
        better = np.isfinite(value) & (sign * value < sign * before - np.float32(min_delta)) & ~stopped
        waited = np.where(better, 0, np.asarray(state.waited) + ~stopped)
        return Stopping(
            best=np.where(better, value, before).astype(np.float32),
            best_step=np.where(better, step, state.best_step).astype(np.int32),
            waited=waited.astype(np.int32),
            stopped=np.asarray(waited >= patience),  # permanent: `waited` and `best` of a stopped seed do not change
        )

    return StopRule(init, update)


def _measured(measured: Measurements, metric: str, shape: tuple[int, ...]) -> np.ndarray:  # -> float32 [] or [S]
    if metric not in measured:
        known = ", ".join(sorted(measured))
        raise InputError(
            f"early_stopping: {metric!r} is not measured, expected one of {known}{nearest(metric, measured)}"
        )
    with np.errstate(over="ignore"):
        value = np.asarray(measured[metric]).astype(np.float32)
    if value.shape != shape:
        raise InputError(
            f"early_stopping: {metric!r} has shape {value.shape}, expected {shape}; "
            "pass seeds = the number of seeds, or None for a single run"
        )
    return value
