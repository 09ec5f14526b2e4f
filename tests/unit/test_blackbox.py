"""Estimates of gradients from values, against functions whose gradients are known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax import blackbox
from dl_jax.core.errors import InputError

RNG = np.random.default_rng(0)
SLOPE = {"w": RNG.normal(size=(2, 3)).astype(np.float32), "b": RNG.normal(size=2).astype(np.float32)}
PARAMS = {"w": jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32), "b": jnp.zeros(2)}
ROOT = RNG.normal(size=(8, 8)).astype(np.float32)


def flat(tree):
    return jnp.concatenate(
        [tree["b"].reshape(*tree["b"].shape[:-1], -1), tree["w"].reshape(*tree["w"].shape[:-2], -1)], -1
    )


def linear(params):
    return (params["w"] * SLOPE["w"]).sum() + params["b"] @ SLOPE["b"] + 3


def quadratic(params):
    return ((ROOT @ flat(params)) ** 2).sum() / 2


def tree_of(rows):  # [n, 8]
    return {"b": jnp.asarray(rows[:, :2], jnp.float32), "w": jnp.asarray(rows[:, 2:].reshape(-1, 2, 3), jnp.float32)}


def close(found, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


@pytest.mark.parametrize(
    "rows",
    [
        np.array(list(itertools.product((1.0, -1.0), repeat=8))),
        np.sqrt(8) * np.linalg.qr(RNG.normal(size=(8, 8)))[0],
    ],
    ids=["all signs", "orthogonal directions"],
)
def test_a_linear_function_is_exact_in_the_mean_over_directions(rows):
    directions = tree_of(rows)
    values = blackbox.on_both_sides(linear, PARAMS, directions, 0.1)
    for row, pair in zip(rows[:5], values[:5], strict=True):
        moved = [jax.tree.map(lambda p, d, s=s: p + s * d[0], PARAMS, tree_of(row[None])) for s in (0.1, -0.1)]
        np.testing.assert_allclose(pair, [linear(each) for each in moved], rtol=1e-5)
    close(blackbox.along(values / 0.1, directions), SLOPE, atol=2e-5)


def test_spsa_by_its_equation():
    value, grads = jax.jit(lambda key: blackbox.spsa(0.2)(quadratic, PARAMS, key))(jax.random.key(3))
    signs = jax.tree.map(lambda d: d[0], blackbox.drawn(jax.random.rademacher, PARAMS, jax.random.key(3), 1))
    up, down = (quadratic(jax.tree.map(lambda p, d, s=s: p + s * d, PARAMS, signs)) for s in (0.2, -0.2))
    np.testing.assert_allclose(value, (up + down) / 2, rtol=1e-5)
    close(grads, jax.tree.map(lambda d: (up - down) / 0.4 / d, signs), rtol=1e-4)


def unranked(size, pairs):
    """Evolution strategies without ranks, whose mean is the gradient of a quadratic function."""

    def estimate(value, params, key):
        noise = blackbox.drawn(jax.random.normal, params, key, pairs)
        return 0, blackbox.along(blackbox.on_both_sides(value, params, noise, size) / size, noise)

    return estimate


@pytest.mark.parametrize("estimate", [blackbox.spsa(0.5), unranked(0.5, 3)], ids=["spsa", "evolution"])
def test_an_estimate_is_unbiased_on_a_quadratic_function(estimate):
    """The mean of 4,000 estimates is within 4 of its standard errors of the gradient."""
    keys = jax.random.split(jax.random.key(0), 4000)
    found = np.asarray(flat(jax.jit(jax.vmap(lambda key: estimate(quadratic, PARAMS, key)[1]))(keys)), np.float64)
    expected = flat(jax.grad(quadratic)(PARAMS))
    error = found.std(0) / np.sqrt(len(found))
    assert (abs(found.mean(0) - expected) < 4 * error).all()
    assert (error < 0.1 * np.linalg.norm(expected)).all()  # a mean of 0 would be seen


def test_ranks_stand_values_that_are_infinite():
    ranks = blackbox.centred_ranks(jnp.array([[3.0, -jnp.inf], [jnp.inf, 3.0]]))
    np.testing.assert_allclose(ranks, [[0, -0.5], [0.5, 0]])


def test_evolution_weighs_its_directions_by_ranks():
    size, key = 0.3, jax.random.key(1)
    value, grads = blackbox.evolution(size, 4)(quadratic, PARAMS, key)
    noise = blackbox.drawn(jax.random.normal, PARAMS, key, 4)
    values = np.asarray(blackbox.on_both_sides(quadratic, PARAMS, noise, size))
    order = sorted(values.ravel().tolist())
    rank = lambda x: order.index(float(x)) / 7 - 0.5
    weights = [(rank(up) - rank(down)) / (2 * 4 * size) for up, down in values]
    close(grads, jax.tree.map(lambda d: sum(w * each for w, each in zip(weights, d, strict=True)), noise), rtol=1e-4)
    np.testing.assert_allclose(value, values.mean(), rtol=1e-5)
    _, same = blackbox.evolution(size, 4)(lambda params: jnp.exp(quadratic(params) / 20), PARAMS, key)
    close(same, grads, rtol=1e-6)  # ranks do not see the scale


@pytest.mark.parametrize(("estimate", "evaluations"), [(blackbox.spsa(0.1), 2), (blackbox.evolution(0.1, 3), 6)])
def test_an_estimate_takes_as_many_values_as_it_says(estimate, evaluations):
    seen = []

    def value(params):
        jax.debug.callback(lambda w: seen.append(w), params["w"])
        return linear(params)

    jax.block_until_ready(estimate(value, PARAMS, jax.random.key(0)))
    jax.effects_barrier()
    assert len(seen) == evaluations


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: blackbox.spsa(0.0), "size is 0.0, expected more than 0"),
        (lambda: blackbox.evolution(-1.0, 2), "size is -1.0, expected more than 0"),
        (lambda: blackbox.evolution(1.0, 0), "pairs is 0, expected more than 0"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
