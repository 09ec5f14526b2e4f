"""Activations on ranges that are calibrated: unsigned integers with a zero point, rounded at the points of a model.

Jacob et al. 2018, arXiv:1712.05877, sections 2.1 and 3; Krishnamoorthi 2018, arXiv:1806.08342, section 2.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dl_jax import inspect
from dl_jax.compress.grid import fake_quantize
from dl_jax.compress.quantize.points import OUTPUT, SUM, Points, points
from dl_jax.compress.quantize.weights import require_bits
from dl_jax.core.equations import Called
from dl_jax.core.errors import InputError
from dl_jax.core.leaves import at_least_float32
from dl_jax.core.step import Array, Batch, Tree

RANGES = "ranges"  # the collection in which variables carry them
BINS = 2048  # of a histogram of a point's values


class Range(NamedTuple):
    """The smallest and the largest value at a point."""

    low: Array  # float32 [], or float64 if the values are float64
    high: Array


Observer = Callable[[Array, Array], Range]  # (values [N] in ascending order, how many there are of each) -> the range


def calibrate(
    apply: Callable[[Tree, Batch], Any], variables: Tree, batches: Iterable[Batch], observer: Observer | None = None
) -> dict[str, Range]:
    """{name of a point: the range of its values over `batches`}; goes into variables["ranges"].

    `apply(variables, batch)` runs the model. Its points are the inputs of its layers, under the layer's path, and what
    lies between them (`points.points`). The range is that of all values, unless an `observer` (`percentile`,
    `least_error`) chooses one from a histogram of 2,048 bins, for which the batches are run a second time. For a stack
    of seeds: jax.vmap(lambda v: calibrate(apply, v, batches)).

    Raises InputError for no batches, for a batch of no rows, for values that are NaN or infinite, and where there is no
    layer. Under jit the check is impossible: a non-finite range is returned, and `rounded` then gives NaN.
    """
    batches = list(batches)
    if not batches:
        raise InputError("calibrate: no batches, expected at least one; give some of the training set")
    for i, batch in enumerate(batches):
        _require_rows(i, batch)
    extremes = jax.jit(lambda variables, batch: _each(_range, _values(apply, variables, batch)))
    ranges = _finite(_over(batches, variables, extremes, _union))
    if observer is None:
        return dict(ranges)

    @jax.jit
    def histograms(variables: Tree, batch: Batch) -> OrderedDict[str, Array]:
        return _each(_histogram, _values(apply, variables, batch), ranges)

    counts = _over(batches, variables, histograms, jnp.add)
    chosen = jax.jit(lambda bounds, counts: observer(_centres(bounds), counts))
    return {name: chosen(ranges[name], counts[name]) for name in ranges}


def _over(batches: list[Batch], variables: Tree, of: Callable[..., Any], merge: Callable[[Any, Any], Any]) -> Any:
    found = (of(variables, batch) for batch in batches)
    return functools.reduce(lambda a, b: _each(merge, a, b), found)


def _each(f: Callable[..., Any], first: OrderedDict[str, Any], *others: OrderedDict[str, Any]) -> OrderedDict[str, Any]:
    return OrderedDict((name, f(value, *(other[name] for other in others))) for name, value in first.items())


def _values(apply: Callable[[Tree, Batch], Any], variables: Tree, batch: Batch) -> OrderedDict[str, list[Array]]:
    """The values at each point, in the order in which they are computed."""
    called, at = _points(apply, variables, batch)
    arrays = [*jax.tree.leaves(variables), *called.others]
    return OrderedDict(inspect.run(called.jaxpr, arrays, *at.hooks(lambda name, x: (x, x)))[1])


def _points(function: Callable[..., Any], variables: Tree, *args: Any, **kwargs: Any) -> tuple[Called, Points]:
    called = inspect.opened(function, variables, *args, **kwargs)
    found = points(called)
    if not (found.values or found.operands):
        raise InputError(
            "the model has no layer with a kernel, expected at least one; give it dense or convolutional layers"
        )
    return called, found


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
            f"calibrate: the values at {', then at '.join(wrong)}, expected finite numbers; look for NaN in the "
            "batches and for divergence in the parameters"
        )
    return ranges


def _not_finite(path: str, bounds: Range) -> str:
    """The point, its first seed whose range is not finite, and that range; "" where all are."""
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


def _centres(bounds: Range) -> Array:
    return bounds.low + (bounds.high - bounds.low) * ((jnp.arange(BINS) + 0.5) / BINS).astype(bounds.low.dtype)


def _histogram(xs: list[Array], bounds: Range) -> Array:  # int [BINS]
    """How many of the values are in each of the equal parts of their range."""
    width = jnp.where(bounds.high > bounds.low, bounds.high - bounds.low, 1)
    places = [jnp.clip((x - bounds.low) / width * BINS, 0, BINS - 1).astype(jnp.int32).ravel() for x in xs]
    return jnp.zeros(BINS, jnp.int32).at[jnp.concatenate(places)].add(1)


def percentile(share: float) -> Observer:
    """The range of the middle `share` per cent of the values: as many are clipped at either end.

    Raises InputError for a share that is not above 0 and at most 100.
    """
    if not 0 < share <= 100:
        raise InputError(
            f"percentile: {share} per cent of the values, expected more than 0 and at most 100; 99.99 is usual"
        )

    def observer(values: Array, counts: Array) -> Range:
        below = jnp.cumsum(counts.astype(values.dtype)) / counts.sum()
        outside = (1 - share / 100) / 2
        # The first bin that is not wholly outside, from either end.
        low, high = (
            jnp.argmax(below > outside),
            BINS - 1 - jnp.argmax((1 - below + counts / counts.sum())[::-1] > outside),
        )
        half = (values[1] - values[0]) / 2
        return Range(values[low] - half, values[high] + half)

    return observer


def least_error(bits: int) -> Observer:
    """The range with the least squared error of rounding to `bits` bits, of a hundred shares of the whole range.

    Both ends are moved towards 0 by the same share. Raises InputError for bits outside 1 .. 8.
    """
    require_bits(bits)

    def observer(values: Array, counts: Array) -> Range:
        half = (values[1] - values[0]) / 2
        low, high = jnp.minimum(values[0] - half, 0), jnp.maximum(values[-1] + half, 0)

        def error(share: Array) -> Array:
            return (counts * (rounded(values, Range(share * low, share * high), bits) - values) ** 2).sum()

        shares = jnp.arange(1, 101, dtype=values.dtype) / 100
        best = shares[jnp.argmin(jax.lax.map(error, shares))]
        return Range(best * low, best * high)

    return observer


def with_activations(function: Callable[..., Any], bits: int) -> Callable[..., Any]:
    """Wraps a loss, a metric or `module.apply`, so that activations are rounded at the points that `calibrate` found.

    The inputs of layers are rounded to `bits` bits, and what lies between them to 8. Ranges are read from
    variables["ranges"]; every layer has to have one, while other points without one, as in ranges of the inputs alone,
    are not rounded. Raises InputError for bits outside 1 .. 8 and, when called, if variables["ranges"] is missing or
    lacks a layer.
    """
    require_bits(bits)
    return rounding_points(function, lambda x, name, bounds: rounded(x, bounds, 8 if is_between(name) else bits))


def rounding_points(function: Callable[..., Any], f: Callable[[Array, str, Range], Array]) -> Callable[..., Any]:
    """Wraps `function` as `with_activations` does, with f(x, name, range) in the place of the value x of each point."""

    @functools.wraps(function)  # keeps the signature, which `classify` inspects
    def quantized(variables: Tree, *args: Any, **kwargs: Any) -> Any:
        if RANGES not in variables:
            raise InputError(f"the variables have no collection {RANGES!r}, expected one; call `calibrate` first")
        ranges = variables[RANGES]
        others = {name: tree for name, tree in variables.items() if name != RANGES}

        def at_point(name: str, x: Array) -> tuple[Array, None]:
            if name in ranges:
                return f(x, name, as_range(ranges[name])), None
            if not is_between(name):
                known = ", ".join(ranges)
                raise InputError(f"layer {name!r} has no range, expected one of {known}; calibrate this very model")
            return x, None

        called, at = _points(function, others, *args, **kwargs)
        outputs, _ = inspect.run(called.jaxpr, [*jax.tree.leaves(others), *called.others], *at.hooks(at_point))
        return called.result(outputs)

    return quantized


def as_range(bounds: Any) -> Range:
    """A range, which the codec gives back as a dict of its two ends."""
    return bounds if isinstance(bounds, Range) else Range(**bounds)


def is_between(name: str) -> bool:
    """Whether a point is not the input of a layer."""
    return name.endswith((OUTPUT, SUM))


def rounded(x: Array, bounds: Range, bits: int) -> Array:
    """Rounds x to 2^bits evenly spaced values over `bounds`, which are widened to contain 0.

    0 is represented exactly; x is clipped. The gradient is that of the identity, and 0 where x was clipped (Jacob et
    al. 2018, equation 12 and section 3.1). Computed in float32 or wider; the result has the dtype of x, and integer x
    gives float32. Non-finite bounds give NaN. Raises InputError for bits outside 1 .. 8.
    """
    require_bits(bits)
    x = x if jnp.issubdtype(x.dtype, jnp.floating) else at_least_float32(x)
    return fake_quantize(x, *jax.lax.stop_gradient(grid_of(bounds, bits)), 2**bits - 1)


def grid_of(bounds: Range, bits: int) -> tuple[Array, Array]:
    """Scale and zero point of 2^bits values over `bounds`, widened to contain 0."""
    low, high = at_least_float32(jnp.minimum(bounds.low, 0)), at_least_float32(jnp.maximum(bounds.high, 0))
    scale = (high - low) * low.dtype.type(1 / (2**bits - 1))
    scale = jnp.where(scale == 0, 1, scale)
    return scale, jnp.round(-low / scale)
