"""The eight schools: the density against its equations, and what is measured, by hand."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dl_jax.core.errors import InputError
from dl_jax.core.step import init_state, make_step

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def schools(load_experiment):
    return load_experiment("learning/eight_schools")


def test_the_potential_is_minus_the_log_joint_density(schools):
    """With log τ as the variable, whose density has the factor τ."""
    of = schools.posterior()
    mu, log_tau, z = 3.0, 0.7, RNG.normal(size=8)
    tau = np.exp(log_tau)
    log_density = scipy.stats.norm.logpdf(mu, 0, 5) + scipy.stats.halfcauchy.logpdf(tau, 0, 5) + log_tau
    log_density += scipy.stats.norm.logpdf(z).sum()
    log_density += scipy.stats.norm.logpdf(schools.EFFECTS, mu + tau * z, schools.ERRORS).sum()
    free = {"mu": jnp.float32(mu), "tau": jnp.float32(log_tau), "z": jnp.asarray(z, jnp.float32)}
    np.testing.assert_allclose(of.potential(free), -log_density, rtol=1e-5)
    found = schools.named({name: np.asarray(each) for name, each in of.constrained(free).items()})
    assert list(found) == list(schools.REFERENCE)
    np.testing.assert_allclose([found["tau"], found["theta8"]], [tau, mu + tau * z[7]], rtol=1e-5)


def test_variational_inference_of_a_gaussian_with_independent_variables_is_exact(schools):
    mean, deviation = np.array([2.0, -1.0]), np.array([0.5, 3.0])
    potential = lambda x: (((x["a"] - mean) / deviation) ** 2).sum() / 2
    params = {"mean": {"a": jnp.zeros(2)}, "log_deviation": {"a": jnp.full(2, -1.0)}}
    tx = schools.optax.adam(schools.optax.cosine_decay_schedule(0.05, 1500))
    step = make_step(lambda *given: schools.loss(potential, 20, *given), tx)
    state = init_state(jax.random.key(0), {"params": params}, tx)
    state, _ = jax.lax.scan(lambda state, _: step(state, {}), state, None, 1500)
    np.testing.assert_allclose(state.params["mean"]["a"], mean, atol=0.05)
    np.testing.assert_allclose(jnp.exp(state.params["log_deviation"]["a"]), deviation, rtol=0.05)


def test_draws_have_the_moments_and_are_independent(schools):
    params = {
        "mean": {"a": jnp.float32(2), "b": jnp.float32(2)},
        "log_deviation": {"a": jnp.log(3.0), "b": jnp.log(3.0)},
    }
    found = schools.draws(params, jax.random.key(0), 20_000)
    np.testing.assert_allclose([each.mean() for each in found.values()], 2, atol=0.1)
    np.testing.assert_allclose(np.cov(found["a"], found["b"]), 9 * np.eye(2), atol=0.3)


def test_a_distance_is_in_combined_standard_errors(schools):
    """Of independent draws, whose effective number is their number."""
    draws = {name: mean + RNG.normal(size=(4, 2000)) for name, (mean, _) in schools.REFERENCE.items()}
    draws["tau"] = draws["tau"] - draws["tau"].mean() + 3.60206 + 5 * np.hypot(0.03186, 1 / np.sqrt(8000))
    distance, r_hat = schools.judged(draws)
    assert distance["tau"] == pytest.approx(5, rel=0.03)
    assert max(each for name, each in distance.items() if name != "tau") < 3
    assert 0.99 < r_hat < 1.01
    draws["mu"][0] += 3  # a chain that has not mixed
    assert schools.judged(draws)[1] > 1.5


def test_without_numpyro_it_says_what_to_install(schools, monkeypatch):
    monkeypatch.setitem(sys.modules, "numpyro", None)
    with pytest.raises(
        InputError,
        match=r"the model of the schools needs numpyro, .* run: pip install -e '\.\[bayes",
    ):
        schools.posterior()
