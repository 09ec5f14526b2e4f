"""Learned step sizes against the equations of LSQ; binary and ternary weights against those of their papers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dl_jax.compress import quantize
from dl_jax.compress.quantize import Range
from dl_jax.core.errors import InputError
from dl_jax.losses import with_params

W = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
PARAMS = {"Dense_0": {"kernel": W, "bias": np.ones(4, np.float32)}}


def test_learned_steps_start_and_round_as_in_the_paper():
    """Section 2.1, and equations 1 and 2: v̄ = round(clip(v / s, −Q, Q)), v̂ = v̄ s."""
    params = quantize.with_steps(PARAMS, 3)
    step = params["weight_steps"]["Dense_0/kernel"]
    np.testing.assert_allclose(step, 2 * abs(W).mean(0, keepdims=True) / np.sqrt(3), rtol=1e-6)
    found = quantize.learned(3)(params)
    assert found.keys() == {"Dense_0"}
    assert found["Dense_0"]["bias"] is PARAMS["Dense_0"]["bias"]
    np.testing.assert_allclose(found["Dense_0"]["kernel"], np.round(np.clip(W / step, -3, 3)) * step, rtol=1e-6)
    stored = quantize.stored(params, 3)
    assert stored["Dense_0"]["kernel"].values.dtype == jnp.int8
    np.testing.assert_array_equal(quantize.dequantize(stored)["Dense_0"]["kernel"], found["Dense_0"]["kernel"])
    quantize.pack(np.asarray(stored["Dense_0"]["kernel"].values), 3)


def lsq_slope(ratio, lowest, highest):
    """Equation 3."""
    inside = np.round(ratio) - ratio
    return np.where(ratio <= lowest - 0.5, lowest, np.where(ratio >= highest + 0.5, highest, inside))


def test_the_gradient_of_a_weights_step_is_scaled():
    """Equation 3, times g = 1 / sqrt(N Q) with N the weights that share the step (section 2.2)."""
    params, factor = quantize.with_steps(PARAMS, 3), np.random.default_rng(1).normal(size=W.shape)
    gradient = jax.grad(lambda p: (quantize.learned(3)(p)["Dense_0"]["kernel"] * factor).sum())(params)
    ratio = W.astype(np.float64) / params["weight_steps"]["Dense_0/kernel"]
    expected = (factor * lsq_slope(ratio, -3, 3)).sum(0, keepdims=True) / np.sqrt(len(W) * 3)
    np.testing.assert_allclose(gradient["weight_steps"]["Dense_0/kernel"], expected, rtol=1e-4)
    np.testing.assert_allclose(gradient["Dense_0"]["kernel"], np.where(abs(np.round(ratio)) <= 3, factor, 0), rtol=1e-6)


@pytest.mark.parametrize(("low", "high", "zero"), [(0.0, 2.0, 0), (-1.0, 2.0, 4)])
def test_the_gradient_of_an_activations_step_is_scaled(low, high, zero):
    """As above, with N the features of an example and Q the largest integer."""
    x, ranges = np.random.default_rng(2).normal(size=(5, 30)).astype(np.float32), {"Dense_0": Range(low, high)}
    ranges = jax.tree.map(jnp.float32, ranges)
    apply = lambda variables, x: x @ variables["params"]["Dense_0"]["kernel"]
    params = PARAMS | quantize.activation_steps(ranges, 3)
    step = float(params["activation_steps"]["Dense_0"])
    assert step == pytest.approx(2 / (7 - zero))
    rounded = quantize.learned_activations(apply, 3)
    values, back = jax.vjp(lambda p: rounded({"params": p, "ranges": ranges}, x), params)
    ratio = x.astype(np.float64) / step
    np.testing.assert_allclose(values, np.round(np.clip(ratio, -zero, 7 - zero)) * step @ W, rtol=1e-4, atol=1e-5)
    (gradient,) = back(jnp.ones_like(values))
    expected = (lsq_slope(ratio, -zero, 7 - zero) * W.sum(1)).sum() / np.sqrt(30 * (7 - zero))
    np.testing.assert_allclose(gradient["activation_steps"]["Dense_0"], expected, rtol=1e-4)


def test_learned_steps_find_a_better_grid():
    target = W[:, :1]
    params = quantize.with_steps({"kernel": target}, 2)
    params["weight_steps"]["kernel"] = 3 * params["weight_steps"]["kernel"]
    error = lambda steps: ((quantize.learned(2)(params | {"weight_steps": steps})["kernel"] - target) ** 2).mean()
    steps, before = params["weight_steps"], error(params["weight_steps"])
    descend = jax.jit(lambda steps: jax.tree.map(lambda s, g: s - 0.3 * g, steps, jax.grad(error)(steps)))
    for _ in range(100):
        steps = descend(steps)
    assert error(steps) < 0.5 * before


def test_weights_activations_and_both_kinds_of_steps_train_together():
    x, ranges = W[:, :3], {"Dense_0": Range(jnp.float32(-1), jnp.float32(2))}
    params = quantize.with_steps({"Dense_0": {"kernel": W[:3]}}, 3) | quantize.activation_steps(ranges, 3)

    def loss(variables, batch, key):
        return ((batch @ variables["params"]["Dense_0"]["kernel"]) ** 2).mean(), ({}, {})

    both = with_params(quantize.learned_activations(loss, 3), quantize.learned(3))
    gradient = jax.jit(jax.grad(lambda p: both({"params": p, "ranges": ranges}, x, None)[0]))(params)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_learned_steps_refuse():
    for use in (quantize.learned, functools.partial(quantize.with_steps, PARAMS), lambda b: quantize.stored(PARAMS, b)):
        with pytest.raises(InputError, match="learned step sizes for 1 bit, expected 2 to 8 bits"):
            use(1)
        with pytest.raises(InputError, match="bits is 9, expected"):
            use(9)
    with pytest.raises(InputError, match="the parameters have no 'weight_steps', expected step sizes"):
        quantize.learned(4)(PARAMS)
    with pytest.raises(InputError, match="the parameters have no 'activation_steps'"):
        quantize.learned_activations(lambda v, x: x, 4)({"params": PARAMS}, W)


def loss(variables, batch, key):
    return (variables["params"]["Dense_0"]["kernel"] * batch).sum(), ({}, {"key": key})


def test_binary_weights_are_signs_with_a_straight_gradient():
    w = np.array([[-0.3, 0.0], [0.2, -2.0]], np.float32)
    batch = np.arange(4.0, dtype=np.float32).reshape(2, 2)
    value, gradient = jax.value_and_grad(lambda p: with_params(loss, quantize.binary())({"params": p}, batch, None)[0])(
        {"Dense_0": {"kernel": w}}
    )
    np.testing.assert_array_equal(quantize.binary()({"kernel": w})["kernel"], [[-1, 1], [1, -1]])
    assert value == 0 * -1 + 1 * 1 + 2 * 1 + 3 * -1
    np.testing.assert_array_equal(gradient["Dense_0"]["kernel"], batch)


def test_drawn_weights_are_plus_one_with_the_probability_of_the_hard_sigmoid():
    levels = np.array([-1.5, -1, -0.5, 0, 0.6, 1, 2], np.float32)
    params = {"a": {"kernel": np.tile(levels, (20_000, 1))}, "b": {"kernel": np.zeros((20_000, 7), np.float32)}}
    drawn = quantize.stochastic_binary(jax.random.key(0), params)
    assert set(np.unique(drawn["a"]["kernel"])) == {-1, 1}
    expected = np.clip((levels + 1) / 2, 0, 1)
    np.testing.assert_allclose((np.asarray(drawn["a"]["kernel"]) > 0).mean(0), expected, atol=4 * 0.5 / np.sqrt(20_000))
    assert not np.array_equal(drawn["a"]["kernel"][:, 3], drawn["b"]["kernel"][:, 3])  # each weight has its own draws
    again = quantize.with_stochastic_binary(lambda v, b, key: (v["params"]["a"]["kernel"], ({}, {})))
    one, other = (again({"params": params}, None, jax.random.key(seed))[0] for seed in (1, 2))
    assert not np.array_equal(one, other)
    gradient = jax.grad(lambda p: quantize.with_stochastic_binary(loss)({"params": p}, W, jax.random.key(0))[0])(PARAMS)
    np.testing.assert_array_equal(gradient["Dense_0"]["kernel"], W)


def test_real_weights_stay_within_one():
    tx = optax.chain(optax.sgd(1.0), quantize.within_one())
    params = {"kernel": np.array([0.9, -0.2, -1.0], np.float32), "bias": np.array([3.0], np.float32)}
    gradient = {"kernel": np.array([-0.5, 0.1, 2.0], np.float32), "bias": np.array([-1.0], np.float32)}
    updates, _ = tx.update(gradient, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(after["kernel"], [1, -0.3, -1], rtol=1e-6)
    assert after["bias"] == 4
    with pytest.raises(ValueError, match="got no params"):
        tx.update(gradient, tx.init(params))


def test_ternary_weights_against_the_equations():
    """Li and Liu: Δ = 0.7 E|W| (6), a = the mean of |W| where |W| > Δ (5), and straight gradients."""
    found = np.asarray(quantize.ternary()(PARAMS)["Dense_0"]["kernel"])
    delta = 0.7 * abs(W.astype(np.float64)).mean()
    kept = abs(W) > delta
    np.testing.assert_allclose(found, np.where(kept, np.sign(W), 0) * abs(W[kept]).mean(), rtol=1e-6)
    brute = [np.square(W - np.where(abs(W) > t, np.sign(W), 0) * abs(W[abs(W) > t]).mean()).sum() for t in (0.1, 1.5)]
    assert np.square(W - found).sum() < min(brute)
    gradient = jax.grad(lambda p: with_params(loss, quantize.ternary())({"params": p}, W, None)[0])(PARAMS)
    np.testing.assert_array_equal(gradient["Dense_0"]["kernel"], W)
    np.testing.assert_array_equal(quantize.ternary()({"kernel": 0 * W})["kernel"], 0)
