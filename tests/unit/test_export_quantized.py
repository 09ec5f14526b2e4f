"""ONNX files with the scales of `compress.grid`: what they hold, what ONNX Runtime makes of them, and what it gives."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dl_jax.compress import quantize, structure
from dl_jax.compress.grid import dequantized, fake_quantize
from dl_jax.core.errors import InputError
from dl_jax.export import onnx
from dl_jax.models import ops

IMAGES = np.random.default_rng(0).random((6, 8, 8, 1), np.float32)


class Weight(NamedTuple):
    values: np.ndarray  # int8
    scale: np.ndarray  # float32 [1, ..., C]

    def floats(self) -> jax.Array:
        return dequantized(jnp.asarray(self.values), jnp.asarray(self.scale))


def weight(*shape: int, seed: int = 1) -> Weight:
    """Weights of 7 bits: with 8, x86 CPUs without VNNI saturate the sums of two products."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.5, 1, (*(1,) * (len(shape) - 1), shape[-1])) / np.sqrt(np.prod(shape[:-1])) / 30
    return Weight(rng.integers(-63, 64, shape).astype(np.int8), scale.astype(np.float32))


def rounded(x: jax.Array, low: float, high: float, levels: int = 255) -> jax.Array:
    scale = np.float32((high - low) / levels)
    return fake_quantize(x, scale, np.float32(np.round(-low / scale)), levels)


NET = {
    "conv": {"kernel": weight(3, 3, 1, 8), "bias": np.linspace(-0.5, 0.5, 8, dtype=np.float32)},
    "left": {"kernel": weight(3, 3, 8, 8, seed=2), "bias": np.linspace(0, 0.1, 8, dtype=np.float32)},
    "dense": {"kernel": weight(128, 12, seed=3), "bias": np.linspace(-0.1, 0.1, 12, dtype=np.float32)},
    "head": {"kernel": weight(12, 3, seed=4), "bias": np.zeros(3, np.float32)},
}


def convolved(layer: Any, x: jax.Array) -> jax.Array:
    kernel, numbers = layer["kernel"].floats(), ("NHWC", "HWIO", "NHWC")
    return ops.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers) + layer["bias"]


def residual(net: Any, image: jax.Array) -> jax.Array:
    """Convolution, pooling, a residual block and two dense layers, all of whose inputs and sums are rounded."""
    x = rounded(ops.max_pool(nn.relu(convolved(net["conv"], rounded(image, 0, 1))), 2), 0, 2)
    x = rounded(nn.relu(x + rounded(convolved(net["left"], x), -2, 2)), 0, 3)
    x = nn.relu(x.reshape(x.shape[0], -1) @ net["dense"]["kernel"].floats() + net["dense"]["bias"])
    return rounded(x, 0, 2) @ net["head"]["kernel"].floats() + net["head"]["bias"]


def recurrent(net: Any, x: jax.Array) -> jax.Array:
    """[B, T, 4] -> [B, 8]: h = tanh(x W + round(h) U)."""
    w, u = net["w"].floats(), net["u"].floats()
    first = jnp.zeros((x.shape[0], 8))
    step = lambda h, x: (jnp.tanh(rounded(x, -1, 1) @ w + rounded(h, -1, 1) @ u), None)
    return lax.scan(step, first, x.swapaxes(0, 1))[0]


def nodes(graph: Any) -> Iterator[Any]:
    """Of a graph and of its loops."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes(attribute.g)


def fused(file: Path) -> list[str]:
    """The operators of ONNX Runtime's own graph of a file."""
    import onnx as format
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(file.with_suffix(".optimised"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in nodes(format.load(options.optimized_model_filepath).graph)]


RANGES = [(0, 1, 0), (0, 2, 0), (-2, 2, 127), (0, 3, 0)]  # of `residual`, with their zero points


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("int8") / "net.onnx"
    assert onnx.export(residual, NET, [IMAGES], file, tolerance=0.02) < 0.02
    return file


def test_a_residual_net_is_computed_in_integers_throughout(file):
    kinds = fused(file)
    assert [kinds.count(name) for name in ("QLinearConv", "QLinearAdd", "QGemm")] == [2, 1, 2]
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "Add", "Relu", "MaxPool"} & set(kinds)


