"""Folds batch normalisation, and other constant scales and shifts, into the kernels beside them.

    left = fold.remaining(model.apply, variables, image, train=False)  # {layer: why it cannot be folded}
    apply, variables = fold.folded(model.apply, variables, image, train=False)

In evaluation, a normalisation with running statistics multiplies and shifts each channel by constants. After a dense
layer or a convolution y = x * K + b, this is s y + t = x * (s K) + (s b + t): another kernel and another bias (Jacob et
al. 2018, arXiv:1712.05877, section 3.2). Before one that does not pad, s folds into the channels that K takes.

Layers are found by the flow of data in the trace, not by names: a product of data and a parameter (dense, convolution,
depthwise, grouped or transposed), and a line of additions, multiplications and the like with values that depend on
variables and constants alone. A line ends where something else reads what is in it.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dl_jax import inspect
from dl_jax.core.equations import Called, bound, evaluate, trace
from dl_jax.core.errors import InputError
from dl_jax.core.leaves import leaf_name
from dl_jax.core.step import Array, Tree

Apply = Callable[..., Any]
Variable = Any  # of a jaxpr
Equation = Any
Axes = tuple[int | None, ...]  # for each axis of an array, the axis of another one that it is, or None

SHIFTS = {"add", "add_any", "sub"}
ARITHMETIC = {*SHIFTS, "div", "mul", "neg"}
MOVES = {"broadcast_in_dim", "convert_element_type", "copy", "reshape", "rev", "squeeze", "transpose"}
ELEMENTWISE = {*ARITHMETIC, "abs", "exp", "integer_pow", "log", "max", "min", "pow", "rsqrt", "sqrt", "square"}
GONE = object()  # in the place of a leaf that a folded model no longer has


def folded(apply: Apply, variables: Tree, *inputs: Any, **settings: Any) -> tuple[Apply, Tree]:
    """The model with its normalisations folded: another `apply`, and variables without those that it no longer reads.

    A layer without a bias gets one, a leaf `bias` beside its kernel. Outputs are the same up to rounding. What could
    not be folded stays as it is; `remaining` tells why. A kernel that is used twice is left alone.

    Args:
      apply: `module.apply`, or a function like it: (variables, *inputs, **settings) -> outputs.
      variables: arrays, {"params": ..., "batch_stats": ...}.
      inputs: examples, with any number of rows. Their values do not matter.
      settings: of evaluation, such as `train=False`. They hold in all later calls, whatever these say.

    The folded model runs as in evaluation also when it is called with train=True: the running statistics are in its
    kernels, and dropout is off. Otherwise it takes what `apply` takes, any number of rows, and can be fine-tuned,
    jitted, mapped over seeds, exported and rewritten again. Variables that are a stack of seeds are folded by

        jax.vmap(lambda variables: fold.folded(model.apply, variables, image, train=False)[1])(stack)

    Raises InputError where a kernel or bias would not be finite, as with a negative variance or NaN in a leaf. The new
    `apply` raises it for variables that are not those of a folded model, and where its arguments make the model read
    values within a folded layer.
    """
    if isinstance(apply, functools.partial):  # its settings are meant to hold as well
        settings = {**apply.keywords, **settings}
    shapes = jax.eval_shape(lambda variables: variables, variables)
    called = trace(apply, variables, *inputs, **settings)
    flow = _Flow.of(called)
    folds = _folds(flow)
    gone, new = _gone(called, folds), _new_leaves(flow, folds, jax.tree.leaves(variables))
    expected = ({*called.paths} - gone) | new.keys()

    @functools.wraps(apply)
    def run(variables: Tree, *args: Any, **kwargs: Any) -> Any:
        given = dict(jax.tree_util.tree_leaves_with_path(variables))
        if given.keys() != expected:
            path = min({*given} ^ expected, key=leaf_name)
            raise InputError(
                f"the variables {'have' if path in given else 'lack'} {leaf_name(path)}, expected those that `folded` "
                "returned beside this function; give both from one call"
            )
        again = trace(apply, shapes, *args, **{**kwargs, **settings})
        found = _folds(_Flow.of(again))
        if [fold.signature for fold in found] != [fold.signature for fold in folds]:
            raise InputError(
                "with these arguments the model normalises by its batch or reads values in a folded layer, expected "
                "what `folded` saw; give it the settings of evaluation, such as train=False, and ask for results alone"
            )
        return _run(again, found, given)

    return run, _edited(variables, (), gone, new)


def remaining(apply: Apply, variables: Tree, *inputs: Any, **settings: Any) -> dict[str, str]:
    """What `folded` leaves of the normalisations with running statistics: {layer: why}, by path ("stem/BatchNorm_0").

    Running statistics are the leaves outside of `params`. The arguments are those of `folded`.
    """
    called = trace(apply, variables, *inputs, **settings)
    flow = _Flow.of(called)
    passed = _passed(_folds(flow))
    reads = _reads(called, passed)
    layer = lambda leaf: leaf_name(called.paths[leaf][1:-1])
    statistics = {i for i, path in enumerate(called.paths) if leaf_name(path[:1]) != "params"}
    found = {
        layer(i): "its running statistics are not read; give the settings of evaluation, such as train=False"
        for i in statistics
        if not flow.reads[called.jaxpr.jaxpr.invars[i]]
    }
    for equation in called.jaxpr.jaxpr.eqns:
        result, constants = equation.outvars[0], flow.constants_of(equation)
        if result not in flow.known and result not in passed and any(reads[out] for out in equation.outvars):
            for leaf in frozenset().union(*(each.leaves for each in constants if each)) & statistics:
                found.setdefault(layer(leaf), _why(flow, equation))
    return found


class _Constant(NamedTuple):
    """A value that depends on variables and constants only."""

    varies: frozenset[int]  # the axes along which it may vary
    leaves: frozenset[int] = frozenset()  # of the variables, from which it is computed
    view: tuple[int, Axes] | None = None  # the leaf of which it is a copy, and that leaf's axis for each axis
    alone: bool = False  # it is all that reads this leaf


class _Line(NamedTuple):
    """Data that a line of operations with constants makes of other data."""

    source: Variable
    axes: Axes  # of the source, for each axis
    steps: tuple[Equation, ...] = ()
    varies: frozenset[int] = frozenset()  # axes of the source along which the constants vary
    leaves: tuple[frozenset[int], ...] = ()  # those of the constants, for each step of arithmetic


class _Product(NamedTuple):
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


class _Fold(NamedTuple):
    product: _Product
    before: _Line | None  # of what goes into the product
    after: _Line  # of its result; it may have no steps
    bias: jax.tree_util.KeyPath

    @property
    def signature(self) -> Any:
        """Equal in two traces where the same is folded in both."""
        lines = [line and ([step.primitive.name for step in line.steps], line.leaves) for line in self[1:3]]
        return self.product.leaf, lines


class _Flow(NamedTuple):
    """How values depend on each other in a trace."""

    called: Called
    reads: Counter[Variable]  # how often the result needs each variable
    known: dict[Variable, _Constant]
    products: dict[Variable, _Product | str]  # by their results; or why nothing can be folded into the kernel
    lines: dict[Variable, _Line]

    @classmethod
    def of(cls, called: Called) -> "_Flow":
        flow = cls(called, _reads(called, {}), {}, {}, {})
        jaxpr = called.jaxpr.jaxpr
        for variable in jaxpr.constvars:
            flow.known[variable] = _Constant(_long(variable))
        for i, variable in enumerate(jaxpr.invars[: len(called.paths)]):
            flow.known[variable] = _Constant(_long(variable), frozenset([i]), (i, _all(variable)), True)
        for equation in jaxpr.eqns:
            _follow(flow, equation)
        return flow

    def constants_of(self, equation: Equation) -> list[_Constant | None]:
        """The inputs of an equation, None for data."""
        return [NUMBER if isinstance(atom, jex.Literal) else self.known.get(atom) for atom in equation.invars]

    def line(self, variable: Variable) -> _Line:
        """The line up to a variable. It begins there where something else reads the variable too."""
        new = _Line(variable, _all(variable))
        return self.lines.get(variable, new) if self.reads[variable] == 1 else new


NUMBER = _Constant(frozenset())


def _follow(flow: _Flow, equation: Equation) -> None:
    """Notes what an equation does: with constants, in a line, or as a product."""
    name, result, constants = equation.primitive.name, equation.outvars[0], flow.constants_of(equation)
    data = [atom for atom, each in zip(equation.invars, constants, strict=True) if each is None]
    if not data and not equation.effects:
        alone = all(isinstance(atom, jex.Literal) or flow.reads[atom] == 1 for atom in equation.invars)
        flow.known.update({out: _computed(equation, constants, out, alone) for out in equation.outvars})
    elif len(data) == 1 and name in ARITHMETIC:
        begun = flow.line(data[0])
        for line in (begun, _Line(data[0], _all(data[0]))):
            if longer := _longer(flow, line, equation):
                flow.lines[result] = longer
                return
    elif len(data) == 1 == len(equation.invars) and name in MOVES and _is_real(data[0]):
        line, moved = flow.line(data[0]), _moved(equation)
        axes = tuple(None if axis is None else line.axes[axis] for axis in moved)
        flow.lines[result] = line._replace(axes=axes, steps=(*line.steps, equation))
    elif product := _product(flow, equation):
        flow.products[result] = product


def _longer(flow: _Flow, line: _Line, equation: Equation) -> _Line | None:
    """The line with a step of arithmetic more; None where its constants cannot be folded with the others."""
    place = next(i for i, each in enumerate(flow.constants_of(equation)) if each is None)
    constant = next((each for each in flow.constants_of(equation) if each), NUMBER)
    if _shape(equation.invars[place]) != _shape(equation.outvars[0]) or (equation.primitive.name == "div" and place):
        return None
    varies = {line.axes[axis] for axis in constant.varies} | line.varies
    product = flow.products.get(line.source)
    fits = varies <= product.outputs.keys() if isinstance(product, _Product) else len(varies) < 2
    if None in varies or not fits:
        return None
    steps, leaves = (*line.steps, equation), (*line.leaves, constant.leaves)
    return line._replace(steps=steps, varies=frozenset(varies), leaves=leaves)


def _product(flow: _Flow, equation: Equation) -> _Product | str | None:
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
    return _Product(equation, place, *kernel.view, outputs, inputs)


def _unfit(product: _Product, line: _Line) -> str | None:
    """Why a line that ends in the data of a product cannot be folded into the kernel; None where it can."""
    params = product.equation.params
    along = {axis for axis, of in enumerate(line.axes) if of in line.varies}
    if not along <= product.inputs.keys() or {line.axes[axis] for axis in along} != line.varies:
        return "its values vary along other axes than those over which the kernel after it sums"
    if any(product.view[product.inputs[axis]] is None for axis in along) or params.get("batch_group_count", 1) != 1:
        return "the kernel after it is used in another order of its values"
    edges = [*sum(params.get("padding", ()), ()), *(step - 1 for step in params.get("lhs_dilation", ()))]
    if any(edges) and any(step.primitive.name in SHIFTS for step in line.steps):
        return "the convolution after it pads with zeros, which would have to be shifted as well"
    return None


def _folds(flow: _Flow) -> list[_Fold]:
    """What is folded, in the order of the products."""
    products = {result: each for result, each in flow.products.items() if isinstance(each, _Product)}
    after = {
        line.source: line  # the longest comes last
        for line in flow.lines.values()
        if line.steps[-1].primitive.name in ARITHMETIC and line.source in products and flow.reads[line.source] == 1
    }
    found = []
    for result, product in products.items():
        line = flow.line(product.data)
        into = line if line.varies and line.source not in after and not _unfit(product, line) else None
        out = after.get(result, _Line(result, _all(result)))
        bias = _bias(flow, product, out)
        if bias and (into or (out.steps and not _is_bias(flow, out))):
            found.append(_Fold(product, into, out, bias))
    return found


def _is_bias(flow: _Flow, line: _Line) -> bool:
    """Whether the only step of arithmetic adds a parameter."""
    steps = [step for step in line.steps if step.primitive.name in ARITHMETIC]
    names = [step.primitive.name for step in steps]
    return names == ["add"] and any(each and each.view for each in flow.constants_of(steps[0]))


def _bias(flow: _Flow, product: _Product, line: _Line) -> jax.tree_util.KeyPath | None:
    """The path of the layer's bias, which may be new; None where there is no place for it."""
    kernel, paths = flow.called.paths[product.leaf], flow.called.paths
    bias = (*kernel[:-1], jax.tree_util.DictKey("bias"))
    if len(kernel) < 2 or not isinstance(kernel[-1], jax.tree_util.DictKey) or bias == kernel:
        return None
    if bias in paths:  # it may be replaced unless it is read by something else
        leaf = paths.index(bias)
        if flow.reads[flow.called.jaxpr.jaxpr.invars[leaf]] != sum(leaf in each for each in line.leaves):
            return None
        return bias
    kernels = [paths[each.leaf] for each in flow.products.values() if isinstance(each, _Product)]
    if sum(each[:-1] == kernel[:-1] for each in kernels) > 1:
        return None  # it would be that of several
    return bias


