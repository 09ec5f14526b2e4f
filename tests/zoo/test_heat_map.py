"""The detector of peaks against NumPy, the sizes of its maps, and images that it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import batch_norm, conv, dense, relu, up_conv
from quick import drawn, jit, shapes

from dl_jax.core.errors import InputError
from dl_jax.models.vision.heat_map import HeatMapDetector


def test_against_numpy():
    model, image = HeatMapDetector(3, (4, 6), head=4), np.random.default_rng(0).random((2, 4, 12, 2), np.float32)
    variables = drawn(model, image, train=False, spread=0.5)
    variables["batch_stats"] = jax.tree.map(lambda leaf: abs(leaf) + 0.5, variables["batch_stats"])
    params, stats = variables["params"], variables["batch_stats"]

    def normalised(x, name, block=None):
        mine = (params, stats) if block is None else (params[block], stats[block])
        return batch_norm(x, mine[0][name], mine[1][name])

    def block(x, name, stride):
        y = relu(normalised(conv(x, params[name]["conv1"], stride), "norm1", name))
        y = normalised(conv(y, params[name]["conv2"], 1), "norm2", name)
        return relu(y + normalised(conv(x, params[name]["conv_shortcut"], stride), "norm_shortcut", name))

    x = relu(normalised(conv(image.astype(np.float64), params["stem_conv"], 2), "stem_norm"))
    quarter = block(x, "down_0", 2)
    x = up_conv(block(quarter, "down_1", 2), params["up_conv_0"])[:, :1, :3]
    x = block(np.concatenate([quarter, x], -1), "up_0", 1)
    found = jit(lambda variables: model.apply(variables, image, train=False))(variables)
    for name, maps in (("heat", 3), ("size", 2), ("offset", 2)):
        expected = dense(relu(conv(x, params[f"{name}_conv"], 1)), params[name])
        assert found[name].shape == expected.shape == (2, 1, 3, maps)
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("maps", [(4,), (4, 4), (4, 6, 8, 10)])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (20, 36), (120, 160)])
def test_maps_have_a_quarter_of_the_resolution_whatever_the_levels(height, width, maps):
    model = HeatMapDetector(5, maps, head=3)
    out, _ = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), jnp.zeros((2, height, width, 3)), train=False)
    )
    found = {name: leaf.shape for name, leaf in out.items()}
    cells = 2, height // 4, width // 4
    assert found == {"heat": (*cells, 5), "size": (*cells, 2), "offset": (*cells, 2)}


def test_training_begins_with_little_heat_and_centres_in_the_middle_of_cells():
    model, image = HeatMapDetector(2, (2,), head=2), np.zeros((1, 4, 4, 1), np.float32)  # whose features are 0
    found, _ = jit(lambda: model.init_with_output(jax.random.key(0), image, train=False))()
    np.testing.assert_allclose(1 / (1 + np.exp(-found["heat"])), 0.1, rtol=1e-5)
    np.testing.assert_array_equal(found["offset"], np.full((1, 1, 1, 2), 0.5))


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (HeatMapDetector(2), (120, 158, 3), "image of 120 x 158 pixels, expected sides that 4 divides"),
        (HeatMapDetector(2), (3, 8, 3), "3 x 8 pixels, expected 4 x 4 or more"),
        (HeatMapDetector(2, ()), (8, 8, 3), "maps is 0, expected more than 0"),
        (HeatMapDetector(2, (1, 4)), (8, 8, 3), "maps is 0, expected more than 0"),
        (HeatMapDetector(0), (8, 8, 3), "classes is 0, expected more than 0"),
    ],
)
def test_what_is_refused(model, shape, message):
    with pytest.raises(InputError, match=message):
        shapes(model, np.zeros((1, *shape), np.float32), train=False)
