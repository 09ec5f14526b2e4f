"""What the integers of a network are: the kernels of its layers, and the grids of the points between them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax import inspect
from dl_jax.compress.integer.fixed import Grid
from dl_jax.compress.kernels import kernels, summed
from dl_jax.compress.quantize.activations import RANGES, as_range, grid_of, is_between
from dl_jax.compress.quantize.points import Points, points
from dl_jax.compress.quantize.weights import Quantized, as_quantized, dequantize, is_quantized
from dl_jax.core.equations import DERIVATIVES, Called, bound, evaluate, inlined
from dl_jax.core.errors import InputError
from dl_jax.core.step import Array, Tree


class Model(NamedTuple):
    """A call of a model, with the integers of its weights and the grids of its activations."""

    called: Called
    leaves: list[Any]  # of the variables, as real numbers
    layers: dict[Any, inspect.Layer]
    kernels: dict[Any, tuple[np.ndarray, np.ndarray]]  # by the result of a layer: int8 kernel, float64 scale [outputs]
    points: Points
    grids: dict[str, Grid]

    def grid(self, name: str) -> Grid | None:
        """The grid of a point, None where it is between layers and has no range."""
        if name not in self.grids and not is_between(name):
            raise InputError(
                f"layer {name!r} has no range, expected one of {', '.join(self.grids)}; calibrate this model"
            )
        return self.grids.get(name)


def opened(apply: Callable[..., Any], variables: Tree, bits: int, *args: Any, **kwargs: Any) -> Model:
    """Reads a call `apply(variables, *args, **kwargs)` of quantised variables whose layers take inputs of `bits` bits.

    Raises InputError for variables without ranges, and for a layer in a loop, of half precision, or whose weights are
    no integers with one scale for each output.
    """
    if RANGES not in variables:
        raise InputError(f"the variables have no collection {RANGES!r}, expected one; call `quantize.calibrate` first")
    others = {name: tree for name, tree in variables.items() if name != RANGES}
    with jax.ensure_compile_time_eval():
        real, values, scales = dequantize(others), _weights(others, _integers_of), _weights(others, _scales_of)
        grids = {
            name: _grid(as_range(each), 8 if is_between(name) else bits) for name, each in variables[RANGES].items()
        }
    called = inspect.opened(apply, real, *args, **kwargs)
    called = called._replace(jaxpr=_without_derivatives(called.jaxpr))
    layers, _ = inspect.analysed(called)
    with jax.ensure_compile_time_eval():
        found = [kernels(called, layers, jax.tree.leaves(version)) for version in (real, values, scales)]
    integers = {
        e.outvars[0]: _integer_kernel(e, layers[e.outvars[0]], *(each[e.outvars[0]].value for each in found))
        for e in called.jaxpr.jaxpr.eqns
        if e.outvars[0] in layers
    }
    if loops := [layer.paths[0] for v, layer in layers.items() if v not in integers]:
        raise InputError(
            f"layer {loops[0]!r} is in a loop, expected feed-forward layers; recurrent ones stay in floats"
        )
    return Model(called, jax.tree.leaves(real), layers, integers, points(called), grids)


def _grid(bounds: Any, bits: int) -> Grid:
    scale, zero = grid_of(as_range(bounds), bits)
    return Grid(np.asarray(scale, np.float64), int(zero) - 2 ** (bits - 1), 2 ** (bits - 1))


def _without_derivatives(closed: Any) -> Any:
    def operation(equation: Any, inputs: list[Any]) -> Sequence[Any]:
        if body := DERIVATIVES.get(equation.primitive.name):
            return evaluate(inlined(equation.params[body]), inputs, operation)
        return bound(equation, inputs)

    return jax.make_jaxpr(lambda *inputs: evaluate(closed, inputs, operation))(*closed.in_avals)


def _weights(variables: Tree, f: Callable[[Quantized], Array]) -> Tree:
    change = lambda leaf: f(as_quantized(leaf)) if is_quantized(leaf) else leaf
    return jax.tree.map(change, variables, is_leaf=is_quantized)


def _integers_of(weight: Quantized) -> Array:
    return weight.values.astype(jnp.float32)


def _scales_of(weight: Quantized) -> Array:
    return jnp.broadcast_to(weight.scale, weight.values.shape)


def _integer_kernel(
    equation: Any, layer: inspect.Layer, real: np.ndarray | None, values: np.ndarray | None, scales: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The int8 kernel of a product, and the scales of its outputs."""
    if real is None or values is None or scales is None:
        raise InputError(
            f"the weights of layer {layer.paths[0]!r} depend on its data, expected constants; leave it in floats"
        )
    if real.dtype.itemsize < 4:
        raise InputError(
            f"layer {layer.paths[0]!r} computes in {real.dtype.name}, expected float32, in which weights are exact; "
            "make the model with dtype float32"
        )
    axes = summed(equation, 1 - layer.operand)
    scale = scales.astype(np.float64).max(axes, keepdims=True)
    if not (np.allclose(real, values * scale, rtol=1e-5, atol=0) and abs(values).max() <= 127):
        raise InputError(
            f"the weights of layer {layer.paths[0]!r} are not integers with one scale for each output, expected those "
            "of `quantize`; give it the axes that `layer_weights` reads from the model"
        )
    finest = scale[scale > 0].min(initial=1)  # for an output without weights, which may have a bias
    return values.astype(np.int8), np.where(scale > 0, scale, finest).squeeze(axes)