def _why(flow: _Flow, equation: Equation) -> str:
    """Why an equation of constants and data is not folded."""
    if equation.primitive.name not in ARITHMETIC:
        return f"the operation {equation.primitive.name!r} reads it"
    other = "its values vary along other axes than the channels of the kernel before it"
    line = flow.lines.get(equation.outvars[0])
    if line is None:
        return other
    earlier = flow.line(line.source)  # it ends where this line had to begin
    if earlier.steps and isinstance(flow.products.get(earlier.source), _Product):
        return other
    product = flow.products.get(line.source)
    if isinstance(product, str):
        return product
    if flow.reads[line.source] > 1:
        return "what it normalises is read by something else as well"
    if product:
        return "the kernel before it has no place for a bias: `bias` beside it has another use, or there is no dict"
    for each in flow.products.values():
        if isinstance(each, _Product) and flow.line(each.data).source is line.source:
            return _unfit(each, flow.line(each.data)) or "the kernel after it has no place for a bias"
    return "it follows no kernel, and no kernel alone takes its result"


def _reads(called: Called, passed: Mapping[Variable, Variable]) -> Counter[Variable]:
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


def _passed(folds: Iterable[_Fold]) -> dict[Variable, Variable]:
    """{result of arithmetic that is folded: the data that takes its place}."""
    passed = {}
    for line in (line for fold in folds for line in (fold.before, fold.after) if line):
        variable = line.source
        for step in line.steps:
            if step.primitive.name in ARITHMETIC:
                passed[step.outvars[0]] = variable
            variable = step.outvars[0]
    return passed


