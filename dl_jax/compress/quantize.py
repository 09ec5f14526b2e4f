"""Quantisation to 1 to 8 bits: weights symmetric per output channel, activations on calibrated ranges.

    after training    {**variables, "params": dequantize(quantize(params, 8)), "ranges": calibrate(apply, ...)}
    in training       with_params(with_activations(loss, 8), fake(4)), with the ranges among the state's `extra`
    evaluation        with_activations(metric, 8)

`fake` and `with_activations` compute in floating point what integers would: x ≈ scale · (q − zero), with zero = 0 for
weights (Jacob et al. 2018, arXiv:1712.05877, sections 2.1 and 3; Krishnamoorthi 2018, arXiv:1806.08342, section 2).
Gradients go straight through the rounding (Bengio et al. 2013, arXiv:1308.3432).

In a recurrent layer both kernels are quantised, and so is the layer's input; the hidden state is not.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dl_jax.compress.grid import dequantized, fake_quantize
from dl_jax.core.errors import InputError
from dl_jax.core.leaves import Where, at_least_float32, chosen, is_kernel
from dl_jax.core.step import Array, Batch, Tree
from dl_jax.inspect import inputs, with_inputs

RANGES = "ranges"  # the collection in which variables carry them


class Quantized(NamedTuple):
    """A quantised weight; its value is `values * scale`."""

    values: Array  # int8 [..., C], -q .. q with q = 2^(bits - 1) - 1; for 1 bit -1 and 1
    scale: Array  # float32 [1, ..., 1, C], or float64 if the weight is float64


class Range(NamedTuple):
    """The smallest and the largest input of a layer."""

    low: Array  # float32 [], or float64 if the input is float64
    high: Array


def fake(bits: int, where: Where = is_kernel) -> Callable[[Tree], Tree]:
    """Returns a function params -> params that rounds the chosen weights to `bits` bits, for `losses.with_params`.

    The gradient goes straight through the rounding. The values equal `dequantize(quantize(params, bits, where))` bit
    for bit and are float32 or wider, since bfloat16 cannot represent the grid. Gradients have the dtype of the
    parameters. Raises InputError for bits outside 1 .. 8 and, when called, where `where` chooses nothing.
    """
    require_bits(bits)

    def f(params: Tree) -> Tree:
        return jax.tree.map(
            lambda w, yes: _straight_through(w, _floats(_integers(w, bits))) if yes else w,
            params,
            chosen(params, where),
        )

    return f


def quantize(params: Tree, bits: int, where: Where = is_kernel) -> Tree:
    """`params` with each chosen weight as `Quantized`, every output channel (entry of the last axis) on its own grid.

    The grid is symmetric around an exact 0, and its ends are the channel's largest magnitude: scale = max |w| / q. With
    1 bit there is no 0: w becomes ± mean |w| of its channel (Rastegari et al. 2016, arXiv:1603.05279, equation 6), and
    0 becomes +. Map it over seeds with `jax.vmap`. Raises InputError as `fake` does.
    """
    require_bits(bits)
    return jax.tree.map(lambda w, yes: _integers(w, bits) if yes else w, params, chosen(params, where))


def dequantize(params: Tree) -> Tree:
    """The weights that `quantize` stored, in float32 or better; other leaves are left as they are."""
    return jax.tree.map(
        lambda leaf: _floats(leaf) if isinstance(leaf, Quantized) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, Quantized),
    )


def _integers(w: Array, bits: int) -> Quantized:
    w, axes = at_least_float32(w), tuple(range(w.ndim - 1))
    if bits == 1:
        return Quantized(jnp.where(w < 0, -1, 1).astype(jnp.int8), jnp.abs(w).mean(axes, keepdims=True))
    end, _ = _grid(bits)
    # Not a division: XLA turns one by a constant into a product, and compiled code would differ in the last bit.
    nan = jnp.isnan(w).any(axes, keepdims=True)
    scale = jnp.where(nan, jnp.nan, jnp.abs(w).max(axes, keepdims=True)) * w.dtype.type(1 / end)
    steps = jnp.round(w / jnp.where(scale > 0, scale, 1))
    return Quantized(jnp.clip(steps, -end, end).astype(jnp.int8), scale)


def _floats(q: Quantized) -> Array:
    return dequantized(q.values, q.scale)


def _grid(bits: int) -> tuple[int, int]:
    """The largest integer and the step between two, of weights."""
    return (2 ** (bits - 1) - 1, 1) if bits > 1 else (1, 2)


@jax.custom_jvp
def _straight_through(x: Array, value: Array) -> Array:
    """`value`, with the gradient of `x`, which may be of another type."""
    return value


_straight_through.defjvp(lambda primals, tangents: (primals[1], tangents[0].astype(primals[1].dtype)))


def pack(values: np.ndarray, bits: int) -> np.ndarray:  # int8 [...] -> uint8 [ceil(N * bits / 8)]
    """Packs the values of a `Quantized` into a bit string of `bits` bits per value, C order, high bits first.

    Two int4 values share a byte. Raises InputError for bits outside 1 .. 8 and for values that `quantize` does not give
    with `bits` bits.
    """
    require_bits(bits)
    end, step = _grid(bits)
    wide = np.asarray(values).ravel().astype(np.int16)
    if wide.size and (abs(wide).max() > end or ((wide + end) % step).any()):
        raise InputError(
            f"pack: values from {wide.min()} to {wide.max()}, expected those of `quantize` with {bits} bits"
        )
    codes = ((wide + end) // step).astype(np.uint8)
    return np.packbits(np.unpackbits(codes[:, None], axis=1)[:, 8 - bits :])


def unpack(packed: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:  # uint8 [n] -> int8 `shape`
    """The inverse of `pack`. Raises InputError if the number of bytes does not match `shape`."""
    require_bits(bits)
    size = int(np.prod(shape))
    if packed.shape != (-(-size * bits // 8),):
        raise InputError(f"unpack: {packed.shape} bytes for {size} values of {bits} bits, expected what pack gave")
    end, step = _grid(bits)
    table = np.zeros((size, 8), np.uint8)
    table[:, 8 - bits :] = np.unpackbits(packed, count=size * bits).reshape(size, bits)
    return (np.packbits(table, axis=1).reshape(shape).astype(np.int16) * step - end).astype(np.int8)


def calibrate(apply: Callable[[Tree, Batch], Any], variables: Tree, batches: Iterable[Batch]) -> dict[str, Range]:
    """{path of a layer with a kernel: the range of its inputs over `batches`}; goes into variables["ranges"].

    `apply(variables, batch)` runs the model. For a stack of seeds: jax.vmap(lambda v: calibrate(apply, v, batches)).
    Raises InputError for no batches, for a batch of no rows, for inputs that are NaN or infinite, and as
    `inspect.with_inputs` does. Under jit the check is impossible: a non-finite range is returned, and `rounded` then
    gives NaN.
    """

    @jax.jit
    def seen(variables: Tree, batch: Batch) -> OrderedDict[str, Range]:  # the layers in the order in which they run
        return OrderedDict((path, _range(xs)) for path, xs in inputs(apply)(variables, batch).items())

    ranges: OrderedDict[str, Range] | None = None
    for i, batch in enumerate(batches):
        _require_rows(i, batch)
        found = seen(variables, batch)
        ranges = OrderedDict((path, _union(ranges[path], found[path])) for path in found) if ranges else found
    if ranges is None:
        raise InputError("calibrate: no batches, expected at least one; give some of the training set")
    return dict(_finite(ranges))


def _require_rows(i: int, batch: Batch) -> None:
    for shape in map(jnp.shape, jax.tree.leaves(batch)):
        if 0 in shape:
            raise InputError(f"calibrate: batch {i} has an array {shape}, expected 1 row or more; leave the batch out")


def _finite(ranges: OrderedDict[str, Range]) -> OrderedDict[str, Range]:
    """`ranges`, of one seed or [S]. Raises InputError, with all layers in question, where one is not finite."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(ranges)):
        return _finite_stack(ranges)
    if wrong := [line for path, each in ranges.items() if (line := _not_finite(path, each))]:
        raise InputError(
            f"calibrate: the inputs of {', then of '.join(wrong)}, expected finite numbers; look for NaN in the "
            "batches and for divergence in the parameters"
        )
    return ranges


