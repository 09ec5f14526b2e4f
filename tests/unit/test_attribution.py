"""Attributions against functions whose derivatives are known, and against their axioms."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax import attribution
from dl_jax.core.errors import InputError
from dl_jax.models.vision.lenet import LeNetCaffe

IMAGES: Any = np.random.default_rng(0).random((3, 6, 5, 2)).astype(np.float32)
WEIGHTS: Any = np.random.default_rng(1).normal(size=(6, 5, 2)).astype(np.float32)


def linear(images):
    return (images * WEIGHTS).sum((1, 2, 3)) + 1


def cubic(images):
    return (images**3 * WEIGHTS).sum((1, 2, 3))


def test_the_gradients_of_a_linear_score_are_its_weights():
    whole = np.broadcast_to(WEIGHTS, IMAGES.shape)
    np.testing.assert_allclose(attribution.gradient(linear, IMAGES), whole, rtol=1e-6)
    smooth = attribution.smooth_gradient(linear, IMAGES, jax.random.key(0), 0.3, 4)
    np.testing.assert_allclose(smooth, whole, rtol=1e-5)
    np.testing.assert_allclose(attribution.integrated_gradients(linear, IMAGES, 3), whole * IMAGES, rtol=1e-5)


def test_the_smooth_gradient_of_a_cubic_score_is_its_expectation():
    """E[3 (x + s z)²] = 3 (x² + s²) for a standard normal z."""
    smooth = jax.jit(lambda x, key: attribution.smooth_gradient(cubic, x, key, 0.2, 2000))(IMAGES, jax.random.key(0))
    np.testing.assert_allclose(smooth / WEIGHTS, 3 * (IMAGES**2 + 0.2**2), atol=0.15)
    exact = attribution.smooth_gradient(cubic, IMAGES, jax.random.key(0), 0.0, 2)
    np.testing.assert_allclose(exact, 3 * IMAGES**2 * WEIGHTS, rtol=1e-5)


@pytest.mark.parametrize("baseline", [0.0, 0.5, IMAGES[::-1].copy()])
def test_integrated_gradients_add_up_to_the_difference_of_the_scores(baseline):
    """The midpoint rule errs by 1 / (4 steps²) of the third power's share."""
    found = attribution.integrated_gradients(cubic, IMAGES, 100, baseline)
    difference = cubic(IMAGES) - cubic(np.broadcast_to(baseline, IMAGES.shape))
    np.testing.assert_allclose(found.sum((1, 2, 3)), difference, atol=1e-3)
    if isinstance(baseline, float) and not baseline:
        np.testing.assert_allclose(found, IMAGES**3 * WEIGHTS, rtol=1e-3)


def test_occlusion_is_the_score_without_a_window():
    found = attribution.occlusion(cubic, IMAGES, 2, fill=0.25)
    assert found.shape == (3, 5, 4)
    for i, j in np.ndindex(5, 4):
        covered = IMAGES.copy()
        covered[:, i : i + 2, j : j + 2] = 0.25
        np.testing.assert_allclose(found[:, i, j], cubic(IMAGES) - cubic(covered), atol=1e-5)
    apart = attribution.occlusion(cubic, IMAGES, 2, stride=3, fill=0.25)
    np.testing.assert_allclose(apart, found[:, ::3, ::3], atol=1e-6)
    whole = attribution.occlusion(lambda x: x.sum((1, 2, 3)), IMAGES[:, :5], 5)
    np.testing.assert_allclose(whole[:, 0, 0], IMAGES[:, :5].sum((1, 2, 3)), rtol=1e-5)


class Maps(nn.Module):
    flat: bool

    @nn.compact
    def __call__(self, image: Any) -> Any:
        x = nn.relu(nn.Conv(4, (3, 3), use_bias=False)(image))
        if self.flat:
            return nn.Dense(3, use_bias=False)(x.reshape(len(x), -1))
        return nn.Conv(3, (6, 5), padding="VALID", use_bias=False)(x)[:, 0, 0]


