"""A network in integers: int8 activations and weights, int32 sums, fixed-point multipliers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from dl_jax.compress.integer.fixed import Fixed, Grid, Multiplier, as_multiplier, multiplied
from dl_jax.compress.integer.model import Model, opened
from dl_jax.compress.kernels import summed
from dl_jax.compress.quantize.points import REARRANGING, selects
from dl_jax.compress.quantize.weights import require_bits
from dl_jax.core.equations import bound, evaluate
from dl_jax.core.errors import InputError
from dl_jax.core.step import Array, Tree

MOST = 2**30  # of a bias, so that the sum with it is an int32
TERM_BITS = 20  # of the multipliers of the two terms of a sum, which are int8


def integer_only(apply: Callable[..., Any], variables: Tree, bits: int = 8) -> Callable[..., Any]:
    """The function (*args, **kwargs) of `apply(variables, *args, **kwargs)`, computed in integers.

    `variables` has weights from `quantize.quantize`, whose scales are of output channels, and the ranges of
    `quantize.calibrate`. The inputs of layers have `bits` bits, as in `quantize.with_activations`, and what lies
    between them 8. Layers are dense and convolutions of any kind; between them may be biases, ReLU and the like,
    maxima, means over pixels or windows, changes of shape, padding with zeros, and sums of two activations.

    Raises InputError for bits outside 1 .. 8 and, when called, for an operation that has no integer form here, such as
    a batch normalisation that is not folded, for weights without integers, and for a layer without a range.
    """
    require_bits(bits)

    def integers(*args: Any, **kwargs: Any) -> Any:
        model = opened(apply, variables, bits, *args, **kwargs)
        outputs, _ = in_integers(model, model.called.others)
        return model.called.result([x.real() if isinstance(x, Fixed) else x for x in outputs])

    return integers


class Term(NamedTuple):
    """How the integers of a term of a sum are multiplied, and rounded: by a whole number, or by a power of 1/2."""

    before: np.ndarray  # the scale
    factor: np.ndarray
    after: np.ndarray  # the scale of the sum


class Notes(NamedTuple):
    """What `simulated` has to know of the integers, by the variable that holds the result of an operation."""

    constants: dict[Any, list[Any]]  # the constants that it reads, in whole steps; None for what is computed
    terms: dict[Any, list[Term]]  # of a sum
    # At a point: the scale of the sums, and by what they are rescaled.
    rescaled: dict[Any, tuple[np.ndarray, Multiplier]]


def in_integers(model: Model, others: Any) -> tuple[list[Any], Notes]:
    notes = Notes({}, {}, {})

    def operation(equation: Any, inputs: list[Any]) -> Sequence[Any]:
        v = equation.outvars[0]
        if v in model.points.operands:
            i, name = model.points.operands[v]
            inputs[i] = _at(model.grid(name), inputs[i], notes, None)
        if any(isinstance(x, Fixed) for x in inputs):
            outputs = [_computed(model, notes, equation, inputs)]
        elif any(isinstance(x, Tracer) for x in inputs):
            outputs = bound(equation, inputs)
        else:
            with jax.ensure_compile_time_eval():
                outputs = bound(equation, inputs)
        grids = [model.grid(model.points.values[v]) if v in model.points.values else None for v in equation.outvars]
        return [_at(grid, x, notes, v) for grid, x, v in zip(grids, outputs, equation.outvars, strict=True)]

    return evaluate(model.called.jaxpr, [*model.leaves, *others], operation), notes


def _at(grid: Grid | None, x: Any, notes: Notes, v: Any) -> Any:
    """x in the int8 numbers of a point."""
    if grid is None:
        return x
    if not isinstance(x, Fixed):
        return Fixed(grid.of_real(x).astype(jnp.int8), grid.scale, grid.zero)
    multiplier = as_multiplier(x.scale / grid.scale)
    notes.rescaled[v] = x.scale, multiplier
    q = jnp.clip(multiplied(x.centred(), multiplier) + grid.zero, -grid.end, grid.end - 1)
    return Fixed(q.astype(jnp.int8), grid.scale, grid.zero)


def _computed(model: Model, notes: Notes, equation: Any, inputs: list[Any]) -> Fixed:
    """The result of an operation that has integers among its inputs."""
    name, v, x = equation.primitive.name, equation.outvars[0], next(x for x in inputs if isinstance(x, Fixed))
    numbers = [x for x in inputs if not isinstance(x, Fixed)]
    if v in model.layers:
        return _product(model, equation, inputs[0])
    if name == "add":
        return _sum(notes, v, inputs)
    if (selects(equation) or name == "pad") and _same_grid(inputs) and _keeps_channels(equation, x):
        integers = [each.values if isinstance(each, Fixed) else _whole(each, x) for each in inputs]
        if name != "pad":  # whose 0 or −∞ is exact
            notes.constants[v] = [
                None if isinstance(each, Fixed) else (whole.astype(np.float64) - x.zero) * x.scale
                for each, whole in zip(inputs, integers, strict=True)
            ]
        return x._replace(values=_run(equation, integers))
    if name in ("reduce_sum", "reduce_window_sum") and not x.scale.ndim:
        return Fixed(_run(equation, [x.centred()]), x.scale, 0)
    if name in ("mul", "div") and len(numbers) == 1 and np.ndim(numbers[0]) == 0 and inputs[-1] is not x:
        factor = np.asarray(numbers[0], np.float64)
        if factor > 0:
            return x._replace(scale=x.scale * factor if name == "mul" else x.scale / factor)
    if name == "convert_element_type" and jnp.issubdtype(equation.params["new_dtype"], jnp.floating):
        return x
    raise InputError(
        f"{name} of {x.values.dtype} {x.values.shape} has no integer form, expected layers, biases, ReLU, maxima, "
        "means and sums; fold batch normalisations, and use ReLU for other activations"
    )


BROADCAST = {
    "add": jnp.add,
    "max": jnp.maximum,
    "min": jnp.minimum,
    "clamp": lambda low, x, high: jnp.clip(x, low, high),
}


def _run(equation: Any, inputs: list[Any]) -> Array:
    name = equation.primitive.name
    return BROADCAST[name](*inputs) if name in BROADCAST else bound(equation, inputs)[0]


def _whole(number: Any, like: Fixed) -> np.ndarray:
    """The integers that stand for a constant beside `like`, the nearest of its type."""
    limits = np.iinfo(like.values.dtype)
    whole = np.round(np.asarray(number, np.float64) / like.scale) + like.zero
    return np.clip(whole, limits.min, limits.max).astype(like.values.dtype)


def _same_grid(inputs: list[Any]) -> bool:
    first, *others = (x for x in inputs if isinstance(x, Fixed))
    return all(np.array_equal(x.scale, first.scale) and x.zero == first.zero for x in others)


def _keeps_channels(equation: Any, x: Fixed) -> bool:
    """Whether a scale of channels fits the result of an operation, too."""
    if not x.scale.ndim or equation.primitive.name in BROADCAST:
        return True
    before, after = x.values.shape, equation.outvars[0].aval.shape
    channels = [i for i in range(-x.scale.ndim, 0) if x.scale.shape[i] != 1]
    same = len(before) == len(after) and all(before[i] == after[i] for i in channels)
    return same and equation.primitive.name not in REARRANGING


def _sum(notes: Notes, v: Any, inputs: list[Any]) -> Fixed:
    a, b = inputs
    if isinstance(a, Fixed) and isinstance(b, Fixed):
        if np.array_equal(a.scale, b.scale):
            return Fixed(a.centred() + b.centred(), a.scale, 0)
        if not a.values.dtype == b.values.dtype == jnp.int8:
            raise InputError("a sum of two layers of which one is not rounded, expected two; calibrate this very model")
        scale = np.maximum(a.scale, b.scale) * 2.0**-TERM_BITS
        factors = [np.round(x.scale / scale).astype(np.int32) for x in inputs]
        notes.terms[v] = [Term(x.scale, factor, scale) for x, factor in zip(inputs, factors, strict=True)]
        return Fixed(a.centred() * factors[0] + b.centred() * factors[1], scale, 0)
    x, number = (a, b) if isinstance(a, Fixed) else (b, a)
    shift = _shift(x, number)
    scale, kept = x.scale * 2.0**shift, np.minimum(shift, 31)  # by which every sum is 0
    whole = _whole(number, Fixed(x.centred(), scale, 0))
    notes.constants[v] = [None if isinstance(each, Fixed) else whole * scale for each in inputs]
    if not shift.any():
        return Fixed(x.centred() + whole, scale, 0)
    own, bias = Term(x.scale, 2.0**-shift, scale), Term(scale, np.ones(()), scale)
    notes.terms[v] = [own if isinstance(each, Fixed) else bias for each in inputs]
    rounded = (x.centred() + (2**kept >> 1).astype(np.int32)) >> kept.astype(np.int32)  # halves up
    return Fixed(rounded + whole, scale, 0)


def _shift(x: Fixed, number: Any) -> np.ndarray:
    """The least k, by channel, for which the constant is at most `MOST` steps of scale · 2^k.

    It is 0 but for a channel whose weights are tiny beside its bias, as of a unit that weight decay has switched off.
    """
    size = np.abs(np.asarray(number, np.float64))
    size = np.broadcast_to(size, np.broadcast_shapes(size.shape, x.values.shape))
    axes = tuple(i for i in range(-size.ndim, 0) if i < -x.scale.ndim or x.scale.shape[i] == 1)
    largest = size.max(axes, keepdims=True).reshape(x.scale.shape)
    with np.errstate(divide="ignore"):
        return np.maximum(np.ceil(np.log2(largest / x.scale / MOST)), 0).astype(np.int64)


def _product(model: Model, equation: Any, x: Any) -> Fixed:
    """Σ (q − zero) w = Σ q w − zero Σ w (equation 7)."""
    v, params = equation.outvars[0], equation.params
    (kernel, scale), layer = model.kernels[v], model.layers[v]
    convolution = equation.primitive.name == "conv_general_dilated"
    if layer.operand or (params["batch_group_count"] != 1 if convolution else params["dimension_numbers"][1][0]):
        raise InputError(f"layer {layer.paths[0]!r} is a product in batches, expected a dense layer or a convolution")
    if not isinstance(x, Fixed) or x.values.dtype != jnp.int8:
        raise InputError(
            f"the input of layer {layer.paths[0]!r} is not rounded, expected a range; calibrate this very model"
        )
    sums = kernel.astype(np.int32).sum(summed(equation, 1))
    scale = scale if scale.size > 1 else scale.reshape(())  # one output may become no axis
    if not convolution:
        product = lax.dot_general(x.values, kernel, params["dimension_numbers"], preferred_element_type=jnp.int32)
        return Fixed(product - x.zero * sums, x.scale * scale, 0)
    numbers = params["dimension_numbers"]
    around: list[tuple[int, int, int]] = [(0, 0, 0)] * x.values.ndim
    for axis, (low, high), dilation in zip(
        numbers.lhs_spec[2:], params["padding"], params["lhs_dilation"], strict=True
    ):
        around[axis] = low, high, dilation - 1
    product = lax.conv_general_dilated(
        lax.pad(x.values, np.int8(x.zero), around),
        jnp.asarray(kernel),
        params["window_strides"],
        [(0, 0)] * len(params["padding"]),
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=numbers,
        feature_group_count=params["feature_group_count"],
        preferred_element_type=jnp.int32,
    )
    channels = [-1 if i == numbers.out_spec[1] else 1 for i in range(product.ndim)]
    scale = scale if scale.size == 1 else scale.reshape(channels)
    return Fixed(product - x.zero * sums.reshape(channels), x.scale * scale, 0)
