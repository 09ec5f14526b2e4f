"""The MobileNets against their definition: parameters, widths, residual blocks, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import drawn, jit, shapes

from dl_jax.core.errors import InputError
from dl_jax.models.vision.mobilenet import InvertedResidual, MobileNetV1, MobileNetV2, multiple_of_8

IMAGE = np.random.default_rng(0).random((2, 8, 8, 3), np.float32)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize(("width", "millions"), [(0.75, 2.6), (0.5, 1.3), (0.25, 0.5)])
def test_thinner_networks_of_version_1_have_the_papers_parameters(width, millions):
    """Table 6."""
    params = shapes(MobileNetV1(width=width), np.zeros((1, 32, 32, 3), np.float32), train=False)["params"]
    assert round(count(params) / 1e6, 1) == millions


def test_multiples_of_8():
    expected = {1: 8, 11.2: 16, 12: 16, 16: 16, 22.4: 24, 44.8: 48, 89.6: 88, 134.4: 136, 1792: 1792}
    assert {maps: multiple_of_8(maps) for maps in expected} == expected


def test_separable_layers_save_what_section_3_1_says():
    """A block from 8 to 12 maps: 9 * 8 + 8 * 12 weights instead of 9 * 8 * 12, and one normalisation more."""
    model = MobileNetV1(stem=(8, 1), blocks=((12, 1),), classes=5)
    separable, dense = (count(shapes(model.clone(separable=s), IMAGE, train=False)["params"]) for s in (True, False))
    assert dense - separable == 9 * 8 * 12 - (9 * 8 + 8 * 12 + 2 * 8)


def test_a_depthwise_convolution_sees_its_own_map_alone():
    model = MobileNetV1(stem=(8, 1), blocks=((12, 1),), classes=5)
    kernel = shapes(model, IMAGE, train=False)["params"]["block0_depthwise_conv"]["kernel"]
    assert kernel.shape == (3, 3, 1, 8)


@pytest.mark.parametrize(
    ("stride", "maps", "added"), [(1, 6, True), (2, 6, False), (1, 7, False)], ids=["same", "strided", "wider"]
)
def test_a_block_of_version_2_is_linear_at_its_end_and_adds_its_input_where_it_fits(stride, maps, added):
    x = np.random.default_rng(1).standard_normal((2, 5, 4, 6), np.float32)
    model = InvertedResidual(maps, stride, expansion=2, dtype=jnp.float32)
    variables = drawn(model, x, train=False)
    variables["batch_stats"] = jax.tree.map(lambda leaf: abs(leaf) + 0.5, variables["batch_stats"])
    zeros = jax.tree.map(np.zeros_like, variables["params"]["project_norm"])
    params = {**variables["params"], "project_norm": {**zeros, "bias": zeros["bias"] - 3}}
    apply = jit(lambda params: model.apply({**variables, "params": params}, x, train=False))
    mean = variables["batch_stats"]["project_norm"]["mean"]
    assert mean.shape == (maps,)
    np.testing.assert_allclose(
        apply(params), (x if added else 0) + np.full((2, -(-5 // stride), -(-4 // stride), maps), -3.0)
    )
    assert apply(variables["params"]).shape[1:3] == (-(-5 // stride), -(-4 // stride))


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (MobileNetV1(), (31, 32, 3), "image of 31 x 32 pixels, expected 32 x 32 or more"),
        (MobileNetV1(width=0), (32, 32, 3), "width is 0, expected more than 0"),
        (MobileNetV2(), (32, 16, 3), "image of 32 x 16 pixels, expected 32 x 32 or more"),
        (MobileNetV2(width=-1), (32, 32, 3), "width is -1, expected more than 0"),
        (MobileNetV1(classes=0), (32, 32, 3), "classes is 0, expected more than 0"),
        (MobileNetV1(stem=(32, 0)), (32, 32, 3), "a number in stem is 0, expected more than 0"),
        (MobileNetV1(blocks=((64, 1), (64, -1))), (32, 32, 3), "a number in blocks is -1, expected more than 0"),
        *(
            (MobileNetV2(groups=((1, 8, 1, 1), group)), (32, 32, 3), "a number in groups is 0, expected more than 0")
            for group in ((0, 8, 1, 1), (6, 0, 1, 1), (6, 8, 0, 1), (6, 8, 1, 0))
        ),
        (MobileNetV2(last=0), (32, 32, 3), "last is 0, expected more than 0"),
        (MobileNetV2(dropout=1.0), (32, 32, 3), "dropout is 1.0, expected a probability"),
    ],
)
def test_what_is_refused(model, shape, message):
    with pytest.raises(InputError, match=message) as raised:
        shapes(model, np.zeros((1, *shape), np.float32), train=False)
    assert "\n" not in str(raised.value)


def test_another_number_of_channels_than_the_parameters_is_refused():
    model = MobileNetV2(groups=((2, 8, 1, 1),), last=16, classes=5, width=0.25)
    variables = drawn(model, IMAGE, train=False)
    with pytest.raises(InputError, match="image with 1 channels, expected 3 as in the parameters of MobileNetV2"):
        model.apply(variables, IMAGE[..., :1], train=False)
