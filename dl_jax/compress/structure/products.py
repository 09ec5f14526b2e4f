"""How many inputs and outputs of products a channel is, on which the speed of a processor depends."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dl_jax.compress.structure.arrays import Array
from dl_jax.compress.structure.flow import Body, open_jaxpr
from dl_jax.compress.structure.identity import Axis, Identities

Dimension = Sequence[tuple[Axis, Any]]  # axes of an array, with their lengths, that a product takes as one


def widths(ids: Identities, body: Body) -> dict[int, int]:
    """{source: how many inputs or outputs of each product in a body go with it, their greatest common divisor}.

    A head of 64 dimensions is 64 outputs of the layers before it and 64 inputs of the one after it.
    """
    sources, found = _remembered(ids), defaultdict[int, int](int)
    for dimension in _dimensions(body):
        for source, count in _counted(dimension, sources).items():
            found[source] = math.gcd(found[source], count)
    return found


def crossing(ids: Identities, body: Body, group_of: Mapping[int, str]) -> dict[str, frozenset[str]]:
    """{group: the others with which it shares inputs or outputs of products}; `group_of` tells that of a source.

    Heads and their dimensions do: an output goes with its head or with its dimension.
    """
    sources, found = _remembered(ids), {name: set[str]() for name in group_of.values()}
    for dimension in _dimensions(body):
        axes = [
            {frozenset(group_of[each] for each in sources(i) if each in group_of) for i in axis.tolist()}
            for axis, _ in dimension
            if not isinstance(axis, str)
        ]
        along = [frozenset[str]().union(*axis) for axis in axes]
        pairs = {frozenset(pair) for two in itertools.combinations(along, 2) for pair in itertools.product(*two)}
        for together in pairs.union(*axes):
            for name in together:
                found[name] |= together
    return {name: frozenset(others - {name}) for name, others in found.items()}


def _remembered(ids: Identities) -> Callable[[int], frozenset[int]]:
    """The sources of identities, found once for each root."""
    known: dict[int, frozenset[int]] = {}

    def sources(identity: int) -> frozenset[int]:
        root = ids.root(identity)
        if root not in known:
            known[root] = ids.sources(root)
        return known[root]

    return sources


def _dimensions(body: Body) -> Iterator[Dimension]:
    """The axes over which products sum, and those of their results that come from one factor."""
    for equation in open_jaxpr(body.jaxpr).eqns:
        sides = [_with_lengths(body.of(atom), atom) for atom in equation.invars]
        if equation.primitive.name == "dot_general":
            for side, summed, batch in zip(sides, *equation.params["dimension_numbers"], strict=True):
                yield [side[i] for i in summed]
                yield [each for i, each in enumerate(side) if i not in (*summed, *batch)]
        if equation.primitive.name == "conv_general_dilated":
            numbers = equation.params["dimension_numbers"]
            yield [sides[0][numbers.lhs_spec[1]]]
            yield [sides[1][numbers.rhs_spec[0]]]
        for inner in body.within(equation):
            yield from _dimensions(inner)


def _with_lengths(array: Array, atom: Any) -> Dimension:
    return list(zip(array.axes, atom.aval.shape, strict=True))


def _counted(dimension: Dimension, sources: Callable[[int], frozenset[int]]) -> Counter[int]:
    """How many of the numbers along axes that are taken as one go with each source."""
    found: Counter[int] = Counter()
    for k, (axis, _) in enumerate(dimension):
        if isinstance(axis, str):
            continue
        others = math.prod(n for i, (_, n) in enumerate(dimension) if i != k and isinstance(n, int))
        for identity in axis.tolist():
            for source in sources(identity):
                found[source] += others
    return found
