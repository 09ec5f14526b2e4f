"""The arithmetic of quantised numbers, x ≈ scale · (q − zero), as functions that can be found again in a trace.

A trace (`dl_jax.core.equations.trace`) keeps a call of one of them as one equation, since they have derivatives of
their own; an exporter asks `marked` which one it is, and writes the nodes of its format instead.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from dl_jax.core.equations import CALLS, DERIVATIVES
from dl_jax.core.leaves import at_least_float32
from dl_jax.core.step import Array


@jax.custom_jvp
def fake_quantize(x: Array, scale: Array, zero: Array, levels: int) -> Array:
    """(clip(round(x / scale) + zero, 0, levels) − zero) · scale, in float32 or wider and then in the type of x.

    `scale` and `zero` broadcast with x, and `zero` is a whole number from 0 to `levels`. The derivative takes rounding
    for the identity: that by x is 1, and 0 where x is clipped; that by the scale is (round(x / scale) − x / scale), and
    q − zero where x is clipped (Esser et al. 2020, arXiv:1902.08153, equation 3). There is none by `zero`.
    """
    return _fake_quantize(x, scale, zero, levels)


@jax.jit
def _fake_quantize(x: Array, scale: Array, zero: Array, levels: int) -> Array:
    q = jnp.clip(jnp.round(at_least_float32(x) / scale) + zero, 0, levels)
    return ((q - zero) * scale).astype(x.dtype)


def _straight_through(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    (x, scale, zero, levels), (dx, dscale, *_) = primals, tangents
    ratio = at_least_float32(x) / scale
    steps = jnp.round(ratio)
    kept = (steps + zero >= 0) & (steps + zero <= levels)
    value = fake_quantize(x, scale, zero, levels)
    tangent = jnp.zeros_like(value)
    if not isinstance(dx, SymbolicZero):
        tangent += jnp.where(kept, dx, 0)
    if not isinstance(dscale, SymbolicZero):
        slope = jnp.where(kept, steps - ratio, jnp.clip(steps + zero, 0, levels) - zero)
        tangent += (slope * dscale).astype(value.dtype)
    return value, tangent


fake_quantize.defjvp(_straight_through, symbolic_zeros=True)


@jax.custom_jvp
def dequantized(values: Array, scale: Array) -> Array:
    """values · scale, in the type of `scale`: int8 weights as numbers."""
    return _dequantized(values, scale)


@jax.jit
def _dequantized(values: Array, scale: Array) -> Array:
    return values * scale


@dequantized.defjvp
def _by_scale(primals: tuple[Array, Array], tangents: tuple[Any, Array]) -> tuple[Array, Array]:
    return dequantized(*primals), primals[0] * tangents[1]


MARKS = {"_fake_quantize": fake_quantize, "_dequantized": dequantized}  # the name of a call in a trace: the function


def marked(equation: Any) -> Callable[..., Array] | None:
    """`fake_quantize` or `dequantized` if the equation of a trace is a call of it, otherwise None.

    The inputs of the equation are the arguments of the function; `levels` is a number among them.
    """
    if equation.primitive.name not in DERIVATIVES:
        return None
    body = equation.params[DERIVATIVES[equation.primitive.name]]
    names = [inner.params.get("name") for inner in body.jaxpr.eqns if inner.primitive.name in CALLS]
    return MARKS.get(names[0]) if len(names) == len(body.jaxpr.eqns) == 1 else None
