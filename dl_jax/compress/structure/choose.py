"""Which channels to remove: scores of channels, costs of what is left, and plans that meet a budget."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from dl_jax.compress import measure
from dl_jax.compress.structure import shrink
from dl_jax.compress.structure.channels import Apply, Channel, Groups, Plan, cut, followed, kept_by, removing, shrunk
from dl_jax.core import flops
from dl_jax.core.errors import InputError
from dl_jax.core.leaves import Tree, leaf_name

Scores = Mapping[str, np.ndarray]  # by group, float64 [channels]; the lowest go first
Cost = Callable[[Plan], float]


# scores


def l1(found: Groups, variables: Tree) -> Scores:
    """The mean magnitude of a channel's weights (Li et al. 2017, where it is a sum over a filter).

    Weights are parameters of two or more axes: kernels and embeddings, both where they make the channel and where they
    take it.
    """
    return _means(found, {name: np.abs(leaf) for name, leaf in _weights(variables).items()})


def l2(found: Groups, variables: Tree) -> Scores:
    """The root of the mean square of a channel's weights, which are those of `l1`."""
    means = _means(found, {name: leaf**2 for name, leaf in _weights(variables).items()})
    return {name: np.sqrt(mean) for name, mean in means.items()}


def norm_scale(found: Groups, variables: Tree) -> Scores:
    """The mean magnitude of the scales of a channel's normalisations (Liu et al. 2017, arXiv:1708.06519).

    Scales are parameters of one axis named "scale". Groups without any are left out, and so remain whole.
    """
    params = _params(variables)
    scales = {name: np.abs(leaf) for name, leaf in params.items() if name.endswith("/scale") and leaf.ndim == 1}
    return _means(found, scales)


def taylor(found: Groups, loss: Callable[[Tree, Any], jax.Array], variables: Tree, batches: Iterable[Any]) -> Scores:
    """The square of the first-order change of the loss when a channel is removed (Molchanov et al. 2019, eq. 8).

    That is the sum of gradient times parameter over the channel's parameters, squared, and added up over the batches.
    `loss(variables, batch)` is a number. Raises InputError where there are no batches.
    """
    gradient = jax.jit(jax.grad(lambda params, batch: loss({**variables, "params": params}, batch)))
    params, totals = _params(variables), {name: np.zeros(len(channels)) for name, channels in found.free.items()}
    empty = True
    for batch in batches:
        empty = False
        grads = _params({"params": gradient(variables["params"], batch)})
        sums = _sums(found, {name: leaf * grads[name] for name, leaf in params.items()})
        totals = {name: total + np.array([part for part, _ in sums[name]]) ** 2 for name, total in totals.items()}
    if empty:
        raise InputError("taylor: there are no batches, expected one or more; the scores would all be 0")
    return totals


def random(found: Groups, seed: int) -> Scores:
    """Scores uniform in [0, 1): the baseline."""
    draws = np.random.default_rng(seed)
    return {name: draws.random(len(channels)) for name, channels in found.free.items()}


