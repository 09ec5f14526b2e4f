"""experiments/generative/diffusion.py: the score of samples, and what is drawn and judged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax import diffusion
from dl_jax.core.errors import InputError
from dl_jax.harness.run import Run
from dl_jax.models.generative.denoiser import Denoiser

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def experiment(load_experiment):
    return load_experiment("generative/diffusion")


def test_scores_of_known_samples(experiment):
    """Sure and of all classes, sure and of one class, unsure; and by the definition, the mean divergence from E p."""
    sure, one, unsure = np.eye(10)[np.arange(20) % 10], np.eye(10)[np.zeros(20, int)], np.full((20, 10), 0.1)
    for p, expected in ((sure, (10, 10, 100)), (one, (1, 1, 100)), (unsure, (1, 10, 10))):
        found = experiment.scores(p)
        np.testing.assert_allclose([found[name] for name in ("score", "classes", "confidence")], expected, rtol=1e-6)
    p = RNG.dirichlet(np.ones(10), 50)
    divergence = (p * np.log(p / p.mean(0))).sum(-1)
    np.testing.assert_allclose(experiment.scores(p)["score"], np.exp(divergence.mean()), rtol=1e-6)


def test_a_sample_does_not_depend_on_how_many_are_drawn_at_a_time(experiment):
    draw = lambda variables, keys: jax.vmap(lambda key: jax.random.uniform(key, (3,)))(keys) + variables
    given = jnp.zeros(2), jax.random.split(jax.random.key(3), 2)  # of two seeds
    few, many = (experiment.drawing(draw, size)(given, {"index": np.arange(n)}) for n, size in ((5, 2), (7, 8)))
    np.testing.assert_array_equal(few, many[:, :5])
    assert few.shape == (2, 5, 3)
    assert len(np.unique(few)) == few.size


def test_the_rows_of_the_figure_go_from_noise_to_the_samples(experiment):
    schedule, model, key = diffusion.cosine(9), Denoiser((2,), 2, patch=2), jax.random.key(5)
    variables = jax.jit(lambda: model.init(key, jnp.zeros((1, 32, 32, 1)), jnp.zeros(1, jnp.int32), train=False))()
    rows = np.asarray(experiment.way(schedule, model, variables, key)).reshape(10, 10, 28, 28, 1)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(10))
    last = experiment.from_noise(schedule, model, variables, keys)
    np.testing.assert_allclose(rows[:, -1], last, atol=1e-5)
    noise = (jax.random.normal(jax.random.fold_in(keys[4], 0), (32, 32, 1)) + 1) / 2
    np.testing.assert_allclose(rows[4, 0], jnp.clip(noise, 0, 1)[2:-2, 2:-2], atol=1e-6)


def test_the_denoiser_learns_from_digits_with_a_black_margin(experiment, monkeypatch):
    seen = []
    monkeypatch.setattr(experiment.diffusion, "loss", lambda schedule, predict, image, key: seen.append(image) or image)
    digits = RNG.integers(0, 256, (2, 28, 28, 1), np.uint8)
    experiment.denoiser_loss(diffusion.cosine(3), Denoiser(), {}, {"image": digits}, jax.random.key(0))
    assert seen[0].shape == (2, 32, 32, 1)
    np.testing.assert_allclose(experiment.visible(seen[0]), digits / 255, atol=1e-6)
    assert (np.delete(np.delete(seen[0], range(2, 30), 1), range(2, 30), 2) == -1).all()


@pytest.mark.parametrize("preset", ["paper", "quick", "smoke"])
def test_levels_halve_the_sides(experiment, preset):
    cfg = experiment.PRESETS[preset]
    model, inputs = Denoiser(cfg.maps, cfg.embedding, patch=2), (jnp.zeros((1, *experiment.WIDER)), jnp.zeros(1, int))
    shape = jax.eval_shape(lambda key: model.init_with_output(key, *inputs, train=False)[0], jax.random.key(0)).shape
    assert shape == (1, 32, 32, 1)


def test_a_size_that_a_network_cannot_have_costs_no_training(experiment, monkeypatch):
    monkeypatch.setattr(experiment, "fit", lambda *args, **options: pytest.fail("a network was trained"))
    smoke = experiment.PRESETS["smoke"]
    with pytest.raises(InputError, match="an embedding of 3 numbers, expected an even number"):
        experiment.main(dataclasses.replace(smoke, embedding=3), Run())
    with pytest.raises(InputError, match="expected 32 x 32 or more, the smallest that UNet takes"):
        experiment.main(dataclasses.replace(smoke, maps=(2, 2, 2, 2, 2, 2)), Run())


def test_networks_do_not_share_keys(experiment, monkeypatch):
    """The start and the training of each network and the samples use different keys."""
    keys, start, drawing = [], experiment.start, experiment.drawing

    def starts(model, tx, key_init, key, *inputs):
        keys.extend([key_init, key])
        return start(model, tx, key_init, key, *inputs)

    def draws(draw, batch_size):
        collect = drawing(draw, batch_size)
        return lambda given, records: keys.append(given[1]) or collect(given, records)

    monkeypatch.setattr(experiment, "start", starts)
    monkeypatch.setattr(experiment, "drawing", draws)
    monkeypatch.setattr(experiment, "fit", lambda step, states, *rest, **options: states)
    found = experiment.main(experiment.PRESETS["smoke"], Run())
    assert {name.split("/")[1] for name in found} == {"diffusion", "vae", "real"}
    assert len({tuple(np.asarray(jax.random.key_data(key)).ravel().tolist()) for key in keys}) == 3 * 2 + 1
