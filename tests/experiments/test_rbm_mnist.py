"""experiments/generative/rbm_mnist.py: what it makes of machines."""

import dataclasses

import jax
import numpy as np
import pytest

from dl_jax import classify, data, rbm
from dl_jax.core.errors import InputError
from dl_jax.harness.run import Run, Settings
from dl_jax.models.vision.mlp import MLP


@pytest.fixture(scope="module")
def experiment(load_experiment):
    return load_experiment("generative/rbm_mnist")


def test_more_labels_than_images_are_refused_before_any_training(experiment, monkeypatch):
    monkeypatch.setattr(experiment, "fit", None)  # a step would fail
    config = dataclasses.replace(experiment.PRESETS["smoke"], labels=5)
    with pytest.raises(InputError, match="5 labels of each class, expected at most 4, which the split has; lower"):
        experiment.main(config, Run())


def test_each_seed_draws_its_own_labelled_digits_and_both_classifiers_learn_from_them(experiment, monkeypatch):
    config = dataclasses.replace(experiment.PRESETS["smoke"], labels=1, batch_size=20)
    streams, fits = {}, experiment.fit

    def spy(step, states, stream, *, run, **options):
        streams[run.name] = stream
        return fits(step, states, stream, run=run, **options)

    monkeypatch.setattr(experiment, "fit", spy)
    experiment.main(config, Run(settings=Settings(seeds=(0, 1))))
    train = data.grey_images("digits", config.train_split)
    for name in ("tuned-random", "tuned-dbn"):
        batch = streams[name](0)  # two epochs
        for i in range(2):
            own = data.rows(train, data.few(train["label"], 1, 10, seed=i))
            found = {image.tobytes(): label for image, label in zip(batch["image"][i], batch["label"][i], strict=True)}
            assert found == {image.tobytes(): label for image, label in zip(own["image"], own["label"], strict=True)}
    np.testing.assert_array_equal(np.sort(batch["label"]), [np.arange(10).repeat(2)] * 2)


def test_without_steps_the_likelihood_is_that_of_each_pixel_by_itself(experiment):
    """The weights are tiny then, and both likelihoods agree. A machine of many units has the estimate alone."""
    changes = {"train_split": "train", "test_split": "test", "steps": 0, "layers": (), "chains": 100}
    config = dataclasses.replace(experiment.PRESETS["smoke"], **changes)
    found = experiment.main(config, Run(settings=Settings(seeds=(0, 1))))
    np.testing.assert_allclose(found["log_likelihood/pcd"], -241.8, atol=3)
    np.testing.assert_allclose(found["ais_log_likelihood/pcd"], found["log_likelihood/pcd"], atol=0.1)
    assert (found["ais_error/pcd"] < 0.1).all()
    many = experiment.main(dataclasses.replace(config, hidden=26), Run(settings=Settings(seeds=(0, 1))))
    assert set(many) == {"ais_log_likelihood/pcd", "ais_std/pcd"}


def test_a_tuned_network_begins_with_the_means_of_the_machines(experiment, monkeypatch):
    """With a learning rate of almost nothing it still computes their mean-field pass."""
    config = dataclasses.replace(experiment.PRESETS["smoke"], layers=(8, 5), tune_steps=1, tune_rate=1e-12)
    seen = {}
    fits = experiment.fit

    def spy(step, states, stream, *, run, **options):
        seen[run.name] = fits(step, states, stream, run=run, **options)
        return seen[run.name]

    monkeypatch.setattr(experiment, "fit", spy)
    run, train = Run(settings=Settings(seeds=(0, 1))), data.grey_images("digits", "train[:64]")
    (key,), base = run.keys(1), np.zeros(784, np.float32)
    machines = experiment.greedy(config, run, data.shuffled({"image": train["image"]}, 16, run.seeds), base, key)
    experiment.tuned(config, run, [train, train], train, machines, key)
    machines = [jax.tree.map(lambda leaf: leaf[1], each) for each in machines]
    net = jax.tree.map(lambda leaf: leaf[1], seen["tuned-dbn"].params)
    image = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1)).astype(np.uint8)
    top = rbm.up(machines, rbm.unit_rows(image))
    logits = MLP((8, 5), activation=jax.nn.sigmoid).apply({"params": net}, classify.to_unit(image), train=False)
    np.testing.assert_allclose(top @ net["Dense_2"]["kernel"] + net["Dense_2"]["bias"], logits, atol=1e-5)
    other = jax.tree.map(lambda leaf: leaf[1], seen["tuned-random"].params)
    assert np.abs(net["Dense_0"]["kernel"] - other["Dense_0"]["kernel"]).max() > 0.01
    np.testing.assert_allclose(net["Dense_2"]["kernel"], other["Dense_2"]["kernel"], atol=1e-6)


def test_filters_are_grey_where_a_weight_is_zero(experiment):
    weight = np.zeros((784, 3), np.float32)
    weight[0] = [2.0, -4.0, 1.0]
    found = experiment.filters(weight)
    assert found.shape == (3, 28, 28, 1)
    np.testing.assert_array_equal(found[:, 0, 0, 0], [1, 0, 1])
    assert (found.reshape(3, -1)[:, 1:] == 0.5).all()


def test_chains_that_are_annealed_in_several_batches_differ(experiment, monkeypatch):
    """Each batch has a key of its own."""
    monkeypatch.setattr(experiment, "AT_A_TIME", 3)
    config = dataclasses.replace(experiment.PRESETS["smoke"], methods=("cd",), layers=(), chains=8)
    seen = []
    monkeypatch.setattr(experiment, "likelihood", lambda energy, log_weight, exact: seen.append(log_weight) or {})
    experiment.main(config, Run())
    (weights,) = seen
    assert len(set(weights)) == len(weights) == 8
