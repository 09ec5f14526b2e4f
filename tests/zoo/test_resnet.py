"""The ResNets against their definition: parameters, blocks, shortcuts, drop-path, and what they refuse."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import drawn, jit, shapes

from dl_jax.core.errors import InputError
from dl_jax.models.vision.resnet import Block, CifarResNet, ResNet, basic, bottleneck

IMAGE = np.random.default_rng(0).random((2, 8, 8, 3), np.float32)
block = functools.partial(
    Block, projection=True, residual=True, zero_scale=False, drop_path=0.0, activation=jax.nn.relu, dtype=jnp.float32
)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def convolved(x, kernel, stride):
    """A convolution with (size - 1) // 2 pixels of zeros on every side, in float64."""
    size, border = len(kernel), (len(kernel) - 1) // 2
    x = np.pad(x, ((0, 0), (border, border), (border, border), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))[:, ::stride, ::stride]
    return np.einsum("bhwcij,ijcd->bhwd", windows, kernel, optimize=True)


def normalised(x, params, stats):
    return (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]


def layer(variables, x, convolution, norm, stride=1):
    params, stats = variables["params"], variables["batch_stats"]
    return normalised(convolved(x, params[convolution]["kernel"], stride), params[norm], stats[norm])


def drawn_block(model, x):
    variables = drawn(model, x, train=False)
    return jax.tree_util.tree_map_with_path(lambda p, v: abs(v) + 0.5 if p[-1].key == "var" else v, variables)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize(("make", "maps"), [(basic, 10), (bottleneck, 3)])
def test_a_block_is_its_equation(make, maps, projection):
    """For 7 x 5 pixels, which a stride of 2 does not divide, and an odd number of new maps in one case."""
    x = np.random.default_rng(1).standard_normal((2, 7, 5, 5), np.float32)
    model = block(make(maps, 2), projection=projection)
    variables = drawn_block(model, x)
    found = jit(lambda v: model.apply(v, x, train=False))(variables)
    y, convolutions = x, make(maps, 2)
    for i, (_, _, stride) in enumerate(convolutions, 1):
        y = layer(variables, np.maximum(y, 0) if i > 1 else y, f"conv{i}", f"norm{i}", stride)
    if projection:
        y = y + layer(variables, x, "conv_shortcut", "norm_shortcut", 2)
    else:
        before = (y.shape[-1] - 5) // 2
        y[..., before : before + 5] += x[:, ::2, ::2]
    assert found.shape == (2, 4, 3, y.shape[-1])
    np.testing.assert_allclose(found, np.maximum(y, 0), rtol=1e-4, atol=1e-4)


def test_the_stride_of_a_bottleneck_is_in_its_3x3_convolution():
    assert bottleneck(64, 2) == ((64, 1, 1), (64, 3, 2), (256, 1, 1))


def test_a_plain_block_has_no_shortcut():
    x = np.random.default_rng(1).standard_normal((2, 6, 6, 4), np.float32)
    model = block(basic(4, 1))
    variables = drawn_block(model, x)
    plain = jit(lambda v: model.clone(residual=False, activation=lambda y: y).apply(v, x, train=False))(variables)
    whole = jit(lambda v: model.clone(activation=lambda y: y).apply(v, x, train=False))(variables)
    np.testing.assert_allclose(whole - plain, x, atol=1e-4)


def test_a_plain_network_has_the_parameters_of_its_residual_twin():
    plain, residual = (shapes(CifarResNet(8, width=4, residual=r), IMAGE, train=False) for r in (False, True))
    assert plain == residual


def test_a_zero_scale_makes_a_block_its_shortcut():
    x = np.random.default_rng(1).random((2, 6, 6, 4), np.float32)
    model = block(basic(4, 1), zero_scale=True)
    scales = jit(lambda: model.init(jax.random.key(0), x, train=False)["params"])()
    assert scales["norm1"]["scale"].all()
    assert not scales["norm2"]["scale"].any()
    variables = drawn_block(model, x)
    variables["params"]["norm2"] = jax.tree.map(np.zeros_like, variables["params"]["norm2"])
    np.testing.assert_allclose(jit(lambda v: model.apply(v, x, train=False))(variables), x, atol=1e-6)


