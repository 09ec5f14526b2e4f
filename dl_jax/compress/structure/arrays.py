"""What is known of an array of a trace: the identities of its coordinates, and which are zero with their parameters."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax.compress.structure.identity import Axis, Identities

ALONE = "a batch, time, or pixels"


class Array(NamedTuple):
    """What is known of an array of the trace."""

    axes: tuple[Axis, ...]
    zero: tuple[bool, ...]  # of each axis: whether a coordinate is zero where the parameters of its identity are
    literal: Any = None  # its value, if it is a number that the trace holds


Rule = Callable[[Identities, Any, list[Array]], list[Array]]  # (identities, equation, inputs) -> outputs


def settled(ids: Identities, x: Array) -> Array:
    """An array whose axes of length 1 never shrink: what is taken out of a longer one stays."""
    single = [not isinstance(axis, str) and len(axis) == 1 for axis in x.axes]
    why = "a coordinate that is taken alone"
    for axis, yes in zip(x.axes, single, strict=True):
        if yes:
            ids.freeze(axis, why)
    axes = tuple(why if yes else axis for axis, yes in zip(x.axes, single, strict=True))
    return x._replace(axes=axes, zero=tuple(z and not yes for z, yes in zip(x.zero, single, strict=True)))


def anonymous(ids: Identities, aval: Any, zero: bool = False) -> Array:
    """An array of which nothing is known but its shape: every axis of some coordinates gets new identities."""
    axes = tuple(ids.fresh(n) if isinstance(n, int) and n != 1 else ALONE for n in aval.shape)
    return Array(axes, (zero,) * len(axes))


def parameter(ids: Identities, aval: Any) -> Array:
    """A variable of the model: its coordinates are zero where they are to be removed."""
    axes = anonymous(ids, aval).axes
    return Array(axes, tuple(not isinstance(axis, str) for axis in axes))


def fixed(aval: Any, why: str) -> Array:
    """An array that cannot shrink."""
    return Array((why,) * len(aval.shape), (False,) * len(aval.shape))


def given_up(ids: Identities, equation: Any, ins: list[Array], why: str) -> list[Array]:
    for array in ins:
        for axis in array.axes:
            ids.freeze(axis, why)
    return [fixed(variable.aval, why) for variable in equation.outvars]


def number(value: Any) -> Array:
    rank = np.ndim(value)
    return Array((ALONE,) * rank, (is_zero(value),) * rank, value)


def is_zero(value: Any) -> bool:
    return not jnp.issubdtype(jax.typeof(value).dtype, jax.dtypes.prng_key) and not np.any(np.asarray(value))


def joined(ids: Identities, arrays: Sequence[Array], skip: int | None = None) -> tuple[list[Axis], list[bool]]:
    """The axes of arrays of one shape, which are the same, and whether all arrays are zero there."""
    first, *others = arrays
    for other in others:
        for i, (one, two) in enumerate(zip(first.axes, other.axes, strict=True)):
            if i != skip:
                ids.join(one, two)
    axes = [
        next((a for a in each if isinstance(a, str)), each[0]) for each in zip(*(a.axes for a in arrays), strict=True)
    ]
    return axes, [all(each) for each in zip(*(a.zero for a in arrays), strict=True)]


def without(x: Array, dropped: Sequence[int]) -> Array:
    kept = [i for i in range(len(x.axes)) if i not in dropped]
    return Array(tuple(x.axes[i] for i in kept), tuple(x.zero[i] for i in kept))


def output(axes: Sequence[Axis], zero: Sequence[bool]) -> list[Array]:
    """The only output of an equation."""
    return [Array(tuple(axes), tuple(zero))]
