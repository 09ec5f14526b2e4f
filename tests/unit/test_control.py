"""Environments against equations of motion in float64, rollouts step by step, PPO by hand, and replay by a deque."""

import collections
import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from scipy import stats

from dl_jax.control import environments, ppo, replay
from dl_jax.control.environments import Environment, Episode, Transition
from dl_jax.control.returns import interquartile, labelled
from dl_jax.core.errors import InputError
from dl_jax.core.fit import fit
from dl_jax.core.step import per_seed
from dl_jax.core.stream import no_data
from dl_jax.harness.run import Preempted, Run, Settings

RNG = np.random.default_rng(0)


def corridor(limit=6):
    """A walk from 0 to the left (0) or right (1), which is over at 3 or below -1. The reward is the new place."""
    return Environment(
        reset=lambda key: jnp.zeros([]),
        move=lambda place, action: place + 2.0 * action - 1,
        observe=lambda place: place[None],
        reward=lambda place: place,
        final=lambda place: (place >= 3) | (place < -1),
        actions=2,
        limit=limit,
    )


# The motion of both environments as M(q) q'' = f(q, q'), which is solved for q'' in float64.


def cart_pole_acceleration(state, force):
    """The Lagrangian of a cart of 1 kg and a uniform pole of 0.1 kg and 1 m."""
    _, _, angle, turning = state
    m, half, sin, cos = 0.1, 0.5, np.sin(angle), np.cos(angle)
    inertia = [[1.0 + m, m * half * cos], [m * half * cos, 4 / 3 * m * half**2]]
    return np.linalg.solve(inertia, [force + m * half * turning**2 * sin, m * 9.8 * half * sin])


def acrobot_slope(state, torque):
    """Two links of 1 kg, 1 m and 1 kg m² about their centres, which are in their middle."""
    a, b, da, db = state
    h, g = 0.5, 9.8
    mixed = h**2 + h * np.cos(b) + 1
    inertia = [[h**2 + 1 + h**2 + 2 * h * np.cos(b) + 2, mixed], [mixed, h**2 + 1]]
    coriolis = [-h * np.sin(b) * (2 * da * db + db**2), h * np.sin(b) * da**2]
    gravity = [(h + 1) * g * np.sin(a) + h * g * np.sin(a + b), h * g * np.sin(a + b)]
    return np.array([da, db, *np.linalg.solve(inertia, np.array([0, torque]) - coriolis - gravity)])


def moved(environment, states, actions):
    return np.asarray(jax.jit(jax.vmap(environment.move))(jnp.asarray(states, jnp.float32), jnp.asarray(actions)))


def test_cart_pole_moves_by_its_equations():
    states = RNG.uniform([-2.4, -3, -0.2, -3], [2.4, 3, 0.2, 3], (50, 4))
    actions = RNG.integers(0, 2, 50)
    expected = []
    for state, action in zip(states, actions, strict=True):
        place, angle = cart_pole_acceleration(state, 10.0 if action else -10.0)
        expected.append(state + 0.02 * np.array([state[1], place, state[3], angle]))
    np.testing.assert_allclose(moved(environments.cart_pole(), states, actions), expected, atol=1e-5)