def test_drop_path_skips_a_block_for_each_example_on_its_own_and_keeps_the_mean():
    rows = np.ones((400, 1, 1, 2), np.float32) * [1.0, 2.0]
    model = block(basic(2, 1), drop_path=0.25, activation=lambda y: y)
    variables = drawn_block(model, rows)
    apply = lambda v, train, key: model.apply(
        v, rows, train=train, rngs={"dropout": key}, mutable=["batch_stats"] if train else False
    )
    still = jit(lambda v: apply(v, False, jax.random.key(0)))(variables)
    steady = jit(lambda v: model.clone(drop_path=0.0).apply(v, rows, train=True, mutable=["batch_stats"])[0])(variables)
    found = jit(lambda v: apply(v, True, jax.random.key(0))[0])(variables)
    again = jit(lambda v: apply(v, True, jax.random.key(1))[0])(variables)
    branch = (steady - rows)[0, 0, 0]
    kept = ((found - rows)[:, 0, 0] / (branch / 0.75)).round(3)
    assert set(kept.flat) == {0, 1}
    assert (kept[:, 0] == kept[:, 1]).all()
    assert abs(kept[:, 0].mean() - 0.75) < 5 * np.sqrt(0.25 * 0.75 / 400)
    assert (found != again).any()
    assert (still == still[:1]).all()


def test_the_probability_of_a_skip_grows_linearly_to_the_last_block():
    seen = []

    def note(call, arguments, keywords, context):
        if isinstance(context.module, Block) and context.method_name == "__call__":
            seen.append(context.module.drop_path)
        return call(*arguments, **keywords)

    with nn.intercept_methods(note):
        shapes(CifarResNet(14, width=4, drop_path=0.3), IMAGE, train=False)
    np.testing.assert_allclose(seen, [0.05, 0.1, 0.15, 0.2, 0.25, 0.3])


def test_another_activation_is_used_everywhere():
    text = str(
        jax.make_jaxpr(
            lambda: CifarResNet(8, width=4, activation=jnp.tanh).init(jax.random.key(0), IMAGE, train=False)
        )()
    )
    assert text.count("= tanh") == 7
    assert "relu" not in text


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (CifarResNet(21), (32, 32, 3), r"depth is 21, expected 6 n \+ 2"),
        (CifarResNet(2), (32, 32, 3), r"depth is 2, expected 6 n \+ 2"),
        (CifarResNet(), (32, 3, 3), "image of 32 x 3 pixels, expected 4 x 4 or more"),
        (CifarResNet(), (32, 32), r"CifarResNet takes images \[B, H, W, C\], not an array of shape \(1, 32, 32\)"),
        (CifarResNet(width=0), (32, 32, 3), "width is 0, expected more than 0"),
        (CifarResNet(residual=False, drop_path=0.1), (32, 32, 3), "drop_path and zero_scale need shortcuts"),
        (CifarResNet(drop_path=1.0), (32, 32, 3), "drop_path is 1.0, expected a probability"),
        (ResNet(), (31, 64, 3), "image of 31 x 64 pixels, expected 32 x 32 or more, the smallest that ResNet takes"),
        (ResNet(blocks=()), (64, 64, 3), "blocks is 0, expected more than 0"),
    ],
)
def test_what_is_refused(model, shape, message):
    with pytest.raises(InputError, match=message) as raised:
        shapes(model, np.zeros((1, *shape), np.float32), train=False)
    assert "\n" not in str(raised.value)


def test_another_number_of_channels_than_the_parameters_is_refused():
    model = CifarResNet(8, width=4)
    variables = drawn(model, IMAGE, train=False)
    with pytest.raises(InputError, match="image with 1 channels, expected 3 as in the parameters of CifarResNet"):
        model.apply(variables, IMAGE[..., :1], train=False)
