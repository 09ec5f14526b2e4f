"""Rewrites a function into the primitive operations that exporters support."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dl_jax.core.equations import DERIVATIVES, bound, evaluate, inlined


def plain(function: Callable[..., Any], inputs: Sequence[jax.ShapeDtypeStruct]) -> Callable[..., list[jax.Array]]:
    """`function` without nested calls, custom derivatives and `lax.platform_dependent`.

    The result takes arrays of the shapes `inputs`, and returns the list of the leaves of the output of `function`.
    `lax.platform_dependent` is replaced by its default branch. Values that do not depend on the inputs become
    constants. `function` is traced in this call, so that it uses the original `jnp` and Flax functions even where an
    exporter replaces these in its own trace.
    """
    jaxpr = inlined(jax.make_jaxpr(function)(*inputs))
    return lambda *inputs: evaluate(jaxpr, inputs, _results)


def _product(params: Mapping[str, Any], x: Any, kernel: Any) -> Any:
    """The product of a dense layer as `jnp.matmul`, since runtimes fuse an ONNX MatMul with adding the bias."""
    matrices = x.ndim == kernel.ndim == 2 and params["dimension_numbers"] == (((1,), (0,)), ((), ()))
    return jnp.matmul(x, kernel) if matrices else None


def _pad(params: Mapping[str, Any], x: Any, value: Any) -> Any:
    """`lax.pad` as `jnp.pad`, since jax2onnx exports `lax.pad` only for a known batch size."""
    config = params["padding_config"]
    if isinstance(value, Tracer) or any(low < 0 or high < 0 or interior for low, high, interior in config):
        return None
    return jnp.pad(x, [(low, high) for low, high, _ in config], constant_values=float(value))


def _maximum(params: Mapping[str, Any], x: Any, y: Any) -> Any:
    """A maximum with zero as `jax.nn.relu`, since runtimes fuse an ONNX Relu with the operation before it."""
    zero = not isinstance(y, Tracer) and np.ndim(y) == 0 and y == 0
    return jax.nn.relu(x) if zero and jnp.issubdtype(x.dtype, jnp.floating) else None


# Primitives, each with a function that returns an equivalent that exports better: a call that jax2onnx replaces in its
# trace. The function returns None where there is none, and the primitive is then exported unchanged.
FORMS = {"dot_general": _product, "pad": _pad, "max": _maximum}


def _results(equation: Any, inputs: list[Any]) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    if name in DERIVATIVES:
        return evaluate(inlined(params[DERIVATIVES[name]]), inputs, _results)
    if name == "scan":
        body = jax.make_jaxpr(lambda *inputs: evaluate(params["jaxpr"], inputs, _results))(*params["jaxpr"].in_avals)
        return bound(equation, inputs, jaxpr=body)
    known = not any(isinstance(each, Tracer) for each in inputs)
    if known and all(isinstance(size, int) for out in equation.outvars for size in out.aval.shape):
        with jax.ensure_compile_time_eval():
            return bound(equation, inputs)
    form = FORMS[name](params, *inputs) if name in FORMS else None
    return bound(equation, inputs) if form is None else [form]
