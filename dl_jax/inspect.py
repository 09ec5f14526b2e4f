"""The inputs of a model's layers, from outside: seen or changed without a hook in the model."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from dl_jax.core.errors import InputError

Function = Callable[..., Any]


def with_inputs(function: Function, f: Callable[[str, jax.Array], jax.Array]) -> Function:
    """`function`, in which each layer with a kernel gets f(path, x) in place of its input x, its first argument.

    `function` is whatever calls `module.apply` in its turn: that method itself, a loss, a metric. The path names the
    layer as its parameters do: "Dense_0", "encoder/Conv_1". A layer that runs twice gets f twice, with one path.

    A layer that holds others is not met, they are. So a recurrent one (`rnn.Layer`) is met in the projection of its
    input, once for all steps: "Recurrent_0/forward_0/input". The state that its own kernel multiplies is neither seen
    nor changed: no call of a layer takes it from one step to the next.

    Raises InputError, when called, where no layer is met: none has a kernel, or a jitted `apply` was compiled before.
    """

    @functools.wraps(function)
    def intercepted(*args: Any, **kwargs: Any) -> Any:
        met = []

        def change(next_function: Function, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            layer = context.module
            if context.method_name != "__call__" or not _applies_a_kernel(layer):
                return next_function(*args, **kwargs)
            path, name = "/".join(layer.path), next(iter(inspect.signature(layer.__call__).parameters), None)
            if args:
                args = (f(path, args[0]), *args[1:])
            elif name in kwargs:
                kwargs = {**kwargs, name: f(path, kwargs[name])}
            else:  # it takes no input, or was given none
                return next_function(*args, **kwargs)
            met.append(path)
            return next_function(*args, **kwargs)

        with nn.intercept_methods(change):
            result = function(*args, **kwargs)
        if not met:
            raise InputError(
                "with_inputs met no layer that has a kernel, expected at least one; give it a model with dense or "
                "convolutional layers, not jitted before"
            )
        return result

    return intercepted


def _applies_a_kernel(layer: nn.Module) -> bool:
    """Whether its input meets a kernel of its own, rather than that of a layer inside."""
    params = layer.variables.get("params", {})
    return "kernel" in params and not any(isinstance(value, Mapping) for value in params.values())


def inputs(function: Function) -> Callable[..., dict[str, list[jax.Array]]]:
    """What the layers with a kernel are given while `function` runs: {path: one array for each time that it ran}.

    Its result is dropped. Which layers, and when it raises InputError: see `with_inputs`.
    """

    def collect(*args: Any, **kwargs: Any) -> dict[str, list[jax.Array]]:
        found: dict[str, list[jax.Array]] = {}

        def note(path: str, x: jax.Array) -> jax.Array:
            found.setdefault(path, []).append(x)
            return x

        with_inputs(function, note)(*args, **kwargs)
        return found

    return collect


def examples() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """None: this file holds no architecture."""
    return {}
