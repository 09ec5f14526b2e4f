"""Weights as integers of 1 to 8 bits, symmetric around 0, with a scale for each output channel.

Krishnamoorthi 2018, arXiv:1806.08342, sections 2.2 and 3.1. Gradients go straight through the rounding (Bengio et al.
2013, arXiv:1308.3432).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dl_jax.compress.grid import dequantized
from dl_jax.core.errors import InputError
from dl_jax.core.leaves import Where, at_least_float32, chosen, is_kernel, leaf_name
from dl_jax.core.step import Array, Tree

Axes = Callable[[jax.tree_util.KeyPath, Any], tuple[int, ...]]  # the axes of output channels of a parameter


class Quantized(NamedTuple):
    """A quantised weight; its value is `values * scale`."""

    values: Array  # int8 [..., C], -q .. q with q = 2^(bits - 1) - 1; for 1 bit -1 and 1
    scale: Array  # float32 [1, ..., 1, C], or float64 if the weight is float64; C may be several axes


def last_axis(path: jax.tree_util.KeyPath, leaf: Any) -> tuple[int, ...]:
    """The axis of the output channels of dense layers, convolutions, embeddings and gates, as Flax stores them."""
    return (leaf.ndim - 1,)


def is_weight(path: jax.tree_util.KeyPath, leaf: Any) -> bool:
    """Whether a parameter is a kernel or the table of an embedding."""
    return jax.tree_util.keystr(path[-1:], simple=True) in ("kernel", "embedding")


def fake(bits: int, where: Where = is_kernel, axes: Axes = last_axis) -> Callable[[Tree], Tree]:
    """Returns a function params -> params that rounds the chosen weights to `bits` bits, for `losses.with_params`.

    The gradient goes straight through the rounding. The values equal `dequantize(quantize(params, ...))` bit for bit
    and are float32 or wider, since bfloat16 cannot represent the grid. Gradients have the dtype of the parameters. A
    channel with a weight that is not finite is NaN. Raises InputError for bits outside 1 .. 8 and, when called, where
    `where` chooses nothing.
    """
    require_bits(bits)
    return lambda params: of_chosen(
        params, where, lambda path, w: straight_through(w, _floats(_integers(w, bits, axes(path, w))))
    )


def quantize(params: Tree, bits: int, where: Where = is_kernel, axes: Axes = last_axis) -> Tree:
    """`params` with each chosen weight as `Quantized`, every output channel on its own grid.

    The grid is symmetric around an exact 0, and its ends are the channel's largest magnitude: scale = max |w| / q. With
    1 bit there is no 0: w becomes ± mean |w| of its channel (Rastegari et al. 2016, arXiv:1603.05279, equation 6), and
    0 becomes +. `axes` gives the axes of a weight's output channels, by default the last one. `layer_weights` reads
    both from a model: which parameters are weights, of any name, and their axes. Map it over seeds with `jax.vmap`.
    For files that x86 CPUs may run, take 7 bits: see `export.onnx.export`.
    Raises InputError as `fake` does, and for weights that are not finite, which cannot be seen under `jit` and `vmap`.
    """
    require_bits(bits)

    def of(path: jax.tree_util.KeyPath, w: Array) -> Quantized:
        if not isinstance(w, Tracer) and not np.isfinite(wide := np.asarray(at_least_float32(w))).all():
            raise InputError(
                f"weight {leaf_name(path)} has {(~np.isfinite(wide)).sum()} values that are not finite, expected none; "
                "look for divergence in the training"
            )
        return _compiled(w, bits, axes(path, w))

    return of_chosen(params, where, of)


def dequantize(params: Tree) -> Tree:
    """The weights that `quantize` stored, in float32 or better; other leaves are left as they are.

    A weight may also be a dict of `values` and `scale`, as the codec returns it.
    """
    return jax.tree.map(lambda leaf: _floats(as_quantized(leaf)) if is_quantized(leaf) else leaf, params,
                        is_leaf=is_quantized)  # fmt: skip


def is_quantized(tree: Any) -> bool:
    """Whether it is a `Quantized`, or its two arrays in a dict."""
    as_dict = isinstance(tree, dict) and tree.keys() == {*Quantized._fields} and tree["values"].dtype == jnp.int8
    return isinstance(tree, Quantized) or as_dict


def as_quantized(tree: Any) -> Quantized:
    return tree if isinstance(tree, Quantized) else Quantized(**tree)


def of_chosen(params: Tree, where: Where, f: Callable[[jax.tree_util.KeyPath, Array], Any]) -> Tree:
    """`params` with f(path, w) in the place of the chosen weights."""
    change = lambda path, w, yes: f(path, w) if yes else w
    return jax.tree_util.tree_map_with_path(change, params, chosen(params, where))


def _integers(w: Array, bits: int, outputs: tuple[int, ...]) -> Quantized:
    w, axes = at_least_float32(w), inner_axes(w, outputs)
    if bits == 1:
        return Quantized(jnp.where(w < 0, -1, 1).astype(jnp.int8), jnp.abs(w).mean(axes, keepdims=True))
    end, _ = _grid(bits)
    # Not a division: XLA turns one by a constant into a product, and compiled code would differ in the last bit.
    nan = jnp.isnan(w).any(axes, keepdims=True)
    scale = jnp.where(nan, jnp.nan, jnp.abs(w).max(axes, keepdims=True)) * w.dtype.type(1 / end)
    steps = jnp.round(w / jnp.where(scale > 0, scale, 1))
    return Quantized(jnp.clip(steps, -end, end).astype(jnp.int8), scale)


_compiled = jax.jit(_integers, static_argnums=(1, 2))  # eager operations would be compiled one by one


def inner_axes(w: Array, outputs: tuple[int, ...]) -> tuple[int, ...]:
    """The axes over which a grid is shared: those that are not of output channels."""
    return tuple(i for i in range(w.ndim) if i not in outputs)


def _floats(q: Quantized) -> Array:
    return dequantized(q.values, q.scale)


def _grid(bits: int) -> tuple[int, int]:
    """The largest integer and the step between two, of weights."""
    return (2 ** (bits - 1) - 1, 1) if bits > 1 else (1, 2)


@jax.custom_jvp
def straight_through(x: Array, value: Array) -> Array:
    """`value`, with the gradient of `x`, which may be of another type."""
    return value


straight_through.defjvp(lambda primals, tangents: (primals[1], tangents[0].astype(primals[1].dtype)))


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


def require_bits(bits: int) -> None:
    """Raises InputError unless `bits` is an integer from 1 to 8. Call it before training."""
    if isinstance(bits, bool) or not (isinstance(bits, int | np.integer) and 1 <= bits <= 8):
        raise InputError(f"bits is {bits}, expected a whole number from 1 to 8; 8 rarely loses accuracy")
