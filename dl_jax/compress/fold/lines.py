"""How a trace adds and multiplies data with constants: lines of such operations, and products with kernels."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex
import jax.numpy as jnp

from dl_jax.core.equations import ELEMENTWISE, Called
from dl_jax.core.leaves import leaf_name

Variable = Any  # of a jaxpr
Equation = Any
Axes = tuple[int | None, ...]  # for each axis of an array, the axis of another one that it is, or None
SHIFTS = {"add", "add_any", "sub"}
AFFINE = {*SHIFTS, "div", "mul", "neg"}  # with a constant, what becomes s x + t
# Primitives whose results hold numbers of their input alone, in other places, repeated or of another type.
COPIES = {"broadcast_in_dim", "convert_element_type", "copy", "reshape", "rev", "squeeze", "transpose"}


class Constant(NamedTuple):
    """A value that depends on variables and constants only."""

    varies: frozenset[int]  # the axes along which it may vary
    leaves: frozenset[int] = frozenset()  # of the variables, from which it is computed
    view: tuple[int, Axes] | None = None  # the leaf of which it is a copy, and that leaf's axis for each axis
    alone: bool = False  # it is all that reads this leaf


class Line(NamedTuple):
    """Data that a line of operations with constants makes of other data."""

    source: Variable
    axes: Axes  # of the source, for each axis
    steps: tuple[Equation, ...] = ()
    varies: frozenset[int] = frozenset()  # axes of the source along which the constants vary
    leaves: tuple[frozenset[int], ...] = ()  # those of the constants, for each step of arithmetic


class Product(NamedTuple):
    """A product of data and a kernel that is a leaf."""

    equation: Equation
    place: int  # of the kernel in the inputs of the equation
    leaf: int
    view: Axes  # the axis of the leaf for each axis of the kernel
    outputs: Mapping[int, int]  # {axis of the result: of the kernel}
    inputs: Mapping[int, int]  # {axis of the data: of the kernel}

    @property
    def data(self) -> Variable:
        return self.equation.invars[1 - self.place]


class Flow(NamedTuple):
    """How values depend on each other in a trace."""

    called: Called
    reads: Counter[Variable]  # how often the result needs each variable
    known: dict[Variable, Constant]
    products: dict[Variable, Product | str]  # by their results; or why nothing can be folded into the kernel
    lines: dict[Variable, Line]

    @classmethod
    def of(cls, called: Called) -> "Flow":
        flow = cls(called, reads_of(called, {}), {}, {}, {})
        jaxpr = called.jaxpr.jaxpr
        for variable in jaxpr.constvars:
            flow.known[variable] = Constant(_long(variable))
        for i, variable in enumerate(jaxpr.invars[: len(called.paths)]):
            flow.known[variable] = Constant(_long(variable), frozenset([i]), (i, all_axes(variable)), True)
        for equation in (equation for equation in jaxpr.eqns if equation.outvars):
            _follow(flow, equation)
        return flow

    def constants_of(self, equation: Equation) -> list[Constant | None]:
        """The inputs of an equation, None for data."""
        return [NUMBER if isinstance(atom, jex.Literal) else self.known.get(atom) for atom in equation.invars]

    def line(self, variable: Variable) -> Line:
        """The line up to a variable. It begins there where something else reads the variable too."""
        new = Line(variable, all_axes(variable))
        return self.lines.get(variable, new) if self.reads[variable] == 1 else new


NUMBER = Constant(frozenset())


def _follow(flow: Flow, equation: Equation) -> None:
    """Notes what an equation does: with constants, in a line, or as a product."""
    name, result, constants = equation.primitive.name, equation.outvars[0], flow.constants_of(equation)
    data = [atom for atom, each in zip(equation.invars, constants, strict=True) if each is None]
    if not data and not equation.effects:
        alone = all(isinstance(atom, jex.Literal) or flow.reads[atom] == 1 for atom in equation.invars)
        flow.known.update({out: _computed(equation, constants, out, alone) for out in equation.outvars})
    elif len(data) == 1 and name in AFFINE:
        begun = flow.line(data[0])
        for line in (begun, Line(data[0], all_axes(data[0]))):
            if longer := _longer(flow, line, equation):
                flow.lines[result] = longer
                return
    elif len(data) == 1 == len(equation.invars) and name in COPIES and is_real(data[0]):
        line, moved = flow.line(data[0]), _moved(equation)
        axes = tuple(None if axis is None else line.axes[axis] for axis in moved)
        flow.lines[result] = line._replace(axes=axes, steps=(*line.steps, equation))
    elif product := _product(flow, equation):
        flow.products[result] = product


def _longer(flow: Flow, line: Line, equation: Equation) -> Line | None:
    """The line with a step of arithmetic more; None where its constants cannot be folded with the others."""
    place = next(i for i, each in enumerate(flow.constants_of(equation)) if each is None)
    constant = next((each for each in flow.constants_of(equation) if each), NUMBER)
    if shape(equation.invars[place]) != shape(equation.outvars[0]) or (equation.primitive.name == "div" and place):
        return None
    varies = {line.axes[axis] for axis in constant.varies} | line.varies
    product = flow.products.get(line.source)
    fits = varies <= product.outputs.keys() if isinstance(product, Product) else len(varies) < 2
    if None in varies or not fits:
        return None
    steps, leaves = (*line.steps, equation), (*line.leaves, constant.leaves)
    return line._replace(steps=steps, varies=frozenset(varies), leaves=leaves)


def _product(flow: Flow, equation: Equation) -> Product | str | None:
    """The equation as a product with a kernel, or why nothing can be folded into it; None for other operations."""
    params, constants = equation.params, flow.constants_of(equation)
    if equation.primitive.name == "conv_general_dilated" and constants[0] is None:
        numbers = params["dimension_numbers"]
        place = 1
        outputs = {numbers.out_spec[1]: numbers.rhs_spec[0]}
        inputs = {numbers.lhs_spec[1]: numbers.rhs_spec[1]}
    elif equation.primitive.name == "dot_general" and (constants[0] is None) != (constants[1] is None):
        place = int(constants[1] is not None)
        contracted, batch = params["dimension_numbers"]
        inputs = dict(zip(contracted[1 - place] + batch[1 - place], contracted[place] + batch[place], strict=True))
        free = [
            [axis for axis in range(atom.aval.ndim) if axis not in contracted[i] + batch[i]]
            for i, atom in enumerate(equation.invars)
        ]
        first = len(batch[0]) + place * len(free[0])  # axis of the result that the kernel's own begin with
        outputs = dict(enumerate(batch[place])) | dict(enumerate(free[place], first))
    else:
        return None
    kernel = constants[place]
    if kernel is None:
        return "both factors of the product before it are data"
    names = ", ".join(leaf_name(flow.called.paths[leaf][1:]) for leaf in sorted(kernel.leaves)) or "a constant"
    if kernel.view is None or any(kernel.view[1][axis] is None for axis in outputs.values()):
        return f"the kernel before it is computed from {names}"
    if not kernel.alone or flow.reads[equation.invars[place]] > 1:
        return f"{names}, the kernel before it, is used more than once"
    return Product(equation, place, *kernel.view, outputs, inputs)


def reads_of(called: Called, passed: Mapping[Variable, Variable]) -> Counter[Variable]:
    """How often each variable is read on the way to the result, where equations in `passed` only hand on data.

    Leaves that are returned unchanged, such as statistics with `mutable`, do not count as read.
    """
    jaxpr = called.jaxpr.jaxpr
    leaves = set(jaxpr.invars[: len(called.paths)])
    reads = Counter(atom for atom in jaxpr.outvars if not isinstance(atom, jex.Literal) and atom not in leaves)
    for equation in reversed(jaxpr.eqns):
        if equation.effects or any(reads[variable] for variable in equation.outvars):
            inputs = [passed[out] for out in equation.outvars if out in passed] or equation.invars
            reads.update(atom for atom in inputs if not isinstance(atom, jex.Literal))
    return reads


def _computed(equation: Equation, inputs: Sequence[Constant | None], result: Variable, alone: bool) -> Constant:
    """A result of an equation of constants. `alone`: nothing else reads its inputs."""
    constants = [each for each in inputs if each]
    name, leaves = equation.primitive.name, frozenset[int]().union(*(each.leaves for each in constants))
    if name in COPIES and len(constants) == 1:
        (constant,), moved = constants, _moved(equation)
        mixed = _long(result) if name != "broadcast_in_dim" else frozenset()
        varies = {i for i, axis in enumerate(moved) if axis in constant.varies or (axis is None and i in mixed)}
        view = None
        if constant.view and is_real(equation.invars[0]):
            leaf, axes = constant.view
            view = leaf, tuple(None if axis is None else axes[axis] for axis in moved)
        return Constant(frozenset(varies), leaves, view, constant.alone and alone)
    if name in ELEMENTWISE:
        return Constant(frozenset().union(*(each.varies for each in constants)), leaves)
    return Constant(_long(result), leaves)


def _moved(equation: Equation) -> Axes:
    """For each axis of the result of one of COPIES, the axis of its input that it is; None where it is none."""
    name, params = equation.primitive.name, equation.params
    before, after = shape(equation.invars[0]), shape(equation.outvars[0])
    if name == "transpose":
        return tuple(params["permutation"])
    if name == "broadcast_in_dim":
        places = {axis: i for i, axis in enumerate(params["broadcast_dimensions"])}
        found = [places.get(i) for i in range(len(after))]
        return tuple(None if i is None or before[i] != size else i for i, size in zip(found, after, strict=True))
    if name in ("reshape", "squeeze"):
        volume = lambda shape, axis: math.prod(shape[:axis])
        same = lambda i, axis: before[axis] == after[i] and volume(before, axis) == volume(after, i)
        return tuple(next((axis for axis in range(len(before)) if same(i, axis)), None) for i in range(len(after)))
    turned = params["dimensions"] if name == "rev" else ()
    return tuple(None if axis in turned else axis for axis in range(len(after)))


def shape(variable: Variable) -> tuple[Any, ...]:
    return tuple(variable.aval.shape)


def all_axes(variable: Variable) -> tuple[int, ...]:
    return tuple(range(variable.aval.ndim))


def _long(variable: Variable) -> frozenset[int]:
    """The axes of more than one entry."""
    return frozenset(axis for axis, size in enumerate(getattr(variable.aval, "shape", ())) if size != 1)


def is_real(variable: Variable) -> bool:
    return jnp.issubdtype(variable.aval.dtype, jnp.floating)
