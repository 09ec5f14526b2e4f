"""Which variables of a plan the leaves of another tree are: gradients, averages, or the state of an optimiser."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from jax.tree_util import DictKey, KeyPath, SequenceKey

from dl_jax.core.errors import InputError
from dl_jax.core.leaves import leaf_name

Axes = Mapping[int, np.ndarray]  # {axis: the indices that are removed}
Collections = Mapping[str, Mapping[str, Axes]]  # {collection: {path in it: what is removed}}


def planned(paths: Sequence[KeyPath], plan: Mapping[str, Axes]) -> list[Axes]:
    """What a plan removes from the leaves of a tree, which holds copies of the variables.

    Variables are in collections if a path of the plan begins with "params/"; a copy is then of one collection, and
    otherwise of all variables. A copy begins below the name of its collection. One without this name, and one of
    variables without collections, begins at the root, at an attribute (such as `mu` of Adam's state), or at an item of
    sequences from there on, never below a key of a dict, which would be a submodule.

    A leaf of a copy that has all paths of the plan is the variable of its path in the outermost such copy. Parts of a
    copy, as optimisers of some parameters have, are known by names alone: below the name of the collection, or if the
    path in the copy begins with a key of a dict.

    Raises InputError where a leaf may be one of two variables, or an item of a part that its path does not tell.
    """
    collections = _collections(plan)
    inside: dict[KeyPath, set[str]] = defaultdict(set)
    for path in paths:
        for start in range(len(path)):
            inside[path[:start]].add(leaf_name(path[start:]))
    whole = {(root, name) for root, own in inside.items() for name, copy in collections.items() if copy.keys() <= own}
    return [_of_leaf(path, collections, whole) for path in paths]


def _collections(plan: Mapping[str, Axes]) -> Collections:
    """A plan by collections; one without a name for variables that are in none."""
    if not any(path.startswith("params/") for path in plan):
        return {"": plan}
    found: dict[str, dict[str, Axes]] = defaultdict(dict)
    for path, axes in plan.items():
        collection, _, rest = path.partition("/")
        found[collection][rest] = axes
    return found


def _of_leaf(path: KeyPath, collections: Collections, whole: set[tuple[KeyPath, str]]) -> Axes:
    """What is removed from the leaf at a path; `whole` are the roots of what has all paths of a collection."""
    starts = {start: _begun(path[:start], collections) for start in range(len(path))}
    for start, names in starts.items():
        if copies := [name for name in names if (path[:start], name) in whole]:
            return _agreed(path, start, {name: collections[name] for name in copies})
    for start, names in starts.items():
        found = {name: collections[name] for name in names if leaf_name(path[start:]) in collections[name]}
        if found and not isinstance(path[start], DictKey) and not _is_named(path[:start], collections):
            raise InputError(
                f"{leaf_name(path)} may be {leaf_name(path[start:])} of the plan or a part of something else, expected "
                "a tree with all variables of the plan; shrink the trees that have them one by one"
            )
        if found:
            return _agreed(path, start, found)
    return {}


def _begun(root: KeyPath, collections: Collections) -> list[str]:
    """The collections of which a copy may begin at a root."""
    if _is_named(root, collections):
        return [root[-1].key]
    after = next((i for i in reversed(range(len(root))) if not isinstance(root[i], DictKey | SequenceKey)), -1)
    return [] if any(isinstance(key, DictKey) for key in root[after + 1 :]) else list(collections)


def _is_named(root: KeyPath, collections: Collections) -> bool:
    return bool(root) and isinstance(root[-1], DictKey) and root[-1].key in collections


def _agreed(path: KeyPath, start: int, copies: Collections) -> Axes:
    """What is removed from the leaf at a path, which is the rest of it in each of the copies."""
    name = leaf_name(path[start:])
    first, *others = [copy[name] for copy in copies.values() if name in copy] or [{}]
    for other in others:
        if first.keys() != other.keys() or not all(np.array_equal(first[axis], other[axis]) for axis in first):
            raise InputError(
                f"{leaf_name(path)} may be that of {' or '.join(copies)}, of which the plan removes different "
                "coordinates; pass the collections with their names"
            )
    return first
