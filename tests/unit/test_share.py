"""Weight sharing: k-means against its own definition and the paper's figure, gradients of the shared values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dl_jax import losses
from dl_jax.compress import prune, share
from dl_jax.core.errors import InputError
from dl_jax.core.fit import fit
from dl_jax.core.step import init_state, make_step, per_seed

# Figure 3 of the paper: weights, their gradients, the four shared values and their gradients.
WEIGHTS = np.array(
    [[2.09, -0.98, 1.48, 0.09], [0.05, -0.14, -1.08, 2.12], [-0.91, 1.92, 0, -1.03], [1.87, 0, 1.53, 1.49]], np.float32
)
GRADIENT = np.array(
    [[-0.03, -0.01, 0.03, 0.02], [-0.01, 0.01, -0.02, 0.12], [-0.01, 0.02, 0.04, 0.01], [-0.07, -0.02, 0.01, -0.02]]
)
INDEX = np.array([[3, 0, 2, 1], [1, 1, 0, 3], [0, 3, 1, 0], [3, 1, 2, 2]])
VALUES = np.array([-1.00, 0.00, 1.50, 2.00])


def test_the_figure_of_the_paper() -> None:
    codebooks, clusters = share.cluster({"kernel": WEIGHTS}, values=4)
    np.testing.assert_allclose(codebooks["kernel"], VALUES, atol=1e-6)
    assert (clusters["kernel"] == np.where(WEIGHTS == 0, 0, INDEX + 1)).all()  # our zeros are pruned weights


def test_gradients_are_summed_over_each_cluster() -> None:
    def loss(codebooks):
        return (share.expanded({"kernel": INDEX + 1})(codebooks)["kernel"] * GRADIENT).sum()

    found = jax.grad(loss)({"kernel": jnp.asarray(VALUES, jnp.float32)})["kernel"]
    np.testing.assert_allclose(found, [-0.03, 0.04, 0.02, 0.04], atol=1e-6)  # as printed, from the bottom up


def test_clusters_are_expanded_to_their_values() -> None:
    rng = np.random.default_rng(0)
    params = {
        "a": {"kernel": np.where(rng.random((30, 20)) < 0.3, rng.normal(size=(30, 20)), 0).astype(np.float32)},
        "b": {"kernel": np.zeros((2, 2), np.float32), "bias": np.ones(3, np.float32)},
    }
    codebooks, clusters = share.cluster(params, values=7)
    found = share.expanded(clusters)(codebooks)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    kernel = np.asarray(found["a"]["kernel"])
    assert ((kernel == 0) == (params["a"]["kernel"] == 0)).all()
    assert len(np.unique(kernel[kernel != 0])) <= 7
    assert (found["b"]["kernel"] == 0).all()
    assert (found["b"]["bias"] == 1).all()
    distance = np.abs(params["a"]["kernel"][..., None] - codebooks["a"]["kernel"]).min(-1)
    np.testing.assert_array_equal(np.abs(kernel - params["a"]["kernel"])[kernel != 0], distance[kernel != 0])


weights = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=60)


@given(weights, st.integers(1, 20))
def test_k_means_has_come_to_rest(values: list[float], k: int) -> None:
    points = np.array(values)
    means = share.k_means(points, k)
    assert (np.diff(means) >= 0).all()
    start = np.linspace(points.min(), points.max(), k)
    assert ((points[:, None] - means) ** 2).min(1).sum() <= ((points[:, None] - start) ** 2).min(1).sum() + 1e-9
    nearest = np.searchsorted((means[:-1] + means[1:]) / 2, points)
    for i in np.unique(nearest):
        np.testing.assert_allclose(means[i], points[nearest == i].mean(), rtol=1e-9, atol=1e-9)


def test_k_means_finds_separate_groups_and_keeps_what_has_no_weight() -> None:
    points = np.array([0.0, 0.1, 10.0, 10.2, 10.4], np.float32)
    np.testing.assert_allclose(share.k_means(points, 2), [0.05, 10.2], rtol=1e-6)
    np.testing.assert_allclose(share.k_means(points, 3), [0.05, 5.2, 10.2], rtol=1e-6)
    assert share.k_means(points[:0], 4).tolist() == [0, 0, 0, 0]
    assert share.k_means(points[:1] + 2, 2).tolist() == [2, 2]


def problem(seed: int):
    """A pruned, shared network [40, 3] and what it answers: a batch of [64, 40] and [64, 3]."""
    key = jax.random.key(seed)
    params = prune.smallest({"kernel": jax.random.normal(key, (40, 3)), "bias": jnp.arange(3.0)}, 0.5)
    found = share.cluster(params, values=4)
    x = jax.random.normal(jax.random.fold_in(key, 1), (64, 40))
    answer = share.expanded(found.clusters)(found.codebooks)
    return found, {"x": x, "y": x @ answer["kernel"] + answer["bias"]}


def squares(variables, batch, key):
    p = variables["params"]
    return ((batch["x"] @ p["kernel"] + p["bias"] - batch["y"]) ** 2).mean(), ({}, {})


def sharing(variables, batch, key):
    return losses.with_params(squares, share.expanded(variables["clusters"]))(variables, batch, key)


def trained(step, codebooks, clusters, batch, start):
    variables = {"params": jax.tree.map(lambda value: value / 2, codebooks), "clusters": clusters}
    return fit(step, start(jax.random.key(0), variables), lambda step: batch, steps=100).params


def test_training_finds_the_shared_values_again() -> None:
    tx = optax.sgd(0.01, 0.9)
    start, step = functools.partial(init_state, tx=tx), make_step(sharing, tx)
    problems = [problem(seed) for seed in (0, 1)]
    alone = [trained(step, *found, batch, start) for found, batch in problems]
    for (found, _), params in zip(problems, alone, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-2), params, found.codebooks)

    # The same two as seeds of one state, each with clusters of its own.
    (codebooks, clusters), batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
    both = trained(per_seed(step), codebooks, clusters, batch, lambda key, v: jax.vmap(start, (None, 0))(key, v))
    for i, params in enumerate(alone):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5), both, params)


def test_leaves_may_have_different_numbers_of_values() -> None:
    params = {"b": {"kernel": WEIGHTS, "bias": WEIGHTS[0]}, "a": {"kernel": WEIGHTS}}
    codebooks, clusters = share.cluster(params, values=(2, 4))
    assert [len(codebooks[layer]["kernel"]) for layer in ("a", "b")] == [2, 4]
    np.testing.assert_array_equal(codebooks["b"]["kernel"], share.cluster(params, 4).codebooks["b"]["kernel"])
    np.testing.assert_array_equal(codebooks["b"]["bias"], WEIGHTS[0])
    assert clusters["b"]["bias"] is None
    with pytest.raises(InputError, match=r"values has 3 numbers, expected one for each of the 2 leaves"):
        share.cluster(params, (2, 4, 4))


@pytest.mark.parametrize("values", [0, 257, -1, 2.5])
def test_a_number_of_values_out_of_range(values: int) -> None:
    with pytest.raises(InputError, match=f"values is {values}, expected 1 to 256"):
        share.cluster({"kernel": WEIGHTS}, values)


def test_one_value_is_the_mean_of_the_weights() -> None:
    codebooks, clusters = share.cluster({"kernel": WEIGHTS}, values=1)
    np.testing.assert_allclose(codebooks["kernel"], [WEIGHTS[WEIGHTS != 0].mean()], rtol=1e-6)
    assert (clusters["kernel"] == (WEIGHTS != 0)).all()


def test_weights_that_are_not_finite() -> None:
    with pytest.raises(InputError, match="NaN or infinite"):
        share.cluster({"kernel": np.array([[1, np.nan]], np.float32)}, 2)


def test_nothing_to_share() -> None:
    with pytest.raises(InputError, match="`where` chooses none"):
        share.cluster({"bias": WEIGHTS}, 2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_of_low_precision_are_summed_in_float32(dtype) -> None:
    """In bfloat16 a sum of ones stops at 256."""
    expand = share.expanded(jnp.ones(4096, jnp.int32))
    gradient = jax.grad(lambda book: expand(book).astype(jnp.float32).sum())(jnp.ones(1, dtype))
    assert gradient.dtype == dtype
    assert float(gradient[0]) == 4096


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_low_precision_weights_go_to_the_nearest_value(dtype) -> None:
    """Halfway between two values lies no float16 where these are neighbours, and none where their sum overflows."""
    weights = np.array([1000, 1001, 1002, 60000, 61000], np.float64).astype(dtype)
    codebook, clusters = share.cluster({"kernel": weights}, values=3)
    values = np.asarray(codebook["kernel"], np.float64)
    distances = abs(np.asarray(weights, np.float64)[:, None] - values)
    np.testing.assert_array_equal(distances[np.arange(5), clusters["kernel"] - 1], distances.min(1))
