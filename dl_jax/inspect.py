"""Reads or changes the inputs of a model's layers, or reads their outputs, without a hook in the model."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from dl_jax.core.errors import InputError

Function = Callable[..., Any]


def with_inputs(function: Function, f: Callable[[str, jax.Array], jax.Array]) -> Function:
    """Wraps `function` so that every module that owns a parameter `kernel` gets f(path, x) instead of its input x.

    `function` is `module.apply`, or calls it, as a loss or a metric does. x is the module's first argument, and `path`
    names the module as its parameters do: "Dense_0", "encoder/Conv_1". A module called twice calls f twice with the
    same path.

    Containers are skipped; their submodules are visited. For a recurrent layer (`rnn.Layer`) this is the input
    projection, "Recurrent_0/forward_0/input", called once for all time steps; the hidden state is not visible.

    Raises InputError, when called, if no such module runs, for example because `function` was jitted and compiled
    earlier.
    """

    @functools.wraps(function)
    def intercepted(*args: Any, **kwargs: Any) -> Any:
        found = []

        def change(next_function: Function, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            layer = context.module
            if context.method_name != "__call__" or not _owns_a_kernel(layer):
                return next_function(*args, **kwargs)
            path, name = "/".join(layer.path), next(iter(inspect.signature(layer.__call__).parameters), None)
            if args:
                args = (f(path, args[0]), *args[1:])
            elif name in kwargs:
                kwargs = {**kwargs, name: f(path, kwargs[name])}
            else:  # it takes no input, or was given none
                return next_function(*args, **kwargs)
            found.append(path)
            return next_function(*args, **kwargs)

        with nn.intercept_methods(change):
            result = function(*args, **kwargs)
        if not found:
            raise InputError(
                "with_inputs found no layer that has a kernel, expected at least one; give it a model with dense or "
                "convolutional layers, not jitted before"
            )
        return result

    return intercepted


def _owns_a_kernel(layer: nn.Module) -> bool:
    """Whether the module itself has a parameter `kernel`."""
    params = layer.variables.get("params", {})
    return "kernel" in params and not any(isinstance(value, Mapping) for value in params.values())


def inputs(function: Function) -> Callable[..., dict[str, list[jax.Array]]]:
    """Wraps `function` so that it returns the inputs of its layers with a kernel: {path: one array for each call}.

    The function's result is discarded. See `with_inputs` for which layers are included and what is raised.
    """

    def collect(*args: Any, **kwargs: Any) -> dict[str, list[jax.Array]]:
        found: dict[str, list[jax.Array]] = {}

        def note(path: str, x: jax.Array) -> jax.Array:
            found.setdefault(path, []).append(x)
            return x

        with_inputs(function, note)(*args, **kwargs)
        return found

    return collect


def with_outputs(apply: Function, *paths: str) -> Function:
    """Wraps `module.apply` so that it returns (result, outputs), where `outputs` is a tuple with one array per path.

    A path names a module as its parameters do: "Dense_0", "encoder/Conv_1". Of a module that is called more than once
    the first output is taken. `apply` may also be a function that passes its keywords on to `module.apply`, such as
    what `compress.fold` and the like return; its own `mutable` works as usual. Raises InputError, when called, for a
    path that is no module that was called.
    """

    @functools.wraps(apply)
    def run(*args: Any, mutable: Any = False, **kwargs: Any) -> Any:
        wanted = lambda module, method: method == "__call__" and "/".join(module.path) in paths
        others = [mutable] if isinstance(mutable, str) else [] if isinstance(mutable, bool) else [*mutable]
        asked = mutable is True or [*others, "intermediates"]
        result, collections = apply(*args, **kwargs, capture_intermediates=wanted, mutable=asked)
        others = {name: each for name, each in collections.items() if name != "intermediates"}
        found = _captured(collections.get("intermediates", {}))
        if missing := [path for path in paths if path not in found]:
            raise InputError(
                f"with_outputs: no module {missing[0]!r} was called, expected the path of one, such as 'Conv_0' or "
                "'encoder/Dense_1'; look at the names of the parameters"
            )
        outputs = tuple(found[path] for path in paths)
        return ((result, outputs), others) if mutable else (result, outputs)

    return run


def _captured(tree: Any, path: tuple[str, ...] = ()) -> dict[str, jax.Array]:
    """The first output of each module that Flax captured, by path."""
    found = {"/".join(path): tree["__call__"][0]} if "__call__" in tree else {}
    for name, each in tree.items():
        if isinstance(each, Mapping):
            found |= _captured(each, (*path, name))
    return found
