"""Rewrites a function into the primitive operations that exporters support."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

# Call primitives, each with the name of the parameter that holds the called jaxpr.
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


def plain(function: Callable[..., Any], inputs: Sequence[jax.ShapeDtypeStruct]) -> Callable[..., list[jax.Array]]:
    """`function` without nested calls, custom derivatives and `lax.platform_dependent`.

    The result takes arrays of the shapes `inputs`, and returns the list of the leaves of the output of `function`.
    `lax.platform_dependent` is replaced by its default branch. Values that do not depend on the inputs become
    constants. `function` is traced in this call, so that it uses the original `jnp` and Flax functions even where an
    exporter replaces these in its own trace.
    """
    jaxpr = jax.make_jaxpr(function)(*inputs)
    return lambda *inputs: _evaluate(jaxpr, inputs)


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


def _evaluate(closed: Any, inputs: Sequence[Any]) -> list[Any]:
    jaxpr = closed.jaxpr
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *inputs], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for equation in jaxpr.eqns:
        results = _results(equation, [read(atom) for atom in equation.invars])
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _results(equation: Any, inputs: list[Any]) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    if name == "platform_index":
        return [None]  # not used: for the `cond` below the default branch is taken
    if name in CALLS:
        return _evaluate(params[CALLS[name]], inputs)
    if name == "cond" and params.get("branches_platforms"):
        default = params["branches_platforms"].index(None)
        return _evaluate(params["branches"][default], inputs[1:])
    if name == "scan":
        body = jax.make_jaxpr(lambda *inputs: _evaluate(params["jaxpr"], inputs))(*params["jaxpr"].in_avals)
        return equation.primitive.bind(*inputs, **{**params, "jaxpr": body})
    known = not any(isinstance(each, Tracer) for each in inputs)
    if known and all(isinstance(size, int) for out in equation.outvars for size in out.aval.shape):
        with jax.ensure_compile_time_eval():
            return _bound(equation, inputs)
    form = FORMS[name](params, *inputs) if name in FORMS else None
    return _bound(equation, inputs) if form is None else [form]


def _bound(equation: Any, inputs: list[Any]) -> list[Any]:
    results = equation.primitive.bind(*inputs, **equation.params)
    return results if equation.primitive.multiple_results else [results]
