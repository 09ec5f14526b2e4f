"""Follows the identities of coordinates through a trace: a rule for each primitive says which are the same.

What has no rule, or what a rule does not cover, makes the axes that meet there stay. For sums a rule also has to know
whether a coordinate is zero where all parameters of its identity are zero: only then may a term be left out.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from dl_jax.compress.structure.identity import Axis, Identities
from dl_jax.core import equations

ELEMENTWISE = frozenset(
    [
        "abs",
        "acos",
        "acosh",
        "add",
        "add_any",
        "and",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "bitcast_convert_type",
        "cbrt",
        "ceil",
        "clamp",
        "convert_element_type",
        "copy",
        "cos",
        "cosh",
        "digamma",
        "div",
        "eq",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "ge",
        "gt",
        "integer_pow",
        "is_finite",
        "le",
        "lgamma",
        "log",
        "log1p",
        "logistic",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "nextafter",
        "not",
        "optimization_barrier",
        "or",
        "pow",
        "reduce_precision",
        "rem",
        "round",
        "rsqrt",
        "select_n",
        "shift_left",
        "shift_right_arithmetic",
        "shift_right_logical",
        "sign",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "stop_gradient",
        "sub",
        "tan",
        "tanh",
        "xor",
    ]
)
ALONE = "a batch, time, or pixels"
INPUT = "an input of the model"


class Array(NamedTuple):
    """What is known of an array of the trace."""

    axes: tuple[Axis, ...]
    zero: tuple[bool, ...]  # of each axis: whether a coordinate is zero where the parameters of its identity are
    literal: Any = None  # its value, if it is a number that the trace holds


class Body(NamedTuple):
    """What is known of the arrays of a jaxpr, to run it without some of the identities."""

    jaxpr: Any
    arrays: dict[Any, Array]  # by the jaxpr's variables
    inner: dict[Any, tuple["Body", ...]]  # bodies of loops, branches and derivatives, by an equation's first output

    @property
    def outputs(self) -> list[Array]:
        return [self.of(atom) for atom in open_jaxpr(self.jaxpr).outvars]

    def of(self, atom: Any) -> Array:
        return _number(atom.val) if isinstance(atom, jex.Literal) else self.arrays[atom]


Rule = Callable[[Identities, Any, list[Array]], list[Array]]  # (identities, equation, inputs) -> outputs
Control = Callable[[Identities, Any, list[Array], bool], tuple[list[Array], tuple[Body, ...]]]


def open_jaxpr(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def constants(jaxpr: Any) -> list[tuple[Any, Any]]:
    """The variables of a jaxpr that stand for constants, with these."""
    return list(zip(open_jaxpr(jaxpr).constvars, getattr(jaxpr, "consts", ()), strict=True))


def follow(ids: Identities, jaxpr: Any, inputs: Sequence[Array], rules: bool = True) -> Body:
    """What is known of all arrays of a jaxpr whose inputs are known.

    With `rules`, also of those of derivatives that functions have of their own. A rule usually calls its function
    again, so those within a rule are not followed: second derivatives are those of the bodies.
    """
    body = Body(jaxpr, dict(zip(open_jaxpr(jaxpr).invars, inputs, strict=True)), {})
    for variable, value in constants(jaxpr):
        body.arrays[variable] = anonymous(ids, jax.typeof(value), zero=_is_zero(value))
    for equation in open_jaxpr(jaxpr).eqns:
        ins = [body.of(atom) for atom in equation.invars]
        outs, inner = _followed(ids, equation, ins, rules)
        body.arrays.update(zip(equation.outvars, outs, strict=True))
        if inner:
            body.inner[equation.outvars[0]] = inner
    return body


def unshared(jaxpr: Any) -> Any:
    """A jaxpr in which every use of an array that repeats one number, such as zeros, has an array of its own.

    Otherwise layers that begin with the same zeros, as the states of recurrent networks do, could not shrink apart.
    """

    def operation(equation: Any, inputs: list[Any]) -> Sequence[Any]:
        own = [x() if callable(x) else x for x in inputs]
        if equation.primitive.name == "broadcast_in_dim" and isinstance(equation.invars[0], jex.Literal):
            return [lambda: equations.bound(equation, own)[0]]
        return equations.bound(equation, own)

    def copied(*inputs: Any) -> list[Any]:
        return [x() if callable(x) else x for x in equations.evaluate(jaxpr, inputs, operation)]

    return jax.make_jaxpr(copied)(*jaxpr.in_avals)


def anonymous(ids: Identities, aval: Any, zero: bool = False) -> Array:
    """An array of which nothing is known but its shape: every axis of some coordinates gets new identities."""
    axes = tuple(ids.fresh(n) if isinstance(n, int) and n != 1 else ALONE for n in aval.shape)
    return Array(axes, (zero,) * len(axes))


def fixed(aval: Any, why: str) -> Array:
    """An array that cannot shrink."""
    return Array((why,) * len(aval.shape), (False,) * len(aval.shape))


def _followed(ids: Identities, equation: Any, ins: list[Array], rules: bool) -> tuple[list[Array], tuple[Body, ...]]:
    name = equation.primitive.name
    if name in CONTROL:
        return CONTROL[name](ids, equation, ins, rules)
    if name in RULES:
        return RULES[name](ids, equation, ins), ()
    if name in ELEMENTWISE:
        return _elementwise(ids, equation, ins), ()
    return _given_up(ids, equation, ins, f"the operation {name}, which is not followed"), ()


def _given_up(ids: Identities, equation: Any, ins: list[Array], why: str) -> list[Array]:
    for array in ins:
        for axis in array.axes:
            ids.freeze(axis, why)
    return [fixed(variable.aval, why) for variable in equation.outvars]


def _number(value: Any) -> Array:
    rank = np.ndim(value)
    return Array((ALONE,) * rank, (_is_zero(value),) * rank, value)


def _is_zero(value: Any) -> bool:
    return not jnp.issubdtype(jax.typeof(value).dtype, jax.dtypes.prng_key) and not np.any(np.asarray(value))


def _one(axes: Sequence[Axis], zero: Sequence[bool]) -> list[Array]:
    return [Array(tuple(axes), tuple(zero))]


def _joined(ids: Identities, arrays: Sequence[Array], skip: int | None = None) -> tuple[list[Axis], list[bool]]:
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
    zero = [_stays_zero(equation, [a.zero[i] if a.axes else False for a in ins], ins) for i in range(len(shape))]
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
        return all(_is_zero(result) for result in equations.bound(equation, filled))


# shapes


def _broadcast_in_dim(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    x, shape = ins[0], equation.invars[0].aval.shape
    new = anonymous(ids, equation.outvars[0].aval, zero=x.literal is not None and _is_zero(x.literal))
    axes, zero = list(new.axes), list(new.zero)
    for i, o in enumerate(equation.params["broadcast_dimensions"]):
        if shape[i] == equation.outvars[0].aval.shape[o]:
            axes[o], zero[o] = x.axes[i], x.zero[i]
    return _one(axes, zero)


def _reshape(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    x, old, new = ins[0], equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if equation.params.get("dimensions") is not None:
        return _given_up(ids, equation, ins, "a reshape in another order")
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


def _without(x: Array, dropped: Sequence[int]) -> Array:
    kept = [i for i in range(len(x.axes)) if i not in dropped]
    return Array(tuple(x.axes[i] for i in kept), tuple(x.zero[i] for i in kept))


def _squeeze(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    return [_without(ins[0], equation.params["dimensions"])]


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
    axes, zero = _joined(ids, ins, skip=place)
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
    place, (axes, zero) = equation.params["axis"], _joined(ids, ins)
    return _one([*axes[:place], ALONE, *axes[place:]], [*zero[:place], False, *zero[place:]])


def _unstack(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    place = equation.params["axis"]
    ids.freeze(ins[0].axes[place], "an axis that is taken apart")
    return [_without(ins[0], [place])] * len(equation.outvars)


def _pad(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    x, filling = ins
    empty = filling.literal is not None and _is_zero(filling.literal)
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
        rest = _without(array, [i for each in used for i in each])
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
        return _given_up(ids, equation, ins, "a convolution in groups of the batch")
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
    return [_without(x, axes) for x in ins]


def _along(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    place, why = equation.params["axis"], f"an order of coordinates ({equation.primitive.name})"
    ids.freeze(ins[0].axes[place], why)
    return _one([why if i == place else axis for i, axis in enumerate(ins[0].axes)], ins[0].zero)


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
        return _given_up(ids, equation, ins, "an index for each row")
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


# loops, branches, and derivatives


def _scan(ids: Identities, equation: Any, ins: list[Array], rules: bool) -> tuple[list[Array], tuple[Body, ...]]:
    params = equation.params
    fixed_ins, carried = params["num_consts"], params["num_consts"] + params["num_carry"]
    for x in ins[carried:]:
        ids.freeze(x.axes[0], "the steps of a loop")
    rows = [_without(x, [0]) for x in ins[carried:]]
    body, carry = _iterated(ids, params["jaxpr"], ins[:fixed_ins], ins[fixed_ins:carried], rows, rules)
    outputs = [Array(("the steps of a loop", *y.axes), (False, *y.zero)) for y in body.outputs[params["num_carry"] :]]
    return [*carry, *outputs], (body,)


def _while(ids: Identities, equation: Any, ins: list[Array], rules: bool) -> tuple[list[Array], tuple[Body, ...]]:
    params = equation.params
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    body, carry = _iterated(ids, params["body_jaxpr"], ins[first:second], ins[second:], [], rules)
    return carry, (follow(ids, params["cond_jaxpr"], [*ins[:first], *carry], rules), body)


def _iterated(
    ids: Identities, jaxpr: Any, before: list[Array], carry: list[Array], after: list[Array], rules: bool
) -> tuple[Body, list[Array]]:
    """The body of a loop, and what it carries: repeated until what it takes is what it gives."""
    while True:
        body = follow(ids, jaxpr, [*before, *carry, *after], rules)
        met = [_joined(ids, pair) for pair in zip(carry, body.outputs[: len(carry)], strict=True)]
        new = [Array(tuple(axes), tuple(zero)) for axes, zero in met]
        if all(map(_alike, carry, new)):
            return body, new
        carry = new


def _alike(one: Array, other: Array) -> bool:
    kinds = ([isinstance(axis, str) for axis in array.axes] for array in (one, other))
    return next(kinds) == next(kinds) and one.zero == other.zero


def _cond(ids: Identities, equation: Any, ins: list[Array], rules: bool) -> tuple[list[Array], tuple[Body, ...]]:
    bodies = tuple(follow(ids, branch, ins[1:], rules) for branch in equation.params["branches"])
    met = [_joined(ids, each) for each in zip(*(body.outputs for body in bodies), strict=True)]
    return [Array(tuple(axes), tuple(zero)) for axes, zero in met], bodies


def is_real(variable: Any) -> bool:
    return jnp.issubdtype(variable.aval.dtype, jnp.inexact)


def reals(equation: Any) -> tuple[Callable[..., Any], list[bool]]:
    """An equation as a function (inputs, the real ones of them) -> outputs, and which inputs are real."""
    real = [is_real(variable) for variable in equation.invars]

    def of_reals(inputs: Sequence[Any], some: Sequence[Any]) -> list[Any]:
        remaining = iter(some)
        return list(equations.bound(equation, [next(remaining) if r else x for r, x in zip(real, inputs, strict=True)]))

    return of_reals, real


def chosen(values: Sequence[Any], mask: Sequence[bool]) -> list[Any]:
    return [value for value, yes in zip(values, mask, strict=True) if yes]


def _custom_jvp(ids: Identities, equation: Any, ins: list[Array], rules: bool) -> tuple[list[Array], tuple[Body, ...]]:
    """The function, and the rule of its derivative: (inputs, tangents of the real ones) -> (outputs, tangents)."""
    if not all(map(is_real, equation.outvars)):
        return _given_up(ids, equation, ins, "a custom derivative of numbers that are not real"), ()
    body = follow(ids, equations.inlined(equation.params["call_jaxpr"]), ins, rules)
    if not rules:
        return body.outputs, (body,)
    of_reals, real = reals(equation)

    def rule(inputs: list[Any], tangents: list[Any]) -> Any:
        return jax.jvp(lambda *some: of_reals(inputs, some), tuple(chosen(inputs, real)), tuple(tangents))

    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]
    traced = equations.inlined(jax.make_jaxpr(rule)(avals, chosen(avals, real)))
    derivative = follow(ids, traced, [*ins, *chosen(ins, real)], rules=False)
    met = [_joined(ids, each) for each in zip(body.outputs * 2, derivative.outputs, strict=True)]
    outs = [Array(tuple(axes), tuple(zero)) for axes, zero in met[: len(body.outputs)]]
    return outs, (body, derivative)


def _custom_vjp(ids: Identities, equation: Any, ins: list[Array], rules: bool) -> tuple[list[Array], tuple[Body, ...]]:
    """The function; the forward pass to (outputs, residuals); the backward pass (residuals, gradients) -> gradients."""
    if not all(map(is_real, equation.outvars)):
        return _given_up(ids, equation, ins, "a custom derivative of numbers that are not real"), ()
    body = follow(ids, equations.inlined(equation.params["call_jaxpr"]), ins, rules)
    if not rules:
        return body.outputs, (body,)
    of_reals, real = reals(equation)

    def forward(*inputs: Any) -> Any:
        return jax.vjp(lambda *some: of_reals(inputs, some), *chosen(inputs, real))

    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]
    traced, (outputs, pull) = jax.make_jaxpr(forward, return_shape=True)(*avals)
    residuals, tree = jax.tree.flatten(pull)
    pulled = jax.make_jaxpr(lambda residuals, grads: jax.tree.unflatten(tree, residuals)(grads))(residuals, outputs)
    ahead = follow(ids, equations.inlined(traced), ins, rules=False)
    met = [_joined(ids, each) for each in zip(body.outputs, ahead.outputs[: len(outputs)], strict=True)]
    outs = [Array(tuple(axes), tuple(zero)) for axes, zero in met]
    back = follow(ids, equations.inlined(pulled), [*ahead.outputs[len(outputs) :], *outs], rules=False)
    for one, other in zip(chosen(ins, real), back.outputs, strict=True):
        _joined(ids, [one, other])
    return outs, (body, ahead, back)


RULES: dict[str, Rule] = {
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
CONTROL: dict[str, Control] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
}
