"""dl_jax/rbm.py: steps without gradients, the partition function and its estimate, against enumeration in float64."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from dl_jax import data, rbm
from dl_jax.core.errors import InputError
from dl_jax.core.fit import fit
from dl_jax.core.recorder import NonFiniteError
from dl_jax.core.step import per_seed
from dl_jax.harness.run import Preempted, Run, Settings

D, H = 6, 4
RNG = np.random.default_rng(0)
PARAMS = {
    name: RNG.normal(size=shape).astype(np.float32)
    for name, shape in {"weight": (D, H), "visible": (D,), "hidden": (H,)}.items()
}
IMAGES = RNG.integers(0, 256, (24, 3, 2, 1)).astype(np.uint8)


def states(n: int) -> np.ndarray:  # [2^n, n]
    return np.array([*itertools.product((0.0, 1.0), repeat=n)])


def log_joint() -> np.ndarray:
    """−E(v, h) of all states, float64 [2^D, 2^H]."""
    v, h = states(D), states(H)
    own = (v @ PARAMS["visible"])[:, None] + h @ PARAMS["hidden"]
    return own + v @ PARAMS["weight"].astype(np.float64) @ h.T


def test_the_partition_function_and_the_free_energy_are_sums_over_states():
    joint = log_joint()
    np.testing.assert_allclose(rbm.log_partition(PARAMS), np.log(np.exp(joint).sum()), rtol=1e-5)
    np.testing.assert_allclose(rbm.free_energy(PARAMS, states(D)), -np.log(np.exp(joint).sum(1)), rtol=1e-4)


def test_the_partition_function_of_many_units_is_summed_in_parts(monkeypatch):
    whole = rbm.log_partition(PARAMS)
    monkeypatch.setattr(rbm, "_LOW", 1)
    np.testing.assert_allclose(rbm.log_partition(PARAMS), whole, rtol=1e-6)


def test_the_conditional_means_are_those_of_the_joint_distribution():
    p = np.exp(log_joint())
    of_h = (p[:, :, None] * states(H)).sum(1) / p.sum(1)[:, None]
    of_v = (p[:, :, None] * states(D)[:, None]).sum(0) / p.sum(0)[:, None]
    np.testing.assert_allclose(rbm.hidden_mean(PARAMS, states(D)), of_h, atol=1e-5)
    np.testing.assert_allclose(rbm.visible_mean(PARAMS, states(H)), of_v, atol=1e-5)


def test_gibbs_sampling_has_the_joint_distribution_as_its_limit():
    chains = 20_000
    v, h = jax.jit(rbm.gibbs, static_argnums=3)(PARAMS, jnp.zeros((chains, H)), jax.random.key(0), 30)
    code = lambda x: np.asarray(x) @ 2 ** np.arange(x.shape[1])[::-1]
    p = np.exp(log_joint())
    p /= p.sum()
    # v is drawn before h, so both are from the limit.
    for found, expected in ((code(v), p.sum(1)), (code(h), p.sum(0))):
        share = np.bincount(found.astype(int), minlength=len(expected)) / chains
        assert (np.abs(share - expected) < 5 * np.sqrt(expected / chains) + 1e-3).all()


def test_the_estimate_of_the_partition_function_is_right_within_its_error():
    base = np.array([0.3, -1.0, 0.0, 0.5, 2.0, -0.5], np.float32)
    betas = rbm.temperatures(200)
    found = jax.jit(rbm.annealed_importance, static_argnums=4)(PARAMS, base, jax.random.key(1), betas, 500)
    estimate, error = rbm.log_partition_estimate(found.log_weights)
    assert 0 < error < 0.05
    assert abs(estimate - np.log(np.exp(log_joint()).sum())) < 4 * error


def test_of_a_machine_without_weights_one_temperature_is_exact():
    """All weights are then the ratio of the partition functions, as v has the same distribution throughout."""
    params = PARAMS | {"weight": np.zeros((D, H), np.float32), "hidden": np.zeros(H, np.float32)}
    found = rbm.annealed_importance(params, params["visible"], jax.random.key(0), rbm.temperatures(2), 3)
    np.testing.assert_allclose(found.log_weights, rbm.log_partition(params), rtol=1e-5)
    np.testing.assert_allclose(found.visible, jax.nn.sigmoid(np.tile(params["visible"], (3, 1))), rtol=1e-5)


def test_the_error_of_an_estimate_is_that_of_the_mean_weight():
    log_weights = np.array([1000.0, 1001.0, 999.0])
    weights = np.exp(log_weights - 1000)
    value, error = rbm.log_partition_estimate(log_weights)
    np.testing.assert_allclose(value, 1000 + np.log(weights.mean()))
    np.testing.assert_allclose(error, weights.std(ddof=1) / np.sqrt(3) / weights.mean())


def test_temperatures_are_the_papers():
    found = rbm.temperatures(14_501)
    np.testing.assert_allclose(found[[0, 250, 500, 4500, 14_500]], [0, 0.25, 0.5, 0.9, 1], atol=1e-6)
    assert (np.diff(found) > 0).all()
    with pytest.raises(InputError, match="1 temperatures, expected 2 or more"):
        rbm.temperatures(1)


@pytest.mark.parametrize("persistent", [False, True])
def test_a_step_follows_the_difference_of_means(persistent):
    tx = optax.sgd(0.5)
    state = rbm.start(PARAMS["visible"], H, tx, jax.random.key(3), chains=24 if persistent else 0)
    state = state._replace(params=jax.tree.map(jnp.asarray, PARAMS))
    new, metrics = jax.jit(rbm.contrastive_divergence(tx, k=2))(state, {"image": IMAGES})
    key_x, key_h, key_gibbs = jax.random.split(jax.random.fold_in(state.key, 0), 3)
    x = np.asarray(jax.random.bernoulli(key_x, IMAGES.reshape(24, D) / 255), np.float64)
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    mean = sigmoid(PARAMS["hidden"] + x @ PARAMS["weight"])
    drawn = jax.random.bernoulli(key_h, jnp.asarray(mean, jnp.float32)).astype(jnp.float32)
    v, h = rbm.gibbs(PARAMS, state.extra["chain"]["hidden"] if persistent else drawn, key_gibbs, 2)
    negative = sigmoid(PARAMS["hidden"] + v @ PARAMS["weight"])
    expected = {
        "weight": (x.T @ mean - v.T @ negative) / 24,
        "visible": (x - v).mean(0),
        "hidden": (mean - negative).mean(0),
    }
    for name, change in expected.items():
        np.testing.assert_allclose(new.params[name], PARAMS[name] + 0.5 * change, atol=1e-5)
    np.testing.assert_allclose(metrics["reconstruction"], ((x - v) ** 2).sum(1).mean(), rtol=1e-5)
    assert new.step == 1
    if persistent:
        np.testing.assert_array_equal(new.extra["chain"]["hidden"], h)
    else:
        assert new.extra == {}


def test_images_go_up_through_the_machines_below():
    """The weights do not matter for the visible biases' gradient, so it shows what the step saw."""
    tx = optax.sgd(1.0)
    certain = {"weight": np.zeros((D, H), np.float32), "visible": np.zeros(D), "hidden": np.array([99.0, -99, 99, -99])}
    second = {"weight": 1000 * np.eye(H, 3, dtype=np.float32), "visible": np.zeros(H), "hidden": np.full(3, -500.0)}
    state = rbm.start(np.full(3, -99.0), 2, tx, jax.random.key(0))
    state = state._replace(extra={"below": {"0": certain, "1": second}})
    new, _ = jax.jit(rbm.contrastive_divergence(tx))(state, {"image": IMAGES})
    np.testing.assert_allclose(new.params["visible"] + 99, [1, 0, 1], atol=1e-6)
    assert new.extra.keys() == {"below"}


