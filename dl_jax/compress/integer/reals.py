"""What a network in integers computes, in real numbers."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax import inspect
from dl_jax.compress.integer.fixed import Fixed, Grid
from dl_jax.compress.integer.integers import BROADCAST, Notes, in_integers
from dl_jax.compress.integer.model import Model, opened
from dl_jax.compress.kernels import summed
from dl_jax.compress.quantize.weights import require_bits
from dl_jax.core.equations import bound, evaluate
from dl_jax.core.step import Tree


def simulated(apply: Callable[..., Any], variables: Tree, bits: int = 8) -> Callable[..., Any]:
    """The function of `integer_only` in real numbers, of float64: what training simulates, rounded as the integers are.

    Layers multiply and sum the real numbers that the integers stand for. At a point of the model, a sum is rounded to
    whole steps of scale(input) · scale(weight), which removes the error of float64, multiplied by m · 2^-n, and
    rounded, halves up. Biases and other constants are whole steps too, and so are the terms of a sum of two
    activations. But for the rounding of constants and of multipliers this is `quantize.with_activations`. Takes and
    raises what `integer_only` does.
    """
    require_bits(bits)

    def reals(*args: Any, **kwargs: Any) -> Any:
        model = opened(apply, variables, bits, *args, **kwargs)
        noted: list[Any] = []
        jax.eval_shape(lambda others: noted.extend(in_integers(model, others)), model.called.others)
        results, notes = noted
        with jax.enable_x64(True):
            outputs = jax.jit(lambda others: _in_reals(model, notes, others))(model.called.others)
            steps = [jnp.round(x / y.scale).astype(jnp.int32) if isinstance(y, Fixed) else x
                     for x, y in zip(outputs, results, strict=True)]  # fmt: skip
        pairs = zip(steps, results, strict=True)
        return model.called.result([Fixed(x, y.scale, 0).real() if isinstance(y, Fixed) else x for x, y in pairs])

    return reals


def _in_reals(model: Model, notes: Notes, others: Any) -> list[Any]:
    """The outputs of `simulated`: float64 behind the first points, and float32 before."""

    def operation(equation: Any, inputs: list[Any]) -> Sequence[Any]:
        v = equation.outvars[0]
        if v in model.points.operands:
            i, name = model.points.operands[v]
            inputs[i] = at(model.grid(name), inputs[i], None)
        if v in model.layers:
            kernel, scale = model.kernels[v]
            inputs[1] = kernel * np.expand_dims(scale, summed(equation, 1))
        inputs = [x if c is None else c for x, c in zip(inputs, notes.constants.get(v, inputs), strict=True)]
        if terms := notes.terms.get(v):
            inputs = [jnp.floor(jnp.round(x / each.before) * each.factor + 0.5) * each.after
                      for x, each in zip(inputs, terms, strict=True)]  # fmt: skip
        wide = any(jnp.result_type(x) == jnp.float64 for x in inputs)
        outputs = _wide(equation, inputs) if wide else bound(equation, _typed(equation, inputs))
        grids = [model.grid(model.points.values[v]) if v in model.points.values else None for v in equation.outvars]
        return [at(grid, x, v) for grid, x, v in zip(grids, outputs, equation.outvars, strict=True)]

    def at(grid: Grid | None, x: Any, v: Any) -> Any:
        if grid is None:
            return x
        q = grid.of_real(x).astype(jnp.float64)
        if v in notes.rescaled:
            scale, (m, n, left) = notes.rescaled[v]
            steps = jnp.round(x / scale) * (m * 2.0 ** (left - n))
            q = jnp.clip(jnp.floor(steps + 0.5) + grid.zero, -grid.end, grid.end - 1)
        return grid.scale * (q - grid.zero)

    return evaluate(model.called.jaxpr, [*model.leaves, *others], operation)


def _typed(equation: Any, inputs: list[Any]) -> list[Any]:
    return [jnp.asarray(x, atom.aval.dtype) for x, atom in zip(inputs, equation.invars, strict=True)]


def _wide(equation: Any, inputs: list[Any]) -> Sequence[Any]:
    """The results of an equation in float64."""
    real = [jnp.issubdtype(atom.aval.dtype, jnp.floating) for atom in equation.invars]
    inputs = [jnp.asarray(x, jnp.float64 if yes else None) for x, yes in zip(inputs, real, strict=True)]
    name = equation.primitive.name
    if name == "convert_element_type" and jnp.issubdtype(equation.params["new_dtype"], jnp.floating):
        return inputs
    if name in BROADCAST:
        return [BROADCAST[name](*inputs)]
    changes = {"preferred_element_type": None} if name in inspect.LAYER_PRIMITIVES else {}
    return bound(equation, inputs, **changes)
