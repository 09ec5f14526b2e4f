"""A function as the primitive operations that exporters know."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

# A call primitive -> its parameter that holds what is called.
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


def plain(function: Callable[..., Any], inputs: Sequence[jax.ShapeDtypeStruct]) -> Callable[..., list[jax.Array]]:
    """`function` of `inputs` without calls, custom derivatives and choices of a device; gives the result's leaves.

    `lax.platform_dependent` becomes its default. What does not depend on the inputs is computed now. `function` is
    traced here, so that its `jnp` and Flax calls are the real ones even where an exporter replaces them in its trace.
    """
    jaxpr = jax.make_jaxpr(function)(*inputs)
    return lambda *inputs: _evaluate(jaxpr, inputs)


def _product(params: Mapping[str, Any], x: Any, kernel: Any) -> Any:
    """Of a dense layer: as MatMul, which runtimes fuse with the addition of the bias."""
    matrices = x.ndim == kernel.ndim == 2 and params["dimension_numbers"] == (((1,), (0,)), ((), ()))
    return jnp.matmul(x, kernel) if matrices else None


def _pad(params: Mapping[str, Any], x: Any, value: Any) -> Any:
    """As `jnp.pad`: of `lax.pad` jax2onnx wants to know the batch size."""
    config = params["padding_config"]
    if isinstance(value, Tracer) or any(low < 0 or high < 0 or interior for low, high, interior in config):
        return None
    return jnp.pad(x, [(low, high) for low, high, _ in config], constant_values=float(value))


def _maximum(params: Mapping[str, Any], x: Any, y: Any) -> Any:
    """With zero: as Relu, which runtimes fuse with what comes before."""
    zero = not isinstance(y, Tracer) and np.ndim(y) == 0 and y == 0
    return jax.nn.relu(x) if zero and jnp.issubdtype(x.dtype, jnp.floating) else None


# Primitive -> the form in which it exports best, given by a call that jax2onnx replaces in its trace; None: as it is.
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
        return [None]  # the choice below does not read it
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
