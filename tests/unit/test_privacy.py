"""DP-SGD: gradients against those of each example, noise by its moments, costs and bounds against their equations."""

import functools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.stats
from sklearn.metrics import roc_auc_score

from dl_jax import classify, privacy
from dl_jax.core.errors import InputError
from dl_jax.core.step import init_state
from dl_jax.models.sequence.rnn import SequenceTagger
from dl_jax.models.vision.mlp import MLP

RNG = np.random.default_rng(0)


class Shared(nn.Module):
    """A table, a product over positions, a convolution with strides, one by groups, and a kernel used twice."""

    @nn.compact
    def __call__(self, image, *, train):
        x = nn.relu(nn.Conv(6, (3, 2), (2, 1), padding="SAME")(image))  # [B, 4, 8, 6]
        x = nn.Conv(6, (3, 3), feature_group_count=2)(x)
        x = nn.LayerNorm()(nn.DenseGeneral((2, 3), axis=(-2, -1))(x))  # [B, 4, 2, 3]
        twice = nn.Dense(3)
        x = twice(jnp.tanh(twice(x)))
        x = x + nn.Embed(5, 3)((image[:, :4, :2, 0] * 5).astype(int))
        return nn.Dense(10)(nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1)))


def batch_of(rows, side=8):
    return {
        "image": RNG.random((rows, side, side, 1), np.float32),
        "label": RNG.integers(0, 10, rows),
        "mask": np.array([1] * (rows - 1) + [0], np.float32),
    }


def by_vmap(loss, clip, params, batch, key):
    """Sum and norms from the gradients of all examples."""
    rows = {name: column for name, column in batch.items() if name != "mask"}

    def one(params, row, key):
        return loss({"params": params}, jax.tree.map(lambda x: x[None], row), key)[0]

    keys = jax.random.split(key, len(batch["mask"]))
    each = jax.vmap(jax.grad(one), (None, 0, 0))(params, rows, keys)
    norms = jnp.sqrt(sum((g**2).reshape(len(g), -1).sum(-1) for g in jax.tree.leaves(each)))
    weight = batch["mask"] * jnp.minimum(1, clip / norms)
    return jax.tree.map(lambda g: jnp.tensordot(weight, g, 1), each), norms


@pytest.mark.parametrize("model", [MLP((12,), dropout=0.5), Shared()], ids=["MLP", "Shared"])
def test_the_sum_of_clipped_gradients_is_that_of_each_examples_gradient(model):
    batch, key = batch_of(6), jax.random.key(1)
    params = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), batch["image"])["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    loss = classify.loss(model.apply)
    clip = 20.0 if isinstance(model, MLP) else 7.0
    expected, norms = jax.jit(functools.partial(by_vmap, loss, clip))(params, batch, key)
    found = jax.jit(privacy.clipped_sum(loss, clip))(params, {}, batch, key)
    np.testing.assert_allclose(found.norms, norms, rtol=1e-5)
    assert 0 < (np.asarray(found.norms) > clip).sum() < 6
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found.total, expected)


def test_of_a_sequence_one_row_for_each_step():
    for width, steps in ((9, 3), (3, 7)):
        model = nn.Dense(width)
        x = RNG.normal(size=(4, steps, width)).astype(np.float32)
        params = {"kernel": RNG.normal(size=(width, width)).astype(np.float32), "bias": np.zeros(width, np.float32)}
        loss = lambda variables, batch, key, model=model: (
            (model.apply(variables, batch["image"]) ** 3).mean(),
            ({}, {}),
        )
        batch = {"image": x, "mask": np.ones(4, np.float32)}
        expected, norms = jax.jit(functools.partial(by_vmap, loss, 1.0))(params, batch, jax.random.key(0))
        found = jax.jit(privacy.clipped_sum(loss, 1.0))(params, {}, batch, jax.random.key(0))
        np.testing.assert_allclose(found.norms, norms, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found.total, expected)


def test_a_norm_is_not_lost_where_rows_are_nearly_the_same():
    """Rows that differ little, with errors that cancel over them: sums of products of rows would be all rounding."""
    x = (100 + 1e-3 * RNG.normal(size=(4, 8, 200))).astype(np.float32)
    error = RNG.normal(size=(8, 200)).astype(np.float32)
    error -= error.mean(0)
    loss = lambda variables, batch, key: (((batch["x"] @ variables["params"]["kernel"]) * error).sum(), ({}, {}))
    batch = {"x": x, "mask": np.ones(4, np.float32)}
    found = jax.jit(privacy.clipped_sum(loss, 1.0))(
        {"kernel": np.zeros((200, 200), np.float32)}, {}, batch, jax.random.key(0)
    )
    expected = [np.linalg.norm(np.float64(each).T @ np.float64(error)) for each in x]
    np.testing.assert_allclose(found.norms, expected, rtol=1e-2)