@pytest.mark.parametrize("flat", [True, False])
def test_grad_cam_is_its_equation(flat):
    model = Maps(flat)
    rng = np.random.default_rng(2)
    first: Any = rng.normal(size=(3, 3, 2, 4)).astype(np.float32)
    last = rng.normal(size=(6, 5, 4, 3)).astype(np.float32)
    name = "Dense_0" if flat else "Conv_1"
    params = {"Conv_0": {"kernel": first}, name: {"kernel": last.reshape(-1, 3) if flat else last}}
    apply: Any = model.apply
    score = lambda variables, images: apply(variables, images)[:, 1]
    cam = lambda x: attribution.grad_cam(score, {"params": params}, x, name, (6, 5, 4) if flat else None)
    maps = np.asarray(nn.relu(jax.lax.conv_general_dilated(
        IMAGES, first, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))))  # fmt: skip
    expected = np.maximum((maps * last[..., 1].mean((0, 1))).sum(-1), 0)
    np.testing.assert_allclose(jax.jit(cam)(IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_guided_backpropagation_lets_positive_gradients_pass():
    relu = jnp.array([[-1.0, 2.0, -3.0], [4.0, -5.0, 6.0]])

    def score(variables: Any, x: Any) -> Any:  # x [B, 2]
        return nn.relu(x @ variables["w"]) @ variables["v"]

    variables = {"w": relu, "v": jnp.array([1.0, -2.0, 3.0])}
    x = jnp.array([[1.0, 1.0], [2.0, 0.1]])
    plain, guided = (jax.grad(lambda x, f=f: f(variables, x).sum())(x) for f in (score, attribution.guided(score)))
    on = np.asarray(x @ relu > 0)
    np.testing.assert_allclose(plain, (on * [1, -2, 3]) @ relu.T)
    np.testing.assert_allclose(guided, (on * [1, 0, 3]) @ relu.T)
    np.testing.assert_allclose(attribution.guided(score)(variables, x), score(variables, x))


def test_the_variance_of_a_normalisation_is_no_relu():
    """Flax's is at least 0, by a maximum that has to keep its derivative."""
    model = nn.Sequential([nn.LayerNorm(), nn.relu, nn.Dense(1)])
    variables = {"params": {"layers_0": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
                            "layers_2": {"kernel": jnp.ones((4, 1)), "bias": jnp.zeros(1)}}}  # fmt: skip
    x = jnp.array([[1.0, 2.0, 3.0, 4.5]])
    slope = lambda f: jax.grad(lambda x: f(variables, x).sum())(x)
    score = lambda variables, x: model.apply(variables, x)[:, 0]
    # All gradients that reach the ReLU are positive, so that guided ones differ in nothing.
    np.testing.assert_allclose(slope(attribution.guided(score)), slope(score), rtol=1e-6)
    norm = lambda variables, x: nn.LayerNorm().apply({"params": variables["params"]["layers_0"]}, x).sum(-1)
    with pytest.raises(InputError, match="the network has no ReLU"):
        attribution.guided(norm)(variables, x)


def test_all_relus_of_a_network_of_the_zoo_are_guided():
    """With ones as images and weights below 0 in the last layer, no gradient is left."""
    model, image = LeNetCaffe(), np.ones((2, 16, 16, 1), np.float32)
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), image)
    variables = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01), shapes)
    variables["params"]["Dense_1"]["kernel"] *= -1
    apply: Any = model.apply
    score = lambda variables, image: apply(variables, image, train=False)[:, 0]
    slope = lambda f: jax.jit(jax.grad(lambda x: f(variables, x).sum()))(image)
    assert (np.asarray(slope(score)) < 0).any()
    assert not np.asarray(slope(attribution.guided(score))).any()


def test_climbing_a_linear_score_ends_at_its_signs():
    found = attribution.maximised(linear, jnp.full((1, 6, 5, 2), 0.5), 400, 0.5)
    np.testing.assert_allclose(found[0], WEIGHTS > 0, atol=1e-6)
    kept = attribution.maximised(lambda x: 0 * x.sum((1, 2, 3)), IMAGES, 3, 0.5, lambda x: x / 2)  # no slope
    np.testing.assert_allclose(kept, IMAGES / 8, rtol=1e-6)


DENSE = {"params": {"a": {"kernel": np.ones((60, 1), np.float32)}}}


