"""The kernels that a model multiplies with, computed from the leaves of its variables."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dl_jax import inspect
from dl_jax.core.equations import Called, bound, evaluate, scanned


class Kernel(NamedTuple):
    """What a layer multiplies its data with."""

    equation: Any  # the product
    value: np.ndarray | None  # None where it depends on data


def kernels(called: Called, layers: dict[Any, inspect.Layer], leaves: Sequence[Any]) -> dict[Any, Kernel]:
    """The kernels of the layers of a call, by the result of the layer; `leaves` are those of its variables.

    In a loop over a stack of layers the kernel is that of the first.
    """
    found: dict[Any, Kernel] = {}

    def operation(equation: Any, inputs: list[Any]) -> Sequence[Any]:  # None stands for what depends on data
        if equation.primitive.name == "scan":
            constants, carried = scanned(equation)
            firsts = [None if x is None or not len(x) else x[0] for x in inputs[constants + carried :]]
            evaluate(equation.params["jaxpr"], [*inputs[:constants], *[None] * carried, *firsts], operation)
            return [None] * len(equation.outvars)
        if layer := layers.get(equation.outvars[0]):
            value = inputs[1 - layer.operand]
            found[equation.outvars[0]] = Kernel(equation, None if value is None else np.asarray(value))
        return [None] * len(equation.outvars) if any(x is None for x in inputs) else bound(equation, inputs)

    evaluate(called.jaxpr, [*leaves, *[None] * len(called.others)], operation)
    return found


def summed(equation: Any, side: int) -> tuple[int, ...]:
    """The axes of an input over which a product sums."""
    numbers = equation.params["dimension_numbers"]
    if equation.primitive.name == "dot_general":
        return tuple(numbers[0][side])
    return tuple((numbers.lhs_spec, numbers.rhs_spec)[side][1:])