def test_of_a_recurrent_network():
    model = SequenceTagger(3, hidden=4)
    x = RNG.normal(size=(3, 5, 2)).astype(np.float32)
    params = model.init(jax.random.key(0), x, train=False)["params"]
    loss = lambda variables, batch, key: ((model.apply(variables, batch["image"], train=True)[0] ** 2).sum(), ({}, {}))
    batch = {"image": x, "mask": np.ones(3, np.float32)}
    expected, norms = jax.jit(functools.partial(by_vmap, loss, 1.0))(params, batch, jax.random.key(0))
    found = jax.jit(privacy.clipped_sum(loss, 1.0))(params, {}, batch, jax.random.key(0))
    np.testing.assert_allclose(found.norms, norms, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found.total, expected)


def test_kernels_of_dense_layers_and_convolutions_need_no_gradient_of_each_example():
    """Of the parameters only biases are followed for each example."""
    batch = batch_of(50, side=28)
    model = MLP((300,))
    params = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), batch["image"])["params"]
    traced = jax.make_jaxpr(privacy.clipped_sum(classify.loss(model.apply), 1.0))(params, {}, batch, jax.random.key(0))
    largest = max(np.prod(out.aval.shape) for equation in traced.jaxpr.eqns for out in equation.outvars)
    assert largest < 300 * 784 + 1  # of a kernel, and not of 50


def linear(variables, batch, key):
    """A loss whose gradient is the example."""
    return (batch["image"].reshape(len(batch["label"]), -1) @ variables["params"]["w"]).mean(), ({}, {"two": 2.0})


def stepped(batch, *, clip=1.0, noise=0.0, seed=0, batch_size=2, size=64):
    tx = optax.sgd(1.0)
    step = privacy.private_step(linear, tx, clip=clip, noise=noise, batch_size=batch_size)
    state = init_state(jax.random.key(seed), {"params": {"w": jnp.zeros(size)}}, tx)
    return jax.jit(step)(state, batch)


def test_the_step_is_the_clipped_sum_divided_by_the_size_on_average():
    batch = batch_of(4)
    state, metrics = stepped(batch, clip=4.0, batch_size=5)
    rows = batch["image"].reshape(4, -1)
    norms = np.linalg.norm(rows, axis=1)
    clipped = rows * np.minimum(1, 4.0 / norms)[:, None]
    np.testing.assert_allclose(state.params["w"], -clipped[:3].sum(0) / 5, rtol=1e-5)
    assert state.step == 1
    np.testing.assert_allclose(metrics["clipped"], [(norms[:3] > 4).sum(), 3])
    np.testing.assert_allclose(metrics["two"], [6, 3])
    assert metrics["loss"] == (0, 3)


def test_the_noise_is_normal_with_the_multiplier_and_the_clip_norm():
    """Another one in each step and seed; of an empty batch there is nothing else."""
    batch = {**batch_of(2, side=200), "mask": np.zeros(2, np.float32)}
    state, metrics = stepped(batch, clip=3.0, noise=2.0, batch_size=4, size=40_000)
    draws = np.asarray(state.params["w"]) / (2.0 * 3.0 / 4)
    assert scipy.stats.kstest(draws, "norm").pvalue > 1e-3
    assert metrics["loss"] == (0, 0)
    other, _ = stepped(batch, clip=3.0, noise=2.0, batch_size=4, size=40_000, seed=1)
    assert abs(np.corrcoef(draws, other.params["w"])[0, 1]) < 0.03
    later = privacy.private_step(linear, optax.sgd(1.0), clip=3.0, noise=2.0, batch_size=4)
    start = init_state(jax.random.key(0), {"params": {"w": jnp.zeros(40_000)}}, optax.sgd(1.0))
    then, _ = later(start._replace(step=jnp.int32(1)), batch)
    assert abs(np.corrcoef(draws, then.params["w"])[0, 1]) < 0.03