def test_acrobot_moves_by_its_equations():
    """A step of Runge-Kutta; angles are wrapped and speeds are clipped, which some of the states show."""
    high = np.pi * np.array([1, 1, 4, 9])
    states, actions, expected = RNG.uniform(-high, high, (50, 4)), RNG.integers(0, 3, 50), []
    for y, action in zip(states, actions, strict=True):
        k1 = acrobot_slope(y, action - 1)
        k2 = acrobot_slope(y + 0.1 * k1, action - 1)
        k3 = acrobot_slope(y + 0.1 * k2, action - 1)
        k4 = acrobot_slope(y + 0.2 * k3, action - 1)
        expected.append(y + 0.2 / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
    expected = np.array(expected)
    assert (abs(expected[:, :2]) > np.pi).any()
    assert (abs(expected[:, 2:]) > np.pi * np.array([4, 9])).any()
    found = moved(environments.acrobot(), states, actions)
    wrapped = found[:, :2] - expected[:, :2]
    np.testing.assert_allclose(wrapped, 2 * np.pi * np.round(wrapped / (2 * np.pi)), atol=1e-3)
    assert (abs(found[:, :2]) <= np.pi + 1e-6).all()
    limits = np.array([4 * np.pi, 9 * np.pi])
    np.testing.assert_allclose(found[:, 2:], np.clip(expected[:, 2:], -limits, limits), atol=0.01)


def seen_of(environment, state, steps, action=1):
    episode = Episode(jnp.asarray(state, jnp.float32), jnp.int32(steps), jnp.float32(7))
    return jax.jit(functools.partial(environments.step, environment))(episode, jnp.int32(action))[1]


def test_falling_is_termination_and_the_limit_truncation():
    """A step that does both is a termination, after which there is nothing to bootstrap."""
    fallen, upright = [0, 0, np.radians(11.9), 2.0], [0, 0, 0, 0.0]
    cases = {(499, "fallen"): (True, False), (499, "upright"): (False, True), (498, "upright"): (False, False)}
    for (steps, how), (terminated, truncated) in cases.items():
        seen = seen_of(environments.cart_pole(), fallen if how == "fallen" else upright, steps)
        assert (bool(seen.terminated), bool(seen.truncated)) == (terminated, truncated)
        assert (float(seen.reward), float(seen.total)) == (1, 8)
    outside = seen_of(environments.cart_pole(), [-2.395, -1.0, 0, 0], 0)
    assert bool(outside.terminated)


def test_the_arm_is_up_above_the_height_of_a_link():
    """Straight up the tip is 2 m above the joint; the step there is worth nothing, others -1."""
    up, hanging = (seen_of(environments.acrobot(), state, 0) for state in ([np.pi, 0, 0, 0], [0.0, 0, 0, 0]))
    assert (bool(up.terminated), float(up.reward)) == (True, 0)
    assert (bool(hanging.terminated), float(hanging.reward)) == (False, -1)
    angles = RNG.uniform(-np.pi, np.pi, (100, 2))
    height = -np.cos(angles[:, 0]) - np.cos(angles.sum(1))
    final = jax.vmap(environments.acrobot().final)(jnp.asarray(np.pad(angles, ((0, 0), (0, 2))), jnp.float32))
    np.testing.assert_array_equal(final, height > 1)


def at_random(environment):
    return lambda observation, key: jax.random.randint(key, (len(observation),), 0, environment.actions)


def started(environment, n, seed=0):
    return jax.vmap(functools.partial(environments.begin, environment))(jax.random.split(jax.random.key(seed), n))


def test_a_rollout_step_by_step():
    """The environment is deterministic, so that the actions tell all: what is seen, summed up, and where it ends."""
    environment, key = corridor(), jax.random.key(3)
    run = jax.jit(lambda episodes: environments.rollout(environment, at_random(environment), episodes, key, 60))
    episodes, seen = jax.tree.map(np.asarray, run(started(environment, 5)))
    places, steps, totals = np.zeros(5), np.zeros(5, int), np.zeros(5)
    for t in range(60):
        np.testing.assert_array_equal(seen.observation[t, :, 0], places)
        places, steps = places + 2 * seen.action[t] - 1, steps + 1
        totals = totals + places
        np.testing.assert_array_equal(seen.following[t, :, 0], places)  # of the old episode where it ends
        np.testing.assert_array_equal(seen.reward[t], places)
        np.testing.assert_array_equal(seen.total[t], totals)
        terminated = (places >= 3) | (places < -1)
        truncated = (steps == 6) & ~terminated
        np.testing.assert_array_equal(seen.terminated[t], terminated)
        np.testing.assert_array_equal(seen.truncated[t], truncated)
        places, steps, totals = (np.where(terminated | truncated, 0, x) for x in (places, steps, totals))
    assert seen.terminated.any()
    assert seen.truncated.any()
    for found, expected in zip(episodes, (places, steps, totals), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_new_episodes_differ():
    environment = environments.cart_pole(limit=2)
    run = jax.jit(lambda e: environments.rollout(environment, lambda o, k: jnp.ones(3, int), e, jax.random.key(0), 9))
    _, seen = run(started(environment, 3))
    first = np.asarray(seen.observation)[::2].reshape(-1, 4)  # after each second step one begins
    assert len(np.unique(first[:, 0])) == len(first)
    assert (abs(first) <= 0.05).all()


def test_returns_of_whole_episodes():
    """To the right an episode of the corridor is 1 + 2 + 3; there and back it is truncated at 6 steps."""
    keys = jax.random.split(jax.random.key(0), 4)
    right = environments.returns(corridor(), lambda seen, key: jnp.ones(len(seen), int), keys, keys[0])
    np.testing.assert_array_equal(right, 6)
    back = environments.returns(corridor(), lambda seen, key: (seen[:, 0] < 1).astype(int), keys, keys[0])
    np.testing.assert_array_equal(back, 3)


def test_an_environment_without_an_end_is_refused():
    endless = corridor(limit=None)
    with pytest.raises(InputError, match="neither a limit of steps nor final states, so that no episode would end"):
        environments.begin(endless._replace(final=None), jax.random.key(0))
    with pytest.raises(InputError, match="no limit of steps, so that an episode might never end"):
        environments.returns(endless, at_random(endless), jax.random.split(jax.random.key(0), 2), jax.random.key(1))
    with pytest.raises(InputError, match="limit of an episode is 0 steps, expected 1 or more"):
        environments.begin(corridor(limit=0), jax.random.key(0))
    episode, seen = environments.step(endless, environments.begin(endless, jax.random.key(0)), jnp.int32(1))
    assert (int(episode.steps), bool(seen.ended)) == (1, False)
    never = corridor()._replace(final=None)
    assert not environments.step(never, environments.begin(never, jax.random.key(0)), jnp.int32(1))[1].terminated


def transitions(reward, terminated, truncated):
    """Transitions [T, E] that have these, and nothing of use besides."""
    shape, nothing = reward.shape, jnp.zeros((*reward.shape, 1))
    return Transition(
        nothing, jnp.zeros(shape, int), *map(jnp.asarray, (reward,)), nothing, terminated, truncated, reward
    )


@pytest.mark.parametrize("bootstrap", [True, False])
def test_advantages_are_a_double_sum(bootstrap):
    """A_t = Σ_k (γλ)^k δ_{t+k} up to the end of the episode, from the definition, in float64."""
    steps, rule = 12, ppo.Rule(discount=0.9, decay=0.7, bootstrap=bootstrap)
    reward, value, following = RNG.normal(size=(3, steps, 4))
    terminated, truncated = RNG.random((2, steps, 4)) < 0.2
    truncated &= ~terminated
    assert (terminated.any(), truncated.any(), (terminated | truncated)[-1].all()) == (True, True, False)
    expected = np.zeros((steps, 4))
    for e in range(4):
        for t in range(steps):
            for k in range(steps - t):
                s = t + k
                zero = terminated[s, e] or (truncated[s, e] and not bootstrap)
                delta = reward[s, e] + 0.9 * (0 if zero else following[s, e]) - value[s, e]
                expected[t, e] += (0.9 * 0.7) ** k * delta
                if terminated[s, e] or truncated[s, e]:
                    break
    as_given = (jnp.asarray(x, jnp.float32) for x in (value, following))
    found = ppo.advantages(transitions(jnp.float32(reward), terminated, truncated), *as_given, rule)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_surrogate_by_hand():
    """At ε = 0.2 a gain counts up to 1.2 of a good action and down to 0.8 of a bad one, a loss counts whole."""
    cases = [(1.1, 2.0, 2.2), (1.5, 2.0, 2.4), (0.5, 2.0, 1.0), (0.9, -2.0, -1.8), (0.5, -2.0, -1.6), (1.5, -2.0, -3.0)]
    ratio, advantage, expected = map(np.array, zip(*cases, strict=True))
    np.testing.assert_allclose(ppo.surrogate(jnp.float32(ratio), jnp.float32(advantage), 0.2), expected, rtol=1e-6)
    slope = jax.vmap(jax.grad(lambda r, a: ppo.surrogate(r, a, 0.2)))(jnp.float32(ratio), jnp.float32(advantage))
    np.testing.assert_allclose(slope, [2, 0, 2, -2, 0, -2])


def test_the_loss_of_values_by_hand():
    """Target 1 and a move from 0: within 0.1 it is the error; beyond, the larger of both, which may be the clipped."""
    value, before, target = jnp.array([0.05, 0.5, 0.5, 2.0]), jnp.zeros(4), jnp.array([1.0, 1.0, 0.2, 1.0])
    expected = np.array([0.95**2, 0.9**2, 0.3**2, 1.0**2]) / 2
    np.testing.assert_allclose(ppo.value_loss(value, before, target, 0.1), expected, rtol=1e-6)


def test_the_objective_in_float64():
    n, rule = 8, ppo.Rule(clip=0.1, entropy=0.3, value=0.7)
    logits, old, value, before, advantage = (RNG.normal(size=s) for s in ((n, 3), n, n, n, n))
    action = RNG.integers(0, 3, n)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen, old = logs[np.arange(n), action], logs[np.arange(n), action] + 0.2 * old
    ratio, standard = np.exp(chosen - old), (advantage - advantage.mean()) / advantage.std(ddof=1)
    gain = np.minimum(ratio * standard, np.clip(ratio, 0.9, 1.1) * standard).mean()
    target = before + advantage
    near = before + np.clip(value - before, -0.1, 0.1)
    squares = np.maximum((value - target) ** 2, (near - target) ** 2).mean() / 2
    entropy = -(np.exp(logs) * logs).sum(-1).mean()
    agent = ppo.Agent(lambda params, x: params["logits"], lambda params, x: params["value"])
    params = {"logits": jnp.float32(logits), "value": jnp.float32(value)}
    rows = ppo.Rows(jnp.zeros((n, 1)), jnp.asarray(action), *map(jnp.float32, (old, before, advantage)))
    found, metrics = ppo.objective(agent, rule, params, rows)
    np.testing.assert_allclose(found, -gain + 0.7 * squares - 0.3 * entropy, rtol=1e-4)
    expected = {"policy_loss": -gain, "value_loss": squares, "entropy": entropy}
    assert {name: pytest.approx(value, rel=1e-4) for name, value in expected.items()} == metrics


RULE = ppo.Rule(rollout=16, epochs=2, minibatches=4, discount=0.9)


def learner(environment, rule=RULE):
    """(step, states of two seeds) of PPO in an environment."""
    agent, init = ppo.networks(environment, 8)
    tx = optax.adam(0.02)
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 2))(jnp.arange(2))
    start = lambda keys: ppo.start(environment, tx, 4, init(keys[0]), keys[1])
    return agent, per_seed(ppo.step(environment, agent, tx, rule)), jax.jit(jax.vmap(start))(keys)


