"""Reads or changes the inputs of a model's layers, or reads their outputs, without a hook in the model.

A layer is a matrix product or a convolution of a value that depends on the model's input with one that depends on
parameters only. It is found in the trace of a call, whatever the module is written in, jitted or not.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from dl_jax.core.equations import DERIVATIVES, Called, bound, evaluate, inlined, scanned, trace
from dl_jax.core.errors import InputError
from dl_jax.core.leaves import leaf_name
from dl_jax.models import ops

Function = Callable[..., Any]
Notes = dict[str, list[Any]]
Hook = Callable[[Any, list[Any]], tuple[list[Any], Notes]]
Origin = frozenset[int]  # numbers of leaves of the variables on which a value depends, and DATA if on anything else
DATA = -1
LAYER_PRIMITIVES = ("dot_general", "conv_general_dilated")


class Layer(NamedTuple):
    """A product of the trace."""

    paths: tuple[str, ...]  # of its parameters without their last name; several where kernels are concatenated
    operand: int  # which input of the equation is the layer's input; the other is the kernel
    leaves: tuple[int, ...]  # the numbers of its parameters among the leaves of the variables


def with_inputs(function: Function, f: Callable[[str, jax.Array], jax.Array]) -> Function:
    """Wraps `function` so that every layer gets f(path, x) instead of its input x.

    `function(variables, ...)` is `module.apply`, or calls it, as a loss or a metric does. `path` names the layer as its
    parameters do: "Dense_0", "encoder/Conv_1". A layer that is called twice calls f twice with the same path, and the
    product with several kernels side by side, such as the gates of `nn.OptimizedLSTMCell`, calls f for the path of each
    of them, one after the other. Of a recurrent layer there are the input, for all time steps at once or in each step
    as the model computes it, and the hidden state of each step; both may have the same path. Layers within
    `lax.while_loop` and `lax.cond` are not found.

    Calls with derivatives of their own that contain layers are differentiated as what they compute. Raises InputError,
    when called, if there is no layer.
    """

    @functools.wraps(function)
    def changed(*args: Any, **kwargs: Any) -> Any:
        return _layers_run(function, lambda path, x: (f(path, x), None), *args, **kwargs)[0]

    return changed


def inputs(function: Function) -> Callable[..., dict[str, list[jax.Array]]]:
    """Wraps `function` so that it returns the inputs of its layers: {path: one array for each call}.

    They have the shapes with which the products compute. A hidden state is one array of all steps, [T, ...]. The
    function's result is discarded. See `with_inputs` for which layers are included and what is raised.
    """

    def collect(*args: Any, **kwargs: Any) -> dict[str, list[jax.Array]]:
        return _layers_run(function, lambda path, x: (x, x), *args, **kwargs)[1]

    return collect


def _layers_run(function: Function, f: Callable[[str, Any], Any], *args: Any, **kwargs: Any) -> tuple[Any, Notes]:
    called = opened(function, *args, **kwargs)
    found, _ = analysed(called)
    if not found:
        raise InputError(
            "with_inputs found no layer that has a kernel, expected at least one; give it a model with dense or "
            "convolutional layers"
        )

    def before(equation: Any, inputs: list[Any]) -> tuple[list[Any], Notes]:
        notes: Notes = {}
        if layer := found.get(equation.outvars[0]):
            for path in layer.paths:
                inputs[layer.operand], note = f(path, inputs[layer.operand])
                notes[path] = [note]
        return inputs, notes

    outputs, notes = run(called.jaxpr, [*jax.tree.leaves(args[0]), *called.others], before, _unchanged)
    return called.result(outputs), notes


def opened(function: Function, variables: Any, *args: Any, **kwargs: Any) -> Called:
    """`trace`, in which calls with derivatives of their own are inlined where they contain products."""
    called = trace(function, variables, *args, **kwargs)
    return called._replace(jaxpr=_without_calls(called.jaxpr))


def _without_calls(closed: Any) -> Any:
    return jax.make_jaxpr(lambda *inputs: evaluate(closed, inputs, _open))(*closed.in_avals)


def _open(equation: Any, inputs: list[Any]) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return bound(equation, inputs, jaxpr=_without_calls(params["jaxpr"]))
    if name in DERIVATIVES and _has_products(body := inlined(params[DERIVATIVES[name]])):
        return evaluate(body, inputs, _open)
    return bound(equation, inputs)


def _has_products(closed: Any) -> bool:
    bodies = [e.params["jaxpr"] for e in closed.jaxpr.eqns if e.primitive.name == "scan"]
    bodies += [
        inlined(e.params[DERIVATIVES[e.primitive.name]]) for e in closed.jaxpr.eqns if e.primitive.name in DERIVATIVES
    ]
    return any(e.primitive.name in LAYER_PRIMITIVES for e in closed.jaxpr.eqns) or any(map(_has_products, bodies))


def analysed(called: Called) -> tuple[dict[Any, Layer], dict[Any, Origin]]:
    """The layers of a trace of `opened`, and what each variable depends on, also in the bodies of scans.

    The layers are {variable of the result: layer}, in the order in which they run.
    """
    found: dict[Any, Layer] = {}
    known: dict[Any, Origin] = {}
    sources = [frozenset({i}) for i in range(len(called.paths))]
    _origins(called, called.jaxpr.jaxpr, [*sources, *[frozenset({DATA})] * len(called.others)], found, known)
    return found, known


def _origins(
    called: Called, jaxpr: Any, sources: Sequence[Origin], found: dict[Any, Layer], known: dict[Any, Origin]
) -> list[Origin]:
    """What the outputs of a jaxpr depend on, from what its inputs do. Adds the layers and variables that it meets."""
    nothing: Origin = frozenset()
    known.update(zip(jaxpr.invars, sources, strict=True))
    read = lambda atom: nothing if isinstance(atom, jex.Literal) else known.get(atom, nothing)
    for equation in jaxpr.eqns:
        origins = [read(atom) for atom in equation.invars]
        if equation.primitive.name == "scan":
            results = _scan_origins(called, equation, origins, found, known)
        else:
            results = [nothing.union(*origins)] * len(equation.outvars)
            if equation.primitive.name in LAYER_PRIMITIVES and (layer := _layer(called, origins)):
                found[equation.outvars[0]] = layer
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _scan_origins(
    called: Called, equation: Any, origins: list[Origin], found: dict[Any, Layer], known: dict[Any, Origin]
) -> list[Origin]:
    """The carry depends on what it depended on in the step before, until nothing is added."""
    start, carry = scanned(equation)
    stop = start + carry
    while True:
        inner: dict[Any, Layer] = {}
        results = _origins(called, equation.params["jaxpr"].jaxpr, origins, inner, known)
        state = [a | b for a, b in zip(origins[start:stop], results, strict=False)]
        if state == origins[start:stop]:
            found |= inner
            return [*state, *results[carry:]]
        origins = [*origins[:start], *state, *origins[stop:]]


def _layer(called: Called, origins: Sequence[Origin]) -> Layer | None:
    weights = [i for i, origin in enumerate(origins) if origin and DATA not in origin]
    if len(weights) != 1 or DATA not in origins[1 - weights[0]]:
        return None
    numbers = sorted(origins[weights[0]])
    kernels = [i for i in numbers if len(called.jaxpr.in_avals[i].shape) > 1] or numbers
    paths = dict.fromkeys(leaf_name(called.paths[i][1:-1]) for i in kernels)
    return Layer(tuple(paths), 1 - weights[0], tuple(kernels))


def run(closed: Any, inputs: Sequence[Any], before: Hook, after: Hook) -> tuple[list[Any], Notes]:
    """Evaluates a trace of `opened`, also the bodies of its scans, with other values in the place of some.

    `before(equation, inputs)` may change what an equation computes with, `after(variables, values)` what the inputs of
    a jaxpr and the results of an equation are. Both return the values and notes, {name: [array, ...]}, which are
    returned beside the outputs; those of a scan's body have an axis of its steps.
    """
    notes: Notes = {}

    def noted(values: list[Any], new: Notes) -> list[Any]:
        for name, found in new.items():
            notes.setdefault(name, []).extend(found)
        return values

    def operation(equation: Any, inputs: list[Any]) -> Sequence[Any]:
        if equation.primitive.name == "scan":
            outputs, new = _scan(equation, inputs, before, after)
            outputs = noted(outputs, new)
        else:
            outputs = computed(equation, noted(*before(equation, inputs)))
        return noted(*after(equation.outvars, list(outputs)))

    return evaluate(closed, noted(*after(closed.jaxpr.invars, list(inputs))), operation), notes


def _unchanged(_: Any, values: list[Any]) -> tuple[list[Any], Notes]:
    return values, {}


def _scan(equation: Any, inputs: list[Any], before: Hook, after: Hook) -> tuple[list[Any], Notes]:
    params, (start, carry) = equation.params, scanned(equation)

    def step(state: list[Any], x: list[Any]) -> tuple[list[Any], tuple[list[Any], Notes]]:
        outputs, notes = run(params["jaxpr"], [*inputs[:start], *state, *x], before, after)
        return outputs[:carry], (outputs[carry:], notes)

    state = [jnp.asarray(x) for x in inputs[start : start + carry]]
    state, (outputs, notes) = jax.lax.scan(
        step, state, inputs[start + carry :], params["length"], params["reverse"], params["unroll"]
    )
    return [*state, *outputs], notes


def computed(equation: Any, inputs: list[Any]) -> Sequence[Any]:
    """The results of an equation, of a convolution by our own forms, whose gradients are faster on CPUs."""
    params = equation.params
    if equation.primitive.name != "conv_general_dilated" or params["batch_group_count"] != 1 or _widens(equation):
        return bound(equation, inputs)
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers", "feature_group_count")
    return [ops.conv_general_dilated(*inputs, **{name: params[name] for name in names}, precision=params["precision"])]


def _widens(convolution: Any) -> bool:
    return convolution.params["preferred_element_type"] not in (None, convolution.invars[0].aval.dtype)


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
