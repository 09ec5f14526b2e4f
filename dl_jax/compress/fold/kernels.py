"""The kernels and biases of folded layers."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dl_jax.compress.fold.lines import (
    Flow,
    Line,
    Product,
    Variable,
    shape,
)
from dl_jax.core.equations import Called, bound
from dl_jax.core.errors import InputError
from dl_jax.core.leaves import leaf_name
from dl_jax.core.step import Array


class Fold(NamedTuple):
    product: Product
    before: Line | None  # of what goes into the product
    after: Line  # of its result; it may have no steps
    bias: jax.tree_util.KeyPath

    @property
    def signature(self) -> Any:
        """Equal in two traces where the same is folded in both."""
        lines = [line and ([step.primitive.name for step in line.steps], line.leaves) for line in self[1:3]]
        return self.product.leaf, lines


def new_leaves(flow: Flow, folds: Sequence[Fold], leaves: Sequence[Any]) -> dict[jax.tree_util.KeyPath, Array]:
    """The folded kernels and biases. Raises InputError where one is not finite."""

    @jax.jit
    def compute(leaves: Sequence[Any]) -> list[tuple[Array, Array]]:
        values = _values(flow, leaves)
        return [_scaled(fold, values, leaves[fold.product.leaf]) for fold in folds]

    found = _finite(flow.called, folds, leaves, compute(leaves))
    kernels = {flow.called.paths[fold.product.leaf]: kernel for fold, (kernel, _) in zip(folds, found, strict=True)}
    return kernels | {fold.bias: bias for fold, (_, bias) in zip(folds, found, strict=True)}


def _values(flow: Flow, leaves: Sequence[Any]) -> dict[Variable, Any]:
    """The values of all constants."""
    jaxpr = flow.called.jaxpr
    values = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    values.update(zip(jaxpr.jaxpr.invars, leaves, strict=False))
    for equation in jaxpr.jaxpr.eqns:
        if equation.outvars and equation.outvars[0] in flow.known:
            inputs = [atom.val if isinstance(atom, jex.Literal) else values[atom] for atom in equation.invars]
            values.update(zip(equation.outvars, bound(equation, inputs), strict=True))
    return values


def _scaled(fold: Fold, values: Mapping[Variable, Any], kernel: Array) -> tuple[Array, Array]:
    """The kernel and the bias of a folded layer.

    A line computes s x + t. Its derivative is s, exactly, and its value at 0 is t. What the shift of the line before
    the product becomes in the product is where the line after it starts from.
    """
    product, after = fold.product, fold.after
    result = product.equation.outvars[0].aval
    start, factor = jnp.zeros(result.shape, result.dtype), 1
    if before := fold.before:
        zero = jnp.zeros(before.source.aval.shape, before.source.aval.dtype)
        shift, scale = jax.jvp(lambda x: _replayed(before, values, x), (zero,), (jnp.ones_like(zero),))
        factor = _of_inputs(product, scale, kernel.ndim)
        operands = [shift, values[product.equation.invars[product.place]]]
        (start,) = bound(product.equation, operands if product.place else operands[::-1])
    shift, scale = jax.jvp(lambda x: _replayed(after, values, x), (start,), (jnp.ones_like(start),))
    channels = [axis if axis in product.outputs else None for axis in after.axes]
    of_kernel = [None if axis is None else product.view[product.outputs[axis]] for axis in channels]
    sizes = [result.shape[axis] if axis in product.outputs else 1 for axis in range(result.ndim)]
    bias = jnp.broadcast_to(_placed(shift, channels, result.ndim), sizes)
    bias = bias.reshape([result.shape[axis] for axis in sorted(product.outputs)])
    return (kernel * factor * _placed(scale, of_kernel, kernel.ndim)).astype(kernel.dtype), bias.astype(kernel.dtype)


def _replayed(line: Line, values: Mapping[Variable, Any], x: Array) -> Array:
    """The end of a line whose source is x."""
    values = {**values, line.source: x}
    for step in line.steps:
        inputs = [atom.val if isinstance(atom, jex.Literal) else values[atom] for atom in step.invars]
        (values[step.outvars[0]],) = bound(step, inputs)
    return values[line.source if not line.steps else line.steps[-1].outvars[0]]


def _of_inputs(product: Product, scale: Array, ndim: int) -> Array:
    """The factor of each value of a kernel of `ndim` axes, from those of the data that it is multiplied with."""
    if product.equation.primitive.name == "dot_general":
        axes = [product.view[product.inputs[axis]] if axis in product.inputs else None for axis in range(scale.ndim)]
        return _placed(scale, axes, ndim)
    ((channel, of_kernel),) = product.inputs.items()
    ((_, maps),) = product.outputs.items()
    groups = product.equation.params["feature_group_count"]
    each = _placed(scale, [0 if axis == channel else None for axis in range(scale.ndim)], 1).reshape(groups, -1)
    count = shape(product.equation.invars[1])[maps] // groups  # of the maps of a group, which are neighbours
    return _placed(jnp.repeat(each, count, 0), [product.view[maps], product.view[of_kernel]], ndim)


def _placed(values: Array, axes: Sequence[int | None], ndim: int) -> Array:
    """`values` with axis i as axis axes[i] of `ndim`. They are alike along axes for which this is None."""
    values = values[tuple(0 if axis is None else slice(None) for axis in axes)]
    places = [axis for axis in axes if axis is not None]
    values = values.transpose(np.argsort(places))
    sizes = dict(zip(sorted(places), values.shape, strict=True))
    return values.reshape([sizes.get(axis, 1) for axis in range(ndim)])


def _finite(called: Called, folds: Sequence[Fold], leaves: Sequence[Any], new: Any) -> Any:
    """`new`, the kernel and bias of each fold. Raises InputError where one of them is not finite.

    Under `jax.vmap` the numbers of one seed are unknown, but those of the whole stack are not; under `jit` none are.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((leaves, new))):

        @jax.custom_batching.custom_vmap
        def unknown(leaves: Any, new: Any) -> Any:
            return new

        unknown.def_vmap(lambda seeds, mapped, leaves, new: (_finite(called, folds, leaves, new), mapped[1]))
        return unknown(leaves, new)
    for fold, arrays in zip(folds, new, strict=True):
        if all(np.isfinite(each).all() for each in arrays):
            continue
        lines = [line for line in (fold.before, fold.after) if line]
        used = sorted({fold.product.leaf}.union(*(each for line in lines for each in line.leaves)))
        names = {leaf: leaf_name(called.paths[leaf]) for leaf in used}
        for leaf, name in names.items():
            if not np.isfinite(leaves[leaf]).all():
                raise InputError(
                    f"{name} has NaN or infinite values, expected finite numbers; look for divergence in training"
                )
        raise InputError(
            f"folding {', '.join(names.values())} gives NaN or infinite values, expected finite numbers; look for a "
            "negative variance or a division by zero"
        )
    return new
