"""A function as the primitive operations of its trace, to read them or to run them in another way.

`trace` gives the jaxpr of a call without nested calls, and `evaluate` runs a jaxpr with a function in the place of each
operation. A rewritten function traces the original one whenever it is called, so that it takes any batch size and may
itself be rewritten, jitted, mapped, differentiated or exported:

    def small(variables, image):
        called = trace(apply, shapes, image)                       # at the shapes that `apply` was written for
        return called.result(evaluate(called.jaxpr, [*jax.tree.leaves(variables), *called.others], operation))
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex

# Primitives that call a jaxpr, each with the name of the parameter that holds it.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}
# The same for those that have derivatives of their own.
DERIVATIVES = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
# Primitives each number of whose result is computed from the numbers in its place of the inputs, which may be scalars.
ELEMENTWISE = frozenset((
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "bitcast_convert_type", "cbrt", "ceil", "clamp", "convert_element_type", "copy", "cos", "cosh", "digamma",
    "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite",
    "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not",
    "or", "pow", "reduce_precision", "rem", "round", "rsqrt", "select_n", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient",
    "sub", "tan", "tanh", "xor",
))  # fmt: skip

Operation = Callable[[Any, list[Any]], Sequence[Any]]  # (equation, inputs) -> outputs


class Called(NamedTuple):
    """The trace of a call `function(variables, *args, **kwargs)`."""

    jaxpr: Any  # a ClosedJaxpr without calls; its inputs are the leaves of the variables, then `others`
    paths: tuple[jax.tree_util.KeyPath, ...]  # of the leaves of the variables, as in {"params": ..., ...}
    others: tuple[Any, ...]  # the arrays in `args` and `kwargs`
    structure: Any  # of the result

    def result(self, outputs: Sequence[Any]) -> Any:
        """What the function returns, from the outputs of the jaxpr."""
        return jax.tree.unflatten(self.structure, outputs)


def trace(function: Callable[..., Any], variables: Any, *args: Any, **kwargs: Any) -> Called:
    """Traces a call of `function` and inlines what it calls.

    `variables` may be arrays or shapes (`jax.ShapeDtypeStruct`). Leaves of `args` and `kwargs` that are arrays become
    inputs; others, such as `train=True`, are left to the function as they are. Inlined are `jax.jit`,
    `jax.checkpoint` and the default branch of `lax.platform_dependent`, also in loops and branches. Calls with custom
    derivatives stay, because their derivatives need not be those of their bodies.
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    is_array = [isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or hasattr(leaf, "__array__") for leaf in leaves]

    def call(variables: Any, arrays: list[Any]) -> Any:
        remaining = iter(arrays)
        filled = [next(remaining) if yes else leaf for leaf, yes in zip(leaves, is_array, strict=True)]
        args, kwargs = jax.tree.unflatten(tree, filled)
        return function(variables, *args, **kwargs)

    others = tuple(leaf for leaf, yes in zip(leaves, is_array, strict=True) if yes)
    jaxpr, shapes = jax.make_jaxpr(call, return_shape=True)(variables, list(others))
    paths = tuple(path for path, _ in jax.tree_util.tree_leaves_with_path(variables))
    return Called(inlined(jaxpr), paths, others, jax.tree.structure(shapes))


def inlined(closed: Any) -> Any:
    """A ClosedJaxpr without the calls that `trace` inlines."""
    return jax.make_jaxpr(lambda *inputs: evaluate(closed, inputs, inline))(*closed.in_avals)


def inline(equation: Any, inputs: list[Any]) -> Sequence[Any]:
    """An operation that inlines calls, also in loops and branches."""
    name, params = equation.primitive.name, equation.params
    if name in CALLS:
        return evaluate(params[CALLS[name]], inputs, inline)
    if name == "platform_index":
        return [None]  # only the `cond` of lax.platform_dependent, below, reads it
    if name == "cond":
        if platforms := params.get("branches_platforms"):
            return evaluate(params["branches"][platforms.index(None)], inputs[1:], inline)
        return bound(equation, inputs, branches=tuple(map(inlined, params["branches"])))
    if name == "scan":
        return bound(equation, inputs, jaxpr=inlined(params["jaxpr"]))
    if name == "while":
        bodies = {key: inlined(params[key]) for key in ("cond_jaxpr", "body_jaxpr")}
        return bound(equation, inputs, **bodies)
    return bound(equation, inputs)


def evaluate(jaxpr: Any, inputs: Sequence[Any], operation: Operation) -> list[Any]:
    """The outputs of a jaxpr (closed, or without constants) for `inputs`, each equation computed by `operation`."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    values: dict[Any, Any] = dict(
        zip([*inner.constvars, *inner.invars], [*getattr(jaxpr, "consts", ()), *inputs], strict=True)
    )

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for equation in inner.eqns:
        outputs = operation(equation, [read(atom) for atom in equation.invars])
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in inner.outvars]


def bound(equation: Any, inputs: Sequence[Any], **changes: Any) -> Sequence[Any]:
    """The outputs of an equation itself, with `changes` to its parameters."""
    outputs = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params({**equation.params, **changes}))
    return outputs if equation.primitive.multiple_results else [outputs]


def scanned(equation: Any) -> tuple[int, int]:
    """How many inputs of a `scan` are constants of its body, which come first, and how many it carries, the next."""
    params = equation.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carried, _ = params["ft_in"].unpack()  # JAX 0.12
    return len(constants), len(carried)