def dense(variables, images):
    return (images.reshape(3, -1) @ variables["params"]["a"]["kernel"])[:, 0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: attribution.smooth_gradient(linear, IMAGES, jax.random.key(0), -1, 2), "sigma is -1, expected 0 or"),
        (lambda: attribution.smooth_gradient(linear, IMAGES, jax.random.key(0), 1, 0), "samples"),
        (lambda: attribution.integrated_gradients(linear, IMAGES, 0), "steps"),
        *(
            (functools.partial(of, linear, np.zeros((1, 6, 5, 2), np.uint8)), "images of uint8 .*, expected floats")
            for of in (
                attribution.gradient,
                functools.partial(attribution.integrated_gradients, steps=2),
                functools.partial(attribution.smooth_gradient, key=jax.random.key(0), sigma=0.1, samples=2),
            )
        ),
        (lambda: attribution.occlusion(linear, IMAGES, 2, 0), "stride"),
        (lambda: attribution.occlusion(linear, IMAGES, 6), "a window of 6 pixels in images"),
        (lambda: attribution.maximised(linear, IMAGES, 1, 0.0), "rate"),
        (
            lambda: attribution.guided(lambda v, x: x @ v)(jnp.ones((2, 2)), jnp.ones((1, 2))),
            "guided: the network has no ReLU",
        ),
        (
            lambda: attribution.grad_cam(dense, DENSE, IMAGES, "b"),
            "'b' is no layer, expected one of a",
        ),
        (
            lambda: attribution.grad_cam(dense, DENSE, IMAGES, "a", (5, 5, 2)),
            r"a reads \(3, 60\), expected maps \[B, h, w, D\]",
        ),
        (
            lambda: attribution.grad_cam(lambda v, x: dense(v, x) + dense(v, 2 * x), DENSE, IMAGES, "a", (6, 5, 2)),
            "a is called 2 times, expected once",
        ),
    ],
)
def test_what_cannot_be(wrong, message):
    with pytest.raises(InputError, match=message):
        wrong()


def test_pixels_are_deleted_and_inserted_in_the_order_of_a_map():
    maps = np.random.default_rng(2).permuted(np.arange(3 * 30.0).reshape(3, 30), axis=1).reshape(3, 6, 5)
    found = {name: getattr(attribution, name)(cubic, IMAGES, maps, 0.5) for name in ("deletion", "insertion")}
    for b in range(3):
        first = np.argsort(-maps[b].ravel())
        for n in (0, 1, 7, 30):
            covered = np.zeros(30, bool)
            covered[first[:n]] = True
            for name, where in (("deletion", covered), ("insertion", ~covered)):
                left = np.where(where.reshape(6, 5, 1), 0.5, IMAGES[b])
                assert found[name].shape == (3, 31)
                np.testing.assert_allclose(found[name][b, n], cubic(left[None])[0], rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, bool])
def test_equal_pixels_go_in_the_order_of_their_places(dtype):
    maps = np.random.default_rng(2).integers(0, 2, (3, 6, 5)).astype(dtype)
    distinct = maps.astype(np.float64) - np.arange(30).reshape(6, 5) / 100
    for of in (attribution.deletion, attribution.insertion):
        np.testing.assert_array_equal(of(cubic, IMAGES, maps), of(cubic, IMAGES, distinct))
        np.testing.assert_array_equal(of(cubic, IMAGES, maps), of(cubic, IMAGES, jnp.asarray(maps)))


def test_the_weights_of_a_linear_score_delete_it_soonest():
    """Of all orders, that of what each pixel adds has the least deletion and the largest insertion."""
    adds = (IMAGES * WEIGHTS).sum(-1)
    others = np.random.default_rng(3).normal(size=(20, *adds.shape))
    for of, sign in ((attribution.deletion, 1), (attribution.insertion, -1)):
        best = sign * of(linear, IMAGES, adds).mean(1)
        assert all((best < sign * of(linear, IMAGES, each).mean(1)).all() for each in others)


def test_maps_of_another_size_are_refused():
    with pytest.raises(InputError, match=r"maps \(3, 5, 6\) of images \(3, 6, 5, 2\), expected \(3, 6, 5\)"):
        attribution.deletion(linear, IMAGES, jnp.zeros((3, 5, 6)))