@pytest.fixture(scope="module")
def walkers():
    return learner(corridor())


def test_networks_are_orthogonal_and_the_policy_is_nearly_even(walkers):
    agent, _, states = walkers
    params = jax.tree.map(lambda leaf: np.asarray(leaf[0]), states.params)
    for net, scale in (("policy", 0.01), ("value", 1.0)):
        kernels = [params[net][f"Dense_{i}"]["kernel"] for i in range(3)]
        for kernel, size in zip(kernels, (2**0.5, 2**0.5, scale), strict=True):
            small = kernel @ kernel.T if kernel.shape[0] < kernel.shape[1] else kernel.T @ kernel
            np.testing.assert_allclose(small, size**2 * np.eye(len(small)), atol=1e-5)
    observation = jnp.float32(RNG.normal(size=(20, 1)))
    np.testing.assert_allclose(jax.nn.softmax(agent.logits(params, observation)), 0.5, atol=0.02)
    assert agent.value(params, observation).shape == (20,)


def test_it_learns_to_walk_where_the_reward_is(walkers):
    """Back and forth between 1 and 2, which is worth 9 before the limit; the way to the end is worth 6."""
    agent, step, states = walkers
    states = fit(step, states, no_data, steps=30)
    params = jax.tree.map(lambda leaf: leaf[0], states.params)
    policy = lambda seen, key: agent.logits(params, seen).argmax(-1)
    keys = jax.random.split(jax.random.key(9), 3)
    np.testing.assert_array_equal(environments.returns(corridor(), policy, keys, jax.random.key(0)), 9)


