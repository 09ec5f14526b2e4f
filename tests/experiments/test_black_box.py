"""experiments/learning/black_box.py: equal evaluations, the step, what the network sees, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dl_jax.core.errors import InputError
from dl_jax.core.step import State
from dl_jax.harness import Run


@pytest.fixture(scope="module")
def black_box(load_experiment):
    return load_experiment("learning/black_box")


def test_digits_are_means_of_four_by_four_pixels(black_box):
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), np.uint8)
    found = black_box.pooled({"image": images, "label": np.arange(3)})
    assert found["image"].shape == (3, 7, 7, 1)
    assert found["image"].dtype == np.float32
    for row, column in ((0, 0), (2, 5), (6, 6)):
        part = images[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].mean((1, 2)) / 255
        np.testing.assert_allclose(found["image"][:, row, column], part, rtol=1e-5)


def test_a_step_goes_along_the_estimate_and_gives_its_value(black_box):
    seen = []

    def estimate(value, params, key):
        seen.append((value(params), value(params + 1), key))
        return jnp.float32(7), 2 * jnp.ones_like(params)

    loss = lambda variables, batch, key: (variables["params"].sum() + jax.random.normal(key), ({}, {}))
    tx = optax.sgd(0.5)
    step = black_box.estimated(loss, black_box.Way(estimate, 5, 0.1), tx)
    params = jnp.arange(3.0)
    state = State(jnp.int32(4), params, {}, tx.init(params), jax.random.key(0))
    state, metrics = step(state, {})
    np.testing.assert_allclose(state.params, params - 1)
    assert (state.step, metrics["loss"]) == (5, 7)
    ((first, second, key),) = seen
    np.testing.assert_allclose(second - first, 3, rtol=1e-5)  # one key for all evaluations of a step
    assert key != jax.random.fold_in(state.key, 4)


def test_the_gradient_is_that_of_the_loss(black_box):
    way = black_box.ways(black_box.Config())["gradient"]
    value, grads = way.estimate(lambda params: (params**3).sum(), jnp.arange(3.0), jax.random.key(0))
    assert (value, grads.tolist(), way.evaluations) == (9, [0, 3, 12], 1)


def test_evaluations_that_evolution_cannot_use_up_are_refused(black_box, monkeypatch):
    monkeypatch.setattr(black_box, "fit", None)  # a step would fail
    cfg = dataclasses.replace(black_box.PRESETS["smoke"], evaluations=10)
    with pytest.raises(InputError, match="evaluations is 10 and a step of evolution takes 4, expected a multiple"):
        black_box.main(cfg, Run())
