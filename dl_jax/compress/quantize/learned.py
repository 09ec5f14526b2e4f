"""Quantisation-aware training with learned step sizes: LSQ (Esser et al. 2020, arXiv:1902.08153).

    params = with_steps(params, 4)                        # {..., "weight_steps": {"Dense_0/kernel": [1, C], ...}}
    params |= activation_steps(variables["ranges"], 4)    # {..., "activation_steps": {"Dense_0": [], ...}}
    loss = with_params(learned_activations(loss, 4), learned(4))

A step size is a parameter like the others, and is trained by the gradient of equation 3, scaled as in section 2.2.
Weights have the symmetric grid of `quantize`, which has one negative level less than the paper's.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dl_jax.compress.grid import fake_quantize
from dl_jax.compress.quantize.activations import Range, is_between, rounded, rounding_points
from dl_jax.compress.quantize.weights import Axes, Quantized, inner_axes, last_axis, of_chosen, require_bits
from dl_jax.core.errors import InputError
from dl_jax.core.leaves import Where, at_least_float32, is_kernel, leaf_name
from dl_jax.core.step import Array, Tree

WEIGHT_STEPS, ACTIVATION_STEPS = "weight_steps", "activation_steps"  # beside the model's own parameters


def with_steps(params: Tree, bits: int, where: Where = is_kernel, axes: Axes = last_axis) -> Tree:
    """`params` and a step size for each output channel of the chosen weights, 2 mean |w| / sqrt(Q) (section 2.1).

    Raises InputError for bits outside 2 .. 8.
    """
    end, steps = _end(bits), {}

    def add(path: jax.tree_util.KeyPath, w: Array) -> Array:
        mean = jnp.abs(at_least_float32(w)).mean(inner_axes(w, axes(path, w)), keepdims=True)
        steps[leaf_name(path)] = jnp.where(mean > 0, 2 * mean / math.sqrt(end), 1)
        return w

    return {**of_chosen(params, where, add), WEIGHT_STEPS: steps}


def learned(bits: int) -> Callable[[Tree], Tree]:
    """Returns a function params -> params that rounds the weights that have a step size, for `losses.with_params`.

    Raises InputError for bits outside 2 .. 8 and, when called, for parameters without step sizes.
    """
    end = _end(bits)

    def rounded_by(w: Array, step: Array) -> Array:
        step = _scaled(step, 1 / math.sqrt(w.size // step.size * end))
        return fake_quantize(at_least_float32(w), step, jnp.asarray(end, step.dtype), 2 * end)

    return lambda params: _with(params, rounded_by)


def stored(params: Tree, bits: int) -> Tree:
    """The weights that have a step size as `Quantized`, for `dequantize`, `pack` and the codec.

    The values equal those of `learned` bit for bit. Raises InputError as `learned` does.
    """
    end = _end(bits)

    def integers(w: Array, step: Array) -> Quantized:
        return Quantized(jnp.clip(jnp.round(at_least_float32(w) / step), -end, end).astype(jnp.int8), step)

    return _with(params, integers)


def _with(params: Tree, f: Callable[[Array, Array], Any]) -> Tree:
    """The model's own parameters, with f(w, step) in the place of those that have a step size."""
    steps = _steps(params, WEIGHT_STEPS)
    others = {name: tree for name, tree in params.items() if name != WEIGHT_STEPS}
    has_step = lambda path, leaf: leaf_name(path) in steps
    return of_chosen(others, has_step, lambda path, w: f(w, steps[leaf_name(path)]))


def activation_steps(ranges: dict[str, Range], bits: int) -> Tree:
    """{"activation_steps": {path of a layer: []}} for the parameters: the ranges of `calibrate` divided by the levels.

    `calibrate` with `least_error(bits)` gives a good start. Raises InputError for bits outside 2 .. 8.
    """
    _end(bits)

    def step(bounds: Range) -> Array:
        zero, levels = _zero(bounds, bits), 2**bits - 1
        needed = jnp.maximum(bounds.high / (levels - zero), -bounds.low / jnp.maximum(zero, 1))
        return jnp.where(needed > 0, needed, 1)

    return {ACTIVATION_STEPS: {name: step(bounds) for name, bounds in ranges.items() if not is_between(name)}}


def learned_activations(function: Callable[..., Any], bits: int) -> Callable[..., Any]:
    """Wraps a loss, a metric or `module.apply`; the inputs of layers are rounded by learned step sizes.

    The points are those of `with_activations`, which rounds what lies between layers. Inputs are unsigned where the
    range in variables["ranges"] has no negative number, and signed elsewhere; their range is not used otherwise. Raises
    InputError for bits outside 2 .. 8 and, when called, as `with_activations` does.
    """
    _end(bits)

    @functools.wraps(function)
    def quantized(variables: Tree, *args: Any, **kwargs: Any) -> Any:
        steps = _steps(variables["params"], ACTIVATION_STEPS)
        params = {name: tree for name, tree in variables["params"].items() if name != ACTIVATION_STEPS}

        def f(x: Array, name: str, bounds: Range) -> Array:
            if is_between(name):
                return rounded(x, bounds, 8)
            zero, levels = _zero(bounds, bits), 2**bits - 1
            features = math.prod(x.shape[1:])
            step = _scaled(steps[name], 1 / jnp.sqrt(features * (levels - zero)))
            return fake_quantize(x, step, zero, levels)

        return rounding_points(function, f)({**variables, "params": params}, *args, **kwargs)

    return quantized


def _zero(bounds: Range, bits: int) -> Array:
    """Q_N: half of the levels are negative where values are."""
    return jnp.where(bounds.low < 0, 2 ** (bits - 1), 0).astype(at_least_float32(bounds.low).dtype)


def _scaled(step: Array, factor: Any) -> Array:
    """`step`, whose gradient is multiplied by `factor`."""
    return jax.lax.stop_gradient(step) + factor * (step - jax.lax.stop_gradient(step))


def _steps(params: Tree, kind: str) -> Tree:
    if kind not in params:
        raise InputError(
            f"the parameters have no {kind!r}, expected step sizes; add those of `with_steps` and the like"
        )
    return params[kind]


def _end(bits: int) -> int:
    """The largest integer of a weight."""
    require_bits(bits)
    if bits == 1:
        raise InputError("learned step sizes for 1 bit, expected 2 to 8 bits; `binary` has the sign alone")
    return 2 ** (bits - 1) - 1
