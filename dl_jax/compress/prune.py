"""Magnitude pruning: masks as the last transform of an Optax chain, so that no loop and no model knows of them.

    gradual     optax.chain(optax.adam(1e-3), prune.magnitude(prune.cubic(0.9, begin=1000, end=5000), every=100))
    one shot    params = prune.smallest(trained, 0.9), then train on with optax.chain(..., prune.keep_zeros())
    rewinding   the same from `start` where `prune.smallest(trained, 0.9)` is not zero (Frankle & Carbin 2019)

Layers are pruned one by one. A pruned weight is exactly zero after every step, whatever momentum or weight decay want,
and stays so. Masks are bool and in the optimiser's state: mapped over seeds, donated and saved like the rest of it.
For layers on different schedules put one `magnitude` for each after the other, with different `where`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dl_jax.core.errors import InputError
from dl_jax.core.leaves import Where, chosen, is_kernel
from dl_jax.core.step import Array, Tree

LAST = 2**31 - 1  # the largest int32, in which optimisers count
Sparsity = float | Callable[[jax.tree_util.KeyPath, Array], float]  # share of zeros; a function of path and layer


def smallest(params: Tree, sparsity: Sparsity, where: Where = is_kernel) -> Tree:
    """`params` with the round(sparsity · size) weights of least magnitude of each chosen layer set to zero.

    That many also among equal weights, of which the first go first. Zeros from before count as pruned: sparsity is
    that of the result. Map it over seeds with `jax.vmap`. Raises InputError for a sparsity outside [0, 1), and where
    `where` chooses nothing.
    """

    def prune(path: jax.tree_util.KeyPath, leaf: Array, yes: bool) -> Array:
        if not yes:
            return leaf
        share = sparsity(path, leaf) if callable(sparsity) else sparsity
        _require_sparsity(f"smallest: sparsity of {_name(path)}", share)
        return jnp.where(_largest(jnp.abs(leaf), round(share * leaf.size)), leaf, 0)

    return jax.tree_util.tree_map_with_path(prune, params, chosen(params, where))


def rounds(params: Tree, kept: Sequence[float]) -> Callable[[float], Sparsity]:
    """progress -> sparsity, for pruning in rounds: each takes the same fraction of what the one before left.

    At progress 1 the share `kept[i]` is left of the i-th kernel of `params`, at progress p its power kept[i]^p. Raises
    InputError unless there is one share in (0, 1] for each kernel.
    """
    names = list(_layers(params, is_kernel))
    if len(names) != len(kept):
        raise InputError(
            f"rounds: {len(kept)} shares are kept of {len(names)} kernels, expected one for each of {', '.join(names)}"
        )
    for share in kept:
        _require_sparsity("rounds: 1 - the share that is kept", 1 - share)
    shares = dict(zip(names, kept, strict=True))
    return lambda progress: lambda path, leaf: 1 - shares[_name(path)] ** progress


def nonzeros(params: Tree, where: Where = is_kernel) -> dict[str, Array]:
    """{path: weights that are not zero, int32 []} of the chosen layers, "Dense_0/kernel" and so on.

    Raises InputError where `where` chooses nothing.
    """
    return {name: jnp.count_nonzero(leaf) for name, leaf in _layers(params, where).items()}


class Pruned(NamedTuple):
    """State of `keep_zeros`."""

    masks: Tree  # bool, like the parameters; None where none is pruned


def keep_zeros(where: Where = is_kernel) -> optax.GradientTransformation:
    """Weights that are zero at init stay zero, exactly. Goes last in the chain.

    With an optimiser that treats each weight on its own, the others move as if the gradient had been masked. Raises
    InputError, at init, where `where` chooses nothing.
    """

    def init(params: Tree) -> Pruned:
        return Pruned(jax.tree.map(lambda p, yes: p != 0 if yes else None, params, chosen(params, where)))

    def update(updates: Tree, state: Any, params: Tree | None = None) -> tuple[Tree, Pruned]:
        return _masked(updates, state.masks, _required("keep_zeros", params)), state

    return optax.GradientTransformation(init, update)


class Pruning(NamedTuple):
    """State of `magnitude`."""

    step: Array  # int32 []
    sparsity: Array  # float32 [], of the masks
    masks: Tree  # bool, like the parameters; None where none is pruned


def magnitude(schedule: optax.Schedule, every: int = 1, where: Where = is_kernel) -> optax.GradientTransformation:
    """Prunes the weights that the chain before it reached, by magnitude, along `schedule`. Goes last in the chain.

    After update n each chosen layer has round(schedule(n) · size) zeros, reckoned in float32: `schedule` gives a share
    in [0, 1) that does not fall, as `cubic` does. The masks follow it at every multiple of `every` updates, and where
    it comes to rest, so that its end is met exactly.

    Raises InputError for `every` < 1, for a schedule whose first or last share is outside [0, 1) and, at init, where
    `where` chooses nothing.
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
    """Sparsity of gradual pruning: it rises fast at first, while there is much to spare (Zhu & Gupta 2017, eq. 1).

    final + (initial − final) · (1 − (n − begin) / (end − begin))³ from update `begin` to `end`, 0 before, `final`
    after. Raises InputError for sparsities outside [0, 1) or that fall, and where `end` is not after `begin`.
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
    """Updates that take what is pruned to zero: p + (−p) is exactly 0."""
    return jax.tree.map(lambda u, p, m: u if m is None else jnp.where(m, u, -p), updates, params, masks)


def _largest(magnitudes: Array, dropped: Any) -> Array:
    """bool, like `magnitudes`: all but the `dropped` smallest; of equal ones the first are dropped first.

    Negative numbers, of which there are at most `dropped`, are smaller than every magnitude.
    """
    width = 8 * magnitudes.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(magnitudes.ravel(), f"int{width}")  # in the order of the magnitudes
    below = lambda bound: (bits < bound).sum()

    def halve(i: Array, least: Array) -> Array:
        higher = least | (jnp.ones_like(least) << (width - 2 - i).astype(least.dtype))
        return jnp.where(below(higher) <= dropped, higher, least)

    # Bit by bit, the magnitude that `dropped` others are below: a tenth of the time of sorting them on a CPU.
    least = jax.lax.fori_loop(0, width - 1, halve, jnp.zeros((), bits.dtype))
    first = jnp.cumsum(bits == least) <= dropped - below(least)
    return ~((bits < least) | (bits == least) & first).reshape(magnitudes.shape)


def _shrunk(share: Array, masks: Tree, weights: Tree) -> Tree:
    """The masks of `weights` at sparsity `share` [], within `masks`."""

    def shrink(mask: Array, weight: Array) -> Array:
        return _largest(jnp.where(mask, jnp.abs(weight), -1), jnp.round(share * weight.size))

    return jax.tree.map(shrink, masks, weights)


@jax.custom_batching.custom_vmap
def _refreshed(due: Array, share: Array, masks: Tree, weights: Tree) -> Tree:
    """New masks if `due`, else `masks`."""
    return jax.lax.cond(due, _shrunk, lambda share, masks, weights: masks, share, masks, weights)


@_refreshed.def_vmap
def _refreshed_seeds(seeds: int, mapped: Any, *arguments: Any) -> tuple[Tree, Tree]:
    """A mapped condition computes both of its branches: the weights would be ranked at every step."""
    stacked = lambda x, yes: x if yes else jnp.broadcast_to(x, (seeds, *x.shape))
    due, share, masks, weights = jax.tree.map(stacked, arguments, tuple(mapped))

    def refresh(due: Array, share: Array, masks: Tree, weights: Tree) -> Tree:
        return jax.tree.map(lambda new, old: jnp.where(due, new, old), _shrunk(share, masks, weights), masks)

    masks = jax.lax.cond(
        due.any(), jax.vmap(refresh), lambda due, share, masks, weights: masks, due, share, masks, weights
    )
    return masks, jax.tree.map(lambda mask: True, masks)


def _layers(params: Tree, where: Where) -> dict[str, Any]:
    """The chosen leaves by path."""
    leaves = zip(jax.tree.leaves_with_path(params), jax.tree.leaves(chosen(params, where)), strict=True)
    return {_name(path): leaf for (path, leaf), yes in leaves if yes}


def _name(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _required(name: str, params: Tree | None) -> Tree:
    if params is None:
        raise ValueError(f"{name}: update got no params, expected those that the updates are added to")
    return params


def _require_sparsity(name: str, share: float) -> None:
    if not 0 <= share < 1:
        raise InputError(f"{name} is {share}, expected a share of zeros in [0, 1); 0.9 keeps every tenth weight")