def test_what_examples_would_leave_without_noise_is_refused():
    model = MLP((4,), batch_norm=True)
    batch = batch_of(3)
    variables = model.init(jax.random.key(0), batch["image"], train=False)
    step = privacy.private_step(classify.loss(model.apply), optax.sgd(1.0), clip=1.0, noise=1.0, batch_size=3)
    with pytest.raises(InputError, match="the loss changes the collection 'batch_stats', expected none"):
        step(init_state(jax.random.key(0), variables, optax.sgd(1.0)), batch)
    with pytest.raises(InputError, match=r"the batch has no column .mask., expected that of `data\.poisson`"):
        step(init_state(jax.random.key(0), variables, optax.sgd(1.0)), {"image": batch["image"]})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clip": 0.0}, "clip is 0.0, expected more than 0"),
        ({"clip": -1.0}, "clip is -1.0, expected more than 0"),
        ({"noise": -0.1}, "noise is -0.1, expected a multiplier of at least 0"),
        ({"batch_size": 0}, "batch_size is 0, expected more than 0"),
    ],
)
def test_a_step_that_cannot_be(given, message):
    with pytest.raises(InputError, match=message):
        privacy.private_step(linear, optax.sgd(1.0), **{"clip": 1.0, "noise": 1.0, "batch_size": 2, **given})


def gaussian_delta(epsilon, noise):
    """Of one Gaussian mechanism (Balle & Wang 2018, arXiv:1805.06530, theorem 8)."""
    half, ratio = 1 / (2 * noise), epsilon * noise
    return scipy.stats.norm.cdf(half - ratio) - np.exp(epsilon) * scipy.stats.norm.cdf(-half - ratio)


def gaussian_epsilon(noise, delta):
    return scipy.optimize.brentq(lambda e: gaussian_delta(e, noise) - delta, 0, 100)


def test_epsilon_of_gaussian_mechanisms_on_all_records():
    """With a sampling rate of 1, k mechanisms are one whose noise is divided by the root of k."""
    for noise, steps, once in ((2.0, 1, ()), (8.0, 9, ()), (8.0, 9, (5.0, 7.0))):
        total = (steps / noise**2 + sum(1 / each**2 for each in once)) ** -0.5
        found = privacy.epsilon(noise, privacy.Releases(1.0, steps, once), 1e-5)
        assert gaussian_epsilon(total, 1e-5) <= found <= gaussian_epsilon(total, 1e-5) + 0.02


def test_sampling_amplifies():
    """Of one step, δ is exactly that of a mixture (both directions, by integration)."""
    noise, q, delta = 1.0, 0.2, 1e-3
    x = np.linspace(-12, 13, 200_001)
    without = scipy.stats.norm.pdf(x, 0, noise)
    with_it = (1 - q) * without + q * scipy.stats.norm.pdf(x, 1, noise)
    spent = lambda p, r, e: np.trapezoid(np.maximum(p - np.exp(e) * r, 0), x)
    worst = lambda e: max(spent(with_it, without, e), spent(without, with_it, e)) - delta
    exact = scipy.optimize.brentq(worst, 0, 10)
    found = privacy.epsilon(noise, privacy.Releases(q, 1), delta)
    assert exact <= found <= exact + 0.01


def test_a_sample_without_a_place_takes_its_part_of_delta():
    plain = privacy.Releases(0.04, 50)
    free, some = (privacy.epsilon(1.0, plain._replace(overflow=p), 1e-5) for p in (0.0, 1e-9))
    most = free + 1
    assert free < some <= privacy.epsilon(1.0, plain, 1e-5 - (1 + np.exp(most)) * 50 * 1e-9) + 1e-9
    assert privacy.epsilon(1.0, plain._replace(overflow=1e-6), 1e-5) == np.inf


def test_the_noise_for_an_epsilon_is_hardly_more_than_is_needed():
    releases = privacy.Releases(0.02, 100, (7.0,))
    noise = privacy.noise_for(2.0, releases, 1e-5)
    assert privacy.epsilon(noise, releases, 1e-5) <= 2.0 < privacy.epsilon(0.99 * noise, releases, 1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda of: privacy.noise_for(0.2, of._replace(on_all=(7.0,)), 1e-5), "epsilon is 0.2, expected at least 0.5"),
        (
            lambda of: privacy.noise_for(2.0, of._replace(overflow=1e-3), 1e-5),
            "one of 2 steps with a probability of up to 2.0e-03, expected far less than delta, 1e-05",
        ),
        (lambda of: privacy.noise_for(0.0, of, 1e-5), "epsilon is 0.0, expected more than 0"),
        (lambda of: privacy.epsilon(1.0, of._replace(rate=1.5), 1e-5), "the sampling rate is 1.5, expected at most 1"),
        (lambda of: privacy.epsilon(1.0, of._replace(rate=0.0), 1e-5), "rate is 0.0, expected more than 0"),
        (lambda of: privacy.epsilon(1.0, of._replace(steps=0), 1e-5), "steps is 0, expected more than 0"),
        (lambda of: privacy.epsilon(0.0, of, 1e-5), "noise is 0.0, expected more than 0"),
        (lambda of: privacy.epsilon(1.0, of, 0.0), "delta is 0, expected more than 0 and less than 1"),
        (lambda of: privacy.epsilon(1.0, of, 1.0), "delta is 1, expected more than 0 and less than 1"),
    ],
)
def test_costs_that_cannot_be(call, message):
    with pytest.raises(InputError, match=message):
        call(privacy.Releases(0.1, 2))


