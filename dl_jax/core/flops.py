"""The floating-point operations of a traced program, with loops multiplied out, where XLA counts a loop's body once."""

import math
from typing import Any

import numpy as np


def flops(jaxpr: Any) -> float:
    """The multiplications and additions in the matrix products and convolutions of a jaxpr, over all devices.

    A scan counts as many times as it iterates, and a loop whose number of iterations is not known counts once. Of the
    branches of a condition it is the costliest, and of branches for different platforms the default: a convolution
    counts as one, however a CPU computes it. Products with zeros of a padding or a dilation do not count.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # of a ClosedJaxpr
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2.0 * _size(equation.outvars[0]) * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
    if name == "conv_general_dilated":
        return _of_convolution(equation)
    if name == "cond":
        platforms, branches = params.get("branches_platforms"), params["branches"]
        return flops(branches[platforms.index(None)]) if platforms else max(map(flops, branches))
    values = [each for value in params.values() for each in (value if isinstance(value, tuple) else (value,))]
    inner = sum(flops(value) for value in values if hasattr(getattr(value, "jaxpr", value), "eqns"))
    if name == "shard_map":  # its shapes are those of one device
        return inner * math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return params["length"] * inner if name == "scan" else inner


def _of_convolution(equation: Any) -> float:
    (image, kernel), params = (variable.aval.shape for variable in equation.invars), equation.params
    numbers, result = params["dimension_numbers"], equation.outvars[0].aval.shape
    (_, channels, *taps), (batch, maps, *size) = numbers.rhs_spec, numbers.out_spec
    spatial = zip(
        [image[i] for i in numbers.lhs_spec[2:]],
        [kernel[i] for i in taps],
        [result[i] for i in size],
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        strict=True,
    )
    return 2.0 * result[batch] * result[maps] * kernel[channels] * math.prod(_products(*each) for each in spatial)


def _products(n: int, taps: int, results: int, stride: int, padding: tuple[int, int], holes: int, step: int) -> int:
    """The pairs of a result and a tap along one axis that meet one of the n numbers of the input."""
    position = np.add.outer(np.arange(results) * stride, np.arange(taps) * step) - padding[0]
    return int(((position >= 0) & (position <= (n - 1) * holes) & (position % holes == 0)).sum())


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)
