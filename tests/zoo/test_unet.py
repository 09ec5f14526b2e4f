"""The U-Net and its transposed convolution against NumPy, and the shapes of figure 1 of the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy_layers import conv, dense, max_pool, relu, up_conv
from quick import drawn, jit, shapes

from dl_jax.core.errors import InputError
from dl_jax.models import summary
from dl_jax.models.vision.unet import UNet, UpConv


def test_a_transposed_convolution_against_its_definition_and_xlas_with_gradients_and_seeds():
    seeds, model, rng = 2, UpConv(3, jnp.float32), np.random.default_rng(0)
    x = rng.normal(size=(seeds, 2, 3, 4, 5)).astype(np.float32)
    params = {
        "kernel": rng.normal(size=(seeds, 2, 2, 5, 3)).astype(np.float32),
        "bias": rng.normal(size=(seeds, 3)).astype(np.float32),
    }
    weight = rng.normal(size=(2, 6, 8, 3)).astype(np.float32)

    def xla(params, x):  # it turns the kernel round
        kernel, layout = params["kernel"][::-1, ::-1], ("NHWC", "HWIO", "NHWC")
        return lax.conv_transpose(x, kernel, (2, 2), "SAME", dimension_numbers=layout) + params["bias"]

    def with_gradients(function):
        return jit(jax.vmap(jax.value_and_grad(lambda *args: (weight * function(*args)).sum(), (0, 1))))(params, x)

    ours = lambda params, x: model.apply({"params": params}, x)
    outputs = jit(jax.vmap(ours))(params, x)
    for seed in range(seeds):
        layer = {name: value[seed] for name, value in params.items()}
        np.testing.assert_allclose(outputs[seed], up_conv(x[seed], layer), atol=1e-5)
    for found, expected in zip(*map(jax.tree.leaves, map(with_gradients, (ours, xla))), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_against_numpy():
    model, image = UNet((2, 3, 4), classes=3), np.random.default_rng(0).random((2, 8, 4, 1), np.float32)
    variables = drawn(model, image, train=False, spread=0.5)
    params = variables["params"]

    def twice(x, layer):
        return relu(conv(relu(conv(x, layer["Conv_0"])), layer["Conv_1"]))

    x0 = twice(np.float64(image), params["down_0"])
    x1 = twice(max_pool(x0, 2, 2, 0), params["down_1"])
    x = twice(max_pool(x1, 2, 2, 0), params["down_2"])
    x = twice(np.concatenate([x1, up_conv(x, params["up_conv_1"])], -1), params["up_1"])
    x = twice(np.concatenate([x0, up_conv(x, params["up_conv_0"])], -1), params["up_0"])
    found = jit(lambda variables: model.apply(variables, image, train=False))(variables)
    np.testing.assert_allclose(found, dense(x, params["logits"]), rtol=1e-5, atol=1e-5)


def test_a_condition_is_added_to_the_maps_of_the_first_convolution_of_each_level():
    """As if its bias were moved by a linear function of the condition, for each image by itself."""
    rng = np.random.default_rng(0)
    model, image = UNet((2, 3)), rng.random((2, 4, 4, 1), np.float32)
    condition = rng.normal(size=(2, 5)).astype(np.float32)
    params = drawn(model, image, condition, train=False, spread=0.5)["params"]
    apply = jit(lambda params, image, condition: model.apply({"params": params}, image, condition, train=False))
    found = apply(params, image, condition)
    plain = jit(lambda params, image: model.apply({"params": params}, image, train=False))
    for i in range(2):
        moved = {name: dict(layer) for name, layer in params.items()}
        for name in ("down_0", "down_1", "up_0"):
            added = moved[name].pop("condition")
            bias = moved[name]["Conv_0"]["bias"] + condition[i] @ added["kernel"] + added["bias"]
            moved[name]["Conv_0"] = {**moved[name]["Conv_0"], "bias": bias}
        np.testing.assert_allclose(found[i : i + 1], plain(moved, image[i : i + 1]), rtol=1e-4, atol=1e-5)
    assert abs(found - apply(params, image, condition[::-1])).max() > 0.01


def test_the_maps_of_figure_1():
    model, inputs, _ = summary.published()["UNet"]
    found = {layer.path: layer.outputs[0] for layer in summary.layers(model, inputs)}
    sizes = {0: (512, 64), 1: (256, 128), 2: (128, 256), 3: (64, 512), 4: (32, 1024)}
    for level, (side, maps) in sizes.items():
        names = [f"down_{level}", *([f"up_{level}"] if level < 4 else [])]
        for path in [f"{name}/Conv_{i}" for name in names for i in (0, 1)]:
            assert found.pop(path) == f"[1, {side}, {side}, {maps}]"
    ups = {f"up_conv_{level}": f"[1, {side}, {side}, {maps}]" for level, (side, maps) in sizes.items() if level < 4}
    assert found == {**ups, "logits": "[1, 512, 512, 2]"}


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (UNet(), (48, 40, 1), "image of 48 x 40 pixels, expected sides that 16 divides"),
        (UNet(), (16, 8, 1), "16 x 8 pixels, expected 16 x 16 or more"),
        (UNet(maps=()), (16, 16, 1), "maps is 0, expected more than 0"),
    ],
)
def test_what_is_refused(model, shape, message):
    with pytest.raises(InputError, match=message):
        shapes(model, np.zeros((1, *shape), np.float32), train=False)
