"""What each operation does to the identities of coordinates: a rule for each primitive says which are the same.

What a rule does not cover makes the axes that meet there stay. For sums a rule also has to know whether a coordinate is
zero where all parameters of its identity are zero: only then may a term be left out.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax.compress.structure.identity import Axis, Identities
from dl_jax.core import equations

ELEMENTWISE = frozenset((
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "bitcast_convert_type", "cbrt", "ceil", "clamp", "convert_element_type", "copy", "cos", "cosh", "digamma",
    "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite",
    "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not",
    "or", "pow", "reduce_precision", "rem", "round", "rsqrt", "select_n", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient",
    "sub", "tan", "tanh", "xor",
))  # fmt: skip
ALONE = "a batch, time, or pixels"


class Array(NamedTuple):
    """What is known of an array of the trace."""

    axes: tuple[Axis, ...]
    zero: tuple[bool, ...]  # of each axis: whether a coordinate is zero where the parameters of its identity are
    literal: Any = None  # its value, if it is a number that the trace holds


Rule = Callable[[Identities, Any, list[Array]], list[Array]]  # (identities, equation, inputs) -> outputs


def apply_rule(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    """What is known of the outputs of an equation without inner ones.

    An axis of length 1 never shrinks: what is taken out of a longer one stays.
    """
    name = equation.primitive.name
    if name in RULES:
        outs = RULES[name](ids, equation, ins)
    elif name in ELEMENTWISE:
        outs = _elementwise(ids, equation, ins)
    else:
        outs = given_up(ids, equation, ins, f"the operation {name}, which is not followed")
    return [_settled(ids, out) for out in outs]


def _settled(ids: Identities, x: Array) -> Array:
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


def _one(axes: Sequence[Axis], zero: Sequence[bool]) -> list[Array]:
    return [Array(tuple(axes), tuple(zero))]


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


# shapes


def _broadcast_in_dim(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    x, shape = ins[0], equation.invars[0].aval.shape
    new = anonymous(ids, equation.outvars[0].aval, zero=x.literal is not None and is_zero(x.literal))
    axes, zero = list(new.axes), list(new.zero)
    for i, o in enumerate(equation.params["broadcast_dimensions"]):
        if shape[i] == equation.outvars[0].aval.shape[o]:
            axes[o], zero[o] = x.axes[i], x.zero[i]
    return _one(axes, zero)


def _reshape(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    x, old, new = ins[0], equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if equation.params.get("dimensions") is not None:
        return given_up(ids, equation, ins, "a reshape in another order")
    if any(isinstance(n, int) and n == 0 for n in old):
        return given_up(ids, equation, ins, "a reshape without numbers")
    axes: list[Axis] = [ALONE] * len(new)
    zero = [False] * len(new)
    for before, after in _blocks(old, new):
        merged, is_zero = _merged(
            ids, [x.axes[i] for i in before], [x.zero[i] for i in before], [old[i] for i in before]
        )
        for o, axis in zip(after, _split_up(ids, merged, [new[o] for o in after]), strict=True):
            axes[o], zero[o] = axis, is_zero
    return _one(axes, zero)


def _blocks(old: Sequence[Any], new: Sequence[Any]) -> Iterator[tuple[list[int], list[int]]]:
    """The shortest runs of axes, from the last to the first, that a reshape makes of each other.

    Axes of length 1 are left out. What lies before an axis of unknown length is one run.
    """
    ins, outs = ([i for i, n in enumerate(shape) if not (isinstance(n, int) and n == 1)] for shape in (old, new))
    while ins and outs:
        before, after = [ins.pop()], [outs.pop()]
        while (a := math.prod(old[i] for i in before)) != (b := math.prod(new[o] for o in after)):
            if not isinstance(a, int) or not isinstance(b, int):
                before, after, ins, outs = ins + before, outs + after, [], []
                break
            run, rest = (before, ins) if a < b else (after, outs)
            run.insert(0, rest.pop())
        yield before, after


def _merged(ids: Identities, axes: list[Axis], zero: list[bool], sizes: list[Any]) -> tuple[Axis, bool]:
    """Some axes as one."""
    free = [i for i, axis in enumerate(axes) if not isinstance(axis, str)]
    if not free:
        return axes[0], False
    if not all(isinstance(n, int) for n in sizes):
        why = "a reshape together with an axis of unknown length"
        for axis in axes:
            ids.freeze(axis, why)
        return why, False
    index = np.indices(sizes).reshape(len(sizes), -1)
    parts = [np.asarray(axes[i])[index[i]] for i in free]
    return parts[0] if len(parts) == 1 else ids.combined(parts), all(zero[i] for i in free)


def _split_up(ids: Identities, axis: Axis, sizes: list[Any]) -> list[Axis]:
    """One axis as several.

    Where its identities repeat along all of them but one, they are those of this one.
    """
    if isinstance(axis, str) or len(sizes) == 1:
        return [axis] * len(sizes)
    grid = axis.reshape(sizes)
    roots = ids.roots(grid)
    for i in range(len(sizes)):
        if (roots == roots[tuple(slice(None) if k == i else slice(1) for k in range(len(sizes)))]).all():
            own = grid[tuple(slice(None) if k == i else 0 for k in range(len(sizes)))]
            return [own if k == i else ALONE for k in range(len(sizes))]
    new = [ids.fresh(n) for n in sizes]
    index = np.indices(sizes).reshape(len(sizes), -1)
    ids.join(axis, ids.combined([part[i] for part, i in zip(new, index, strict=True)]))
    return list(new)


def _transpose(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    order = equation.params["permutation"]
    return _one([ins[0].axes[i] for i in order], [ins[0].zero[i] for i in order])


def _squeeze(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    return [without(ins[0], equation.params["dimensions"])]


def _rev(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    turned = equation.params["dimensions"]
    axes = [a[::-1] if i in turned and not isinstance(a, str) else a for i, a in enumerate(ins[0].axes)]
    return _one(axes, ins[0].zero)


def _slice(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    params, x = equation.params, ins[0]
    steps = params["strides"] or (1,) * len(x.axes)
    parts = zip(x.axes, params["start_indices"], params["limit_indices"], steps, strict=True)
    return _one([axis if isinstance(axis, str) else axis[a:b:step] for axis, a, b, step in parts], x.zero)


def _split(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    place, x = equation.params["axis"], ins[0]
    axis, ends = x.axes[place], np.cumsum(equation.params["sizes"])
    pieces = [axis] * len(ends) if isinstance(axis, str) else np.split(axis, ends[:-1])
    return [Array((*x.axes[:place], piece, *x.axes[place + 1 :]), x.zero) for piece in pieces]


def _concatenate(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    place = equation.params["dimension"]
    axes, zero = joined(ids, ins, skip=place)
    parts = [x.axes[place] for x in ins]
    if all(isinstance(part, str) for part in parts):
        axes[place] = parts[0]
    else:
        sizes = [variable.aval.shape[place] for variable in equation.invars]
        axes[place] = np.concatenate([_stuck(ids, part, n) for part, n in zip(parts, sizes, strict=True)])
    return _one(axes, zero)


def _stuck(ids: Identities, axis: Axis, n: int) -> np.ndarray:
    """An axis as identities, also one that cannot shrink."""
    if isinstance(axis, str):
        new = ids.fresh(n)
        ids.freeze(new, axis)
        return new
    return axis


def _stack(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    place, (axes, zero) = equation.params["axis"], joined(ids, ins)
    return _one([*axes[:place], ALONE, *axes[place:]], [*zero[:place], False, *zero[place:]])


def _unstack(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    place = equation.params["axis"]
    ids.freeze(ins[0].axes[place], "an axis that is taken apart")
    return [without(ins[0], [place])] * len(equation.outvars)


def _pad(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    x, filling = ins
    empty = filling.literal is not None and is_zero(filling.literal)
    axes: list[Axis] = []
    for axis, config in zip(x.axes, equation.params["padding_config"], strict=True):
        low, high, between = config
        if isinstance(axis, str) or config == (0, 0, 0):
            axes.append(axis)
        elif between or low < 0 or high < 0:
            ids.freeze(axis, "a padding between its coordinates, or a negative one")
            axes.append("a padding between its coordinates, or a negative one")
        else:
            axes.append(np.concatenate([ids.fresh(low), axis, ids.fresh(high)]))
    return _one(axes, [z and empty for z in x.zero])


def _counted(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    new, place = anonymous(ids, equation.outvars[0].aval), equation.params["dimension"]
    return _one([*new.axes[:place], "an axis whose coordinates are numbered", *new.axes[place + 1 :]], new.zero)


def _drawn(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    keys = list(ins[0].axes)
    new = anonymous(ids, equation.outvars[0].aval)
    return _one([*keys, *new.axes[len(keys) :]], new.zero)


def _keys(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    return [fixed(variable.aval, "random keys") for variable in equation.outvars]


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
    return _one(axes, zero)


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
    return _one([maps if i == of_result else ALONE for i in rank], [zero and i == of_result for i in rank])


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
    return _one([why if i == place else axis for i, axis in enumerate(ins[0].axes)], [False] * len(ins[0].axes))


def _window(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    """Pooling. Its other axes have windows of one coordinate."""
    params, x = equation.params, ins[0]
    why, axes = "the pixels of a pooling", []
    for i, axis in enumerate(x.axes):
        each = [params[name][i] for name in ("window_dimensions", "window_strides", "base_dilation")]
        plain = each == [1, 1, 1] and tuple(params["padding"][i]) == (0, 0)
        if not plain:
            ids.freeze(axis, why)
        axes.append(axis if plain else why)
    return _one(axes, x.zero)


# indexing

INDEXED = "an axis that is indexed"


def _gather(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    numbers, (x, indices) = equation.params["dimension_numbers"], ins
    if numbers.operand_batching_dims:
        return given_up(ids, equation, ins, "an index for each row")
    shape, sizes = equation.invars[0].aval.shape, equation.params["slice_sizes"]
    axes: list[Axis] = [ALONE] * len(equation.outvars[0].aval.shape)
    zero = [False] * len(axes)
    for axis in indices.axes:
        ids.freeze(axis, "an array of indices")
    left = [i for i in range(len(shape)) if i not in numbers.collapsed_slice_dims]
    for i, (axis, size, n) in enumerate(zip(x.axes, sizes, shape, strict=True)):
        if i in left and size == n:
            place = numbers.offset_dims[left.index(i)]
            axes[place], zero[place] = axis, x.zero[i]
        else:
            ids.freeze(axis, INDEXED)
    return _one(axes, zero)


def _dynamic_slice(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    x, axes = ins[0], []
    for axis, size, n in zip(x.axes, equation.params["slice_sizes"], equation.invars[0].aval.shape, strict=True):
        if size != n:
            ids.freeze(axis, INDEXED)
        axes.append(axis if size == n else INDEXED)
    return _one(axes, x.zero)


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
    return _one(axes, [a and b for a, b in zip(x.zero, new.zero, strict=True)])


def _unchanged(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    return ins


RULES: dict[str, Rule] = {
    "optimization_barrier": _unchanged,
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "rev": _rev,
    "slice": _slice,
    "split": _split,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "pad": _pad,
    "iota": _counted,
    "random_bits": _drawn,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    **dict.fromkeys(("random_wrap", "random_unwrap", "random_fold_in", "random_split", "random_seed"), _keys),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"), _reduced),
    **dict.fromkeys(("argmax", "argmin"), _reduced),
    **dict.fromkeys(("cumsum", "cummax", "cummin", "cumprod", "cumlogsumexp"), _along),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _window),
}