def _gone(called: Called, folds: Iterable[_Fold]) -> set[jax.tree_util.KeyPath]:
    """The leaves that are read now, but not by the folded model."""
    now, then = _reads(called, {}), _reads(called, _passed(folds))
    leaves = zip(called.paths, called.jaxpr.jaxpr.invars, strict=False)
    return {path for path, variable in leaves if now[variable] and not then[variable]}


def _run(called: Called, folds: Sequence[_Fold], leaves: Mapping[jax.tree_util.KeyPath, Any]) -> Any:
    """The result of a folded call for the leaves that it still has."""
    passed, gone = _passed(folds), _gone(called, folds)
    layers = {fold.product.equation.outvars[0]: fold for fold in folds}

    def operation(equation: Equation, inputs: list[Any]) -> Sequence[Any]:
        result = equation.outvars[0] if equation.outvars else None
        if result in passed:
            return [inputs[equation.invars.index(passed[result])]]
        if any(each is GONE for each in inputs):
            return [GONE] * len(equation.outvars)
        outputs = inspect.computed(equation, inputs)
        if result in layers:
            sizes = [size if i in layers[result].product.outputs else 1 for i, size in enumerate(_shape(result))]
            return [outputs[0] + leaves[layers[result].bias].reshape(sizes).astype(outputs[0].dtype)]
        return outputs

    given = [GONE if path in gone else leaves[path] for path in called.paths]
    return _edited(called.result(evaluate(called.jaxpr, [*given, *called.others], operation)), (), (), {})


