"""The floating-point operations of a traced program, with loops multiplied out, where XLA counts a loop's body once."""

import math
from collections import Counter
from typing import Any

import numpy as np


def flops(jaxpr: Any) -> int:
    """The multiplications and additions in the matrix products and convolutions of a jaxpr, over all devices.

    A scan counts as many times as it iterates, and a loop whose number of iterations is not known counts once. Of the
    branches of a condition it is the costliest, and of branches for different platforms the default: a convolution
    counts as one, however a CPU computes it. Products with zeros of a padding or a dilation do not count.
    """
    return by_scope(jaxpr).total()


def by_scope(jaxpr: Any) -> Counter[str]:
    """The parts of `flops` by the scope that an operation was traced in, such as "Net/Dense_0" (`jax.named_scope`)."""
    found: Counter[str] = Counter()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:  # of a ClosedJaxpr, or itself
        found.update(_of_equation(equation))
    return found


def _of_equation(equation: Any) -> Counter[str]:
    name, params, scope = equation.primitive.name, equation.params, str(equation.source_info.name_stack)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        terms = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
        return Counter({scope: 2 * _size(equation.outvars[0]) * terms})
    if name == "conv_general_dilated":
        return Counter({scope: _of_convolution(equation)})
    times = 1
    if name == "cond":
        platforms, branches = params.get("branches_platforms"), params["branches"]
        inner = [branches[platforms.index(None)]] if platforms else [max(branches, key=flops)]
    else:
        values = [each for value in params.values() for each in (value if isinstance(value, tuple) else (value,))]
        inner = [value for value in values if hasattr(getattr(value, "jaxpr", value), "eqns")]
    if name == "shard_map":  # its shapes are those of one device
        times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    elif name == "scan":
        times = params["length"]
    found: Counter[str] = Counter()
    for within, operations in sum(map(by_scope, inner), Counter()).items():
        found["/".join(filter(None, (scope, within)))] += times * operations
    return found


def _of_convolution(equation: Any) -> int:
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
    return 2 * result[batch] * result[maps] * kernel[channels] * math.prod(_products(*each) for each in spatial)


def _products(n: int, taps: int, results: int, stride: int, padding: tuple[int, int], holes: int, step: int) -> int:
    """The pairs of a result and a tap along one axis that meet one of the n numbers of the input."""
    position = np.add.outer(np.arange(results) * stride, np.arange(taps) * step) - padding[0]
    return int(((position >= 0) & (position <= (n - 1) * holes) & (position % holes == 0)).sum())


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)