def test_the_outputs_are_those_of_the_rounded_function(file):
    images = np.random.default_rng(5).random((300, 8, 8, 1), np.float32)
    found, expected = onnx.load(file)(images), np.asarray(jax.jit(residual)(NET, images))
    errors = np.abs(found - expected)
    assert errors.max() < 0.02 * np.abs(expected).max()
    # Where no number was so near to the middle of two steps that another order of a sum mattered: the bias's step.
    assert np.median(errors) < 1e-4


def test_the_file_holds_our_scales_and_integers(file):
    import onnx as format

    graph = format.load(file).graph
    arrays = {tensor.name: format.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    dequantised = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in arrays]
    found = [tuple(arrays[name] for name in node.input[:2]) for node in dequantised]
    for layer in NET.values():
        values, scale = layer["kernel"]
        same = [np.array_equal(scale.ravel(), s) for v, s in found if v.dtype == np.int8 and v.shape == values.shape]
        assert any(same)
        assert any(np.array_equal(values, v) for v, _ in found)
    assert sorted(v.size for v, _ in found if v.dtype == np.int32) == [3, 8, 8, 12]  # the biases
    grids = {
        (arrays[node.input[1]].item(), arrays[node.input[2]].item())
        for node in graph.node
        if node.op_type == "QuantizeLinear"
    }
    assert grids == {(float(np.float32((high - low) / 255)), zero) for low, high, zero in RANGES}


def test_a_loop_multiplies_integers(tmp_path):
    net = {"w": weight(4, 8), "u": weight(8, 8, seed=2)}
    x = np.random.default_rng(1).uniform(-1, 1, (3, 5, 4)).astype(np.float32)
    assert onnx.export(recurrent, net, [x], tmp_path / "rnn.onnx", tolerance=1e-3) < 1e-3
    assert fused(tmp_path / "rnn.onnx").count("MatMulIntegerToFloat") == 2


def test_fewer_levels_and_a_channel_of_zeros(tmp_path):
    """With 4 bits x is clipped at the fifteenth step. Scales of 0 would be divided by."""
    kernel = weight(4, 6)
    kernel.values[:, 2], kernel.scale[:, 2] = 0, 0
    x = np.random.default_rng(1).uniform(-2, 2, (50, 4)).astype(np.float32)
    bias = np.linspace(-1, 1, 6, dtype=np.float32)
    apply = lambda w, x: rounded(rounded(x, -0.5, 1, levels=15) @ w.floats() + bias, -3, 3)
    onnx.export(apply, kernel, [x], tmp_path / "net.onnx", tolerance=0.03)  # a step is 0.024
    found = onnx.load(tmp_path / "net.onnx")(x)
    np.testing.assert_allclose(found[:, 2], rounded(bias[2], -3, 3), rtol=1e-6)
    assert "QGemm" in fused(tmp_path / "net.onnx")


class Pooled(nn.Module):
    """Convolutions with maxima of windows between them, one on a sum of two and one before a ReLU."""

    window: tuple[int, int]
    strides: tuple[int, int]
    padding: Any

    @nn.compact
    def __call__(self, image):
        pool = lambda x: nn.max_pool(x, self.window, self.strides, self.padding)
        x = pool(nn.relu(nn.Conv(8, (3, 3))(image)))
        x = nn.relu(pool(nn.Conv(8, (3, 3))(x) + x))
        x = pool(nn.Conv(12, (3, 3), padding="VALID")(jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))))
        return nn.Dense(3)(nn.relu(x).reshape(x.shape[0], -1))


