"""Which parameters of a model are weights, and their axes of output channels: read from the products that use them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dl_jax import inspect
from dl_jax.compress.kernels import Kernel, kernels, summed
from dl_jax.compress.quantize.weights import Axes, last_axis
from dl_jax.core.equations import Called
from dl_jax.core.errors import InputError
from dl_jax.core.leaves import Where, leaf_name
from dl_jax.core.step import Tree


class LayerWeights(NamedTuple):
    """For `quantize` and `fake`: `quantize(params, 8, *layer_weights(apply, variables, image))`."""

    where: Where  # whether a layer multiplies with a parameter, of whatever name
    axes: Axes


def layer_weights(apply: Callable[..., Any], variables: Tree, *args: Any, **kwargs: Any) -> LayerWeights:
    """The parameters that layers multiply with in the given call, and the axes over which their results run.

    Those of a kernel [D, heads, width] that projects to heads are (1, 2), and those of a kernel [heads, width, D] that
    projects back are (2,). Where a layer computes its kernel otherwise than by moving numbers, none may be found: the
    weight then has one scale. A parameter that no layer multiplies with, such as an embedding, has the `last_axis`, and
    `where` does not choose it. Only the shapes of `variables` matter. Layers are those of `inspect.with_inputs`.

    Raises InputError where no layer multiplies with a parameter.
    """
    called = inspect.opened(apply, variables, *args, **kwargs)
    layers, _ = inspect.analysed(called)
    leaves = jax.tree.leaves(variables)
    used = sorted({i for layer in layers.values() for i in layer.leaves if leaf_name(called.paths[i][:1]) == "params"})
    if not used:
        raise InputError(
            "the call multiplies with no parameter, expected at least one layer; give it a model with dense or "
            "convolutional layers, and its variables as {'params': ..., ...}"
        )
    runs_over = [_kernels_along(called, layers, leaves, axis) for axis in range(max(leaves[i].ndim for i in used))]
    found = {
        leaf_name(called.paths[i][1:]): tuple(axis for axis in range(leaves[i].ndim) if i in runs_over[axis])
        for i in used
    }
    return LayerWeights(
        lambda path, leaf: leaf_name(path) in found,
        lambda path, leaf: found.get(leaf_name(path), last_axis(path, leaf)),
    )


def _kernels_along(called: Called, layers: dict[Any, inspect.Layer], leaves: list[Any], axis: int) -> set[int]:
    """The numbers of the leaves whose `axis` is one of outputs.

    Each number of a weight is replaced by its place along the axis. If the axis is one of outputs, all numbers that a
    product sums over are then the same.
    """
    places = [_places(leaf, axis) if leaf.ndim > axis else np.zeros(leaf.shape, np.float32) for leaf in leaves]
    places = [place.astype(leaf.dtype) for place, leaf in zip(places, leaves, strict=True)]
    ours: set[int] = set()
    others: set[int] = set()
    for result, kernel in kernels(called, layers, places).items():
        layer = layers[result]
        (ours if _constant(kernel, 1 - layer.operand) else others).update(layer.leaves)
    return ours - others


def _places(leaf: Any, axis: int) -> np.ndarray:
    shape = [-1 if i == axis else 1 for i in range(leaf.ndim)]
    return np.broadcast_to(np.arange(leaf.shape[axis], dtype=np.float32).reshape(shape), leaf.shape)


def _constant(kernel: Kernel, side: int) -> bool:
    """Whether a kernel, input `side` of a product, is constant along the axes over which the product sums."""
    value = kernel.value
    if value is None:
        return False
    axes = summed(kernel.equation, side)
    return bool((value.max(axes) == value.min(axes)).all())
