"""Magnitude pruning, with masks in the state of the last transform of an Optax chain.

    gradual     optax.chain(optax.adam(1e-3), prune.magnitude(prune.cubic(0.9, begin=1000, end=5000), every=100))
    one shot    params = prune.smallest(trained, 0.9), then train these with optax.chain(..., prune.keep_zeros())
    rewinding   as one shot, but train the initial weights, set to zero where prune.smallest(trained, 0.9) is zero
                (Frankle & Carbin 2019)
    before      params = prune.highest(initial, prune.sensitivity(loss, variables, batch, key), 0.9), then as one shot
                (SNIP, Lee et al. 2019); the control has prune.random_scores(key, initial) in place of the sensitivity

Each layer is pruned to its own sparsity, but by `highest`, which ranks all layers together. A pruned weight is exactly
zero after every later step, also with momentum or weight decay. Masks are bool and part of the optimiser's state, so
they are mapped over seeds, donated and saved like the rest of the state. For layers on different schedules chain one
`magnitude` per schedule, with different `where`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax.core.errors import InputError
from dl_jax.core.leaves import Where, chosen, is_kernel, leaf_name
from dl_jax.core.step import Array, Batch, Loss, Tree

LAST = 2**31 - 1  # the largest step: optimisers count in int32
Sparsity = float | Callable[[jax.tree_util.KeyPath, Array], float]  # fraction of zeros, or (path, leaf) -> fraction


def smallest(params: Tree, sparsity: Sparsity, where: Where = is_kernel) -> Tree:
    """`params` with the round(sparsity · size) weights of smallest magnitude of each chosen layer set to zero.

    Ties are pruned in array order. `sparsity` is that of the result: weights
    that are already zero count as pruned. Map the function over seeds with `jax.vmap`. Raises InputError for a sparsity
    outside [0, 1), and where `where` chooses no parameter.
    """

    def prune(path: jax.tree_util.KeyPath, leaf: Array, yes: bool) -> Array:
        if not yes:
            return leaf
        share = sparsity(path, leaf) if callable(sparsity) else sparsity
        _require_sparsity(f"smallest: sparsity of {leaf_name(path)}", share)
        return jnp.where(_largest(jnp.abs(leaf), round(share * leaf.size)), leaf, 0)

    return jax.tree_util.tree_map_with_path(prune, params, chosen(params, where))


def sensitivity(loss: Loss, variables: Tree, batch: Batch, key: Array) -> Tree:
    """SNIP's score of each parameter, |gradient · weight|, from one batch; a tree of the shapes of the parameters.

    It is the derivative of the loss with respect to a factor of the weight, at factor 1: how much a small change of the
    connection matters (Lee, Ajanthan & Torr 2019, arXiv:1810.02340, section 4, without the common divisor).
    """
    gradients = jax.grad(lambda params: loss({**variables, "params": params}, batch, key)[0])(variables["params"])
    return jax.tree.map(lambda g, w: jnp.abs(g * w), gradients, variables["params"])


def random_scores(key: Array, params: Tree) -> Tree:
    """Scores uniform in [0, 1), of the shapes of `params`: with `highest`, every weight is equally likely to stay."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(structure, [jax.random.uniform(k, w.shape) for k, w in zip(keys, leaves, strict=True)])


def highest(params: Tree, scores: Tree, sparsity: float, where: Where = is_kernel) -> Tree:
    """`params` with the round(sparsity · size) weights of lowest score set to zero, over all chosen layers together.

    `size` is the number of weights in these layers. Ties are pruned in the order of the layers and arrays. `scores` has
    the structure of `params` and no negative numbers; NaN counts as highest. Map the function over seeds with
    `jax.vmap`. Raises InputError for a sparsity outside [0, 1), and where `where` chooses no parameter.
    """
    _require_sparsity("highest: sparsity", sparsity)
    yes = chosen(params, where)
    ranked = [score.ravel() for score, chosen in zip(*map(jax.tree.leaves, (scores, yes)), strict=True) if chosen]
    kept = _largest(jnp.concatenate(ranked), round(sparsity * sum(map(len, ranked))))
    masks = iter(jnp.split(kept, np.cumsum([len(each) for each in ranked])[:-1]))
    return jax.tree.map(lambda w, yes: jnp.where(next(masks).reshape(w.shape), w, 0) if yes else w, params, yes)


