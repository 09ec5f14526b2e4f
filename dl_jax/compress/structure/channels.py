"""Channels of a model that have to be removed together, and the model without some of them."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax.compress.structure import arrays, copies, flow, products, shrink
from dl_jax.compress.structure.identity import Identities
from dl_jax.core import equations
from dl_jax.core.errors import InputError
from dl_jax.core.leaves import Tree, leaf_name

Apply = Callable[..., Any]
Place = tuple[str, int]  # path and axis of a parameter, such as ("params/Conv_0/kernel", 3)
Channel = Mapping[Place, tuple[int, ...]]  # the coordinates that go together, in all parameters that have it
Plan = Mapping[str, Mapping[int, np.ndarray]]  # {path: {axis: the indices that are removed, int, ascending}}


class Groups(NamedTuple):
    """What can be removed from a model, and what cannot.

    A group is named after one of the axes of parameters that its channels lie along: "params/Conv_0/kernel:3".
    """

    free: Mapping[str, tuple[Channel, ...]]  # by group, the channels of which each goes on its own
    frozen: Mapping[Place, str]  # why coordinates of an axis stay
    widths: Mapping[str, int]  # by group, how many inputs and outputs of layers a channel is: of a head, its dimensions
    crossing: Mapping[str, frozenset[str]]  # by group, those with which it shares inputs and outputs of layers


class Followed(NamedTuple):
    """A call of a model with the identities of its coordinates."""

    called: equations.Called
    ids: Identities
    body: flow.Body
    variables: tuple[arrays.Array, ...]


def groups(apply: Apply, variables: Tree, *args: Any, **kwargs: Any) -> Groups:
    """The channels that a call `apply(variables, *args, **kwargs)` allows to remove.

    Arrays may be given as shapes. An output shrinks with a variable, as new batch statistics do, if its path ends in
    that of the variable, which is in a collection and below keys of dicts alone, and their shapes are equal. Other
    outputs keep their shapes. Channels that cross, as heads and their dimensions do, are in different groups.
    """
    found = followed(apply, variables, args, kwargs)
    channels: dict[int, dict[Place, list[int]]] = defaultdict(lambda: defaultdict(list))
    crossed: dict[int, set[tuple[Place, int]]] = defaultdict(set)  # by source, those with which it shares coordinates
    frozen: dict[Place, str] = {}
    for path, array in zip(found.called.paths, found.variables, strict=True):
        for axis, identities in enumerate(array.axes):
            place = leaf_name(path), axis
            for i, each in enumerate([] if isinstance(identities, str) else identities.tolist()):
                if reason := found.ids.reason(each):
                    frozen.setdefault(place, reason)
                sources = sorted(found.ids.sources(each))  # in the order of axes: heads before their dimensions
                for source in sources:
                    channels[source][place].append(i)
                    crossed[source].update((place, other) for other in sources if other != source)
    alike: dict[Any, list[int]] = defaultdict(list)
    for source, channel in channels.items():
        alike[tuple(channel), frozenset(crossed[source])].append(source)
    counts = products.widths(found.ids, found.body)
    free: dict[str, tuple[Channel, ...]] = {}
    widths: dict[str, int] = {}
    group_of: dict[int, str] = {}
    for (places, _), sources in alike.items():
        name = _name(places)
        if same := sum(known.partition("#")[0] == name for known in free):
            name = f"{name}#{same + 1}"
        free[name] = tuple({place: tuple(indices) for place, indices in channels[source].items()} for source in sources)
        widths[name] = math.gcd(*(counts.get(source, 1) for source in sources))
        group_of |= dict.fromkeys(sources, name)
    return Groups(free, frozen, widths, products.crossing(found.ids, found.body, group_of))


def _name(places: tuple[Place, ...]) -> str:
    """The name of a group: a parameter and its axis, of those that make the channels rather than take them."""
    makes = [(path, axis) for path, axis in places if path.startswith("params/")]
    path, axis = max(makes or places, key=lambda place: place[1])
    return f"{path}:{axis}"


def followed(apply: Apply, variables: Tree, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Followed:
    """Traces a call and follows the identities of its variables to its outputs."""
    called = equations.trace(apply, variables, *args, **kwargs)
    called = called._replace(jaxpr=flow.unshared(called.jaxpr))
    ids, invars = Identities(), flow.open_jaxpr(called.jaxpr).invars
    own = tuple(arrays.parameter(ids, v.aval) for v in invars[: len(called.paths)])
    others = [arrays.fixed(v.aval, "an input of the model") for v in invars[len(called.paths) :]]
    body = flow.follow(ids, called.jaxpr, [*own, *others])
    _join_outputs(ids, called, own, body)
    return Followed(called, ids, body, own)


def _join_outputs(ids: Identities, called: equations.Called, own: tuple[arrays.Array, ...], body: flow.Body) -> None:
    """Notes that outputs keep their shapes, but for new values of variables, which shrink with these.

    Places in lists and tuples tell nothing of an output, so only a name in a collection says that it is a variable.
    """
    invars, outvars = flow.open_jaxpr(called.jaxpr).invars, flow.open_jaxpr(called.jaxpr).outvars
    known = {
        path: (variable.aval.shape, array)
        for path, variable, array in zip(called.paths, invars[: len(own)], own, strict=True)
        if len(path) > 1 and all(isinstance(key, jax.tree_util.DictKey) for key in path)
    }
    numbered = jax.tree.unflatten(called.structure, range(called.structure.num_leaves))
    for path, i in jax.tree_util.tree_leaves_with_path(numbered):
        shape, variable = next((known[path[k:]] for k in range(len(path)) if path[k:] in known), (None, None))
        for place, axis in enumerate(body.outputs[i].axes):
            if variable is not None and shape == outvars[i].aval.shape:
                ids.join(axis, variable.axes[place])
            else:
                ids.freeze(axis, "an output of the model")


def removing(channels: Iterable[Channel]) -> Plan:
    """The plan that removes these channels."""
    found: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for channel in channels:
        for (path, axis), indices in channel.items():
            found[path][axis].update(indices)
    return {path: {axis: np.array(sorted(i)) for axis, i in axes.items()} for path, axes in found.items()}


def cut(apply: Apply, variables: Tree, plan: Plan) -> tuple[Apply, Tree]:
    """A model without the channels of a plan: the function, of the signature of `apply`, and its variables.

    The function traces `apply` at the old shapes and runs it at the new ones, whenever it is called.

    Raises InputError where the plan does not fit `variables`, and when a call of the function needs what it removes, or
    gets variables of other shapes.
    """
    sizes = {path: jnp.shape(leaf) for path, leaf in _named(variables).items()}
    if unknown := sorted(set(plan) - set(sizes)):
        raise InputError(
            f"the plan removes coordinates of {unknown[0]}, which the model does not have; make it of this model"
        )
    smaller = shrunk(variables, plan)
    left = {path: jnp.shape(leaf) for path, leaf in _named(smaller).items()}

    @functools.wraps(apply)
    def small(variables: Tree, *args: Any, **kwargs: Any) -> Any:
        def before(path: jax.tree_util.KeyPath, leaf: Any) -> jax.ShapeDtypeStruct:
            name, shape = leaf_name(path), jnp.shape(leaf)
            if shape != left.get(name, shape):
                raise InputError(
                    f"{name} has shape {shape}, expected {left[name]} as the plan leaves it; pass the variables that "
                    "`cut` returned"
                )
            return jax.ShapeDtypeStruct(sizes.get(name, shape), jax.typeof(leaf).dtype)

        found = followed(apply, jax.tree_util.tree_map_with_path(before, variables), args, kwargs)
        kept = kept_by(found, plan)
        inputs = [*jax.tree.leaves(variables), *found.called.others]
        return found.called.result(shrink.run(kept, found.body, inputs))

    return small, smaller


def kept_by(found: Followed, plan: Plan) -> shrink.Kept:
    """What a plan leaves: it removes the independent identities of which it names all coordinates.

    Raises InputError where it names a coordinate that stays.
    """
    planned: dict[Place, frozenset[int]] = {
        (path, axis): frozenset(np.asarray(indices).tolist())
        for path, axes in plan.items()
        for axis, indices in axes.items()
    }
    whole: dict[int, bool] = {}
    coordinates = [
        ((leaf_name(path), axis), i, each)
        for path, array in zip(found.called.paths, found.variables, strict=True)
        for axis, identities in enumerate(array.axes)
        if not isinstance(identities, str)
        for i, each in enumerate(identities.tolist())
    ]
    for place, i, each in coordinates:
        for source in found.ids.sources(each):
            whole[source] = whole.get(source, True) and i in planned.get(place, ())
    removed = frozenset(source for source, yes in whole.items() if yes)
    for place, i, each in coordinates:
        if i in planned.get(place, ()) and removed.isdisjoint(found.ids.sources(each)):
            why = found.ids.reason(each) or "others that the plan keeps go with it"
            raise InputError(f"the plan removes {i} of axis {place[1]} of {place[0]}, which this call needs: {why}")
    return shrink.Kept(found.ids, removed)


def shrunk(tree: Tree, plan: Plan) -> Tree:
    """A tree without the coordinates of a plan: variables, parameters, statistics, or the state of an optimiser.

    The tree may hold copies of the variables: "params/a/kernel" stands for `opt_state[0].mu["a"]["kernel"]`, too.
    `copies.planned` has the rule. Raises InputError where a leaf may be one of two variables, and where one has other
    axes than the plan, as in an optimiser that factors its moments.
    """
    return _mapped(tree, plan, lambda leaf, mask, axis: shrink.compressed(leaf, mask, axis))


def zeroed(tree: Tree, plan: Plan) -> Tree:
    """A tree whose coordinates of a plan are zero, of the old shapes. See `shrunk`."""

    def zero(leaf: Any, mask: np.ndarray, axis: int) -> Any:
        return leaf * mask.reshape([-1 if i == axis else 1 for i in range(leaf.ndim)]).astype(leaf.dtype)

    return _mapped(tree, plan, zero)


def _mapped(tree: Tree, plan: Plan, change: Callable[[Any, np.ndarray, int], Any]) -> Tree:
    def of_leaf(path: jax.tree_util.KeyPath, leaf: Any, axes: copies.Axes) -> Any:
        for axis, indices in axes.items():
            shape = jnp.shape(leaf)
            if axis >= len(shape) or not 0 <= min(indices) <= max(indices) < shape[axis]:
                raise InputError(
                    f"{leaf_name(path)} of shape {shape} does not fit the plan, which removes {max(indices)} of axis "
                    f"{axis}; make the plan for these shapes"
                )
            mask = ~np.isin(np.arange(shape[axis]), indices)
            if not mask.any():
                raise InputError(
                    f"the plan removes all {shape[axis]} of axis {axis} of {leaf_name(path)}, expected that at "
                    "least one is left"
                )
            leaf = change(leaf, mask, axis)
        return leaf

    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    planned = copies.planned([path for path, _ in leaves], plan)
    return jax.tree.unflatten(structure, [of_leaf(*leaf, axes) for leaf, axes in zip(leaves, planned, strict=True)])


def _named(tree: Tree) -> dict[str, Any]:
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def explain(found: Groups) -> str:
    """A report of what can be removed together, and of what stays and why."""
    lines = [f"Groups of channels that can be removed: {len(found.free)}"]
    for name, channels in found.free.items():
        width = found.widths[name]
        lines.append(f"  {name}: {len(channels)} channels{f' of {width} inputs and outputs' if width > 1 else ''}")
        lines.extend(f"    axis {axis} of {path}" for path, axis in channels[0])
    by_reason: dict[str, list[Place]] = defaultdict(list)
    for place, why in found.frozen.items():
        by_reason[why].append(place)
    lines.extend(["", f"Axes that stay, in whole or in part: {len(found.frozen)}"] if found.frozen else [])
    for why, places in by_reason.items():
        lines.append(f"  {why}:")
        lines.extend(f"    axis {axis} of {path}" for path, axis in places)
    return "\n".join(lines)
