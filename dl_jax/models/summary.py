"""The layers of a network with their shapes, parameters and operations, from its trace: nothing is computed."""

import pkgutil
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from dl_jax import models
from dl_jax.core.errors import InputError, nearest
from dl_jax.core.flops import by_scope
from dl_jax.core.leaves import leaf_name

Inputs = Mapping[str, jax.ShapeDtypeStruct]  # by the names of the model's arguments; the first axis is the batch


class Published(NamedTuple):
    """A full-size instance of a model whose number of parameters is known from elsewhere."""

    model: nn.Module
    inputs: Inputs
    parameters: int


class Layer(NamedTuple):
    """One module of a network, without its submodules."""

    path: str  # as its parameters are named, "encoder/Dense_0"; "" for the network itself
    kind: str  # the module's class
    outputs: tuple[str, ...]  # the shapes that each call returned
    parameters: int
    flops: int  # multiplications and additions in matrix products and convolutions, over all calls


def published() -> dict[str, Published]:
    """The published instances of all model files, by name."""
    files = [each.name for each in pkgutil.walk_packages(models.__path__, f"{models.__name__}.") if not each.ispkg]
    architectures = [pkgutil.resolve_name(file) for file in files if file.count(".") == 3]  # others are operations
    return {name: Published(*each) for file in architectures for name, each in file.published().items()}


def find(name: str) -> Published:
    """The published instance of this name. Raises InputError where there is none."""
    known = published()
    if name not in known:
        hint = nearest(name, known)
        raise InputError(f"there is no model {name!r}, expected one of {', '.join(sorted(known))}{hint}")
    return known[name]


def with_batch(inputs: Inputs, size: int) -> Inputs:
    """`inputs` with another batch size. Raises InputError where it is below 1."""
    if size < 1:
        raise InputError(f"the batch size is {size}, expected 1 or more; give a larger one")
    return {name: jax.ShapeDtypeStruct((size, *each.shape[1:]), each.dtype) for name, each in inputs.items()}


def variables(model: nn.Module, inputs: Inputs) -> Any:
    """The shapes and types of the variables that `model` starts with."""

    def init(inputs: Any) -> Any:
        return model.init(jax.random.key(0), **inputs, train=False)

    return jax.eval_shape(init, inputs)


def parameters(model: nn.Module, inputs: Inputs) -> int:
    """The number of trainable numbers of `model`."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables(model, inputs)["params"]))


def layers(model: nn.Module, inputs: Inputs) -> list[Layer]:
    """The modules that own parameters or operations, in the order of their first call, in evaluation.

    An operation belongs to the innermost module in whose call it was traced, and a parameter to the module that made
    it. A shared module is therefore one row, whose operations are those of all its calls, and the rows add up to the
    parameters and to `flops` of the whole network. Flax's `nn.tabulate` asks XLA for the operations of every call with
    all that it calls, which counts a loop once and gives zeros where XLA tells nothing.
    """
    calls: dict[str, tuple[str, list[str]]] = {}
    start = variables(model, inputs)

    def apply(variables: Any, inputs: Any) -> Any:
        with nn.intercept_methods(_noting(calls)):
            return model.apply(variables, **inputs, train=False)

    owned, operations = Counter[str](), Counter[str]()
    for scope, n in by_scope(jax.make_jaxpr(apply)(start, inputs)).items():
        operations[_MARK.findall(scope)[-1]] += n
    for path, leaf in jax.tree_util.tree_leaves_with_path(start["params"]):
        owned[_owner(leaf_name(path), calls)] += leaf.size
    return [
        Layer(path, kind, tuple(outputs), owned[path], operations[path])
        for path, (kind, outputs) in calls.items()
        if owned[path] or operations[path]
    ]


_MARK = re.compile("module<([^>]*)>")  # names of scopes by `_noting`, also within "vmap(...)" and the like


def _noting(calls: dict[str, tuple[str, list[str]]]) -> Callable[..., Any]:
    """An interceptor that marks operations with the path of their module, and adds its class and outputs to `calls`."""

    def note(method: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        path = "/".join(context.module.path)
        _, outputs = calls.setdefault(path, (type(context.module).__name__, []))
        with jax.named_scope(f"module<{path}>"):
            result = method(*args, **kwargs)
        if context.method_name == "__call__":
            outputs.append(", ".join(map(shape, jax.tree.leaves(result))))
        return result

    return note


def _owner(parameter: str, calls: Mapping[str, Any]) -> str:
    """The innermost module of `calls` that the parameter "encoder/Dense_0/kernel" is of."""
    while parameter:
        parameter = parameter.rpartition("/")[0]
        if parameter in calls:
            break
    return parameter


def shape(array: Any) -> str:
    """The shape of an array as "[1, 28, 28, 6]"."""
    return str([*array.shape])