def test_without_dp_accounting_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(InputError, match=r"an accountant needs dp_accounting, .* run: pip install -e '\.\[private\]'"):
        privacy.epsilon(1.0, privacy.Releases(0.1, 2), 1e-5)


def test_an_example_more_changes_the_second_moments_by_one():
    x = RNG.integers(0, 256, (30, 3, 3, 1)).astype(np.uint8)
    change = privacy.second_moments(x) - privacy.second_moments(x[1:])
    np.testing.assert_allclose(np.linalg.norm(change), 1, rtol=1e-5)
    np.testing.assert_allclose(privacy.normalised(np.zeros((2, 3), np.float32)), 0)


def test_principal_axes_are_eigenvectors_of_noisy_moments():
    moments = np.diag([1.0, 100.0, 5.0, 40.0])
    found = privacy.principal_axes(moments, 2, 1e-6, 0)
    np.testing.assert_allclose(np.abs(found), np.eye(4)[:, [1, 3]], atol=1e-4)
    noisy = [privacy.principal_axes(np.zeros((50, 50)), 50, 3.0, seed).astype(float) for seed in (0, 1)]
    assert np.abs(noisy[0] - noisy[1]).max() > 0.1
    np.testing.assert_allclose(noisy[0].T @ noisy[0], np.eye(50), atol=1e-5)


def test_noise_of_moments_has_the_multiplier(monkeypatch):
    seen = []
    monkeypatch.setattr(np.linalg, "eigh", lambda a: seen.append(a) or (None, np.eye(len(a))))
    privacy.principal_axes(np.ones((200, 200)), 3, 3.0, 0)
    noise = (seen[0] - 1) / 3
    np.testing.assert_array_equal(noise, noise.T)
    assert scipy.stats.kstest(noise[np.triu_indices(200)], "norm").pvalue > 1e-3


@pytest.mark.parametrize(
    ("given", "message"),
    [((5, 1.0), "5 principal axes of 4 features, expected 1 to 4"), ((2, 0.0), "noise is 0.0, expected more than 0")],
)
def test_axes_that_cannot_be(given, message):
    with pytest.raises(InputError, match=message):
        privacy.principal_axes(np.eye(4), *given, 0)


def test_the_area_of_an_attack_is_that_of_scikit_learn_also_with_ties():
    members, others = RNG.integers(0, 5, 60) + 1.0, RNG.integers(0, 5, 40)
    labels = np.repeat([1, 0], [60, 40])
    expected = roc_auc_score(labels, np.concatenate([members, others]))
    false, true = privacy.roc(members, others)
    assert privacy.area((false, true)) == pytest.approx(expected)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert true[1] == (members == 5).mean()


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.0), (0.5, 1e-5), (2.0, 0.1)])
def test_bounds_of_attacks_are_those_of_randomised_response(epsilon, delta):
    """Which tells membership outright with probability δ, and otherwise with e^ε to 1."""
    right = np.exp(epsilon) / (1 + np.exp(epsilon))
    true, false = delta + (1 - delta) * right, (1 - delta) * (1 - right)
    assert privacy.most_advantage(epsilon, delta) == pytest.approx(true - false)
    assert privacy.most_true_positives(np.array(false), epsilon, delta) == pytest.approx(true)
    grid = np.linspace(0, 1, 10_001)
    gain = privacy.most_true_positives(grid, epsilon, delta) - grid
    assert gain.max() == pytest.approx(privacy.most_advantage(epsilon, delta), abs=1e-3)
    assert privacy.most_true_positives(np.array(0.0), epsilon, delta) == pytest.approx(delta)


def test_without_privacy_everything_may_be_told():
    assert privacy.most_advantage(1000.0, 1e-5) == privacy.most_advantage(np.inf, 0.0) == 1
