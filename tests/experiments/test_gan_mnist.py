"""experiments/generative/gan_mnist.py: a step of two optimisers, `fit`, and the Parzen window that scores samples."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from dl_jax.core.errors import InputError
from dl_jax.core.fit import fit
from dl_jax.core.step import per_seed
from dl_jax.harness.run import Preempted, Run, Settings
from dl_jax.models.generative.gan import Discriminator, Generator

RNG = np.random.default_rng(0)
SHAPE = (4, 3, 1)
REAL = RNG.integers(0, 256, (6, *SHAPE)).astype(np.uint8)


@pytest.fixture(scope="module")
def experiment(load_experiment):
    return load_experiment("generative/gan_mnist")


def players(experiment, dropout=0.5):
    generator = Generator(hidden=(8,), shape=SHAPE, spread=0.5)
    discriminator = Discriminator(hidden=(6,), pieces=2, spread=0.5, dropout=dropout, input_dropout=dropout)
    return experiment.Players(generator, discriminator, 5, optax.adam(0.01))


@pytest.fixture(scope="module")
def states(experiment):
    """States of three seeds."""
    two, keys = players(experiment), jax.random.split(jax.random.key(1), 3)
    return jax.jit(jax.vmap(lambda key: experiment.begin(two, key)))(keys)


@pytest.fixture(scope="module")
def state(states):
    return jax.tree.map(lambda leaf: leaf[1], states)


@pytest.fixture(scope="module")
def step(experiment):
    return experiment.adversarial(players(experiment))


def test_a_step_is_two_updates(experiment, state):
    """Both updates written out: the discriminator's uses the old generator, the generator's the new discriminator."""
    two, tx = players(experiment, dropout=0.0), optax.adam(0.01)
    new, metrics = jax.jit(experiment.adversarial(two))(state, {"image": REAL})
    probability = lambda d, image: jax.nn.sigmoid(two.discriminator.apply({"params": d}, image, train=False))
    painted = lambda g, noise: two.generator.apply({"params": g}, noise, train=False)

    @jax.jit
    def expected(old_g, old_d, key):
        key_d, key_g = jax.random.split(key)
        noise_d, noise_g = (jax.random.normal(jax.random.split(k, n)[0], (6, 5)) for k, n in ((key_d, 3), (key_g, 2)))
        fooled = lambda d, g, noise: jnp.log(probability(d, painted(g, noise)))
        caught = lambda d: jnp.log(1 - probability(d, painted(old_g, noise_d)))
        loss_d = lambda d: -(jnp.log(probability(d, REAL / 255)) + caught(d)).mean() / 2
        value_d, grads = jax.value_and_grad(loss_d)(old_d)
        new_d = optax.apply_updates(old_d, tx.update(grads, tx.init(old_d))[0])
        value_g, grads = jax.value_and_grad(lambda g: -fooled(new_d, g, noise_g).mean())(old_g)
        new_g = optax.apply_updates(old_g, tx.update(grads, tx.init(old_g))[0])
        return {"generator": new_g, "discriminator": new_d}, value_d, value_g

    old_g, old_d = state.params["generator"], state.params["discriminator"]
    params, value_d, value_g = expected(old_g, old_d, jax.random.fold_in(state.key, 0))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(close, new.params, params)
    close(metrics["discriminator_loss"], value_d)
    close(metrics["generator_loss"], value_g)
    assert new.step == 1
    moved = zip(jax.tree.leaves(params["discriminator"]), jax.tree.leaves(old_d), strict=True)
    assert any((a != b).any() for a, b in moved)


@pytest.mark.parametrize(("idle", "busy"), [("generator", "discriminator"), ("discriminator", "generator")])
def test_a_player_is_moved_by_its_own_loss_alone(experiment, state, idle, busy, monkeypatch):
    """The loss of one network changes neither the parameters nor the optimiser's moments of the other."""
    monkeypatch.setattr(experiment, f"{idle}_loss", lambda players, params, *rest: 0.0)
    new, _ = jax.jit(experiment.adversarial(players(experiment)))(state, {"image": REAL})
    jax.tree.map(np.testing.assert_array_equal, new.params[idle], state.params[idle])
    jax.tree.map(np.testing.assert_array_equal, new.opt_state[idle][0].mu, state.opt_state[idle][0].mu)
    for before, after in ((state.params, new.params), (state.opt_state, new.opt_state)):
        changed = [(a != b).any() for a, b in zip(*(jax.tree.leaves(t[busy]) for t in (before, after)), strict=True)]
        assert all(changed)


