"""Runs a trace without the coordinates that a plan removes: a rule for each primitive whose parameters hold shapes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax

from dl_jax.compress.structure.arrays import Array
from dl_jax.compress.structure.flow import Body, chosen, constants, is_real, open_jaxpr
from dl_jax.compress.structure.identity import Axis, Identities
from dl_jax.core import equations
from dl_jax.models import ops

Mask = np.ndarray | None  # bool [n], which coordinates of an axis are kept; None for all


class Kept:
    """Which coordinates are left when some identities, given by their roots, are removed."""

    def __init__(self, ids: Identities, removed: frozenset[int]) -> None:
        self._ids, self._removed = ids, removed
        self._goes: dict[int, bool] = {}

    def axis(self, axis: Axis) -> Mask:
        if isinstance(axis, str):
            return None
        mask = np.array([not self._is_removed(self._ids.root(each)) for each in axis.tolist()], bool)
        return None if mask.all() else mask

    def axes(self, array: Array) -> list[Mask]:
        return [self.axis(axis) for axis in array.axes]

    def aval(self, array: Array, aval: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(_sizes(aval.shape, self.axes(array)), aval.dtype)

    def values(self, array: Array, values: Any) -> Any:
        """The values of an array that are left."""
        for place, mask in enumerate(self.axes(array)):
            if mask is not None:
                values = compressed(values, mask, place)
        return values

    def all_of(self, body: Body) -> bool:
        """Whether a body loses nothing."""
        return all(mask is None for array in body.arrays.values() for mask in self.axes(array)) and all(
            self.all_of(inner) for bodies in body.inner.values() for inner in bodies
        )

    def _is_removed(self, root: int) -> bool:
        if root not in self._goes:
            self._goes[root] = not self._removed.isdisjoint(self._ids.sources(root))
        return self._goes[root]


def compressed(values: Any, mask: np.ndarray, place: int) -> Any:
    """The coordinates of an axis for which `mask` is true, in NumPy for NumPy's arrays; or the shape that they have."""
    if isinstance(values, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(
            _sizes(values.shape, [mask if i == place else None for i in range(len(values.shape))]), values.dtype
        )
    numpy = np if isinstance(values, np.ndarray) else jnp
    return numpy.take(values, np.flatnonzero(mask), axis=place)


def run(kept: Kept, body: Body, inputs: Sequence[Any]) -> list[Any]:
    """The outputs of a body for its shrunk inputs."""
    values = dict(zip(open_jaxpr(body.jaxpr).invars, inputs, strict=True))
    values |= {variable: kept.values(body.arrays[variable], value) for variable, value in constants(body.jaxpr)}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for equation in open_jaxpr(body.jaxpr).eqns:
        outputs = _computed(kept, body, equation, [read(atom) for atom in equation.invars])
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in open_jaxpr(body.jaxpr).outvars]


def _computed(kept: Kept, body: Body, equation: Any, inputs: list[Any]) -> Sequence[Any]:
    name, inner = equation.primitive.name, body.within(equation)
    if inner:
        if all(map(kept.all_of, inner)):
            return equations.bound(equation, inputs)
        return CONTROL[name](kept, inner, equation, inputs)
    if name not in RULES:
        return equations.bound(equation, inputs)
    before = [kept.axes(body.of(atom)) for atom in equation.invars]
    return RULES[name](equation, inputs, before, kept.axes(body.of(equation.outvars[0])))


# operations whose parameters are sizes


def _shape(equation: Any, after: list[Mask]) -> tuple[Any, ...]:
    """The shape of what is left of the first output."""
    return _sizes(equation.outvars[0].aval.shape, after)


def _sizes(sizes: Sequence[Any], masks: list[Mask]) -> tuple[Any, ...]:
    return tuple(n if mask is None else int(mask.sum()) for n, mask in zip(sizes, masks, strict=True))


def _with_shape(equation: Any, inputs: list[Any], before: list[list[Mask]], after: list[Mask]) -> Sequence[Any]:
    return equations.bound(equation, inputs, shape=_shape(equation, after))


def _drawn(equation: Any, inputs: list[Any], before: list[list[Mask]], after: list[Mask]) -> Sequence[Any]:
    """Numbers of the old shape, of which some are left: a draw of a smaller shape would give other numbers."""
    drawn, first = equations.bound(equation, inputs)[0], len(before[0])  # the axes of the keys come first
    for place, mask in enumerate(after):
        if place >= first and mask is not None:
            drawn = compressed(drawn, mask, place)
    return [drawn]


def _reshape(equation: Any, inputs: list[Any], before: list[list[Mask]], after: list[Mask]) -> Sequence[Any]:
    return [lax.reshape(inputs[0], _shape(equation, after), equation.params["dimensions"])]


def _broadcast_in_dim(equation: Any, inputs: list[Any], before: list[list[Mask]], after: list[Mask]) -> Sequence[Any]:
    return [lax.broadcast_in_dim(inputs[0], _shape(equation, after), equation.params["broadcast_dimensions"])]


def _slice(equation: Any, inputs: list[Any], before: list[list[Mask]], after: list[Mask]) -> Sequence[Any]:
    """Along an axis that shrinks, a slice of what is left, or where its steps would differ, a selection."""
    params, x = equation.params, inputs[0]
    starts, limits = list(params["start_indices"]), list(params["limit_indices"])
    steps = list(params["strides"] or (1,) * len(starts))
    for i, mask in enumerate(before[0]):
        if mask is None:
            continue
        wanted = np.zeros(len(mask), bool)
        wanted[starts[i] : limits[i] : steps[i]] = True
        places = np.flatnonzero(wanted[mask])
        first = int(places[0]) if len(places) else 0
        starts[i], limits[i], steps[i] = first, first + len(places), 1
        if (places != first + np.arange(len(places))).any():
            x = jnp.take(x, places, axis=i)
            starts[i], limits[i] = 0, len(places)
    return [lax.slice(x, starts, limits, steps)]