def _new_leaves(flow: _Flow, folds: Sequence[_Fold], leaves: Sequence[Any]) -> dict[jax.tree_util.KeyPath, Array]:
    """The folded kernels and biases. Raises InputError where one is not finite."""

    @jax.jit
    def compute(leaves: Sequence[Any]) -> list[tuple[Array, Array]]:
        values = _values(flow, leaves)
        return [_scaled(fold, values, leaves[fold.product.leaf]) for fold in folds]

    found = _finite(flow.called, folds, leaves, compute(leaves))
    kernels = {flow.called.paths[fold.product.leaf]: kernel for fold, (kernel, _) in zip(folds, found, strict=True)}
    return kernels | {fold.bias: bias for fold, (_, bias) in zip(folds, found, strict=True)}


def _values(flow: _Flow, leaves: Sequence[Any]) -> dict[Variable, Any]:
    """The values of all constants."""
    jaxpr = flow.called.jaxpr
    values = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    values.update(zip(jaxpr.jaxpr.invars, leaves, strict=False))
    for equation in jaxpr.jaxpr.eqns:
        if equation.outvars and equation.outvars[0] in flow.known:
            inputs = [atom.val if isinstance(atom, jex.Literal) else values[atom] for atom in equation.invars]
            values.update(zip(equation.outvars, bound(equation, inputs), strict=True))
    return values