def _not_finite(path: str, bounds: Range) -> str:
    """The layer, its first seed whose range is not finite, and that range; "" where all are."""
    low, high = map(np.ravel, bounds)
    wrong = np.flatnonzero(~(np.isfinite(low) & np.isfinite(high)))
    if not wrong.size:
        return ""
    seed = f" of seed {wrong[0]}" if np.ndim(bounds.low) else ""
    return f"layer {path!r}{seed} range from {low[wrong[0]]} to {high[wrong[0]]}"


@jax.custom_batching.custom_vmap
def _finite_stack(ranges: OrderedDict[str, Range]) -> OrderedDict[str, Range]:
    """Under `jax.vmap` a seed's own ranges are unknown, but those of the whole stack are not."""
    return ranges


@_finite_stack.def_vmap
def _finite_seeds(seeds: int, mapped: Any, ranges: OrderedDict[str, Range]) -> tuple[Any, Any]:
    return _finite(ranges), mapped[0]


def _range(xs: list[Array]) -> Range:
    def ends(x: Array) -> Range:
        nan = jnp.isnan(x).any()  # XLA's minima and maxima on a CPU pass over some
        return Range(jnp.where(nan, jnp.nan, x.min()), jnp.where(nan, jnp.nan, x.max()))

    return functools.reduce(_union, [ends(at_least_float32(x)) for x in xs])


