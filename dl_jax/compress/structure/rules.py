"""What each operation does to the identities of coordinates: a rule for each primitive says which are the same.

What a rule does not cover makes the axes that meet there stay. For sums a rule also has to know whether a coordinate is
zero where all parameters of its identity are zero: only then may a term be left out.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dl_jax.compress.structure.arrays import (
    ALONE,
    Array,
    Rule,
    given_up,
    is_zero,
    output,
    settled,
    without,
)
from dl_jax.compress.structure.identity import Axis, Identities
from dl_jax.compress.structure.shapes import SHAPES
from dl_jax.core import equations
from dl_jax.core.equations import ELEMENTWISE


def apply_rule(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    """What is known of the outputs of an equation without inner ones."""
    name = equation.primitive.name
    if name in RULES:
        outs = RULES[name](ids, equation, ins)
    elif name in ELEMENTWISE:
        outs = _elementwise(ids, equation, ins)
    else:
        outs = given_up(ids, equation, ins, f"the operation {name}, which is not followed")
    return [settled(ids, out) for out in outs]


# arithmetic


def _elementwise(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    """Operands of rank 0, and axes of length 1 against longer ones, are broadcast and have no identities."""
    shape = equation.outvars[0].aval.shape
    axes: list[Axis] = []
    for i, size in enumerate(shape):
        full = [
            a.axes[i] for a, v in zip(ins, equation.invars, strict=True) if v.aval.shape and v.aval.shape[i] == size
        ]
        for axis in full[1:]:
            ids.join(full[0], axis)
        axes.append(next((axis for axis in full if isinstance(axis, str)), full[0]))
    zero = [_stays_zero(equation, [bool(a.axes) and a.zero[i] for a in ins], ins) for i in range(len(shape))]
    return [Array(tuple(axes), tuple(zero)) for _ in equation.outvars]


def _stays_zero(equation: Any, zero: list[bool], ins: list[Array]) -> bool:
    """Whether the result is zero where the inputs are; `zero` says which are."""
    name = equation.primitive.name
    if name == "mul":
        return any(zero)
    if name in ("div", "integer_pow"):
        return zero[0] and equation.params.get("y", 1) > 0
    known = [z or (not a.axes and a.literal is not None) for z, a in zip(zero, ins, strict=True)]
    if name == "select_n":
        return all(known[1:]) and not any(np.any(a.literal) for z, a in zip(zero[1:], ins[1:], strict=True) if not z)
    if not any(zero) or not all(known):
        return False
    values = [0 if z else a.literal for z, a in zip(zero, ins, strict=True)]
    with jax.ensure_compile_time_eval():
        filled = [jnp.asarray(x, v.aval.dtype) for x, v in zip(values, equation.invars, strict=True)]
        return all(is_zero(result) for result in equations.bound(equation, filled))


# sums

TERMS = "a sum, whose terms need not be zero where parameters are"


def _dot_general(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    (contracted, batch), (x, y) = equation.params["dimension_numbers"], ins
    for i, j in zip(*contracted, strict=True):
        _summed_product(ids, (x.axes[i], x.zero[i]), (y.axes[j], y.zero[j]))
    axes: list[Axis] = []
    zero: list[bool] = []
    for i, j in zip(*batch, strict=True):
        ids.join(x.axes[i], y.axes[j])
        axes.append(x.axes[i] if isinstance(x.axes[i], str) else y.axes[j])
        zero.append(x.zero[i] or y.zero[j])
    for array, *used in ((x, contracted[0], batch[0]), (y, contracted[1], batch[1])):
        rest = without(array, [i for each in used for i in each])
        axes.extend(rest.axes)
        zero.extend(rest.zero)
    return output(axes, zero)


def _summed_product(ids: Identities, one: tuple[Axis, bool], other: tuple[Axis, bool]) -> None:
    ids.join(one[0], other[0])
    if not (one[1] or other[1]):
        ids.freeze(one[0], TERMS)


def _convolution(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    params, (x, kernel) = equation.params, ins
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if params["batch_group_count"] != 1:
        return given_up(ids, equation, ins, "a convolution in groups of the batch")
    (_, of_x, *_), (of_maps, of_channels, *_), (_, of_result, *_) = numbers
    for i, axis in enumerate(x.axes):
        if i != of_x:
            ids.freeze(axis, "the pixels or the batch of a convolution")
    for i, axis in enumerate(kernel.axes):
        if i not in (of_maps, of_channels):
            ids.freeze(axis, "the taps of a convolution")
    inputs, channels, maps = x.axes[of_x], kernel.axes[of_channels], kernel.axes[of_maps]
    zero = kernel.zero[of_maps]
    if groups == 1:
        _summed_product(ids, (inputs, x.zero[of_x]), (channels, kernel.zero[of_channels]))
    else:  # a group goes as a whole
        ids.freeze(channels, "the inputs of a group of a convolution")
        if isinstance(inputs, str):
            ids.freeze(maps, inputs)
        elif isinstance(maps, str):
            ids.freeze(inputs, maps)
        else:
            first, *others = (*inputs.reshape(groups, -1).T, *maps.reshape(groups, -1).T)
            for other in others:
                ids.join(first, other)
        zero = zero or x.zero[of_x]
    rank = range(len(x.axes))
    return output([maps if i == of_result else ALONE for i in rank], [zero and i == of_result for i in rank])


def _reduced(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    axes, name = equation.params["axes"], equation.primitive.name
    for x in ins:
        for i in axes:
            if name != "reduce_sum":
                ids.freeze(x.axes[i], f"an axis of which one number is made ({name})")
            elif not x.zero[i]:
                ids.freeze(x.axes[i], TERMS)
    return [without(x, axes) for x in ins]


def _along(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    place, why = equation.params["axis"], f"an order of coordinates ({equation.primitive.name})"
    ids.freeze(ins[0].axes[place], why)
    return output([why if i == place else axis for i, axis in enumerate(ins[0].axes)], [False] * len(ins[0].axes))


def _window(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    """Pooling. Its other axes have windows of one coordinate.

    A maximum or minimum over nothing is not zero, so every window has to meet a number: paddings are smaller than it.
    """
    params, x = equation.params, ins[0]
    filled = equation.primitive.name == "reduce_window_sum" or (
        {*params["base_dilation"], *params["window_dilation"]} == {1}
        and all(max(pads) < n for pads, n in zip(params["padding"], params["window_dimensions"], strict=True))
    )
    why, axes = "the pixels of a pooling", []
    for i, axis in enumerate(x.axes):
        each = [params[name][i] for name in ("window_dimensions", "window_strides", "base_dilation")]
        plain = each == [1, 1, 1] and tuple(params["padding"][i]) == (0, 0)
        if not plain:
            ids.freeze(axis, why)
        axes.append(axis if plain else why)
    return output(axes, [z and filled for z in x.zero])


# indexing

INDEXED = "an axis that is indexed"


def _gather(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    numbers, (x, indices) = equation.params["dimension_numbers"], ins
    if numbers.operand_batching_dims:
        return given_up(ids, equation, ins, "an index for each row")
    shape, sizes = equation.invars[0].aval.shape, equation.params["slice_sizes"]
    axes: list[Axis] = [ALONE] * len(equation.outvars[0].aval.shape)
    zero, empty = [False] * len(axes), _fills_with_zeros(equation)
    for axis in indices.axes:
        ids.freeze(axis, "an array of indices")
    left = [i for i in range(len(shape)) if i not in numbers.collapsed_slice_dims]
    for i, (axis, size, n) in enumerate(zip(x.axes, sizes, shape, strict=True)):
        if i in left and size == n:
            place = numbers.offset_dims[left.index(i)]
            axes[place], zero[place] = axis, x.zero[i] and empty
        else:
            ids.freeze(axis, INDEXED)
    return output(axes, zero)


def _fills_with_zeros(equation: Any) -> bool:
    """Whether a gather puts nothing but zeros, or NaNs, in the place of what its indices miss.

    A row of NaNs is an error, which those that are left show as well. Whole numbers have none.
    """
    filling, dtype = equation.params["fill_value"], equation.outvars[0].aval.dtype
    if equation.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return True
    if filling is None:
        return jnp.issubdtype(dtype, jnp.inexact)
    return not filling or bool(np.isnan(filling))


def _dynamic_slice(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    x, axes = ins[0], []
    for axis, size, n in zip(x.axes, equation.params["slice_sizes"], equation.invars[0].aval.shape, strict=True):
        if size != n:
            ids.freeze(axis, INDEXED)
        axes.append(axis if size == n else INDEXED)
    return output(axes, x.zero)


def _dynamic_update_slice(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    (x, new), axes = ins[:2], []
    shapes = (variable.aval.shape for variable in equation.invars[:2])
    for one, other, n, size in zip(x.axes, new.axes, *shapes, strict=True):
        if size == n:
            ids.join(one, other)
        else:
            ids.freeze(one, INDEXED)
            ids.freeze(other, INDEXED)
        axes.append(INDEXED if size != n else other if isinstance(other, str) else one)
    return output(axes, [a and b for a, b in zip(x.zero, new.zero, strict=True)])


def _unchanged(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    return ins


RULES: dict[str, Rule] = {
    **SHAPES,
    "optimization_barrier": _unchanged,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"), _reduced),
    **dict.fromkeys(("argmax", "argmin"), _reduced),
    **dict.fromkeys(("cumsum", "cummax", "cummin", "cumprod", "cumlogsumexp"), _along),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _window),
}
