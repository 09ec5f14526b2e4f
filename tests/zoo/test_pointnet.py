"""PointNet: the order of points, its transforms, and each set by itself."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from numpy_layers import batch_norm, dense
from quick import jit

from dl_jax import inspect
from dl_jax.core.errors import InputError
from dl_jax.models.vision.pointnet import PointNet

SMALL = functools.partial(PointNet, 4, (3, 4), (4, 5), (6,), dropout=0.0)
MODEL = SMALL()
POINTS = np.random.default_rng(0).normal(size=(3, 7, 3)).astype(np.float32)
apply: Any = functools.partial(MODEL.apply, train=False)


@pytest.fixture(scope="module")
def variables():
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(functools.partial(MODEL.init, train=False), jax.random.key(0), POINTS)
    draw = lambda leaf: abs(rng.normal(size=leaf.shape)) - 0.3 * (leaf.ndim > 1)
    return jax.tree.map(lambda leaf: draw(leaf).astype(np.float32), shapes)


def test_the_order_of_the_points_does_not_matter(variables):
    predict = jit(apply)
    mixed = np.stack([np.random.default_rng(i).permutation(row) for i, row in enumerate(POINTS)])
    found = predict(variables, POINTS)
    np.testing.assert_allclose(predict(variables, mixed), found, rtol=1e-4)
    twice = np.concatenate([POINTS, POINTS], 1)  # nor how often one is there
    np.testing.assert_allclose(predict(variables, twice), found, rtol=1e-4)
    assert np.ptp(found, 0).min() > 1e-3


def test_it_is_its_equations(variables):
    params, stats = variables["params"], variables["batch_stats"]

    def layers(x, *path):
        p, s = params, stats
        for name in path:
            p, s = p[name], s[name]
        for i in range(len(p) // 2):
            x = x @ p[f"Dense_{i}"]["kernel"].astype(np.float64)
            x = np.maximum(batch_norm(x, p[f"BatchNorm_{i}"], s[f"BatchNorm_{i}"]), 0)
        return x

    def matrix(x, name):
        y = layers(layers(x, name, "Layers_0").max(0), name, "Layers_1")
        n = x.shape[-1]
        return np.eye(n) + dense(y, params[name]["Dense_0"]).reshape(n, n)

    result: Any = inspect.with_outputs(MODEL.apply, "feature_transform")(variables, POINTS, train=False)
    logits, (matrices,) = result
    for row, points in enumerate(POINTS.astype(np.float64)):
        x = layers(points @ matrix(points, "input_transform"), "input_layers")
        np.testing.assert_allclose(matrices[row], matrix(x, "feature_transform"), rtol=1e-3)
        x = layers(x @ matrix(x, "feature_transform"), "feature_layers").max(0)
        np.testing.assert_allclose(logits[row], dense(layers(x, "head"), params["logits"]), rtol=1e-3)


def test_the_transforms_are_near_the_identity_at_the_start():
    both: Any = jit(lambda: MODEL.init(jax.random.key(0), POINTS, train=False))()
    kept = lambda tree: {name: each for name, each in tree.items() if "transform" not in name}
    plain = {kind: kept(tree) for kind, tree in both.items()}
    without = functools.partial(SMALL(transforms=False).apply, train=False)
    np.testing.assert_allclose(jit(apply)(both, POINTS), jit(without)(plain, POINTS), atol=0.01)


@pytest.mark.parametrize(
    ("model", "points", "message"),
    [
        (MODEL, POINTS[0], r"points are \(7, 3\), expected \[B, N, 3\]"),
        (MODEL, POINTS[:, :0], r"points are \(3, 0, 3\)"),
        (PointNet(0), POINTS, "classes is 0"),
        (PointNet(4, (3, 0)), POINTS, "widths is 0"),
        (PointNet(4, (), (), ()), POINTS, "widths is 0"),
        (PointNet(4, dropout=1.0), POINTS, "dropout is 1.0"),
    ],
)
def test_what_cannot_be(model, points, message):
    with pytest.raises(InputError, match=message):
        jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), points)


def test_points_of_another_space_are_refused(variables):
    with pytest.raises(InputError, match=r"2 features in \(3, 7, 2\), expected 3 as in the parameters of PointNet"):
        apply(variables, POINTS[..., :2])