def test_a_resumed_fit_has_the_same_bits_and_reports(walkers, tmp_path):
    """Episodes go on over the checkpoint: their states, steps and rewards so far are part of it."""
    _, step, states = walkers
    runs = []
    for name, at in (("whole", 100), ("cut", 3)):
        settings = Settings(seeds=(0, 1), preempted=lambda i, at=at: i == at)
        ends = pytest.raises(Preempted) if name == "cut" else contextlib.nullcontext()
        with ends, contextlib.closing(Run(epath.Path(tmp_path / name), settings)) as run:
            runs.append((fit(step, states, no_data, steps=7, every=7, run=run), run.history("return")))
    with contextlib.closing(Run(epath.Path(tmp_path / "cut"), Settings(seeds=(0, 1)))) as run:
        runs.append((fit(step, states, no_data, steps=7, every=7, run=run), run.history("return")))
    (whole, reported), (resumed, again) = runs
    assert (np.asarray(whole.extra["episodes"]["steps"]) > 0).any()
    plain = lambda state: state._replace(key=jax.random.key_data(state.key))
    jax.tree.map(np.testing.assert_array_equal, plain(whole), plain(resumed))
    for before, after in zip(reported, again, strict=True):
        np.testing.assert_array_equal(before, after)


def test_minibatches_divide_a_rollout():
    _, step, states = learner(corridor(), RULE._replace(minibatches=5))
    with pytest.raises(InputError, match="minibatches is 5 and a rollout of 16 steps of 4 episodes has 64"):
        jax.eval_shape(step, states, {})


