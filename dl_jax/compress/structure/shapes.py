"""Rules of operations that move coordinates, or make arrays of them: shapes, slices, concatenations, draws."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dl_jax.compress.structure.arrays import (
    ALONE,
    Array,
    Rule,
    anonymous,
    given_up,
    is_zero,
    joined,
    output,
    without,
)
from dl_jax.compress.structure.identity import Axis, Identities


def _broadcast_in_dim(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    x, shape = ins[0], equation.invars[0].aval.shape
    new = anonymous(ids, equation.outvars[0].aval, zero=x.literal is not None and is_zero(x.literal))
    axes, zero = list(new.axes), list(new.zero)
    for i, o in enumerate(equation.params["broadcast_dimensions"]):
        if shape[i] == equation.outvars[0].aval.shape[o]:
            axes[o], zero[o] = x.axes[i], x.zero[i]
    return output(axes, zero)


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
    return output(axes, zero)


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
    return output([ins[0].axes[i] for i in order], [ins[0].zero[i] for i in order])


def _squeeze(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    return [without(ins[0], equation.params["dimensions"])]


def _rev(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    turned = equation.params["dimensions"]
    axes = [a[::-1] if i in turned and not isinstance(a, str) else a for i, a in enumerate(ins[0].axes)]
    return output(axes, ins[0].zero)


def _slice(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    params, x = equation.params, ins[0]
    steps = params["strides"] or (1,) * len(x.axes)
    parts = zip(x.axes, params["start_indices"], params["limit_indices"], steps, strict=True)
    return output([axis if isinstance(axis, str) else axis[a:b:step] for axis, a, b, step in parts], x.zero)


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
    return output(axes, zero)


def _stuck(ids: Identities, axis: Axis, n: int) -> np.ndarray:
    """An axis as identities, also one that cannot shrink."""
    if isinstance(axis, str):
        new = ids.fresh(n)
        ids.freeze(new, axis)
        return new
    return axis


def _stack(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    place, (axes, zero) = equation.params["axis"], joined(ids, ins)
    return output([*axes[:place], ALONE, *axes[place:]], [*zero[:place], False, *zero[place:]])


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
    return output(axes, [z and empty for z in x.zero])


def _counted(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    new, place = anonymous(ids, equation.outvars[0].aval), equation.params["dimension"]
    return output([*new.axes[:place], "an axis whose coordinates are numbered", *new.axes[place + 1 :]], new.zero)


def _drawn(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    keys = list(ins[0].axes)
    new = anonymous(ids, equation.outvars[0].aval)
    return output([*keys, *new.axes[len(keys) :]], new.zero)


def _keys(ids: Identities, equation: Any, ins: list[Array]) -> list[Array]:
    return given_up(ids, equation, ins, "random keys")


SHAPES: dict[str, Rule] = {
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
    **dict.fromkeys(("random_wrap", "random_unwrap", "random_fold_in", "random_split", "random_seed"), _keys),
}
