"""The twenty lines of docs/compress.py, on networks that know nothing of this project."""

import collections
import runpy
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax.core.errors import InputError
from dl_jax.export import onnx, record

PAGE = Path(__file__).parents[2] / "docs" / "compress.py"
compressed = runpy.run_path(str(PAGE))["compressed"]
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (200, 16, 16, 1), np.uint8)


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):  # [B, H, W, C]
        for maps in (32, 64):
            x = nn.Conv(maps, (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10)(nn.relu(nn.Dense(32)(x.reshape(x.shape[0], -1))))


class MobileNet(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        norm = lambda x: nn.relu6(nn.BatchNorm(use_running_average=not train)(x))
        x = norm(nn.Conv(32, (3, 3), strides=2, use_bias=False)(x))
        x = norm(nn.Conv(32, (3, 3), feature_group_count=32, use_bias=False)(x))
        x = norm(nn.Conv(128, (1, 1), use_bias=False)(x))
        return nn.Dense(10)(x.mean((1, 2)))


class Rows(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.RNN(nn.OptimizedLSTMCell(64))(x[..., 0])  # [B, H, W] -> [B, H, 64]
        return nn.Dense(10)(x[:, -1])


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(64, (4, 4), strides=4)(x).reshape(x.shape[0], -1, 64)
        y = nn.LayerNorm()(x)
        x += nn.MultiHeadDotProductAttention(num_heads=4, deterministic=not train)(y, y)
        x += nn.Dense(64)(nn.gelu(nn.Dense(128)(nn.LayerNorm()(x))))
        return nn.Dense(10)(x.mean(1))


class Bare(nn.Module):
    """Kernels with names of their own, pooling, no `train`, and a second output."""

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(32, (3, 3))(x)), (3, 3), (2, 2), "SAME").reshape(x.shape[0], -1)
        for name, width in (("first", 64), ("second", 10)):
            x = nn.relu(x) @ self.param(name, nn.initializers.lecun_normal(), (x.shape[-1], width))
        return x, {"norm": jnp.abs(x).sum()}


def in_training_and_evaluation(module):
    """A function as docs/compress.py wants it."""
    return lambda variables, image, train=False, rngs=None: module.apply(variables, image, rngs=rngs)[0]


NETWORKS = {
    **{each.__name__: (each(), each().apply, {"train": False}) for each in (ConvNet, MobileNet, Rows, Transformer)},
    "Bare": (Bare(), in_training_and_evaluation(Bare()), {}),
}


def drawn(module, settings):
    variables = module.init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)), **settings)
    draw = lambda leaf: RNG.uniform(0.2, 0.6, leaf.shape).astype(np.float32)  # statistics that folding has to meet
    return {**variables, "batch_stats": jax.tree.map(draw, variables.get("batch_stats", {}))}


def elements(file):
    """How many numbers of each type a file holds, in its loops too."""
    format, found = pytest.importorskip("onnx"), collections.Counter()

    def count(graph):
        for tensor in graph.initializer:
            found[format.numpy_helper.to_array(tensor).dtype.name] += int(np.prod(tensor.dims))
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            if attribute.HasField("g"):
                count(attribute.g)
            if attribute.HasField("t"):
                found[format.numpy_helper.to_array(attribute.t).dtype.name] += int(np.prod(attribute.t.dims))

    count(format.load(file).graph)
    return found


@pytest.mark.parametrize("network", NETWORKS)
def test_a_strangers_network(network, tmp_path, capsys):
    module, apply, settings = NETWORKS[network]
    variables = drawn(module, settings)
    agreement = compressed(apply, variables, IMAGES, tmp_path, steps=3)
    sizes = [(tmp_path / f"{name}.onnx").stat().st_size for name in agreement]
    assert [*agreement] == ["float", "small", "int8"]
    assert sizes[0] > sizes[1] > sizes[2]
    for name in agreement:
        found = record.load(tmp_path / f"{name}.onnx")
        record.require_same(found, (tmp_path / f"{name}.onnx").read_bytes(), name)
        assert (found.inputs[0].shape, found.outputs[0].shape) == ((None, 16, 16, 1), (None, 10))
    counts = elements(tmp_path / "int8.onnx")
    assert counts["int8"] > 4 * counts["float32"]  # the weights of every layer are integers
    classes = lambda predict: np.argmax(np.asarray(predict(IMAGES / np.float32(255))), 1)
    same = classes(onnx.load(tmp_path / "int8.onnx")) == classes(lambda image: apply(variables, image, train=False))
    assert agreement["float"] > 0.99
    assert agreement["int8"] == pytest.approx(same.mean(), abs=0.011)  # two images of 200 may be between two classes
    image = RNG.random((7, 16, 16, 1), np.float32)  # another batch size
    small, int8 = (onnx.load(tmp_path / f"{name}.onnx")(image) for name in ("small", "int8"))
    differ = np.abs(small - small.mean(0)).max()  # the answers to different images
    assert np.abs(small - int8).max() < 0.25 * differ
    whole = apply(variables, image, train=False)
    np.testing.assert_allclose(onnx.load(tmp_path / "float.onnx")(image), whole, rtol=1e-4, atol=1e-4)
    said = capsys.readouterr().out
    assert "Normalisations that are not folded: none" in said
    assert "Groups of channels that can be removed:" in said


def test_what_cannot_be_compressed_is_told(tmp_path):
    module = Bare()
    variables = drawn(module, {})
    pair = lambda variables, image, train: module.apply(variables, image)
    with pytest.raises(InputError, match=r"^`apply` returns a tuple, expected an array, such as logits \[B, classes\]"):
        compressed(pair, variables, IMAGES, tmp_path)
    counted = lambda variables, image, train: module.apply(variables, image.reshape(len(image), 16, 16, 1))[0]
    with pytest.raises(InputError, match=r"^the function needs the number of rows in a batch, .* write x.shape\[0\]"):
        compressed(counted, variables, IMAGES, tmp_path)
    with pytest.raises(
        InputError, match=r"^the cost is .* where every group is as small as it can be, expected at most"
    ):
        compressed(in_training_and_evaluation(module), variables, IMAGES, tmp_path, keep=0.001)