@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [
        ((2, 2), (2, 2), "VALID"),
        ((3, 3), (2, 2), "SAME"),
        ((2, 3), (1, 2), ((1, 0), (0, 2))),
        ((4, 1), (3, 1), ((3, 2), (0, 0))),
    ],
)
def test_maxima_in_a_network_that_is_cut_and_quantised(window, strides, padding, tmp_path):
    import onnx as format

    model, rng = Pooled(window, strides, padding), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    draw = lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / np.sqrt(max(8, leaf.size // leaf.shape[-1]))
    variables = jax.tree.map(draw, shapes)
    found = structure.groups(model.apply, variables, IMAGES)
    small, smaller = structure.cut(model.apply, variables, structure.lowest(found, structure.l2(found, variables), 0.5))
    ranges = quantize.calibrate(small, smaller, [IMAGES])
    # Of 8 bits, x86 CPUs without VNNI saturate large sums.
    smaller = {"params": quantize.quantize(smaller["params"], 7), quantize.RANGES: ranges}
    apply = quantize.with_activations(small, 8)
    read = lambda v, image: apply({**v, "params": quantize.dequantize(v["params"])}, image)
    onnx.export(read, smaller, [IMAGES], tmp_path / "net.onnx", tolerance=0.05)
    images = rng.random((40, 8, 8, 1), np.float32)
    expected = np.asarray(jax.jit(small)({"params": quantize.dequantize(smaller["params"])}, images))
    error = np.abs(onnx.load(tmp_path / "net.onnx")(images) - expected)
    assert error.max() < 0.05 * np.abs(expected).max()
    assert [node.op_type for node in format.load(tmp_path / "net.onnx").graph.node].count("MaxPool") == 3


def test_scales_that_depend_on_the_input_are_written_as_operations(tmp_path):
    x = np.random.default_rng(1).uniform(-2, 2, (5, 4)).astype(np.float32)
    apply = lambda _, x: fake_quantize(x, jnp.abs(x).max(1, keepdims=True) / 127, 128.0, 255)
    assert onnx.export(apply, None, [x], tmp_path / "net.onnx") <= 1e-5
    assert "QuantizeLinear" not in fused(tmp_path / "net.onnx")


def test_kernels_of_several_output_axes(tmp_path):
    """A scale for each head and feature: one axis of scales in the file."""
    kernel = weight(6, 8)
    heads = Weight(kernel.values.reshape(6, 2, 4), kernel.scale.reshape(1, 2, 4))
    x = np.random.default_rng(1).standard_normal((5, 6), np.float32)
    assert onnx.export(lambda w, x: jnp.einsum("bi,ihd->bhd", x, w.floats()), heads, [x], tmp_path / "net.onnx") <= 1e-5
    assert (tmp_path / "net.onnx").stat().st_size < 2000


@pytest.mark.parametrize("opset", [onnx.FIRST_OPSET, onnx.OPSET])
def test_an_opset_and_a_batch_that_are_asked_for(opset, tmp_path):
    import onnx as format

    file = tmp_path / "net.onnx"
    onnx.export(residual, NET, [IMAGES], file, opset=opset, batch=4, tolerance=0.02)
    model = format.load(file)
    assert next(each.version for each in model.opset_import if each.domain == "") == opset
    assert [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim] == [4, 8, 8, 1]
    assert onnx.load(file)(IMAGES[:4]).shape == (4, 3)
    with pytest.raises(InputError, match=r"input 0 is float32\[6, 8, 8, 1\], expected float32\[4, 8, 8, 1\]; reshape"):
        onnx.load(file)(IMAGES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"opset": 12}, "opset is 12, expected 13 to 23; take the newest that the runtime knows"),
        ({"opset": 99}, "opset is 99, expected 13 to 23"),
        ({"batch": 0}, "batch is 0, expected 1 or more rows"),
    ],
)
def test_arguments_that_cannot_be(arguments, message, tmp_path):
    with pytest.raises(InputError, match=message):
        onnx.export(residual, NET, [IMAGES], tmp_path / "net.onnx", **arguments)


def test_rounding_that_exceeds_the_tolerance_overwrites_nothing(tmp_path):
    file = tmp_path / "net.onnx"
    file.write_text("the one before")
    with pytest.raises(InputError, match=r"ONNX Runtime differs from JAX by .*net\.onnx is not written"):
        onnx.export(residual, NET, [IMAGES], file, tolerance=1e-12)
    assert file.read_text() == "the one before"