def _scaled(fold: _Fold, values: Mapping[Variable, Any], kernel: Array) -> tuple[Array, Array]:
    """The kernel and the bias of a folded layer.

    A line computes s x + t. Its derivative is s, exactly, and its value at 0 is t. What the shift of the line before
    the product becomes in the product is where the line after it starts from.
    """
    product, after = fold.product, fold.after
    result = product.equation.outvars[0].aval
    start, factor = jnp.zeros(result.shape, result.dtype), 1
    if before := fold.before:
        zero = jnp.zeros(before.source.aval.shape, before.source.aval.dtype)
        shift, scale = jax.jvp(lambda x: _replayed(before, values, x), (zero,), (jnp.ones_like(zero),))
        factor = _of_inputs(product, scale, kernel.ndim)
        operands = [shift, values[product.equation.invars[product.place]]]
        (start,) = bound(product.equation, operands if product.place else operands[::-1])
    shift, scale = jax.jvp(lambda x: _replayed(after, values, x), (start,), (jnp.ones_like(start),))
    channels = [axis if axis in product.outputs else None for axis in after.axes]
    of_kernel = [None if axis is None else product.view[product.outputs[axis]] for axis in channels]
    sizes = [result.shape[axis] if axis in product.outputs else 1 for axis in range(result.ndim)]
    bias = jnp.broadcast_to(_placed(shift, channels, result.ndim), sizes)
    bias = bias.reshape([result.shape[axis] for axis in sorted(product.outputs)])
    return (kernel * factor * _placed(scale, of_kernel, kernel.ndim)).astype(kernel.dtype), bias.astype(kernel.dtype)


def _replayed(line: _Line, values: Mapping[Variable, Any], x: Array) -> Array:
    """The end of a line whose source is x."""
    values = {**values, line.source: x}
    for step in line.steps:
        inputs = [atom.val if isinstance(atom, jex.Literal) else values[atom] for atom in step.invars]
        (values[step.outvars[0]],) = bound(step, inputs)
    return values[line.source if not line.steps else line.steps[-1].outvars[0]]


def _of_inputs(product: _Product, scale: Array, ndim: int) -> Array:
    """The factor of each value of a kernel of `ndim` axes, from those of the data that it is multiplied with."""
    if product.equation.primitive.name == "dot_general":
        axes = [product.view[product.inputs[axis]] if axis in product.inputs else None for axis in range(scale.ndim)]
        return _placed(scale, axes, ndim)
    ((channel, of_kernel),) = product.inputs.items()
    ((_, maps),) = product.outputs.items()
    groups = product.equation.params["feature_group_count"]
    each = _placed(scale, [0 if axis == channel else None for axis in range(scale.ndim)], 1).reshape(groups, -1)
    count = _shape(product.equation.invars[1])[maps] // groups  # of the maps of a group, which are neighbours
    return _placed(jnp.repeat(each, count, 0), [product.view[maps], product.view[of_kernel]], ndim)


def _placed(values: Array, axes: Sequence[int | None], ndim: int) -> Array:
    """`values` with axis i as axis axes[i] of `ndim`. They are alike along axes for which this is None."""
    values = values[tuple(0 if axis is None else slice(None) for axis in axes)]
    places = [axis for axis in axes if axis is not None]
    values = values.transpose(np.argsort(places))
    sizes = dict(zip(sorted(places), values.shape, strict=True))
    return values.reshape([sizes.get(axis, 1) for axis in range(ndim)])