def _union(a: Range, b: Range) -> Range:
    return Range(jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high))


def with_activations(function: Callable[..., Any], bits: int) -> Callable[..., Any]:
    """Wraps a loss, a metric or `module.apply`; the inputs of all layers with a kernel are passed through `rounded`.

    The layers are those of `inspect.with_inputs`, and their ranges are read from variables["ranges"]. Raises InputError
    for bits outside 1 .. 8 and, when called, if variables["ranges"] is missing or lacks a layer.
    """
    require_bits(bits)

    @functools.wraps(function)  # keeps the signature, which `classify` inspects
    def quantized(variables: Tree, *args: Any, **kwargs: Any) -> Any:
        if RANGES not in variables:
            raise InputError(f"the variables have no collection {RANGES!r}, expected one; call `calibrate` first")
        others = {name: tree for name, tree in variables.items() if name != RANGES}

        def f(path: str, x: Array) -> Array:
            if path not in variables[RANGES]:
                known = ", ".join(variables[RANGES])
                raise InputError(f"layer {path!r} has no range, expected one of {known}; calibrate this very model")
            return rounded(x, variables[RANGES][path], bits)

        return with_inputs(function, f)(others, *args, **kwargs)

    return quantized


def rounded(x: Array, bounds: Range, bits: int) -> Array:
    """Rounds x to 2^bits evenly spaced values over `bounds`, which are widened to contain 0.

    0 is represented exactly; x is clipped. The gradient is that of the identity, and 0 where x was clipped (Jacob et
    al. 2018, equation 12 and section 3.1). Computed in float32 or wider; the result has the dtype of x, and integer x
    gives float32. Non-finite bounds give NaN. Raises InputError for bits outside 1 .. 8.
    """
    require_bits(bits)
    levels = 2**bits - 1
    x = x if jnp.issubdtype(x.dtype, jnp.floating) else at_least_float32(x)
    low, high = at_least_float32(jnp.minimum(bounds.low, 0)), at_least_float32(jnp.maximum(bounds.high, 0))
    scale = (high - low) * low.dtype.type(1 / levels)
    scale = jnp.where(scale == 0, 1, scale)
    return fake_quantize(x, jax.lax.stop_gradient(scale), jax.lax.stop_gradient(jnp.round(-low / scale)), levels)


def require_bits(bits: int) -> None:
    """Raises InputError unless `bits` is an integer from 1 to 8. Call it before training."""
    if isinstance(bits, bool) or not (isinstance(bits, int | np.integer) and 1 <= bits <= 8):
        raise InputError(f"bits is {bits}, expected a whole number from 1 to 8; 8 rarely loses accuracy")
