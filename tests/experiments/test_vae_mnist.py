"""experiments/generative/vae_mnist.py: the authors' optimiser and schedule, the pixels, seeds, keys and sheets."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from dl_jax.core.errors import InputError
from dl_jax.harness.run import Run, Settings
from dl_jax.models.generative.vae import VAE, TwoLayerVAE

SEEDS = (4, 5)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def experiment(load_experiment):
    return load_experiment("generative/vae_mnist")


@pytest.fixture(scope="module")
def run_seeds(experiment, tmp_path_factory):
    """seeds -> what one cell measured, and the keys that it used; on five devices, as 20 and 100 are no eights."""
    assert jax.device_count() == 8
    sizes = {"vae_samples": (), "batch_size": 20, "test_batch": 100, "test_split": "test[:120]"}
    config = dataclasses.replace(experiment.PRESETS["smoke"], **sizes)
    train, evaluator = experiment.fit, experiment.evaluator

    def main(*seeds):
        keys = [jax.random.split(jax.random.key(seed), 4)[0] for seed in seeds]  # of the parameters at the start

        def fit(step, states, *rest, **options):
            keys.extend(jax.random.fold_in(key, i) for key in states.key for i in range(8))
            return train(step, states, *rest, **options)

        def recording(measure, records, batch_size, roots):
            keys.extend(jax.random.fold_in(key, i) for key in roots for i in range(8))
            return evaluator(measure, records, batch_size, roots)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(experiment, "fit", fit)
            patch.setattr(experiment, "evaluator", recording)
            patch.setattr(experiment, "sheets", lambda *given: keys.append(given[-1]) or {})
            folder = epath.Path(tmp_path_factory.mktemp("run"))
            with contextlib.closing(Run(folder, Settings(seeds=seeds))) as run:
                return experiment.main(config, run), keys

    return main


@pytest.fixture(scope="module")
def together(run_seeds):
    return run_seeds(*SEEDS)


def test_adam_is_the_authors(experiment):
    """The authors' update in float64: moments from 0 and 1, ε added to the root of the uncorrected second moment.

    Optax corrects the second moment before it adds ε: the difference is ε (1 − √(1 − β2^t)) of the root, at most.
    """
    rate, gradients = 0.1, RNG.normal(0, 2, (30, 4))
    w, first, second = np.zeros(4), np.zeros(4), np.ones(4)
    for t, gradient in enumerate(gradients, 1):
        first = 0.99 * first + 0.01 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        w -= rate * np.sqrt(1 - 0.999**t) / (1 - 0.99**t) * first / (np.sqrt(second) + 1e-4)
    tx = experiment.adam(experiment.learning_rate(((10, rate), (20, rate))))
    params, state, update = jnp.zeros(4), tx.init(jnp.zeros(4)), jax.jit(tx.update)
    for gradient in np.float32(gradients):
        updates, state = update(gradient, state)
        params = params + updates
    np.testing.assert_allclose(params, w, rtol=2e-4)


def test_the_papers_schedule(experiment):
    stages = experiment.PRESETS["paper"].stages
    assert sum(steps for steps, _ in stages) == 3280 * 59_600 // 20
    rate = experiment.learning_rate(stages)
    ends = np.cumsum([2980 * 3**i for i in range(8)])
    expected = [10.0, 7.2, 5.2, 3.7, 2.7, 1.9, 1.4, 1.0]
    np.testing.assert_allclose(jax.jit(jax.vmap(rate))(ends - 1), 1e-4 * np.array(expected), rtol=1e-6)
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


def test_what_a_seed_gives_does_not_depend_on_those_beside_it(run_seeds, together):
    """A seed's test pixels and samples do not depend on the other seeds either."""
    (first, _), (second, _) = together, run_seeds(SEEDS[1], 6)
    for name, values in first.items():
        np.testing.assert_allclose(values[1], second[name][0], rtol=1e-4)
    assert first["nll/iwae-k3"][0] != first["nll/iwae-k3"][1]


def test_no_key_serves_twice(together):
    """The start, the training, the test and the images of each seed all use different keys."""
    _, keys = together
    assert len(keys) == 2 + 1 + 4 * 8
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_chunk": 3}, "test_samples=4 in chunks of test_chunk=3, expected a multiple of the chunk; change one"),
        ({"vae_samples": (), "iwae_samples": ()}, "vae_samples and iwae_samples are empty, expected a number"),
    ],
)
def test_what_cannot_be_tested_is_not_trained(experiment, change, message, monkeypatch):
    monkeypatch.setattr(experiment, "fit", lambda *_, **__: pytest.fail("it trained"))
    with pytest.raises(InputError, match=message):
        experiment.main(dataclasses.replace(experiment.PRESETS["smoke"], **change), Run())


def test_two_stochastic_layers(experiment):
    """The preset at smoke size: the metrics' names are those of the claims, and every parameter is trained."""
    two = experiment.PRESETS["two_layers"]
    assert (two.latents, two.top, two.top_hidden) == (100, 50, (100, 100))
    names = {claim.metric for claim in experiment.CLAIMS if claim.preset == "two_layers"}
    cells = [f"{net}-k{k}" for net, ks in (("vae", two.vae_samples), ("iwae", two.iwae_samples)) for k in ks]
    assert names == {f"nll/two-layers/{cell}" for cell in cells}
    small = dataclasses.replace(experiment.PRESETS["smoke"], top=3, top_hidden=(5,), vae_samples=(), iwae_samples=(2,))
    trained, train = [], experiment.fit

    def fit(step, states, *rest, **options):
        trained.extend((states.params, train(step, states, *rest, **options).params))
        return states._replace(params=trained[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "fit", fit)
        patch.setattr(experiment, "sheets", lambda *_: {})
        found = experiment.main(small, Run())
    assert found.keys() == {"nll/two-layers/iwae-k2", "active/two-layers/iwae-k2"}
    assert np.isfinite(found["nll/two-layers/iwae-k2"]).all()
    before, after = trained
    assert all((np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, trained), strict=True))
    assert {"top_encoder", "top_decoder"} <= before.keys() == after.keys()


def test_samples_of_two_layers_are_drawn_from_the_top(experiment):
    """z given y is Gaussian with the network's mean and variance: over many draws of both, its first two moments."""
    model = TwoLayerVAE(hidden=(4,), latents=2, top=3, top_hidden=(6,), shape=(2, 3, 1))
    image = RNG.random((1, 2, 3, 1), np.float32)
    variables = jax.jit(lambda: model.init(jax.random.key(1), image, train=False))()
    z = np.asarray(experiment.prior(model, variables, jax.random.key(2), 100_000))
    top = RNG.normal(size=(100_000, 3)).astype(np.float32)
    mean, log_var = map(np.asarray, model.apply(variables, top, method=model.decode_top))
    np.testing.assert_allclose(z.mean(0), mean.mean(0), atol=0.03)
    np.testing.assert_allclose(z.var(0), mean.var(0) + np.exp(log_var).mean(0), rtol=0.03)
    assert z.shape == (100_000, 2)
    assert (mean.var(0) > 0.05).all()


def test_sheets(experiment):
    model = VAE(hidden=(7,), latents=4, shape=(8, 12, 1))
    images = RNG.integers(0, 256, (50, 8, 12, 1)).astype(np.uint8)
    variables = jax.jit(lambda: model.init(jax.random.key(0), images / 255, train=False))()
    variables = jax.tree.map(lambda leaf: leaf + 0.1 * RNG.normal(size=leaf.shape).astype(np.float32), variables)
    found = jax.tree.map(np.asarray, experiment.sheets(model, variables, images, jax.random.key(0)))
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
