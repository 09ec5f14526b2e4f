"""The points of a model at which activations are rounded, read from its trace.

They are as few as let a runtime compute in integers only: a product, or a sum of two activations, needs rounded inputs
and a rounded output. So the input of each layer is a point, and the output of a layer after its bias and ReLU unless it
goes, through nothing but ReLU, maxima and changes of shape, into points or out of the model. The sum of two rounded
activations is a point on the same condition. Where one value is the input of several layers, or of a layer and a
residual sum, all of them read the same rounded numbers.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex
import jax.numpy as jnp

from dl_jax.core.equations import DERIVATIVES, Called, inlined
from dl_jax.inspect import DATA, Hook, Layer, Notes, Origin, analysed

REARRANGING = (
    "reshape",
    "transpose",
    "squeeze",
    "expand_dims",
    "rev",
    "copy",
)  # the same numbers, in another shape or order
SELECTIONS = (
    *REARRANGING,
    "slice",
    "max",
    "min",
    "clamp",
    "reduce_max",
    "reduce_window_max",
)  # rounding may come after them
OUTPUT, SUM = ":output", ":sum"  # what the name of a point that is not the input of a layer ends in

Rounding = Callable[[str, Any], tuple[Any, Any]]  # (name of a point, x) -> the value in its place, and a note


class Points(NamedTuple):
    """The names of the points by their variables in a trace."""

    values: dict[Any, str]  # every equation reads the rounded value
    operands: dict[
        Any, tuple[int, str]
    ]  # arguments of the model: input and name, by the result of the layer that reads

    def hooks(self, f: Rounding) -> tuple[Hook, Hook]:
        """For `inspect.run`: puts f(name, x) in the place of the value x of each point, and notes what f returns."""

        def before(equation: Any, inputs: list[Any]) -> tuple[list[Any], Notes]:
            if equation.outvars[0] not in self.operands:
                return inputs, {}
            i, name = self.operands[equation.outvars[0]]
            inputs[i], note = f(name, inputs[i])
            return inputs, {name: [note]}

        def after(variables: Sequence[Any], values: list[Any]) -> tuple[list[Any], Notes]:
            notes: Notes = {}
            for i, name in ((i, self.values[v]) for i, v in enumerate(variables) if v in self.values):
                values[i], note = f(name, values[i])
                notes.setdefault(name, []).append(note)
            return values, notes

        return before, after


def points(called: Called) -> Points:
    """The points of a trace of `inspect.opened`; empty where there is no layer.

    The input of a layer has the name of its (first) path, and its output that with ":output". A sum has the name of the
    last layer before it with ":sum". Every point has a range of its own, so that what would have the name of another
    one is numbered: where a module multiplies with two kernels, or is called twice, its layers are "a" and "a#2". In
    the bodies of scans only inputs are points: a runtime multiplies them as integers, but adds up the gates in floats.
    """
    layers, origins = analysed(called)
    names, found = _numbered(layers), Points({}, {})
    for i, jaxpr in enumerate(_jaxprs(called.jaxpr.jaxpr)):
        graph = _Graph(jaxpr, origins)
        for equation in jaxpr.eqns:
            if layer := layers.get(equation.outvars[0]):
                _add_input(found, graph, equation, layer, names[equation.outvars[0]], is_argument=i == 0)
        if i == 0:
            for equation in jaxpr.eqns:
                _add_output(found, graph, equation, names)
    return found


def _numbered(layers: Mapping[Any, Layer]) -> dict[Any, str]:
    """The names of layers by the variables of their results: the first paths, numbered where several have the same."""
    paths, names = {layer.paths[0] for layer in layers.values()}, {}
    for result, layer in layers.items():
        path, known = layer.paths[0], {*names.values()}
        others = (name for name in map(f"{path}#{{}}".format, itertools.count(2)) if name not in known | paths)
        names[result] = next(others) if path in known else path
    return names


def _jaxprs(jaxpr: Any) -> Iterator[Any]:
    yield jaxpr
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield from _jaxprs(equation.params["jaxpr"].jaxpr)


class _Graph:
    """Who computes and who reads the variables of a jaxpr."""

    def __init__(self, jaxpr: Any, origins: dict[Any, Origin]):
        self.results = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
        self.made = {v: equation for equation in jaxpr.eqns for v in equation.outvars}
        self.readers: dict[Any, list[Any]] = {}
        self.origins = origins
        for equation in jaxpr.eqns:
            for v in {v for v in equation.invars if not isinstance(v, jex.Literal)}:
                self.readers.setdefault(v, []).append(equation)

    def data(self, equation: Any) -> list[Any]:
        """The inputs of an equation that depend on the model's input."""
        return [v for v in equation.invars if not isinstance(v, jex.Literal) and DATA in self.origins.get(v, ())]


