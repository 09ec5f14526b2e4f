"""The parts of the experiment that trains the autoencoders."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax.core.errors import InputError
from dl_jax.harness.run import Run, Settings
from dl_jax.models.generative.vae import VAE

RNG = np.random.default_rng(0)
SMALL_IMAGE = RNG.random((3, 8, 12, 1), np.float32)


def initialised(model, image=SMALL_IMAGE):
    variables = jax.jit(lambda: model.init(jax.random.key(0), image, train=False))()
    return jax.tree.map(lambda leaf: leaf + 0.1 * RNG.normal(size=leaf.shape).astype(np.float32), variables)


@pytest.fixture(scope="module")
def experiment(load_experiment):
    return load_experiment("generative/vae_mnist")


def test_adam_is_the_authors(experiment):
    """Their update in float64: moments from 0 and 1, ε added to the root of the second moment as it is.

    Optax corrects the second moment before it adds ε: the difference is ε (1 − √(1 − β2^t)) of the root, at most.
    """
    rate, gradients = 0.1, RNG.normal(0, 2, (30, 4))
    w, first, second = np.zeros(4), np.zeros(4), np.ones(4)
    for t, gradient in enumerate(gradients, 1):
        first = 0.99 * first + 0.01 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        w -= rate * np.sqrt(1 - 0.999**t) / (1 - 0.99**t) * first / (np.sqrt(second) + 1e-4)
    tx = experiment.adam(experiment.learning_rate(((10, rate), (20, rate))))
    params, state = jnp.zeros(4), tx.init(jnp.zeros(4))
    for gradient in jnp.array(gradients, jnp.float32):
        updates, state = tx.update(gradient, state)
        params = params + updates
    np.testing.assert_allclose(params, w, rtol=2e-4)


def test_the_papers_schedule(experiment):
    stages = experiment.PRESETS["paper"].stages
    assert sum(steps for steps, _ in stages) == 3280 * 59_600 // 20
    rate = experiment.learning_rate(stages)
    ends = np.cumsum([2980 * 3**i for i in range(8)])
    expected = [10.0, 7.2, 5.2, 3.7, 2.7, 1.9, 1.4, 1.0]
    np.testing.assert_allclose([rate(end - 1) for end in ends], 1e-4 * np.array(expected), rtol=1e-6)
    np.testing.assert_allclose(rate(2980), 7.2e-4, rtol=1e-6)


def test_pixels_are_drawn_anew_with_their_grey_level(experiment):
    image = np.array([[0, 64, 128, 255]], np.uint8)
    drawn = jax.vmap(lambda key: experiment.binarised(key, {"image": image})["image"])(
        jax.random.split(jax.random.key(0), 10_000)
    )
    assert set(np.unique(drawn)) == {0, 1}
    np.testing.assert_allclose(drawn.mean((0, 1)), image[0] / 255, atol=0.02)
    np.testing.assert_array_equal(drawn[..., 0], 0)
    np.testing.assert_array_equal(drawn[..., 3], 1)


def test_a_lane_is_a_run_of_its_own(experiment):
    """Also in its test pixels and samples."""
    config = dataclasses.replace(experiment.PRESETS["smoke"], vae_samples=())
    both, alone = (experiment.main(config, Run(settings=Settings(seeds=seeds))) for seeds in ((4, 5), (5,)))
    for name, values in both.items():
        np.testing.assert_allclose(values[1], alone[name][0], rtol=1e-4)
    assert both["nll/iwae-k3"][0] != both["nll/iwae-k3"][1]


def test_no_key_serves_twice(experiment, monkeypatch):
    """Not in the start, the training, the test and the pictures of a seed, and not in those of another seed."""
    train, roots, pictures = experiment.fit, [], []

    def fit(step, state, *rest, **options):
        roots.extend(state.key)
        return train(step, state, *rest, **options)

    def evaluate(examine, variables, exam, key):
        roots.append(key)
        return {"nll": 0.0, "mean": np.zeros(4), "square": np.zeros(4)}

    monkeypatch.setattr(experiment, "fit", fit)
    monkeypatch.setattr(experiment, "evaluate", evaluate)
    monkeypatch.setattr(experiment, "show", lambda *arguments: pictures.append(arguments[-1]))
    config = dataclasses.replace(experiment.PRESETS["smoke"], vae_samples=())
    experiment.main(config, Run(settings=Settings(seeds=(0, 1))))
    starts = [jax.random.split(jax.random.key(seed), 4)[0] for seed in (0, 1)]
    keys = [*starts, *pictures, *(jax.random.fold_in(root, i) for root in roots for i in range(8))]
    assert len(keys) == 2 + 1 + 4 * 8
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys)


def test_the_papers_batch_runs_on_eight_devices(experiment):
    """On five of them: 20 and 100 are no multiples of 8."""
    assert jax.device_count() == 8
    sizes = {"batch_size": 20, "test_batch": 100, "test_split": "test[:120]"}
    config = dataclasses.replace(experiment.PRESETS["smoke"], vae_samples=(), **sizes)
    assert np.isfinite(experiment.main(config, Run())["nll/iwae-k3"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_chunk": 3}, "test_samples=4 in chunks of test_chunk=3, expected a multiple of the chunk; change one"),
        ({"test_samples": 0}, "test_samples is 0, expected more than 0"),
        ({"test_chunk": 0}, "test_chunk is 0, expected more than 0"),
        ({"latents": 0}, "latents is 0, expected more than 0"),
        ({"iwae_samples": (5, 0)}, "the smallest number in vae_samples or iwae_samples is 0, expected more than 0"),
        ({"vae_samples": (), "iwae_samples": ()}, "in vae_samples or iwae_samples is 0"),
        ({"stages": ()}, "the smallest number in stages is 0, expected more than 0"),
        ({"stages": ((5, 0.1), (5, -0.1))}, "the smallest number in stages is -0.1"),
        ({"hidden": (16, 0)}, "hidden is 0, expected more than 0"),
    ],
)
def test_what_cannot_be_tested_is_not_trained(experiment, change, message, monkeypatch):
    monkeypatch.setattr(experiment, "fit", lambda *_, **__: pytest.fail("it trained"))
    with pytest.raises(InputError, match=message):
        experiment.main(dataclasses.replace(experiment.PRESETS["smoke"], **change), Run())


def test_sheets(experiment):
    model = VAE(hidden=(7,), latents=4, shape=(8, 12, 1))
    images = RNG.integers(0, 256, (50, 8, 12, 1)).astype(np.uint8)
    variables = initialised(model, SMALL_IMAGE)
    found = experiment.sheets(model.apply, variables, images, jax.random.key(0))
    assert {name: sheet.shape for name, sheet in found.items()} == dict.fromkeys(
        ("reconstructions", "samples", "interpolations"), (100, 8, 12, 1)
    )
    assert all(((sheet >= 0) & (sheet <= 1)).all() for sheet in found.values())
    seen = found["reconstructions"].reshape(5, 2, 10, 8, 12, 1)
    assert set(np.unique(seen[:, 0])) == {0, 1}
    logits, *_ = model.apply(variables, seen[:, 0].reshape(50, 8, 12, 1), train=False)
    np.testing.assert_allclose(seen[:, 1].reshape(50, 8, 12, 1), jax.nn.sigmoid(logits), atol=1e-5)
    walk = found["interpolations"].reshape(10, 10, 8, 12, 1)
    np.testing.assert_allclose(walk[:, 0], seen[0, 1], atol=1e-5)
    np.testing.assert_allclose(walk[:, -1], seen[1, 1], atol=1e-5)