def test_the_penalty_of_a_quadratic_score(experiment):
    """∇ of x'Ax + b'x is 2 A x + b for a symmetric A; the penalty's derivative by b is twice the mean slope."""
    a, b, x = RNG.normal(size=(5, 5)), RNG.normal(size=5), RNG.normal(size=(7, 5))
    a = a + a.T
    slope = 2 * x @ a + b  # [B, D]
    score = lambda b, x: jnp.einsum("bi,ij,bj->b", x, jnp.float32(a), x) + x @ b
    penalty = lambda b: experiment.r1(lambda x: score(b, x), jnp.float32(x))
    value, by_b = jax.value_and_grad(penalty)(jnp.float32(b))
    np.testing.assert_allclose(value, (slope**2).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(by_b, 2 * slope.mean(0), rtol=1e-4, atol=1e-5)


def test_the_penalty_of_the_discriminator_against_finite_differences(experiment, state):
    """Of real images alone and with the dropout of the loss itself; at γ = 0 the loss is the cross-entropy."""
    two, key = players(experiment), jax.random.key(3)
    params, generator, real = *(state.params[name] for name in ("discriminator", "generator")), REAL / np.float32(255)
    loss = lambda gamma: experiment.discriminator_loss(two._replace(gamma=gamma), params, generator, real, key)
    judge = jax.jit(lambda real: two.judge(params, real, jax.random.split(key, 3)[1]).sum())
    step, squares = 1e-2, np.zeros(len(real))
    for i, *pixel in np.ndindex(real.shape):
        nudge = np.zeros(real.shape, np.float32)
        nudge[i, *pixel] = step
        squares[i] += ((judge(real + nudge) - judge(real - nudge)) / (2 * step)) ** 2
    assert squares.mean() > 0.001
    np.testing.assert_allclose(loss(3.0) - loss(0.0), 1.5 * squares.mean(), rtol=0.02)


def test_the_penalised_player_learns_from_the_penalty(experiment, state):
    """A discriminator that learns from a large penalty alone becomes flat at real images."""
    two = players(experiment, dropout=0.0)._replace(gamma=1e4)
    step = jax.jit(experiment.adversarial(two))
    flatness = lambda params: experiment.r1(lambda x: two.judge(params, x, jax.random.key(0)), REAL / np.float32(255))
    new = state
    for _ in range(20):
        new, _ = step(new, {"image": REAL})
    assert flatness(new.params["discriminator"]) < 0.5 * flatness(state.params["discriminator"])


def test_fit_resumes_both_players(step, state, tmp_path):
    batches = lambda i: {"image": np.roll(REAL, i, axis=0)}
    whole = fit(step, state, batches, steps=8)
    settings = Settings(preempted=lambda step: step == 5)
    with pytest.raises(Preempted), contextlib.closing(Run(epath.Path(tmp_path), settings)) as run:
        fit(step, state, batches, steps=8, run=run)
    with contextlib.closing(Run(epath.Path(tmp_path))) as run:
        resumed = fit(step, state, batches, steps=8, run=run)
    both = lambda state: (state.params, state.opt_state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), both(whole), both(resumed))
    assert whole.step == resumed.step == 8


def test_a_seed_among_others_takes_the_step_that_it_takes_alone(step, states, state):
    stacked, _ = jax.jit(per_seed(step))(states, {"image": np.stack([REAL] * 3)})
    alone, _ = jax.jit(step)(state, {"image": REAL})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, atol=1e-5), stacked.params, alone.params)


def test_rate_and_momentum_follow_the_authors_rules(experiment):
    cfg = experiment.Config(steps=10, learning_rate=0.1, decay=1.5, momentum=0.5, final_momentum=0.7)
    tx, w, velocity = experiment.sgd(cfg), 0.0, 0.0
    params, state, update = jnp.zeros(()), tx.init(jnp.zeros(())), jax.jit(tx.update)
    for t, gradient in enumerate([1.0, -2.0, 0.5, 3.0]):
        velocity = (0.5 + 0.02 * t) * velocity + gradient
        w -= 0.1 / 1.5**t * velocity
        updates, state = update(jnp.array(gradient), state, params)
        params = params + updates
    np.testing.assert_allclose(params, w, rtol=1e-5)


def test_parzen_window_against_float64(experiment):
    samples, valid, test = (RNG.random((n, 12)).astype(np.float32) for n in (30, 20, 150))

    def density(x, width):
        squares = ((x[:, None].astype(np.float64) - samples) ** 2).sum(-1)  # [B, N]
        return np.log(np.exp(-squares / (2 * width**2)).mean(1) / (2 * np.pi * width**2) ** 6).mean()

    widths = np.logspace(-1, 0, 10)
    best = widths[np.argmax([density(valid, width) for width in widths])]
    assert best not in widths[[0, -1]]
    np.testing.assert_allclose(experiment.parzen(samples, valid, test), density(test, best), rtol=1e-4)


def test_the_papers_batch_runs_on_eight_devices(experiment):
    """It runs on five of eight devices, as 100 is not a multiple of 8."""
    assert jax.device_count() == 8
    config = dataclasses.replace(experiment.PRESETS["smoke"], train_split="train[:128]", batch_size=100)
    assert np.isfinite(experiment.main(config, Run())["parzen/r1"])


def test_an_untrained_net_does_not_meet_the_bars(experiment):
    """Before any step the two generators are equal; each seed has its own samples and real digits."""
    changes = {"train_split": "train", "test_split": "test", "samples": 200, "steps": 0, "nets": ("gan", "r1")}
    config = dataclasses.replace(experiment.PRESETS["smoke"], **changes)
    found = experiment.main(config, Run(settings=Settings(seeds=(0, 1))))
    for net in ("gan", "r1"):
        np.testing.assert_array_equal(found[f"parzen/{net}"], found["parzen/untrained"])
        np.testing.assert_array_equal(found[f"margin/{net}"], found["parzen/untrained"] - found["parzen/digits_100"])
        np.testing.assert_array_equal(found[f"below/{net}"], 1)
    assert (found["parzen/untrained"] < found["parzen/digits_100"]).all()
    assert (found["parzen/digits_100"] < found["parzen/training_digits"]).all()
    assert all(len(set(values)) == 2 for name, values in found.items() if not name.startswith("below"))


def test_more_samples_than_digits_to_score_beside_them(experiment):
    config = dataclasses.replace(experiment.PRESETS["smoke"], samples=65)
    with pytest.raises(InputError, match="samples is 65, expected at most 64: as many digits of train"):
        experiment.main(config, Run())