def _params(variables: Tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path({"params": variables["params"]})
    return {leaf_name(path): np.asarray(leaf, np.float64) for path, leaf in leaves}


def _weights(variables: Tree) -> dict[str, np.ndarray]:
    return {name: leaf for name, leaf in _params(variables).items() if leaf.ndim > 1}


def _means(found: Groups, leaves: Mapping[str, np.ndarray]) -> Scores:
    """The mean of the numbers of each channel that stand in `leaves`; groups without such numbers are left out."""
    sums = {name: np.array(each) for name, each in _sums(found, leaves).items()}
    return {name: each[:, 0] / each[:, 1] for name, each in sums.items() if each[:, 1].all()}


def _sums(found: Groups, leaves: Mapping[str, np.ndarray]) -> dict[str, list[tuple[float, int]]]:
    """By group, of each channel: the sum of its numbers in `leaves`, and how many they are."""
    places = {place for channels in found.free.values() for channel in channels for place in channel}
    along = {
        (path, axis): leaves[path].sum(tuple(i for i in range(leaves[path].ndim) if i != axis))
        for path, axis in places
        if path in leaves
    }

    def total(channel: Channel) -> tuple[float, int]:
        own = [(place, list(indices)) for place, indices in channel.items() if place in along]
        count = sum(len(indices) * leaves[place[0]].size // len(along[place]) for place, indices in own)
        return sum(float(along[place][indices].sum()) for place, indices in own), count

    return {name: [total(channel) for channel in channels] for name, channels in found.free.items()}


# costs


def parameters(variables: Tree) -> Cost:
    """The number of parameters that a plan leaves."""
    params = {"params": variables["params"]}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    return lambda plan: sum(leaf.size for leaf in jax.tree.leaves(shrunk(shapes, plan)))


def operations(apply: Apply, variables: Tree, *args: Any, **kwargs: Any) -> Cost:
    """The floating-point operations of a call `apply(variables, *args, **kwargs)` that a plan leaves."""
    found = followed(apply, variables, args, kwargs)
    return lambda plan: flops.flops(shrink.traced(kept_by(found, plan), found.body))


def seconds(apply: Apply, variables: Tree, *args: Any, rounds: int = 100, **kwargs: Any) -> Cost:
    """The median latency of a call `apply(variables, *args, **kwargs)`, jitted, that a plan leaves, on this machine."""
    call = functools.partial(apply, **kwargs)

    def cost(plan: Plan) -> float:
        small, smaller = cut(call, variables, plan)
        return measure.latency({"": jax.jit(small)}, smaller, *args, rounds=rounds)[""].p50

    return cost


# plans


def lowest(found: Groups, scores: Scores, share: float | Mapping[str, float], multiple: int = 1) -> Plan:
    """The plan that removes the share of each group that has the lowest scores.

    `share` is one fraction for all groups that have scores, or {group: fraction}. So many channels of a group are left
    that the inputs and the outputs of layers which they are, together, are a multiple of `multiple`; 8 or 16 suit most
    processors. A channel of a convolution is one of them, a head of 64 dimensions 64, and a group of a grouped
    convolution as many as it has maps (`Groups.widths`). The number is rounded up; a group without such a number stays.
    Heads and their dimensions cross, so that what is left of one changes how many the other is: there the narrower
    channels, here the dimensions, are a multiple whatever heads are left.

    Raises InputError for a share outside [0, 1), a group that cannot shrink, and scores that are not finite.
    """
    shares = dict(share) if isinstance(share, Mapping) else dict.fromkeys(scores, share)
    counts = {}
    for name, fraction in shares.items():
        if not 0 <= fraction < 1:
            raise InputError(
                f"the share of {name} is {fraction}, expected a fraction of its channels in [0, 1); 0.5 removes half"
            )
        counts[name] = round(fraction * _size(found, scores, name))
    return _plan(found, scores, counts, multiple)


def within(found: Groups, scores: Scores, cost: Cost, budget: float, multiple: int = 1) -> Plan:
    """The plan that removes the fewest channels, the lowest scores of all groups first, so that cost(plan) <= budget.

    What a group keeps is a multiple of `multiple`, as in `lowest`. The cost is asked for about log2(channels) plans.
    Raises InputError where the budget cannot be met, and says what stands in the way, and for scores that are not
    finite.
    """
    ranked = sorted((score, name) for name, each in scores.items() for score in each.tolist())

    def plan(n: int, multiple: int = multiple) -> Plan:
        counts = dict.fromkeys(scores, 0)
        for _, name in ranked[:n]:
            counts[name] += 1
        return _plan(found, scores, counts, multiple)

    low, high = 0, len(ranked)
    if not (least := cost(plan(high))) <= budget:  # nor for a budget that is NaN
        if not ranked:
            where, then = "nothing can be removed", "raise the budget; `explain` tells why axes stay"
        elif multiple > 1 and cost(plan(high, multiple=1)) <= budget:
            where = f"every group is as small as the multiple {multiple} lets it be"
            then = "raise the budget, or lower the multiple"
        else:
            where = "every group is as small as it can be"
            then = "raise the budget; a lower multiple is not enough, and `explain` tells why axes stay"
        raise InputError(f"the cost is {least:g} where {where}, expected at most {budget:g}; {then}")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(plan(middle)) <= budget else (middle + 1, high)
    return plan(high)


def _plan(found: Groups, scores: Scores, counts: Mapping[str, int], multiple: int) -> Plan:
    """Removes so many channels of the groups, less where a group would not keep a multiple of `multiple`."""
    if not isinstance(multiple, int | np.integer) or multiple < 1:
        raise InputError(f"multiple is {multiple}, expected a whole number of inputs and outputs of layers, 1 or more")
    for name in counts:
        if name in scores and not np.isfinite(scores[name]).all():
            raise InputError(
                f"the scores of {name} are not all finite, expected numbers; look for NaN in its parameters"
            )
    gone: list[Channel] = []
    for name, count in counts.items():
        size = _size(found, scores, name)
        step = multiple // math.gcd(multiple, _width(found, name, counts))  # channels that are a multiple together
        left = min(size, max(1, -(-(size - count) // step)) * step)
        order = np.argsort(scores[name], kind="stable")
        gone.extend(found.free[name][i] for i in order[: size - left])
    return removing(gone)


def _width(found: Groups, name: str, shrinking: Iterable[str]) -> int:
    """How many inputs and outputs of layers a channel is, at least, whatever is left of wider channels that cross it.

    The wider ones, such as heads, may count on all narrower ones, or on a multiple of these: their dimensions.
    """
    rank = lambda name: (-found.widths[name], name)
    wider = [other for other in found.crossing[name].intersection(shrinking) if rank(other) < rank(name)]
    width = found.widths[name]
    return width // math.gcd(width, math.prod(len(found.free[other]) for other in wider))


def _size(found: Groups, scores: Scores, name: str) -> int:
    if name not in found.free:
        path, _, axis = name.rpartition(":")
        why = found.frozen.get((path, int(axis) if axis.isdecimal() else -1), "there is no such group")
        raise InputError(f"{name} cannot shrink: {why}; `explain` lists the groups")
    if name not in scores:
        raise InputError(f"there are no scores of {name}, expected some for each group with a share; leave it out")
    return len(found.free[name])
