"""PPO: the schedule of the rate, what is measured, and bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dl_jax.control import environments
from dl_jax.core.errors import InputError
from dl_jax.harness.run import Run


@pytest.fixture(scope="module")
def experiment(load_experiment):
    return load_experiment("control/ppo")


def test_frames_until_it_is_solved(experiment):
    """At the first report that has the return; all frames where none has."""
    frames = np.array([100, 200, 300, 400])
    returns = np.array([[500, 10, 475], [20, 20, 0], [500, 480, 0], [500, 30, 0]])
    np.testing.assert_array_equal(experiment.frames_to(475, frames, returns), [100, 300, 100])
    np.testing.assert_array_equal(experiment.frames_to(481, frames, returns), [100, 400, 400])


def test_the_rate_is_constant_in_an_iteration_and_falls_to_0(experiment):
    """Adam's first steps are as large as its rate, for a constant gradient, however large its norm is."""
    cfg = experiment.Config(steps=5, epochs=1, minibatches=2, learning_rate=1.0)
    tx, params = experiment.adam(cfg), jnp.zeros(())
    state, moves = tx.init(params), []
    for _ in range(10):
        updates, state = tx.update(jnp.float32(100.0), state, params)
        moves.append(-float(updates))
    np.testing.assert_allclose(moves, np.repeat([1, 0.8, 0.6, 0.4, 0.2], 2), rtol=1e-3)
    norm = lambda size: optax.tree.norm(tx.update(jnp.full(4, size), tx.init(jnp.zeros(4)))[1][1][0].mu) / 0.1
    np.testing.assert_allclose([norm(100.0), norm(0.1)], [0.5, 0.2], rtol=1e-5)


def test_greedy_episodes_count_once_and_the_others_not(experiment):
    """A policy that always pushes to one side falls in 8 to 11 steps; padding weighs nothing."""
    agent = experiment.ppo.Agent(lambda params, seen: jnp.zeros((len(seen), 2)).at[:, 1].set(1.0), lambda *_: None)
    batch = {"episode": np.arange(20), "mask": np.repeat([1.0, 0.0], [15, 5]).astype(np.float32)}
    measure = lambda batch: environments.greedy_returns(
        environments.cart_pole(), agent.logits, {"params": {}}, batch, jax.random.key(0)
    )["return"]
    total, weight = measure(batch)
    assert weight == 15
    assert 8 <= total / weight <= 11
    first, _ = measure({name: column[:15] for name, column in batch.items()})
    assert first == total


def test_reports_are_as_long_as_an_episode(experiment):
    config = dataclasses.replace(experiment.PRESETS["smoke"], rollout=128)
    with pytest.raises(InputError, match="report_every is 2, of steps that are 128 of each episode, expected 500"):
        experiment.main(config, Run())


def test_minibatches_divide_a_rollout(experiment):
    config = dataclasses.replace(experiment.PRESETS["smoke"], minibatches=3)
    with pytest.raises(InputError, match="minibatches is 3 and a rollout of 256 steps of 2 episodes has 512"):
        experiment.main(config, Run())


def test_a_minibatch_has_a_deviation(experiment):
    config = dataclasses.replace(experiment.PRESETS["smoke"], minibatches=512)
    with pytest.raises(InputError, match=r"minibatches is 512 .* expected a divisor that leaves each two or more"):
        experiment.main(config, Run())