def test_learning_raises_the_likelihood_and_resumes_with_its_chains(tmp_path):
    """Two seeds of persistent CD on rows of which half are a pattern and half its complement."""
    pattern = np.array([1, 0, 1, 1, 0, 0], np.float32)
    rows = np.stack([pattern, 1 - pattern] * 16)
    tx = optax.sgd(optax.linear_schedule(0.1, 0, 400), 0.9)
    begin = lambda key: rbm.start(np.zeros(D), H, tx, key, chains=64)
    first = jax.jit(jax.vmap(begin))(jax.random.split(jax.random.key(0), 2))
    step, stream = per_seed(rbm.contrastive_divergence(tx, k=5)), data.shuffled({"image": rows}, 64, (0, 1))
    train = lambda run=None: fit(step, first, stream, steps=400, run=run, carried=("chain",))
    whole = train()
    settings = Settings(preempted=lambda step: step == 99)
    with pytest.raises(Preempted), contextlib.closing(Run(epath.Path(tmp_path), settings)) as run:
        train(run)
    with contextlib.closing(Run(epath.Path(tmp_path))) as run:
        resumed = train(run)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(resumed.params), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(whole.extra["chain"]["hidden"], resumed.extra["chain"]["hidden"])
    for i in range(2):
        params = jax.tree.map(lambda leaf, i=i: leaf[i], whole.params)
        likelihood = float(-rbm.free_energy(params, rows).mean() - rbm.log_partition(params))
        assert -D * np.log(2) + 1 < likelihood < -np.log(2)  # better than each unit by itself, and not more than all


def test_values_outside_the_unit_interval_are_refused():
    pixels = np.array([[0.0, 0.5], [3.0, 1.0]])
    expected = "Bernoulli units have values from 0 to 3, expected numbers in .0, 1.; divide pixels by 255"
    with pytest.raises(InputError, match=f"^{expected}$"):
        rbm.binarised(jax.random.key(0), pixels)
    found = jax.jit(rbm.binarised)(jax.random.key(0), pixels)
    np.testing.assert_array_equal(np.isnan(found).all(1), [False, True])


def test_a_fit_on_values_outside_the_unit_interval_ends():
    tx = optax.sgd(0.1)
    state = rbm.start(np.zeros(D), H, tx, jax.random.key(0))
    with pytest.raises(NonFiniteError):
        fit(rbm.contrastive_divergence(tx), state, lambda i: {"image": np.full((4, D), 2.0, np.float32)}, steps=1)


def test_many_hidden_units_are_not_enumerated():
    params = {"weight": np.zeros((D, 26)), "visible": np.zeros(D), "hidden": np.zeros(26)}
    with pytest.raises(InputError, match=r"26 hidden units has 2\^26 terms, expected at most 25 units; estimate it"):
        rbm.log_partition(params)


def test_biases_are_the_logits_of_means():
    np.testing.assert_allclose(jax.nn.sigmoid(rbm.logits(np.array([0.3, 0.0, 1.0]))), [0.3, 0.001, 0.999], rtol=1e-5)
