"""What the writers of all formats do with a function: trace it, and compare the written file with it."""

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from dl_jax.core.errors import InputError


def baked(apply: Callable[..., Any], variables: Any) -> Callable[..., Any]:
    """The function inputs -> `apply(variables, *inputs)`, with `variables` (JAX or NumPy arrays) as constants.

    Raises InputError, when called with inputs of an unknown number of rows, where `apply` works for a known one only.
    """
    variables = jax.tree.map(jnp.asarray, variables)

    def function(*inputs: Any) -> Any:
        try:
            return apply(variables, *inputs)
        except Exception as e:
            if isinstance(e, InputError) or not _needs_rows(functools.partial(apply, variables), inputs):
                raise
            raise InputError(
                f"the function needs the number of rows in a batch, expected one for any number ({_first_line(e)}); "
                "write x.shape[0] for len(x), do not loop over rows, or export for one batch size where the format can"
            ) from e

    return function


def _needs_rows(function: Callable[..., Any], inputs: Sequence[Any]) -> bool:
    """Whether a function that cannot be traced for these inputs can be for two rows in place of an unknown number."""
    shapes = [jnp.shape(each) for each in inputs]
    if all(isinstance(size, int) for shape in shapes for size in shape):
        return False
    known = [[size if isinstance(size, int) else 2 for size in shape] for shape in shapes]
    try:
        jax.eval_shape(function, *map(jax.ShapeDtypeStruct, known, [jnp.result_type(each) for each in inputs]))
    except Exception:
        return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def signature(inputs: Sequence[Any], batch: int | None = None) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes and types of the example `inputs` in JAX, for `batch` rows, or with a symbol for any number of them.

    Raises InputError unless the first axis of all inputs has the same length, 1 or more, and where `batch` is below 1.
    """
    if batch is not None and batch < 1:
        raise InputError(f"batch is {batch}, expected 1 or more rows; say how many the file will be called with")
    sizes = {np.shape(each)[:1] for each in inputs}
    if len(sizes) != 1 or sizes <= {(), (0,)}:
        found = ", ".join(str(np.shape(each)) for each in inputs) or "none"
        raise InputError(f"example inputs of shape {found}: expected arrays with the same batch as their first axis")
    rows = jax.export.symbolic_shape("batch")[0] if batch is None else batch
    return tuple(jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for x in map(jax.typeof, inputs))


def difference(
    predict: Callable[..., Any],
    apply: Callable[..., Any],
    variables: Any,
    inputs: Sequence[Any],
    shapes: Sequence[jax.ShapeDtypeStruct],
) -> float:
    """The largest difference between the outputs of an opened file, `predict`, and of `apply(variables, ...)`.

    They are compared on two batches: the first example alone, and all examples twice. A file for one batch size gets
    the examples in order, from the first one and from the last one on. The difference is absolute, or relative to the
    largest absolute output where this exceeds 1. It is infinite for outputs of different shapes and for NaN.
    """
    examples = [np.asarray(each, shape.dtype) for each, shape in zip(inputs, shapes, strict=True)]
    count, rows = len(examples[0]), shapes[0].shape[0]
    orders = (
        (np.arange(rows), np.arange(rows) + count - 1)
        if isinstance(rows, int)
        else (np.arange(1), np.arange(2 * count))
    )
    batches = [[each[order % count] for each in examples] for order in orders]
    expected = jax.jit(apply)  # of variables as arguments: what was compiled for others of their shapes serves again
    return max(_difference(predict(*batch), expected(variables, *batch)) for batch in batches)


def _difference(found: Any, expected: Any) -> float:
    found, expected = ([np.asarray(each, np.float64) for each in jax.tree.leaves(y)] for y in (found, expected))
    if [each.shape for each in found] != [each.shape for each in expected]:
        return math.inf
    errors = [np.where(a == b, 0, np.abs(a - b)) for a, b in zip(found, expected, strict=True)]
    scale = max(1.0, *(np.abs(each).max() for each in expected))
    worst = max(each.max() for each in errors) / scale
    return float(worst) if np.isfinite(worst) else math.inf


def require_same(error: float, tolerance: float, runtime: str, path: str | os.PathLike[str]) -> None:
    """Raises InputError where the difference `error` is larger than `tolerance`."""
    if error > tolerance:
        raise InputError(
            f"{runtime} differs from JAX by {error:.1e}, expected at most {tolerance:.0e}: {path} is not written; find "
            "the operation that the two define differently, or raise the tolerance"
        )
