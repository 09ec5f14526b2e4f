"""Which layers are folded, and the folded model."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dl_jax import inspect
from dl_jax.compress.fold.kernels import (
    Fold,
    new_leaves,
)
from dl_jax.compress.fold.lines import (
    AFFINE,
    SHIFTS,
    Equation,
    Flow,
    Line,
    Product,
    Variable,
    all_axes,
    is_real,
    reads_of,
    shape,
)
from dl_jax.core.equations import Called, evaluate, trace
from dl_jax.core.errors import InputError
from dl_jax.core.leaves import leaf_name
from dl_jax.core.step import Tree

Apply = Callable[..., Any]

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
    jitted, mapped over seeds, exported and rewritten again. It computes in the types of `variables` here, whatever
    those are that it gets. Variables that are a stack of seeds are folded by

        jax.vmap(lambda variables: fold.folded(model.apply, variables, image, train=False)[1])(stack)

    Raises InputError where a kernel or bias would not be finite, as with a negative variance or NaN in a leaf. The new
    `apply` raises it for variables that are not those of a folded model or have other shapes, and where its arguments
    make the model read values within a folded layer.
    """
    if isinstance(apply, functools.partial):  # its settings are meant to hold as well
        settings = {**apply.keywords, **settings}
    shapes = jax.eval_shape(lambda variables: variables, variables)
    called = trace(apply, variables, *inputs, **settings)
    flow = Flow.of(called)
    folds = _folds(flow)
    gone, new = _gone(called, folds), new_leaves(flow, folds, jax.tree.leaves(variables))
    edited = _edited(variables, (), gone, new)
    expected = dict(jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: edited)))

    @functools.wraps(apply)
    def run(variables: Tree, *args: Any, **kwargs: Any) -> Any:
        given = _fitting(dict(jax.tree_util.tree_leaves_with_path(variables)), expected)
        again = trace(apply, shapes, *args, **{**kwargs, **settings})
        found = _folds(Flow.of(again))
        if [fold.signature for fold in found] != [fold.signature for fold in folds]:
            raise InputError(
                "with these arguments the model normalises by its batch or reads values in a folded layer, expected "
                "what `folded` saw; give it the settings of evaluation, such as train=False, and ask for results alone"
            )
        return _run(again, found, given)

    return run, edited


def _fitting(
    given: Mapping[jax.tree_util.KeyPath, Any], expected: Mapping[jax.tree_util.KeyPath, jax.ShapeDtypeStruct]
) -> dict[jax.tree_util.KeyPath, Any]:
    """The leaves that a folded model is called with, in the types that it computes in."""
    if given.keys() != expected.keys():
        path = min({*given} ^ {*expected}, key=leaf_name)
        raise InputError(
            f"the variables {'have' if path in given else 'lack'} {leaf_name(path)}, expected those that `folded` "
            "returned beside this function; give both from one call"
        )
    for path, like in expected.items():
        if jnp.shape(given[path]) != like.shape:
            raise InputError(
                f"{leaf_name(path)} has shape {jnp.shape(given[path])}, expected {like.shape} as in the variables that "
                "`folded` returned beside this function; fold a model after it was cut, or give both from one call"
            )
    return {path: jnp.asarray(leaf, expected[path].dtype) for path, leaf in given.items()}


def remaining(apply: Apply, variables: Tree, *inputs: Any, **settings: Any) -> dict[str, str]:
    """What `folded` leaves of the normalisations with running statistics: {layer: why}, by path ("stem/BatchNorm_0").

    Running statistics are the leaves of real numbers outside of `params`, so neither counters nor keys, and what is
    itself the kernel of a layer is none. The arguments are those of `folded`.
    """
    called = trace(apply, variables, *inputs, **settings)
    flow = Flow.of(called)
    passed = _passed(_folds(flow))
    reads = reads_of(called, passed)
    layer = lambda leaf: leaf_name(called.paths[leaf][1:-1])
    leaves = enumerate(zip(called.paths, called.jaxpr.jaxpr.invars, strict=False))
    statistics = {i: leaf for i, (path, leaf) in leaves if leaf_name(path[:1]) != "params" and is_real(leaf)}
    module = lambda leaf: called.paths[leaf][:-1]
    read = {module(i) for i, leaf in statistics.items() if flow.reads[leaf]}
    found = {
        layer(i): "this call reads none of its statistics; give the settings of evaluation, such as train=False"
        for i in statistics
        if module(i) not in read
    }
    for equation in (equation for equation in called.jaxpr.jaxpr.eqns if equation.outvars):
        result, constants = equation.outvars[0], [each for each in flow.constants_of(equation) if each]
        if result in flow.products:
            constants = [each for each in constants if not each.view]  # a leaf that is the kernel is no statistic
        if result not in flow.known and result not in passed and any(reads[out] for out in equation.outvars):
            for leaf in frozenset().union(*(each.leaves for each in constants)) & statistics.keys():
                found.setdefault(layer(leaf), _why(flow, equation))
    return found