def test_a_replay_buffer_is_a_deque():
    size, model = 7, collections.deque(maxlen=7)
    held = replay.empty(size, {"x": jax.ShapeDtypeStruct((2,), jnp.float32), "n": jax.ShapeDtypeStruct((), jnp.int32)})
    push, count = jax.jit(replay.pushed), 0
    for _ in range(9):
        n = np.arange(count, count + 3)
        rows = {"x": np.stack([n, -n], 1).astype(np.float32), "n": n.astype(np.int32)}
        held, count = push(held, rows), count + 3
        model.extend(n)
        stored = np.asarray(held.rows["n"])[: min(count, size)]
        assert sorted(stored) == list(model)
        np.testing.assert_array_equal(held.rows["x"][: len(stored)], np.stack([stored, -stored], 1))
    assert int(held.written) == count


def test_rows_are_drawn_from_all_that_are_held():
    """Before it is full from those that were written alone; equally often within four deviations."""
    held = replay.empty(8, jax.ShapeDtypeStruct((), jnp.int32))
    draw = jax.jit(lambda held, key: replay.drawn(held, key, 4000))
    for i, possible in ((0, {10, 11, 12, 13, 14}), (1, {12, 13, 14, 15, 16, 17, 18, 19})):
        held = replay.pushed(held, jnp.arange(10 + 5 * i, 15 + 5 * i))
        found, times = np.unique(draw(held, jax.random.key(i)), return_counts=True)
        assert set(found.tolist()) == possible
        expected = 4000 / len(possible)
        assert (abs(times - expected) < 4 * np.sqrt(expected)).all()


def test_a_replay_buffer_that_is_too_small_is_refused():
    with pytest.raises(InputError, match="size of a replay buffer is 0 rows, expected 1 or more"):
        replay.empty(0, jnp.zeros(3))
    with pytest.raises(InputError, match="3 rows for a replay buffer of 2, expected no more than it holds"):
        replay.pushed(replay.empty(2, jnp.zeros([])), jnp.zeros(3))


def test_the_interquartile_mean_is_that_of_scipy_and_ignores_a_quarter_at_each_end():
    values = np.random.default_rng(1).normal(400, 50, 12)
    found = interquartile(values)
    mean = functools.partial(stats.trim_mean, proportiontocut=0.25)
    wanted = stats.bootstrap((values,), mean, n_resamples=20_000, method="percentile", rng=2).confidence_interval
    np.testing.assert_allclose(found.mean, np.sort(values)[3:9].mean())
    np.testing.assert_allclose((found.low, found.high), wanted, atol=2)
    failed = np.where(np.argsort(np.argsort(values)) < 3, 0, values)
    assert interquartile(failed).mean == found.mean
    assert interquartile(values) == found


def test_a_quarter_of_the_seeds_is_rounded_down():
    values = np.array([9.0, 0, 1, 2, 3, 4, 5, 6, 7, 8])
    np.testing.assert_allclose(interquartile(values).mean, np.arange(2, 8).mean())
    np.testing.assert_allclose(interquartile(values[:7]).mean, np.sort(values[:7])[1:6].mean())


def test_the_interquartile_mean_of_one_seed_and_of_a_failed_one():
    assert interquartile(np.array([7.0])) == (7, 7, 7)
    assert np.isnan(interquartile(np.array([7.0, np.nan, 8.0, 9.0]))).all()
    assert labelled("cart", np.full(4, 500.0)) == "cart, IQM 500.0 [500.0, 500.0]"
