"""The textbook net: the shape after every layer, its numbers against NumPy, and what it refuses."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from numpy_layers import conv, dense, max_pool
from quick import drawn, jit, shapes

from dl_jax.core.errors import InputError
from dl_jax.models import ops, summary
from dl_jax.models.vision.convnet import ConvNet

CONVOLUTIONS = ("stem_conv", "conv_1", "conv_2", "conv_3", "conv_4")


def test_the_shape_after_every_layer(monkeypatch):
    found, pool = [], ops.max_pool

    def noting(image, window):
        found.append(pool(image, window).shape)
        return pool(image, window)

    monkeypatch.setattr(ops, "max_pool", noting)
    model, inputs, _ = summary.published()["ConvNet"]
    kinds = {"Conv": [], "Dense": []}
    for layer in summary.layers(model, inputs):
        kinds[layer.kind] += layer.outputs
    first, second = ["[1, 28, 28, 32]"] * 2, ["[1, 14, 14, 64]"] * 3
    assert kinds == {"Conv": first + second, "Dense": ["[1, 128]", "[1, 128]", "[1, 10]"]}
    assert found[-2:] == [(1, 14, 14, 32), (1, 7, 7, 64)]
    params = shapes(model, np.zeros((1, 28, 28, 1), np.float32), train=False)["params"]
    assert [params[name]["kernel"].shape[:2] for name in CONVOLUTIONS] == [(5, 5), (5, 5), (3, 3), (3, 3), (3, 3)]


def test_against_numpy_with_another_activation():
    """The height and the width that fill no window are left out: 9 x 6 becomes 4 x 3, then 2 x 1."""
    model, image = ConvNet((2, 3, 4, 3, 2), (5, 4), classes=3, activation=nn.tanh), np.random.default_rng(0)
    image = image.random((2, 9, 6, 2), np.float32)
    variables = drawn(model, image, train=False, spread=0.5)
    params, x = variables["params"], np.float64(image)
    for i, name in enumerate(CONVOLUTIONS):
        x = np.tanh(conv(x, params[name]))
        x = max_pool(x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2], 2, 2, 0) if i in (1, 4) else x
    x = x.reshape(2, -1)
    for name in ("Dense_0", "Dense_1"):
        x = np.tanh(dense(x, params[name]))
    found = jit(lambda variables: model.apply(variables, image, train=False))(variables)
    np.testing.assert_allclose(found, dense(x, params["Dense_2"]), atol=1e-5)


def test_starts_with_variance_two_over_fan_in():
    init = jit(lambda key: ConvNet().init(key, np.zeros((1, 8, 8, 3), np.float32), train=False))
    params = init(jax.random.key(0))["params"]
    for name, fan_in in {"conv_1": 25 * 32, "conv_4": 9 * 64, "Dense_0": 4 * 64}.items():
        kernel = params[name]["kernel"]
        assert kernel.var() == pytest.approx(2 / fan_in, rel=5 * np.sqrt(2 / kernel.size))


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (ConvNet(), (3, 28, 1), "3 x 28 pixels, expected 4 x 4 or more"),
        (ConvNet(maps=(1, 1, 0, 1, 1)), (8, 8, 1), "maps is 0, expected more than 0"),
        (ConvNet(hidden=(8, -1)), (8, 8, 1), "hidden is -1, expected more than 0"),
    ],
)
def test_what_is_refused(model, shape, message):
    with pytest.raises(InputError, match=message):
        shapes(model, np.zeros((1, *shape), np.float32), train=False)


def test_other_channels_than_the_parameters_have_are_refused():
    variables = shapes(ConvNet(), np.zeros((1, 8, 8, 1), np.float32), train=False)
    with pytest.raises(InputError, match="image with 3 channels, expected 1"):
        jax.eval_shape(lambda v: ConvNet().apply(v, np.zeros((1, 8, 8, 3), np.float32), train=False), variables)
