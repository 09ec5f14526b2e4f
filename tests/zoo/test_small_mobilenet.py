"""The small MobileNet and its dense twin; BatchNorm under seeds and devices, on this network."""

import functools

import jax
import numpy as np
import optax
import pytest
from quick import shapes

from dl_jax import classify, data
from dl_jax.core.errors import InputError
from dl_jax.core.fit import fit
from dl_jax.core.step import init_state, make_step, per_seed
from dl_jax.models import summary
from dl_jax.models.vision.mobilenet import MobileNetV1, SmallMobileNet

NET = MobileNetV1((8, 1), ((10, 2),), classes=3)
RECORDS = {
    "image": np.random.default_rng(0).integers(0, 256, (48, 6, 6, 1), np.uint8),
    "label": np.random.default_rng(1).integers(0, 3, 48),
}
SEEDS, STEPS = 2, 2
TX = optax.sgd(0.1, 0.9)
STEP = make_step(classify.loss(NET.apply), TX)
STREAM = data.shuffled(RECORDS, 16, seeds=range(SEEDS))


def start():
    def one(key):
        return init_state(key, NET.init(key, np.zeros((1, 6, 6, 1), np.float32), train=False), TX)

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), SEEDS))


def equal(a, b, **tolerance):
    for one, other in zip(*map(jax.tree.leaves, (a.variables, b.variables)), strict=True):
        np.testing.assert_allclose(one, other, **tolerance)


def test_seeds_with_batch_norm_are_alike_together_one_by_one_and_alone():
    together = fit(per_seed(STEP), start(), lambda i: STREAM(i), steps=STEPS)
    one_by_one = fit(per_seed(STEP, one_by_one=True), start(), lambda i: STREAM(i), steps=STEPS)
    equal(together, one_by_one, rtol=1e-4, atol=1e-5)
    second = functools.partial(jax.tree.map, lambda leaf: leaf[1])
    alone = fit(STEP, second(start()), lambda i: second(STREAM(i)), steps=STEPS)
    equal(alone, second(together), rtol=1e-4, atol=1e-5)


def test_eight_devices_use_the_statistics_of_the_global_batch():
    """The running mean after a step is a tenth of that over all rows of all devices, worked out in NumPy."""
    one = fit(per_seed(STEP), start(), lambda i: STREAM(i), steps=1)
    eight = fit(per_seed(STEP), start(), STREAM, steps=1)
    assert len(jax.tree.leaves(eight.params)[0].sharding.device_set) == 8
    equal(one, eight, rtol=1e-5, atol=1e-5)
    kernel = np.float64(start().params["stem_conv"]["kernel"])  # [S, 3, 3, 1, maps]
    image = np.pad(STREAM(0)["image"] / 255, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))  # [S, B, H + 2, W + 2, 1]
    windows = np.lib.stride_tricks.sliding_window_view(image, (3, 3), (2, 3))
    maps = np.einsum("sbhwcij,sijcd->sbhwd", windows, kernel)
    running = eight.extra["batch_stats"]["stem_norm"]
    np.testing.assert_allclose(running["mean"], 0.1 * maps.mean((1, 2, 3)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(running["var"], 0.9 + 0.1 * maps.var((1, 2, 3)), rtol=1e-5)


def test_a_separable_block_against_a_dense_one():
    """Howard et al. 2017, section 3.1: 1 / N + 1 / 9 of the multiply-adds of a block of N maps, without padding's."""
    model = MobileNetV1((16, 1), ((32, 1),))
    inputs = {"image": jax.ShapeDtypeStruct((1, 9, 9, 1), np.float32)}
    separable = {layer.path: layer.flops for layer in summary.layers(model, inputs)}
    dense = {layer.path: layer.flops for layer in summary.layers(model.clone(separable=False), inputs)}
    taps = 25**2  # 9 positions times 3 taps along an axis, but for one at either edge
    assert separable["block0_depthwise_conv"] == 2 * taps * 16
    assert separable["block0_pointwise_conv"] == 2 * 81 * 16 * 32
    assert dense["block0_conv"] == 2 * taps * 16 * 32


def test_seven_times_fewer_multiply_adds():
    """Counted by hand, with the products along an axis that do not fall on padding: 82 for 28 pixels, and so on."""
    nets = [summary.published()[name] for name in ("SmallConvMobileNet", "SmallMobileNet")]
    dense, separable = (sum(layer.flops for layer in summary.layers(net.model, net.inputs)) // 2 for net in nets)
    blocks = [(16, 32, 82, 28), (32, 64, 41, 14), (64, 64, 40, 14), (64, 128, 20, 7), (128, 128, 19, 7)]
    ends = 82**2 * 16 + 128 * 10
    assert dense == ends + sum(taps**2 * before * after for before, after, taps, _ in blocks)
    assert separable == ends + sum(before * (taps**2 + side**2 * after) for before, after, taps, side in blocks)
    assert dense / separable == pytest.approx(6.99, abs=0.005)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (SmallMobileNet(), (28, 3, 1), "28 x 3 pixels, expected 4 x 4 or more"),
        (SmallMobileNet(blocks=((8, 0),)), (8, 8, 1), "blocks is 0, expected more than 0"),
        (SmallMobileNet(stem=(0, 1)), (8, 8, 1), "stem is 0, expected more than 0"),
    ],
)
def test_what_is_refused(model, shape, message):
    with pytest.raises(InputError, match=message):
        shapes(model, np.zeros((1, *shape), np.float32), train=False)
