"""experiments/generative/latent_code.py: the linear models against scikit-learn, and the loss of a table."""

import dataclasses

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression

from dl_jax.core.errors import InputError
from dl_jax.harness.run import Run, Settings

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def experiment(load_experiment):
    return load_experiment("generative/latent_code")


def test_principal_components_against_scikit_learn(experiment):
    train, test = (
        RNG.normal(size=(n, 6)).astype(np.float32) @ RNG.normal(size=(6, 6)).astype(np.float32) for n in (50, 9)
    )
    found = experiment.components([train, test], 3)
    reference = PCA(3).fit(train)
    for each, rows in zip(found, (train, test), strict=True):
        expected = reference.transform(rows)
        np.testing.assert_allclose(abs(each), abs(expected), rtol=1e-3, atol=1e-3)


def test_least_squares_against_scikit_learn(experiment):
    x, y = RNG.normal(size=(40, 3)), RNG.normal(size=40) + 7
    both, targets = [x[:30], x[30:]], [y[:30], y[30:]]
    predicted = LinearRegression().fit(x[:30], y[:30]).predict(x[30:])
    np.testing.assert_allclose(
        experiment.least_squares_error(both, targets), np.sqrt(((predicted - y[30:]) ** 2).mean()), rtol=1e-6
    )
    alone = experiment.least_squares_error([each[:, :0] for each in both], targets)
    np.testing.assert_allclose(alone, np.sqrt(((y[:30].mean() - y[30:]) ** 2).mean()), rtol=1e-6)


def test_logistic_regression_of_what_can_and_cannot_be_told(experiment):
    labels = [np.arange(60) % 3, np.arange(30) % 3]
    told = [np.float32(np.eye(3)[each] * 1000 + 5) for each in labels]  # far from standardised
    assert experiment.logistic_error(told, labels) == 0
    constant = [np.zeros((len(each), 2), np.float32) for each in labels]
    assert experiment.logistic_error(constant, labels) == pytest.approx(200 / 3)


def test_seeds_differ_in_their_parts_of_the_table_and_do_not_depend_on_each_other(experiment):
    small = experiment.PRESETS["smoke"]
    together = experiment.main(small, Run(settings=Settings(seeds=(3, 23))))
    alone = experiment.main(small, Run(settings=Settings(seeds=(23,))))
    for name, values in together.items():
        np.testing.assert_allclose(values[1], alone[name][0], rtol=1e-4)
    assert together["rmse/columns"][0] == together["rmse/columns"][1]  # 3 and 23 are the same of 20 splits
    assert together["rmse/code"][0] != together["rmse/code"][1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"table_latents": 11},
            "^table_latents is 11, expected at most 10, which is how many principal components 398 training rows of 10 "
            "numbers have; give fewer, or a larger set$",
        ),
        ({"latents": 785, "train_split": "train"}, "^latents is 785, expected at most 784, .* rows of 784 numbers"),
        ({"latents": 64}, "^latents is 64, expected at most 63, which is how many principal components 64 training"),
        ({"train_split": "train[:1]"}, r"^all 1 examples of digits train\[:1\] to learn from have the label"),
        ({"latents": 2, "train_split": "train[:2]"}, "^latents is 2, expected at most 1, which is"),
    ],
)
def test_what_the_linear_models_cannot_be_fitted_to_is_refused_before_any_training(
    experiment, change, message, monkeypatch
):
    monkeypatch.setattr(experiment, "fit", None)  # a step would fail
    with pytest.raises(InputError, match=message):
        experiment.main(dataclasses.replace(experiment.PRESETS["smoke"], **change), Run())
