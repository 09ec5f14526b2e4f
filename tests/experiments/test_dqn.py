"""The deep Q-network: its loss and actions by hand, target and buffer step by step, resuming, and bad input."""

import contextlib
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from dl_jax.control import environments
from dl_jax.core.errors import InputError
from dl_jax.core.fit import fit
from dl_jax.core.stream import no_data
from dl_jax.harness.run import Preempted, Run, Settings

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def experiment(load_experiment):
    return load_experiment("control/dqn")


@pytest.fixture(scope="module")
def learner(experiment):
    """(config, step, state) of one seed with a table of values that is linear in the observation."""
    cfg = experiment.Config(steps=40, episodes=2, size=12, batch_size=3, copy_every=4)
    values = lambda params, seen: seen @ params["w"]
    environment, tx = environments.cart_pole(), experiment.adam(cfg)
    begin = lambda key: experiment.begin(cfg, environment, tx, {"w": jnp.ones((4, 2))}, key)
    return cfg, experiment.q_learning(cfg, environment, values, tx), jax.jit(begin)(jax.random.key(0))


def test_the_loss_by_hand(experiment):
    """Of rows within and at the ends of episodes."""
    q, best = np.array([[1.0, 3.0], [2.0, 0.0], [0.5, 0.0], [7.0, 0.0]]), np.array([[4.0, 5.0]] * 4)
    rows = {
        "observation": jnp.arange(4), "action": jnp.array([1, 0, 0, 0]), "reward": jnp.array([-1.5, 1.0, 1.0, 1.0]),
        "following": jnp.arange(4), "terminated": jnp.array([False, True, False, True]),
    }  # fmt: skip
    values = lambda params, seen: params[seen]
    loss = lambda q: experiment.q_loss(values, q, jnp.float32(best), rows, 0.9)
    value, slope = jax.value_and_grad(loss)(jnp.float32(q))
    errors = np.array([3 - (-1.5 + 0.9 * 5), 2 - 1, 0.5 - (1 + 0.9 * 5), 7 - 1])
    np.testing.assert_allclose(value, (errors**2).mean() / 2, rtol=1e-6)
    expected = np.zeros((4, 2))
    expected[np.arange(4), [1, 0, 0, 0]] = errors / 4
    np.testing.assert_allclose(slope, expected, atol=1e-6)


def test_what_is_remembered_of_a_truncated_episode(experiment):
    """The observation after the step and not that of the next episode, and that it was not terminated."""
    environment = environments.cart_pole(limit=3)
    running = jax.vmap(lambda key: environments.begin(environment, key))(jax.random.split(jax.random.key(0), 2))
    always = lambda seen, key: jnp.ones(2, int)
    rows = experiment.remembered(environments.rollout(environment, always, running, jax.random.key(1), 4)[1])
    assert rows["observation"].shape == (4, 2, 4)
    assert not rows["terminated"].any()
    moved = jax.vmap(jax.vmap(environment.move))(rows["observation"], rows["action"])
    np.testing.assert_allclose(rows["following"], moved, atol=1e-6)
    assert (rows["following"][2, :, 1] > 0.5).all()  # the speed after three pushes
    assert (abs(rows["observation"][3, :, 1]) <= 0.05).all()  # of the next episode


def test_actions_are_the_best_or_any(experiment):
    values = jnp.tile(jnp.array([0.0, 2.0, 1.0]), (6000, 1))
    choose = jax.jit(experiment.explored)
    np.testing.assert_array_equal(choose(values, 0.0, jax.random.key(0)), 1)
    for share in (0.3, 1.0):
        found = np.bincount(choose(values, share, jax.random.key(1)), minlength=3) / 6000
        expected = np.array([0, 1 - share, 0]) + share / 3
        assert (abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / 6000)).all()


def test_the_share_of_random_actions_falls(experiment):
    cfg = experiment.Config(steps=100, explore=0.2, least=0.1)
    np.testing.assert_allclose(
        [experiment.random_share(cfg, step) for step in (0, 10, 20, 99)], [1, 0.55, 0.1, 0.1], rtol=1e-6
    )


def test_target_and_buffer_step_by_step(learner):
    """The target is a copy every fourth step and stays between; two rows are written in each."""
    cfg, step, state = learner
    step, seen = jax.jit(step), [state]
    for _ in range(9):
        seen.append(step(seen[-1], {})[0])
    for i, (before, after) in enumerate(itertools.pairwise(seen), 1):
        source = after.params if i % cfg.copy_every == 0 else before.extra["target"]
        np.testing.assert_array_equal(after.extra["target"]["w"], source["w"])
        assert (after.params["w"] != before.params["w"]).any()
        written = int(before.extra["replay"]["written"])
        assert written == 2 * (i - 1)
        old, new = (jax.tree.map(np.asarray, each.extra["replay"]["rows"]) for each in (before, after))
        places = [written % cfg.size, (written + 1) % cfg.size]
        others = np.setdiff1d(np.arange(cfg.size), places)
        np.testing.assert_array_equal(new["following"][others], old["following"][others])
        np.testing.assert_array_equal(new["observation"][places], before.extra["episodes"]["state"])


def test_a_resumed_fit_has_the_same_bits(learner, tmp_path):
    _, step, state = learner
    found = []
    for folder, at in (("whole", 100), ("cut", 11), ("cut", 100)):
        run = Run(epath.Path(tmp_path / folder), Settings(preempted=lambda i, at=at: i == at))
        with contextlib.closing(run), pytest.raises(Preempted) if at == 11 else contextlib.nullcontext():
            found.append(fit(step, state, no_data, steps=20, run=run))
    whole, resumed = (state._replace(key=jax.random.key_data(state.key)) for state in found)
    assert (np.asarray(whole.extra["episodes"]["steps"]) > 0).any()
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_the_rule_that_the_bar_is_compared_with():
    """Pushing to the side to which the pole turns keeps it up for some 200 steps; random pushes for 22."""
    keys = jax.random.split(jax.random.key(0), 400)
    policies = {
        200: lambda seen, key: (seen[:, 3] > 0).astype(int),
        22: lambda seen, key: jax.random.randint(key, (400,), 0, 2),
    }
    for expected, policy in policies.items():
        found = environments.returns(environments.cart_pole(), policy, keys, jax.random.key(1)).mean()
        assert abs(found - expected) < 0.04 * expected + 2


def test_bad_input(experiment):
    change = functools.partial(dataclasses.replace, experiment.PRESETS["smoke"])
    with pytest.raises(InputError, match="report_every is 250, of steps that are 1 of each episode, expected 500"):
        experiment.main(change(report_every=250), Run())
    with pytest.raises(InputError, match="report_every is 500, expected a divisor of the 700 steps"):
        experiment.main(change(steps=700), Run())
    with pytest.raises(InputError, match="2 rows for a replay buffer of 1, expected no more than it holds"):
        experiment.main(change(size=1), Run())
