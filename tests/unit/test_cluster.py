"""dl_jax/cluster.py: k-means and EM against scikit-learn, and against sums that are written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax import cluster
from dl_jax.core.errors import InputError
from dl_jax.core.fit import fit
from dl_jax.core.step import holding, plain_state
from dl_jax.core.stream import no_data

RNG = np.random.default_rng(0)
MIDDLES = np.array([[0.0, 0, 0], [6, 0, 1], [0, 7, -1], [5, 5, 5]])
BLOBS = (MIDDLES[RNG.integers(0, 4, 300)] + RNG.normal(size=(300, 3)) * [1, 0.5, 2]).astype(np.float32)


def test_kmeans_ends_where_scikit_learn_does():
    from sklearn.cluster import KMeans

    centres = jnp.asarray(BLOBS[None, [3, 70, 150, 200]])  # one restart
    state = fit(holding(cluster.kmeans, BLOBS), plain_state(jax.random.key(0), centres), no_data, steps=30, every=30)
    theirs = KMeans(4, init=np.asarray(centres[0]), n_init=1, tol=0, algorithm="lloyd").fit(BLOBS)
    ours, clusters = cluster.best(BLOBS, state.params)
    np.testing.assert_allclose(ours, theirs.cluster_centers_, atol=1e-4)
    np.testing.assert_array_equal(clusters, theirs.labels_)


def test_no_pass_raises_the_inertia_and_the_best_restart_is_taken():
    state = plain_state(jax.random.key(0), cluster.spread(BLOBS, 5, jax.random.key(1), restarts=3))
    values = lambda centres: ((BLOBS[:, None] - np.asarray(centres)[..., None, :, :]) ** 2).sum(-1).min(-1).mean(-1)
    step = jax.jit(cluster.kmeans)
    before = values(state.params)  # [R]
    for i in range(6):
        state, measured = step(BLOBS, state, {})
        np.testing.assert_allclose(measured["inertia"], before.min(), rtol=1e-4)
        after = values(state.params)
        assert (after <= before + 1e-4).all()
        before = after
        assert state.step == i + 1
    centres, clusters = cluster.best(BLOBS, state.params)
    np.testing.assert_array_equal(centres, state.params[before.argmin()])
    distances = ((BLOBS[:, None] - np.asarray(centres)) ** 2).sum(-1)
    np.testing.assert_array_equal(clusters, distances.argmin(-1))


def test_empty_clusters_move_to_the_farthest_points():
    """Two of four centres have no point: they become the farthest point and the second farthest, in this order."""
    x = np.array([[0.0], [1], [2], [10], [14]], np.float32)
    centres = np.array([[[-100.0], [1], [500], [11]]], np.float32)  # the points are 1, 0, 1, 1 and 3 away
    state, _ = cluster.kmeans(x, plain_state(jax.random.key(0), jnp.asarray(centres)), {})
    assert state.params[0, 1, 0] == 1
    assert state.params[0, 3, 0] == 12
    assert state.params[0, 0, 0] == 14
    assert state.params[0, 2, 0] in (0, 2, 10)  # equally far


def test_equal_points_leave_finite_centres():
    x = np.zeros((4, 2), np.float32)
    centres = cluster.spread(x, 3, jax.random.key(0))
    state, measured = cluster.kmeans(x, plain_state(jax.random.key(0), centres), {})
    np.testing.assert_array_equal(state.params, np.zeros((1, 3, 2)))
    assert measured["inertia"] == 0


def test_centres_to_begin_with_are_points_in_proportion_to_the_squared_distance():
    x = np.array([[0.0], [1], [4]], np.float32)
    first, second = np.asarray(cluster.spread(x, 2, jax.random.key(0), restarts=6000))[..., 0].T  # [R] each
    assert {*first} == {*second} == {0, 1, 4}
    for value, others in ((0, {1: 1 / 17, 4: 16 / 17}), (1, {0: 1 / 10, 4: 9 / 10}), (4, {0: 16 / 25, 1: 9 / 25})):
        assert abs((first == value).mean() - 1 / 3) < 0.03
        for other, share in others.items():
            assert abs((second[first == value] == other).mean() - share) < 0.05


def test_as_many_clusters_as_points_are_all_points():
    x = RNG.normal(size=(6, 2)).astype(np.float32)
    centres = np.asarray(cluster.spread(x, 6, jax.random.key(0)))[0]
    np.testing.assert_array_equal(np.sort(centres[:, 0]), np.sort(x[:, 0]))


def test_distances_do_not_lose_what_points_far_from_0_have_in_common():
    x, centres = np.random.default_rng(4).normal(size=(2, 7, 3)).astype(np.float32)
    expected = ((x[:, None] - centres) ** 2).sum(-1)
    shifted = cluster.squares(jnp.asarray(x + np.float32(1024)), jnp.asarray(centres + np.float32(1024)))
    np.testing.assert_allclose(shifted, expected, atol=2e-3)


@pytest.mark.parametrize("clusters", [-1, 0, 7])
def test_no_clusters_and_more_clusters_than_points(clusters):
    with pytest.raises(InputError, match=rf"^clusters is {clusters}, expected 1 to 6, the number of points; change it"):
        cluster.spread(np.zeros((6, 2), np.float32), clusters, jax.random.key(0))


def test_no_restarts():
    with pytest.raises(InputError, match=r"^restarts is 0, expected"):
        cluster.spread(BLOBS, 2, jax.random.key(0), restarts=0)


@pytest.mark.parametrize(
    ("clusters", "message"),
    [
        ([0, 2, 1], r"^point 1 is in cluster 2, expected one of 0 to 1; give another number$"),
        ([0, 1, -1], r"^point 2 is in cluster -1, expected one of 0 to 1; give"),
        ([0, 1], r"^clusters are int64 \(2,\), expected int \(3,\), one of each point$"),
        ([0.0, 1.0, 1.0], r"^clusters are float64 \(3,\), expected int \(3,\)"),
    ],
)
def test_clusters_that_no_component_has(clusters, message):
    """A negative one would be counted from the end otherwise."""
    with pytest.raises(InputError, match=message):
        cluster.from_clusters(BLOBS[:3], np.array(clusters), 2)


def test_a_mixture_is_scikit_learns():
    from sklearn.mixture import GaussianMixture

    clusters = ((BLOBS[:, 0] > 3) + 2 * (BLOBS[:, 1] > 3)).astype(int)
    first = cluster.from_clusters(BLOBS, clusters, 4)
    np.testing.assert_allclose(first.weight, np.bincount(clusters) / 300, atol=1e-5)
    for k in range(4):
        np.testing.assert_allclose(first.mean[k], BLOBS[clusters == k].mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(first.covariance[k], np.cov(BLOBS[clusters == k].T, bias=True), rtol=1e-3, atol=1e-4)
    state = plain_state(jax.random.key(0), first)
    state = fit(holding(cluster.mixture, BLOBS), state, no_data, steps=8, every=8)
    ridge = cluster.RIDGE * BLOBS.var(0).mean()
    weight, mean, covariance = (np.asarray(each, np.float64) for each in first)
    theirs = GaussianMixture(
        4,
        reg_covar=ridge,
        max_iter=8,
        tol=0,
        weights_init=weight / weight.sum(),
        means_init=mean,
        precisions_init=np.linalg.inv(covariance),
    )
    with pytest.warns(UserWarning, match="did not converge"):
        theirs.fit(BLOBS.astype(np.float64))
    np.testing.assert_allclose(state.params.weight, theirs.weights_, atol=1e-3)
    np.testing.assert_allclose(state.params.mean, theirs.means_, atol=5e-3)
    np.testing.assert_allclose(state.params.covariance, theirs.covariances_, atol=2e-2)
    density = jax.nn.logsumexp(cluster.log_joint(state.params, BLOBS), -1)
    np.testing.assert_allclose(density, theirs.score_samples(BLOBS), atol=5e-3)


def test_no_iteration_lowers_the_likelihood_of_a_mixture():
    state = plain_state(jax.random.key(0), cluster.from_clusters(BLOBS, np.arange(300) % 3, 3))
    step, seen = jax.jit(cluster.mixture), []
    for _ in range(25):
        state, measured = step(BLOBS, state, {})
        seen.append(float(measured["log_likelihood"]))
    assert (np.diff(seen) > -1e-4).all()
    assert seen[-1] > seen[0] + 0.1
    assert float(state.params.weight.sum()) == pytest.approx(1, abs=1e-5)


def test_a_component_without_points_leaves_finite_numbers():
    state = plain_state(jax.random.key(0), cluster.from_clusters(BLOBS, np.zeros(300, int), 2))
    state, measured = cluster.mixture(BLOBS, state, {})
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, measured)))
    assert state.params.weight[1] < 1e-6


@pytest.mark.parametrize("value", [0.0, 0.1, -3.5e4])
def test_a_constant_feature_has_no_density(value):
    x = np.concatenate([BLOBS, np.full((300, 1), value, np.float32)], 1)
    expected = f"^feature 3 of all points is {value:g} up to rounding, expected different numbers: a Gaussian has no"
    with pytest.raises(InputError, match=expected):
        cluster.from_clusters(x, np.arange(300) % 2, 2)


@pytest.mark.parametrize(
    "begin",
    [lambda x: cluster.spread(x, 1, jax.random.key(0)), lambda x: cluster.from_clusters(x, np.zeros(2, int), 1)],
    ids=["kmeans", "mixture"],
)
def test_points_that_are_not_finite(begin):
    with pytest.raises(InputError, match=r"^feature 0 of point 1 is nan, expected a finite number; leave it out$"):
        begin(np.array([[0.0, 1], [np.nan, 2]], np.float32))


def test_soft_assignments_and_targets_are_the_papers():
    z, centres = RNG.normal(size=(5, 2)), RNG.normal(size=(3, 2))
    kernel = np.array([[1 / (1 + ((a - b) ** 2).sum()) for b in centres] for a in z])
    q = kernel / kernel.sum(1, keepdims=True)
    np.testing.assert_allclose(cluster.soft(z.astype(np.float32), centres.astype(np.float32)), q, rtol=1e-5)
    weight = q**2 / q.sum(0)
    np.testing.assert_allclose(cluster.sharpened(q), weight / weight.sum(1, keepdims=True), rtol=1e-5)
