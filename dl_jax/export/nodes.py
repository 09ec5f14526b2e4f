"""ONNX nodes that jax2onnx does not write by itself, for a function that is written in `FORMS` by `plain`.

QuantizeLinear and DequantizeLinear carry the scales of `compress.grid`. A runtime computes an operation in integers
where it finds DequantizeLinear before each of its inputs, also the bias, and QuantizeLinear after it.
"""

import collections
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray, Tracer

from dl_jax.export.plain import Forms, Integers, Rounding

ROUND = jex.Primitive("dl_jax_round")  # (x, scale, zero) -> x, rounded
ROUND.def_abstract_eval(lambda x, scale, zero: x)
DEQUANTIZE = jex.Primitive("dl_jax_dequantize")  # (values, scale, zero) -> values * scale
DEQUANTIZE.def_abstract_eval(lambda values, scale, zero, *, axis: ShapedArray(values.shape, scale.dtype))
POOL = jex.Primitive("dl_jax_max_pool")  # [B, H, W, C] -> [B, H', W', C]
POOL.def_abstract_eval(lambda x, *, shape, **_: ShapedArray(shape, x.dtype))


def _rounded(x: jax.Array, rounding: Rounding) -> jax.Array:
    scale, zero, largest = rounding
    x = x if largest is None else jnp.minimum(x, largest)
    return ROUND.bind(x, jnp.asarray(scale), jnp.asarray(zero, jnp.uint8))


def _dequantized(weights: Integers) -> jax.Array:
    values, scale, axis = weights
    # The scale of a channel of zeros may be anything but zero, by which the bias of its layer is divided.
    scale = np.where(scale > 0, scale, scale.max() or 1)
    # ONNX Runtime wants a zero point where the standard has a default.
    return DEQUANTIZE.bind(*map(jnp.asarray, (values, scale, np.zeros(scale.shape, np.int8))), axis=axis)


def _product(equation: Any, x: Any, kernel: Any) -> Any:
    """The product of a dense layer as `jnp.matmul`, since runtimes fuse an ONNX MatMul with adding the bias."""
    dense = equation.params["dimension_numbers"] == (((x.ndim - 1,), (0,)), ((), ()))
    return jnp.matmul(x, kernel) if dense and kernel.ndim == 2 <= x.ndim else None


def _pad(equation: Any, x: Any, value: Any) -> Any:
    """`lax.pad` as `jnp.pad`, since jax2onnx exports `lax.pad` only for a known batch size."""
    config = equation.params["padding_config"]
    if isinstance(value, Tracer) or any(low < 0 or high < 0 or interior for low, high, interior in config):
        return None
    return jnp.pad(x, [(low, high) for low, high, _ in config], constant_values=float(value))


def _maximum(equation: Any, x: Any, y: Any) -> Any:
    """A maximum with zero as `jax.nn.relu`, since runtimes fuse an ONNX Relu with the operation before it."""
    zero = not isinstance(y, Tracer) and np.ndim(y) == 0 and y == 0
    return jax.nn.relu(x) if zero and jnp.issubdtype(x.dtype, jnp.floating) else None


def _pool(equation: Any, x: Any) -> Any:
    """Maxima of windows in an image [B, H, W, C] as MaxPool, since jax2onnx writes windows over all four axes."""
    params = equation.params
    window, strides, padding = (params[name] for name in ("window_dimensions", "window_strides", "padding"))
    image = x.ndim == 4 and jnp.issubdtype(x.dtype, jnp.floating)
    others = [params["base_dilation"], params["window_dilation"]] == [(1,) * x.ndim] * 2
    if not (image and others and window[0] == window[3] == strides[0] == strides[3] == 1):
        return None
    if padding[0] != (0, 0) or padding[3] != (0, 0):
        return None
    pads = [padding[axis][end] for end in (0, 1) for axis in (1, 2)]
    (out,) = equation.outvars
    shape = (x.shape[0], *out.aval.shape[1:])
    return POOL.bind(x, shape=shape, kernel_shape=window[1:3], strides=strides[1:3], pads=tuple(pads))


# Of the primitives some become calls that jax2onnx replaces in its trace.
FORMS = Forms(
    _rounded, _dequantized, {"dot_general": _product, "pad": _pad, "max": _maximum, "reduce_window_max": _pool}
)