def _unfit(product: Product, line: Line) -> str | None:
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


def _folds(flow: Flow) -> list[Fold]:
    """What is folded, in the order of the products."""
    products = {result: each for result, each in flow.products.items() if isinstance(each, Product)}
    after = {
        line.source: line  # the longest comes last
        for line in flow.lines.values()
        if line.steps[-1].primitive.name in AFFINE and line.source in products and flow.reads[line.source] == 1
    }
    found = []
    for result, product in products.items():
        line = flow.line(product.data)
        into = line if line.varies and line.source not in after and not _unfit(product, line) else None
        out = after.get(result, Line(result, all_axes(result)))
        bias = _bias(flow, product, out)
        if bias and (into or (out.steps and not _is_bias(flow, out))):
            found.append(Fold(product, into, out, bias))
    return found


def _is_bias(flow: Flow, line: Line) -> bool:
    """Whether the only step of arithmetic adds a parameter."""
    steps = [step for step in line.steps if step.primitive.name in AFFINE]
    names = [step.primitive.name for step in steps]
    return names == ["add"] and any(each and each.view for each in flow.constants_of(steps[0]))


def _bias(flow: Flow, product: Product, line: Line) -> jax.tree_util.KeyPath | None:
    """The path of the layer's bias, which may be new; None where there is no place for it."""
    kernel, paths = flow.called.paths[product.leaf], flow.called.paths
    bias = (*kernel[:-1], jax.tree_util.DictKey("bias"))
    if len(kernel) < 2 or not isinstance(kernel[-1], jax.tree_util.DictKey) or bias == kernel:
        return None
    if any(path[: len(bias)] == bias != path for path in paths):
        return None  # a module has this name
    if bias in paths:  # it may be replaced unless it is read by something else
        leaf = paths.index(bias)
        if flow.reads[flow.called.jaxpr.jaxpr.invars[leaf]] != sum(leaf in each for each in line.leaves):
            return None
        return bias
    kernels = [paths[each.leaf] for each in flow.products.values() if isinstance(each, Product)]
    if sum(each[:-1] == kernel[:-1] for each in kernels) > 1:
        return None  # it would be that of several
    return bias


def _why(flow: Flow, equation: Equation) -> str:
    """Why an equation of constants and data is not folded."""
    if equation.outvars[0] in flow.products:
        return "a kernel is computed from it"
    if equation.primitive.name not in AFFINE:
        return f"the operation {equation.primitive.name!r} reads it"
    other = "its values vary along other axes than the channels of the kernel before it"
    line = flow.lines.get(equation.outvars[0])
    if line is None:
        return other
    earlier = flow.line(line.source)  # it ends where this line had to begin
    if earlier.steps and isinstance(flow.products.get(earlier.source), Product):
        return other
    product = flow.products.get(line.source)
    if isinstance(product, str):
        return product
    if flow.reads[line.source] > 1:
        return "what it normalises is read by something else as well"
    if product:
        return (
            "the kernel before it has no place for a bias: `bias` beside it is a module or read elsewhere, or no dict"
        )
    for each in flow.products.values():
        if isinstance(each, Product) and flow.line(each.data).source is line.source:
            return _unfit(each, flow.line(each.data)) or "the kernel after it has no place for a bias"
    return "it follows no kernel, and no kernel alone takes its result"


def _passed(folds: Iterable[Fold]) -> dict[Variable, Variable]:
    """{result of arithmetic that is folded: the data that takes its place}."""
    passed = {}
    for line in (line for fold in folds for line in (fold.before, fold.after) if line):
        variable = line.source
        for step in line.steps:
            if step.primitive.name in AFFINE:
                passed[step.outvars[0]] = variable
            variable = step.outvars[0]
    return passed


def _gone(called: Called, folds: Iterable[Fold]) -> set[jax.tree_util.KeyPath]:
    """The leaves that are read now, but not by the folded model."""
    now, then = reads_of(called, {}), reads_of(called, _passed(folds))
    leaves = zip(called.paths, called.jaxpr.jaxpr.invars, strict=False)
    return {path for path, variable in leaves if now[variable] and not then[variable]}


def _run(called: Called, folds: Sequence[Fold], leaves: Mapping[jax.tree_util.KeyPath, Any]) -> Any:
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
            sizes = [size if i in layers[result].product.outputs else 1 for i, size in enumerate(shape(result))]
            return [outputs[0] + leaves[layers[result].bias].reshape(sizes).astype(outputs[0].dtype)]
        return outputs

    given = [GONE if path in gone else leaves[path] for path in called.paths]
    return _edited(called.result(evaluate(called.jaxpr, [*given, *called.others], operation)), (), (), {})


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
