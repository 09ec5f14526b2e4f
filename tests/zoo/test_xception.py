"""Xception against NumPy, the shapes of figure 5 of the paper, and the small one."""

import jax
import numpy as np
import pytest
from numpy_layers import batch_norm, conv, dense, max_pool, relu
from quick import drawn, jit, shapes

from dl_jax.core.errors import InputError
from dl_jax.models import summary
from dl_jax.models.vision.xception import SmallXception, Xception


def test_against_numpy():
    """Two blocks of the entry flow, of which the first starts without an activation, and one of the middle flow."""
    model = Xception(stem=(3, 4), stride=1, entry=(4, 5), middle=1, exit=(5, 6, 4), classes=3)
    image = np.random.default_rng(0).random((2, 9, 8, 2), np.float32)
    variables = drawn(model, image, train=False)
    variables["batch_stats"] = jax.tree.map(lambda leaf: abs(leaf) + 0.1, variables["batch_stats"])
    params, stats = variables["params"], variables["batch_stats"]

    def normed(x, tree, running, name):
        return batch_norm(x, tree[name], running[name])

    def separable(x, tree, running):
        x = conv(conv(x, tree["depthwise"], groups=x.shape[-1]), tree["pointwise"])
        return normed(x, tree, running, "BatchNorm_0")

    def block(x, name, convolutions, pooled, activated=True):
        tree, running, y = params[name], stats[name], x
        for i in range(convolutions):
            layer = f"SeparableConv_{i}"
            y = separable(relu(y) if i or activated else y, tree[layer], running[layer])
        if not pooled:
            return x + y
        return normed(conv(x, tree["shortcut"], 2), tree, running, "shortcut_norm") + max_pool(y, 3, 2, 1)

    x = relu(normed(conv(np.float64(image), params["stem_conv"]), params, stats, "BatchNorm_0"))
    x = relu(normed(conv(x, params["Conv_0"]), params, stats, "BatchNorm_1"))
    x = block(x, "entry_0", 2, pooled=True, activated=False)
    x = block(x, "entry_1", 2, pooled=True)
    x = block(x, "middle_0", 3, pooled=False)
    x = block(x, "exit", 2, pooled=True)
    for name in ("SeparableConv_0", "SeparableConv_1"):
        x = relu(separable(x, params[name], stats[name]))
    expected = dense(x.mean((1, 2)), params["Dense_0"])
    found = jit(lambda variables: model.apply(variables, image, train=False))(variables)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


def test_the_maps_of_figure_5():
    model, inputs, _ = summary.published()["Xception"]
    found = {layer.path: layer.outputs[0] for layer in summary.layers(model, inputs)}
    shortcuts = [found[f"{name}/shortcut"] for name in ("entry_0", "entry_1", "entry_2", "exit")]
    assert shortcuts == ["[1, 75, 75, 128]", "[1, 38, 38, 256]", "[1, 19, 19, 728]", "[1, 10, 10, 1024]"]
    assert found["middle_7/SeparableConv_2/pointwise"] == "[1, 19, 19, 728]"
    assert found["SeparableConv_1/pointwise"] == "[1, 10, 10, 2048]"
    assert found["Dense_0"] == "[1, 1000]"
    assert not any(path.startswith("middle_8") for path in found)


def test_the_small_one_takes_digits_and_refuses_smaller_images():
    variables = shapes(SmallXception(), np.zeros((1, 28, 28, 1), np.float32), train=False)
    assert variables["params"]["Dense_0"]["kernel"].shape == (384, 10)
    with pytest.raises(InputError, match="7 x 8 pixels, expected 8 x 8 or more"):
        shapes(SmallXception(), np.zeros((1, 7, 8, 1), np.float32), train=False)
    with pytest.raises(InputError, match="a number of maps is 0, expected more than 0"):
        shapes(Xception(entry=(8, 0)), np.zeros((1, 64, 64, 1), np.float32), train=False)
    with pytest.raises(InputError, match="classes is 0, expected more than 0"):
        shapes(Xception(classes=0), np.zeros((1, 64, 64, 1), np.float32), train=False)
    with pytest.raises(InputError, match="middle is -1, expected a number of blocks, 0 or more"):
        shapes(Xception(middle=-1), np.zeros((1, 64, 64, 1), np.float32), train=False)