def _finite(called: Called, folds: Sequence[_Fold], leaves: Sequence[Any], new: Any) -> Any:
    """`new`, the kernel and bias of each fold. Raises InputError where one of them is not finite.

    Under `jax.vmap` the numbers of one seed are unknown, but those of the whole stack are not; under `jit` none are.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((leaves, new))):

        @jax.custom_batching.custom_vmap
        def unknown(leaves: Any, new: Any) -> Any:
            return new

        unknown.def_vmap(lambda seeds, mapped, leaves, new: (_finite(called, folds, leaves, new), mapped[1]))
        return unknown(leaves, new)
    for fold, arrays in zip(folds, new, strict=True):
        if all(np.isfinite(each).all() for each in arrays):
            continue
        lines = [line for line in (fold.before, fold.after) if line]
        used = sorted({fold.product.leaf}.union(*(each for line in lines for each in line.leaves)))
        names = {leaf: leaf_name(called.paths[leaf]) for leaf in used}
        for leaf, name in names.items():
            if not np.isfinite(leaves[leaf]).all():
                raise InputError(
                    f"{name} has NaN or infinite values, expected finite numbers; look for divergence in training"
                )
        raise InputError(
            f"folding {', '.join(names.values())} gives NaN or infinite values, expected finite numbers; look for a "
            "negative variance or a division by zero"
        )
    return new


def _edited(tree: Tree, path: jax.tree_util.KeyPath, gone: Any, new: Mapping[jax.tree_util.KeyPath, Any]) -> Tree:
    """`tree` at `path` of a larger one, with the leaves in `new`, and without those in `gone` or that are GONE.

    Mappings become dicts, and those that are emptied are left out of others. In other containers None takes the place
    of a leaf.
    """
    if isinstance(tree, Mapping):
        edited = {key: _edited(each, (*path, jax.tree_util.DictKey(key)), gone, new) for key, each in tree.items()}
        edited |= {each[-1].key: leaf for each, leaf in new.items() if each[:-1] == path}
        emptied = {key for key, each in edited.items() if isinstance(each, dict) and not each and tree.get(key)}
        return {key: each for key, each in edited.items() if each is not GONE and key not in emptied}
    if jax.tree_util.all_leaves([tree]):
        return GONE if path in gone else new.get(path, tree)
    children, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda each: each is not tree)
    edited = [_edited(each, (*path, *keys), gone, new) for keys, each in children]
    return jax.tree.unflatten(structure, [None if each is GONE else each for each in edited])


def _computed(equation: Equation, inputs: Sequence[_Constant | None], result: Variable, alone: bool) -> _Constant:
    """A result of an equation of constants. `alone`: nothing else reads its inputs."""
    constants = [each for each in inputs if each]
    name, leaves = equation.primitive.name, frozenset[int]().union(*(each.leaves for each in constants))
    if name in MOVES and len(constants) == 1:
        (constant,), moved = constants, _moved(equation)
        mixed = _long(result) if name != "broadcast_in_dim" else frozenset()
        varies = {i for i, axis in enumerate(moved) if axis in constant.varies or (axis is None and i in mixed)}
        view = None
        if constant.view and _is_real(equation.invars[0]):
            leaf, axes = constant.view
            view = leaf, tuple(None if axis is None else axes[axis] for axis in moved)
        return _Constant(frozenset(varies), leaves, view, constant.alone and alone)
    if name in ELEMENTWISE:
        return _Constant(frozenset().union(*(each.varies for each in constants)), leaves)
    return _Constant(_long(result), leaves)


def _moved(equation: Equation) -> Axes:
    """For each axis of the result of one of MOVES, the axis of its input that it is; None where it is none."""
    name, params = equation.primitive.name, equation.params
    before, after = _shape(equation.invars[0]), _shape(equation.outvars[0])
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


def _shape(variable: Variable) -> tuple[Any, ...]:
    return tuple(variable.aval.shape)


def _all(variable: Variable) -> tuple[int, ...]:
    return tuple(range(variable.aval.ndim))


def _long(variable: Variable) -> frozenset[int]:
    """The axes of more than one entry."""
    return frozenset(axis for axis, size in enumerate(getattr(variable.aval, "shape", ())) if size != 1)


def _is_real(variable: Variable) -> bool:
    return jnp.issubdtype(variable.aval.dtype, jnp.floating)
