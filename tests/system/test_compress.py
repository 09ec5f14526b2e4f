"""The twenty lines of docs/compress.md, on networks that know nothing of this project."""

import runpy
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax.export import onnx

PAGE = Path(__file__).parents[2] / "docs" / "compress.py"


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


@pytest.mark.parametrize("network", [ConvNet, MobileNet, Rows, Transformer])
def test_a_strangers_network(network, tmp_path):
    compressed = runpy.run_path(str(PAGE))["compressed"]
    rng = np.random.default_rng(0)
    train = {
        "image": rng.integers(0, 256, (200, 16, 16, 1), np.uint8),
        "label": rng.integers(0, 10, 200).astype(np.int32),
    }
    variables = network().init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)), train=False)
    drawn = lambda leaf: rng.uniform(0.2, 0.6, leaf.shape).astype(np.float32)  # statistics that folding has to meet
    variables = {**variables, "batch_stats": jax.tree.map(drawn, variables.get("batch_stats", {}))}
    compressed(network().apply, variables, train, tmp_path, steps=3)
    sizes = [(tmp_path / f"{name}.onnx").stat().st_size for name in ("float", "small", "int8")]
    assert sizes[0] > sizes[1] > sizes[2]
    image = rng.random((7, 16, 16, 1), np.float32)  # another batch size
    small, int8 = (onnx.load(tmp_path / f"{name}.onnx")(image) for name in ("small", "int8"))
    differ = np.abs(small - small.mean(0)).max()  # the answers to different images
    assert np.abs(small - int8).max() < 0.25 * differ
    whole = network().apply(variables, image, train=False)
    np.testing.assert_allclose(onnx.load(tmp_path / "float.onnx")(image), whole, rtol=1e-4, atol=1e-4)
