"""Rewrites a function into the primitive operations that exporters support."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from dl_jax.compress.grid import dequantized, fake_quantize, marked
from dl_jax.core.equations import DERIVATIVES, bound, evaluate, inlined, scanned


class Integers(NamedTuple):
    """Weights as a format stores them: their value is `values * scale`."""

    values: np.ndarray  # int8 [...]
    scale: np.ndarray  # float32 [values.shape[axis]], or [] where there is no axis
    axis: int | None


class Rounding(NamedTuple):
    """What rounds an activation to (q − zero) · scale with q = clip(round(x / scale) + zero, 0, 255)."""

    scale: np.float32
    zero: int
    largest: np.float32 | None  # the x that is clipped to before, or None where 255 is the largest q


class Forms(NamedTuple):
    """How a format writes the marked operations of `compress.grid`, and primitives that it has a better form of."""

    rounded: Callable[[jax.Array, Rounding], jax.Array]
    dequantized: Callable[[Integers], jax.Array]
    # By name: (equation, *inputs) -> output, or None where the primitive is as good.
    primitives: Mapping[str, Callable[..., Any]] = MappingProxyType({})


class _Stored(NamedTuple):
    """A dequantised weight that is written where it is read, in the body of a loop too: runtimes want it beside."""

    integers: Integers
    shape: tuple[int, ...]

    def written(self, forms: Forms) -> jax.Array:
        x = forms.dequantized(self.integers)
        return x if x.shape == self.shape else x.reshape(self.shape)


def plain(
    function: Callable[..., Any],
    inputs: Sequence[jax.ShapeDtypeStruct],
    forms: Forms | None = None,
    unroll: bool = False,
) -> Callable[..., list[jax.Array]]:
    """`function` without nested calls, custom derivatives and `lax.platform_dependent`.

    The result takes arrays of the shapes `inputs`, and returns the list of the leaves of the output of `function`.
    `lax.platform_dependent` is replaced by its default branch. Values that do not depend on the inputs become
    constants. `function` is traced in this call, so that it uses the original `jnp` and Flax functions even where an
    exporter replaces these in its own trace.

    Args:
      function: takes arrays.
      inputs: their shapes.
      forms: what to write for rounded activations, dequantised weights and some primitives. Without it the first two
        are written as the operations that they consist of, and so are those whose scales are not constants.
      unroll: write out the steps of each `lax.scan`.
    """
    jaxpr = inlined(jax.make_jaxpr(function)(*inputs))
    operation = functools.partial(_results, forms, unroll)
    return lambda *inputs: [_written(forms, each) for each in evaluate(jaxpr, inputs, operation)]


def _written(forms: Forms | None, value: Any) -> Any:
    return value.written(forms) if forms and isinstance(value, _Stored) else value


def _results(forms: Forms | None, unroll: bool, equation: Any, inputs: list[Any]) -> Sequence[Any]:
    operation = functools.partial(_results, forms, unroll)
    name, params = equation.primitive.name, equation.params
    kept = scanned(equation)[0] if name == "scan" and not unroll else 0  # inputs that the body of a loop reads
    inputs = [*inputs[:kept], *(_written(forms, each) for each in inputs[kept:])]
    if name in DERIVATIVES:
        written = forms and _marked(forms, marked(equation), inputs)
        return evaluate(inlined(params[DERIVATIVES[name]]), inputs, operation) if written is None else [written]
    if name == "scan":
        return _scan(equation, inputs, forms, unroll)
    known = not any(isinstance(each, Tracer) for each in inputs)
    if known and all(isinstance(size, int) for out in equation.outvars for size in out.aval.shape):
        with jax.ensure_compile_time_eval():
            return bound(equation, inputs)
    form = forms.primitives[name](equation, *inputs) if forms and name in forms.primitives else None
    return bound(equation, inputs) if form is None else [form]


def _scan(equation: Any, inputs: list[Any], forms: Forms | None, unroll: bool) -> Sequence[Any]:
    """A scan whose body is written so as well. It closes over the inputs that never change: some are constants."""
    operation = functools.partial(_results, forms, unroll)
    params, (constants, carries) = equation.params, scanned(equation)

    def step(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        outputs = evaluate(params["jaxpr"], [*inputs[:constants], *carry, *x], operation)
        outputs = [_written(forms, each) for each in outputs]
        return outputs[:carries], outputs[carries:]

    carry, xs = inputs[constants:][:carries], inputs[constants + carries :]
    unrolled = params["length"] if unroll else params["unroll"]
    carry, ys = lax.scan(step, carry, xs, params["length"], params["reverse"], unrolled)
    return [*carry, *ys]


def _marked(forms: Forms, mark: Callable[..., Any] | None, inputs: list[Any]) -> jax.Array | _Stored | None:
    """What a format writes for a marked operation, or None where it has to write the body."""
    x, *constants = inputs
    if mark is None or any(isinstance(each, Tracer) for each in constants):
        return None
    if mark is dequantized:
        integers = None if isinstance(x, Tracer) else _integers(np.asarray(x), np.asarray(constants[0], np.float32))
        return None if integers is None else _Stored(integers, x.shape)
    if mark is fake_quantize and isinstance(x, Tracer) and x.dtype == jnp.float32:
        rounding = _rounding(*map(np.asarray, constants))
        return None if rounding is None else forms.rounded(x, rounding)
    return None


def _integers(values: np.ndarray, scale: np.ndarray) -> Integers | None:
    """Weights with one axis of scales, from scales that broadcast with them: neighbouring axes are made one.

    None where these axes are not neighbours, or the values are no int8.
    """
    if values.dtype != np.int8 or scale.ndim > values.ndim:
        return None
    scale = scale.reshape((1,) * (values.ndim - scale.ndim) + scale.shape)
    axes = [axis for axis, size in enumerate(scale.shape) if size > 1]
    if not axes:
        return Integers(values, scale.reshape(()), None)
    first, end = axes[0], axes[-1] + 1
    if scale.shape[first:end] != values.shape[first:end]:
        return None
    merged = (*values.shape[:first], math.prod(values.shape[first:end]), *values.shape[end:])
    return Integers(values.reshape(merged), scale.ravel(), first)


def _rounding(scale: np.ndarray, zero: np.ndarray, levels: np.ndarray) -> Rounding | None:
    if scale.size > 1 or zero.size > 1 or not 0 <= zero <= levels <= 255 or not 0 < scale < np.inf:
        return None
    step, middle, last = np.float32(scale.item()), int(zero.item()), int(levels.item())
    return Rounding(step, middle, None if last == 255 else np.float32((last - middle) * step))