def rounds(params: Tree, kept: Sequence[float]) -> Callable[[float], Sparsity]:
    """The schedule of pruning in rounds, as a function progress -> sparsity.

    At progress p the fraction kept[i]^p of the weights of the i-th kernel of `params` is left, so kept[i] at progress
    1. The kernels are sorted by path, as in `nonzeros`: "Conv_0/kernel", "Dense_0/kernel". With equal steps of progress
    each round prunes the same fraction of the weights that are left. Raises InputError unless `kept` has one fraction
    in (0, 1] for each kernel.
    """
    names = list(_layers(params, is_kernel))
    if len(names) != len(kept):
        raise InputError(
            f"rounds: `kept` has {len(kept)} fractions for {len(names)} kernels, expected one for each of "
            f"{', '.join(names)}"
        )
    for share in kept:
        if not 0 <= 1 - share < 1:
            raise InputError(f"rounds: kept has {share}, expected fractions in (0, 1]; 0.1 keeps every tenth weight")
    shares = dict(zip(names, kept, strict=True))
    return lambda progress: lambda path, leaf: 1 - shares[leaf_name(path)] ** progress


def nonzeros(params: Tree, where: Where = is_kernel) -> dict[str, Array]:
    """The number of non-zero weights of each chosen layer, int32 [], by path ("Dense_0/kernel").

    Raises InputError where `where` chooses no parameter.
    """
    return {name: jnp.count_nonzero(leaf) for name, leaf in _layers(params, where).items()}


class Pruned(NamedTuple):
    """State of `keep_zeros`."""

    masks: Tree  # bool, of the parameters' shapes, False where pruned; None for parameters that are not chosen


def keep_zeros(where: Where = is_kernel) -> optax.GradientTransformation:
    """Keeps weights that are zero at init exactly zero. Put it last in the chain.

    With an element-wise optimiser such as Adam the other weights move as if the gradient had been masked. Raises
    InputError, at init, where `where` chooses no parameter.
    """

    def init(params: Tree) -> Pruned:
        return Pruned(jax.tree.map(lambda p, yes: p != 0 if yes else None, params, chosen(params, where)))

    def update(updates: Tree, state: Any, params: Tree | None = None) -> tuple[Tree, Pruned]:
        return _masked(updates, state.masks, _required("keep_zeros", params)), state

    return optax.GradientTransformation(init, update)


class Pruning(NamedTuple):
    """State of `magnitude`."""

    step: Array  # int32 [], number of updates
    sparsity: Array  # float32 [], of the masks
    masks: Tree  # bool, of the parameters' shapes, False where pruned; None for parameters that are not chosen


def magnitude(schedule: optax.Schedule, every: int = 1, where: Where = is_kernel) -> optax.GradientTransformation:
    """Prunes the updated weights by magnitude, to the sparsity that `schedule` gives. Put it last in the chain.

    `schedule` maps the number n of updates to a sparsity in [0, 1) that never falls, as `cubic` does. The masks are
    recomputed after every `every` updates, and after the update at which the schedule stops rising, so that its final
    sparsity is met exactly. Each chosen layer then has round(schedule(n) · size) zeros, computed in float32.

    Raises InputError for `every` < 1, for a schedule whose first or last value is outside [0, 1) and, at init, where
    `where` chooses no parameter.
    """
    if every < 1:
        raise InputError(f"magnitude: every is {every}, expected 1 or more updates between two masks")
    for n in (1, LAST):
        _require_sparsity(f"magnitude: sparsity after update {n}", jnp.asarray(schedule(n), jnp.float32).item())

    def init(params: Tree) -> Pruning:
        masks = jax.tree.map(lambda p, yes: jnp.ones_like(p, bool) if yes else None, params, chosen(params, where))
        return Pruning(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32), masks)

    def update(updates: Tree, state: Any, params: Tree | None = None) -> tuple[Tree, Pruning]:
        params = _required("magnitude", params)
        step = state.step + 1
        share = jnp.asarray(schedule(step), jnp.float32)
        rests = jnp.asarray(schedule(step + 1), jnp.float32) == share
        due = (share > state.sparsity) & ((step % every == 0) | rests)
        reached = jax.tree.map(lambda p, u, m: None if m is None else p + u, params, updates, state.masks)
        masks = _refreshed(due, share, state.masks, reached)
        return _masked(updates, masks, params), Pruning(step, jnp.where(due, share, state.sparsity), masks)

    return optax.GradientTransformation(init, update)