def _add_input(found: Points, graph: _Graph, equation: Any, layer: Layer, name: str, is_argument: bool) -> None:
    v = equation.invars[layer.operand]
    if not jnp.issubdtype(v.aval.dtype, jnp.floating):
        return
    if v not in graph.made and is_argument:
        found.operands[equation.outvars[0]] = layer.operand, name
        return
    while v in graph.made and graph.made[v].primitive.name in REARRANGING:
        before = graph.made[v].invars[0]
        if before not in graph.made and is_argument:
            break
        v = before
    found.values.setdefault(v, name)


def _add_output(found: Points, graph: _Graph, equation: Any, names: Mapping[Any, str]) -> None:
    v = equation.outvars[0]
    if v in names:
        name = names[v] + OUTPUT
    elif _is_sum(found, graph, equation):
        last = _last_layer(found, graph, equation)
        known = {*found.values.values()}
        numbered = (f"{last}{number}{SUM}" for number in itertools.chain([""], map("#{}".format, itertools.count(2))))
        name = next(name for name in numbered if name not in known)
    else:
        return
    while (after := _bias_or_relu(graph, v)) is not None:
        v = after
    if jnp.issubdtype(v.aval.dtype, jnp.floating) and graph.readers.get(v) and not _goes_into_points(found, graph, v):
        found.values[v] = name


def _bias_or_relu(graph: _Graph, v: Any) -> Any:
    """What is computed of v next, if that is adding a bias, a ReLU or a change of shape."""
    readers = graph.readers.get(v, [])
    if len(readers) != 1 or v in graph.results:
        return None
    (equation,) = readers
    bias = equation.primitive.name == "add" and len(graph.data(equation)) == 1
    return equation.outvars[0] if bias or (selects(equation) and len(graph.data(equation)) == 1) else None


def _goes_into_points(found: Points, graph: _Graph, v: Any) -> bool:
    """Whether nothing reads v, or only points do; then no integers of v itself are needed."""
    if v in found.values:
        return True
    return all(
        equation.outvars[0] in found.operands
        or (selects(equation) and _goes_into_points(found, graph, equation.outvars[0]))
        for equation in graph.readers.get(v, [])
    )


def selects(equation: Any) -> bool:
    """Whether the equation only chooses among numbers and limits them: rounding before and after it is the same."""
    name = equation.primitive.name
    if name in DERIVATIVES:
        return all(map(selects, inlined(equation.params[DERIVATIVES[name]]).jaxpr.eqns))
    return name in SELECTIONS


def _is_sum(found: Points, graph: _Graph, equation: Any) -> bool:
    return (
        equation.primitive.name == "add"
        and len(graph.data(equation)) == 2
        and all(_is_rounded(found, graph, v) for v in equation.invars)
    )


def _is_rounded(found: Points, graph: _Graph, v: Any) -> bool:
    if v in found.values:
        return True
    equation = graph.made.get(v)
    moved = equation is not None and (selects(equation) or equation.primitive.name == "pad")
    return moved and all(_is_rounded(found, graph, each) for each in graph.data(equation))


def _last_layer(found: Points, graph: _Graph, equation: Any) -> str:
    v = graph.data(equation)[-1]
    while v not in found.values:
        v = graph.data(graph.made[v])[0]
    return found.values[v].removesuffix(OUTPUT).removesuffix(SUM)