@functools.cache
def register() -> None:
    """Tells jax2onnx how to write these primitives. Raises ImportError where it is missing."""
    from jax2onnx.plugins.plugin_system import PrimitiveLeafPlugin, register_primitive

    @register_primitive(jaxpr_primitive=ROUND.name)
    class _Round(PrimitiveLeafPlugin):
        def lower(self, ctx: Any, eqn: Any) -> None:
            x, *grid = map(ctx.get_value_for_var, eqn.invars)
            q = ctx.builder.QuantizeLinear(x, *grid)
            _give(ctx, eqn, ctx.builder.DequantizeLinear(q, *grid))

    @register_primitive(jaxpr_primitive=DEQUANTIZE.name)
    class _Dequantize(PrimitiveLeafPlugin):
        def lower(self, ctx: Any, eqn: Any) -> None:
            axis = {} if eqn.params["axis"] is None else {"axis": eqn.params["axis"]}
            _give(ctx, eqn, ctx.builder.DequantizeLinear(*map(ctx.get_value_for_var, eqn.invars), **axis))

    @register_primitive(jaxpr_primitive=POOL.name)
    class _Pool(PrimitiveLeafPlugin):
        def lower(self, ctx: Any, eqn: Any) -> None:
            attributes = {name: list(value) for name, value in eqn.params.items() if name != "shape"}
            first = ctx.builder.Transpose(ctx.get_value_for_var(eqn.invars[0]), perm=[0, 3, 1, 2])
            _give(ctx, eqn, ctx.builder.Transpose(ctx.builder.MaxPool(first, **attributes), perm=[0, 2, 3, 1]))


def _give(ctx: Any, eqn: Any, value: Any) -> None:
    (out,) = eqn.outvars
    expected = ctx.get_value_for_var(out)
    value.type, value.shape = expected.type, expected.shape
    ctx.bind_value_for_var(out, value)


ON_SAME_GRID = ("MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze")  # nodes that rounded numbers pass unchanged


def with_biases(model: Any) -> Any:
    """The ONNX model with each bias that is added to a convolution or a product of matrices as an input of it.

    Where both other inputs are dequantised the bias becomes int32, with the product of their scales, as runtimes want
    it. Loops and functions are left as they are.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    uses = collections.Counter(_read(graph))
    added, tensors, first = [], [], []  # nodes that are left out; what is written instead
    for add in graph.node:
        if add.op_type != "Add" or not (found := _layer(add, constants, made, uses)):
            continue
        layer, last, bias = found
        scale = _scale(layer, constants, made)
        name = f"{add.output[0]}_bias"
        if scale is None or scale.size not in (1, bias.size):
            tensors.append(numpy_helper.from_array(bias, name))
        else:
            steps = np.rint(bias / scale)
            if np.abs(steps).max() > np.iinfo(np.int32).max:
                continue
            grid = {"steps": steps.astype(np.int32), "scale": scale, "zero": np.zeros(scale.shape, np.int32)}
            tensors += [numpy_helper.from_array(array, f"{name}_{part}") for part, array in grid.items()]
            axis: dict[str, Any] = {"axis": 0} if scale.ndim else {}
            first.append(helper.make_node("DequantizeLinear", [f"{name}_{part}" for part in grid], [name], **axis))
        layer.input.append(name)
        if layer.op_type == "MatMul":
            layer.op_type = "Gemm"
        last.output[0] = add.output[0]
        added.append(add)
    for add in added:
        graph.node.remove(add)
    graph.initializer.extend(tensors)
    nodes = [*first, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    read = {*_read(graph)}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)  # a runtime would warn of it
    return model


def _read(graph: Any) -> Iterator[str]:
    """The names of the values that a graph reads or returns, once for each time, in the bodies of its loops too."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _read(attribute.g)
    yield from (output.name for output in graph.output)


def _layer(
    add: Any, constants: Mapping[str, np.ndarray], made: Mapping[str, Any], uses: Mapping[str, int]
) -> tuple[Any, Any, np.ndarray] | None:
    """The layer whose bias `add` is, the node whose output `add` takes, and the bias [C]; None where there is none."""
    for value, bias in (add.input, reversed(add.input)):
        last = layer = made.get(value)
        channels = 1  # its axis
        if last is not None and last.op_type == "Transpose":  # from channels first to channels last
            layer = made.get(last.input[0])
            channels = next(list(each.ints) for each in last.attribute if each.name == "perm").index(1)
        if layer is None or bias not in constants or layer.op_type not in ("Conv", "MatMul") or len(layer.input) > 2:
            continue
        values, alone = constants[bias], uses[value] == uses[layer.output[0]] == 1
        if alone and 1 < values.size == values.shape[channels] and (values.ndim == 2) == (layer.op_type == "MatMul"):
            return layer, last, values.ravel()
    return None


def _scale(layer: Any, constants: Mapping[str, np.ndarray], made: Mapping[str, Any]) -> np.ndarray | None:
    """The product of the scales of the two inputs of a layer, [C] or []; None where one is not dequantised."""
    scale = np.float32(1)
    for name in layer.input:
        node = made.get(name)
        while node is not None and node.op_type in ON_SAME_GRID:
            node = made.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear":
            return None
        scale = scale * constants[node.input[1]]
    return np.asarray(scale, np.float32)