def _split(equation: Any, inputs: list[Any], before: list[list[Mask]], after: list[Mask]) -> Sequence[Any]:
    mask = before[0][equation.params["axis"]]
    if mask is None:
        return equations.bound(equation, inputs)
    ends = np.cumsum(equation.params["sizes"])
    return equations.bound(equation, inputs, sizes=tuple(int(piece.sum()) for piece in np.split(mask, ends[:-1])))


def _pad(equation: Any, inputs: list[Any], before: list[list[Mask]], after: list[Mask]) -> Sequence[Any]:
    config = list(equation.params["padding_config"])
    for i, mask in enumerate(after):
        if mask is not None:
            low, high, _ = config[i]
            config[i] = (int(mask[:low].sum()), int(mask[len(mask) - high :].sum()), 0)
    return equations.bound(equation, inputs, padding_config=tuple(config))


def _convolution(equation: Any, inputs: list[Any], before: list[list[Mask]], after: list[Mask]) -> Sequence[Any]:
    params = equation.params
    groups, mask = params["feature_group_count"], before[0][params["dimension_numbers"].lhs_spec[1]]
    if groups > 1 and mask is not None:
        groups = int(mask.reshape(groups, -1)[:, 0].sum())
    if (
        params["preferred_element_type"] not in (None, equation.invars[0].aval.dtype)
        or params["batch_group_count"] != 1
    ):
        return equations.bound(equation, inputs, feature_group_count=groups)
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers", "precision")
    settings = {name: params[name] for name in names}
    return [ops.conv_general_dilated(*inputs, feature_group_count=groups, **settings)]


def _sliced(equation: Any, inputs: list[Any], before: list[list[Mask]], after: list[Mask]) -> Sequence[Any]:
    """`gather` and `dynamic_slice`, which take all of an axis that shrinks."""
    return equations.bound(equation, inputs, slice_sizes=_sizes(equation.params["slice_sizes"], before[0]))


# loops, branches and derivatives


def traced(kept: Kept, body: Body) -> Any:
    """The jaxpr of what is left of a body."""
    avals = [kept.aval(body.arrays[v], v.aval) for v in open_jaxpr(body.jaxpr).invars]
    return jax.make_jaxpr(lambda *inputs: run(kept, body, inputs))(*avals)


def _scan(kept: Kept, inner: tuple[Body, ...], equation: Any, inputs: list[Any]) -> Sequence[Any]:
    return equations.bound(equation, inputs, jaxpr=traced(kept, inner[0]))


def _while(kept: Kept, inner: tuple[Body, ...], equation: Any, inputs: list[Any]) -> Sequence[Any]:
    condition, body = (traced(kept, each) for each in inner)
    return equations.bound(equation, inputs, cond_jaxpr=condition, body_jaxpr=body)


def _cond(kept: Kept, inner: tuple[Body, ...], equation: Any, inputs: list[Any]) -> Sequence[Any]:
    return equations.bound(equation, inputs, branches=tuple(traced(kept, each) for each in inner))


def _custom_jvp(kept: Kept, inner: tuple[Body, ...], equation: Any, inputs: list[Any]) -> Sequence[Any]:
    if len(inner) == 1:
        return _named(kept, inner[0], equation)(*inputs)
    real = [is_real(variable) for variable in equation.invars]

    def rule(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
        outputs = run(kept, inner[1], [*primals, *chosen(tangents, real)])
        return outputs[: len(equation.outvars)], outputs[len(equation.outvars) :]

    function = jax.custom_jvp(_named(kept, inner[0], equation))
    function.defjvp(rule)
    return function(*inputs)


def _custom_vjp(kept: Kept, inner: tuple[Body, ...], equation: Any, inputs: list[Any]) -> Sequence[Any]:
    if len(inner) == 1:
        return _named(kept, inner[0], equation)(*inputs)
    real, count = [is_real(variable) for variable in equation.invars], len(equation.outvars)

    def forward(*inputs: Any) -> tuple[list[Any], list[Any]]:
        outputs = run(kept, inner[1], inputs)
        return outputs[:count], outputs[count:]

    def backward(residuals: list[Any], grads: list[Any]) -> tuple[Any, ...]:
        found = iter(run(kept, inner[2], [*residuals, *grads]))
        return tuple(next(found) if yes else None for yes in real)

    function = jax.custom_vjp(_named(kept, inner[0], equation))
    function.defvjp(forward, backward)
    return function(*inputs)


def _named(kept: Kept, body: Body, equation: Any) -> Callable[..., list[Any]]:
    """What is left of a body as a function. A body that was one jitted function is one again, of the same name."""

    def function(*inputs: Any) -> list[Any]:
        return run(kept, body, inputs)

    inside = open_jaxpr(equation.params["call_jaxpr"]).eqns
    if len(inside) != 1 or inside[0].primitive.name not in equations.CALLS:
        return function
    function.__name__ = inside[0].params.get("name", function.__name__)
    return jax.jit(function)


RULES: dict[str, Callable[..., Sequence[Any]]] = {
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast_in_dim,
    "iota": _with_shape,
    "random_bits": _drawn,
    "slice": _slice,
    "split": _split,
    "pad": _pad,
    "conv_general_dilated": _convolution,
    "gather": _sliced,
    "dynamic_slice": _sliced,
}
CONTROL: dict[str, Callable[..., Sequence[Any]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
}