def cubic(final: float, begin: int, end: int, initial: float = 0.0) -> optax.Schedule:
    """The sparsity schedule of gradual pruning, which rises fast at first and slowly later (Zhu & Gupta 2017, eq. 1).

    The sparsity after update n is final + (initial − final) · (1 − (n − begin) / (end − begin))³ from update `begin` to
    update `end`, 0 before and `final` afterwards. Raises InputError for a sparsity outside [0, 1), where `initial` is
    above `final`, and unless 0 <= begin < end.
    """
    for name, share in {"final": final, "initial": initial}.items():
        _require_sparsity(f"cubic: {name} sparsity", share)
    if initial > final:
        raise InputError(f"cubic: sparsity from {initial} to {final}, expected a rise: a pruned weight stays zero")
    if not 0 <= begin < end:
        raise InputError(f"cubic: begin is {begin} and end is {end}, expected 0 <= begin < end, in updates")

    def schedule(step: Any) -> Array:
        left = 1 - jnp.clip((step - begin) / (end - begin), 0, 1)
        return jnp.where(step < begin, 0, final + (initial - final) * left**3)

    return schedule


def _masked(updates: Tree, masks: Tree, params: Tree) -> Tree:
    """The updates, with −p for each pruned weight p, since p + (−p) is exactly 0."""
    return jax.tree.map(lambda u, p, m: u if m is None else jnp.where(m, u, -p), updates, params, masks)


@jax.jit  # outside of a jitted function, each of its operations would be compiled by itself
def _largest(magnitudes: Array, dropped: Any) -> Array:
    """A mask of the shape of `magnitudes` that is False at the `dropped` smallest.

    Ties are dropped in array order. Negative entries count as smallest; there may be at most `dropped` of them.
    """
    width = 8 * magnitudes.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(magnitudes.ravel(), f"int{width}")  # in the order of the magnitudes
    below = lambda bound: (bits < bound).sum()

    def halve(i: Array, least: Array) -> Array:
        higher = least | (jnp.ones_like(least) << (width - 2 - i).astype(least.dtype))
        return jnp.where(below(higher) <= dropped, higher, least)

    # Finds the magnitude of rank `dropped` by bisection over its bits: on a CPU in a tenth of the time of a sort.
    least = jax.lax.fori_loop(0, width - 1, halve, jnp.zeros((), bits.dtype))
    first = jnp.cumsum(bits == least) <= dropped - below(least)
    return ~((bits < least) | (bits == least) & first).reshape(magnitudes.shape)


def _shrunk(share: Array, masks: Tree, weights: Tree) -> Tree:
    """The masks that keep the largest weights at sparsity `share` []; weights that `masks` prune stay pruned."""

    def shrink(mask: Array, weight: Array) -> Array:
        return _largest(jnp.where(mask, jnp.abs(weight), -1), jnp.round(share * weight.size))

    return jax.tree.map(shrink, masks, weights)


@jax.custom_batching.custom_vmap
def _refreshed(due: Array, share: Array, masks: Tree, weights: Tree) -> Tree:
    """New masks of sparsity `share` [] where `due` (bool []) is true, else the old `masks`."""
    return jax.lax.cond(due, _shrunk, lambda share, masks, weights: masks, share, masks, weights)


@_refreshed.def_vmap
def _refreshed_seeds(seeds: int, mapped: Any, *arguments: Any) -> tuple[Tree, Tree]:
    """The batching rule of `_refreshed`: it ranks weights only at steps where a seed's masks are due.

    Under `vmap`, `lax.cond` becomes a select that computes both branches, and would rank the weights at every step.
    """
    stacked = lambda x, yes: x if yes else jnp.broadcast_to(x, (seeds, *x.shape))
    due, share, masks, weights = jax.tree.map(stacked, arguments, tuple(mapped))

    def refresh(due: Array, share: Array, masks: Tree, weights: Tree) -> Tree:
        return jax.tree.map(lambda new, old: jnp.where(due, new, old), _shrunk(share, masks, weights), masks)

    masks = jax.lax.cond(
        due.any(), jax.vmap(refresh), lambda due, share, masks, weights: masks, due, share, masks, weights
    )
    return masks, jax.tree.map(lambda mask: True, masks)


def _layers(params: Tree, where: Where) -> dict[str, Any]:
    """The chosen parameters by path."""
    leaves = zip(jax.tree.leaves_with_path(params), jax.tree.leaves(chosen(params, where)), strict=True)
    return {leaf_name(path): leaf for (path, leaf), yes in leaves if yes}


def _required(name: str, params: Tree | None) -> Tree:
    if params is None:
        raise ValueError(f"{name}: update got no params, expected the current parameters; call tx.update(..., params)")
    return params


def _require_sparsity(name: str, share: float) -> None:
    if not 0 <= share < 1:
        raise InputError(f"{name} is {share}, expected a fraction of zeros in [0, 1); 0.9 keeps every tenth weight")
