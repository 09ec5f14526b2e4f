"""Two players in one state: the step of two optimisers, `fit`, and the Parzen window that scores them."""

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


def started(experiment, **options):
    return jax.jit(experiment.start, static_argnums=0)(players(experiment, **options), jax.random.key(0))


def test_a_step_is_two_updates(experiment):
    """Written out: the discriminator's with the old generator, the generator's with the new discriminator."""
    two, state = players(experiment, dropout=0.0), started(experiment, dropout=0.0)
    new, metrics = jax.jit(experiment.adversarial(two))(state, {"image": REAL})
    key_d, key_g = jax.random.split(jax.random.fold_in(state.key, 0))
    noise_d, noise_g = (jax.random.normal(jax.random.split(k, n)[0], (6, 5)) for k, n in ((key_d, 3), (key_g, 2)))
    old_g, old_d, tx = state.params["generator"], state.params["discriminator"], optax.adam(0.01)
    probability = lambda d, image: jax.nn.sigmoid(two.discriminator.apply({"params": d}, image, train=False))
    picture = lambda g, noise: two.generator.apply({"params": g}, noise, train=False)

    def loss_d(d):
        return -(jnp.log(probability(d, REAL / 255)) + jnp.log(1 - probability(d, picture(old_g, noise_d)))).mean() / 2

    value_d, grads = jax.value_and_grad(loss_d)(old_d)
    new_d = optax.apply_updates(old_d, tx.update(grads, tx.init(old_d))[0])
    value_g, grads = jax.value_and_grad(lambda g: -jnp.log(probability(new_d, picture(g, noise_g))).mean())(old_g)
    new_g = optax.apply_updates(old_g, tx.update(grads, tx.init(old_g))[0])
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(close, new.params, {"generator": new_g, "discriminator": new_d})
    close(metrics["discriminator_loss"], value_d)
    close(metrics["generator_loss"], value_g)
    assert new.step == 1
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(new_d), jax.tree.leaves(old_d), strict=True))


@pytest.mark.parametrize(("idle", "busy"), [("generator", "discriminator"), ("discriminator", "generator")])
def test_a_player_is_moved_by_its_own_loss_alone(experiment, idle, busy, monkeypatch):
    """With the other loss alone, neither its parameters nor its optimiser's moments change."""
    monkeypatch.setattr(experiment, f"{idle}_loss", lambda players, params, *rest: 0.0)
    state = started(experiment)
    new, _ = jax.jit(experiment.adversarial(players(experiment)))(state, {"image": REAL})
    jax.tree.map(np.testing.assert_array_equal, new.params[idle], state.params[idle])
    jax.tree.map(np.testing.assert_array_equal, new.opt_state[idle][0].mu, state.opt_state[idle][0].mu)
    for before, after in ((state.params, new.params), (state.opt_state, new.opt_state)):
        changed = [(a != b).any() for a, b in zip(*(jax.tree.leaves(t[busy]) for t in (before, after)), strict=True)]
        assert all(changed)


def batches(step):
    return {"image": np.roll(REAL, step, axis=0)}


def test_fit_resumes_both_players(experiment, tmp_path):
    step, state = experiment.adversarial(players(experiment)), started(experiment)
    whole = fit(step, state, batches, steps=8)
    settings = Settings(preempted=lambda step: step == 5)
    with pytest.raises(Preempted), contextlib.closing(Run(epath.Path(tmp_path), settings)) as run:
        fit(step, state, batches, steps=8, run=run)
    with contextlib.closing(Run(epath.Path(tmp_path))) as run:
        resumed = fit(step, state, batches, steps=8, run=run)
    bits = lambda state: [np.asarray(leaf) for leaf in jax.tree.leaves((state.params, state.opt_state))]
    for a, b in zip(bits(whole), bits(resumed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert whole.step == resumed.step == 8


def test_seeds_are_lanes(experiment):
    two = players(experiment)
    keys = jax.random.split(jax.random.key(1), 3)
    start = lambda key: experiment.start(two, key)
    states, state = jax.jit(jax.vmap(start))(keys), jax.jit(start)(keys[1])
    stacked, _ = jax.jit(per_seed(experiment.adversarial(two)))(states, {"image": np.stack([REAL] * 3)})
    alone, _ = jax.jit(experiment.adversarial(two))(state, {"image": REAL})
    lane = jax.tree.map(lambda leaf: leaf[1], stacked.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), lane, alone.params)


def test_rate_and_momentum_follow_the_authors_rules(experiment):
    cfg = experiment.Config(steps=10, learning_rate=0.1, decay=1.5, momentum=0.5, final_momentum=0.7)
    tx, w, velocity = experiment.sgd(cfg), 0.0, 0.0
    params, state = jnp.zeros(()), tx.init(jnp.zeros(()))
    for t, gradient in enumerate([1.0, -2.0, 0.5, 3.0]):
        velocity = (0.5 + 0.02 * t) * velocity + gradient
        w -= 0.1 / 1.5**t * velocity
        updates, state = tx.update(jnp.array(gradient), state, params)
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
    """On five of them: 100 is no multiple of 8."""
    assert jax.device_count() == 8
    config = dataclasses.replace(experiment.PRESETS["smoke"], train_split="train[:128]", batch_size=100)
    assert np.isfinite(experiment.main(config, Run())["parzen/gan"])


def test_an_untrained_net_does_not_meet_the_bars(experiment):
    """Without a step the two generators are one; a seed's samples and real digits are its own."""
    config = dataclasses.replace(
        experiment.PRESETS["smoke"], train_split="train", test_split="test", samples=200, steps=0
    )
    found = experiment.main(config, Run(settings=Settings(seeds=(0, 1))))
    np.testing.assert_array_equal(found["parzen/gan"], found["parzen/untrained"])
    assert (found["parzen/untrained"] < found["parzen/digits_100"]).all()
    assert (found["parzen/digits_100"] < found["parzen/training_digits"]).all()
    assert all(len(set(values)) == 2 for values in found.values())


@pytest.mark.parametrize(("name", "value"), [("pieces", 0), ("decay", 0.0), ("noise", -1), ("learning_rate", -1.0)])
def test_players_that_cannot_be(experiment, name, value):
    config = dataclasses.replace(experiment.PRESETS["smoke"], **{name: value})
    with pytest.raises(InputError, match=f"{name} is {value}, expected more than 0"):
        experiment.main(config, Run())


@pytest.mark.parametrize("samples", [0, 65])
def test_samples_that_cannot_be_scored(experiment, samples):
    config = dataclasses.replace(experiment.PRESETS["smoke"], samples=samples)
    with pytest.raises(InputError, match=f"samples={samples}, expected 1 to 64: as many digits of"):
        experiment.main(config, Run())
