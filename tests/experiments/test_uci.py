"""What the experiments on UCI's sets measure, by hand, and which settings they refuse before they train."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dl_jax import data
from dl_jax.core.errors import InputError
from dl_jax.harness import Run
from dl_jax.harness.run import Settings

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def ensembles(load_experiment):
    return load_experiment("tabular/ensembles_uci")


def test_claims_are_the_18_cells_of_the_table(ensembles):
    cells = [claim for claim in ensembles.CLAIMS if claim.preset != "quick"]
    assert len({claim.metric for claim in cells}) == len(cells) == 18
    assert {claim.preset for claim in cells if claim.metric.endswith("protein")} == {"protein"}


def test_the_loss_is_that_of_algorithm_1(ensembles):
    """With finite differences in the place of the gradient of the inputs."""
    table = data.Regression(np.float32(RNG.random((9, 3)) * [1, 10, 100]), np.float32(RNG.random(9)), np.zeros((1, 9)))
    table.x[:, 1] = 0.998  # a constant feature is neither scaled nor moved
    scale, model = ensembles.scale(table, np.ones(9, bool)), ensembles.network(4)
    params = model.init(jax.random.key(0), jnp.zeros((1, 3)), train=False)["params"]

    def nll(z):
        mean, raw = np.moveaxis(np.asarray(model.apply({"params": params}, z.astype(np.float32), train=True)), -1, 0)
        deviation = np.sqrt(np.log1p(np.exp(np.float64(raw))) + 1e-6)
        return -scipy.stats.norm.logpdf((table.y - table.y.mean()) / table.y.std(), mean, deviation).mean()

    deviation = np.where(np.arange(3) == 1, 1, table.x.std(0))
    z, h = (table.x - table.x.mean(0)) / deviation, 1e-2
    slope = np.array([[nll(z + h * e) - nll(z - h * e) for e in np.eye(27).reshape(27, 9, 3)]]).reshape(9, 3)
    moved = z + 0.1 * np.ptp(z, 0) * np.sign(slope)
    value, (_, metrics) = ensembles.loss(
        model, 0.1, {"params": params, "scale": scale}, {"x": table.x, "y": table.y}, None
    )
    np.testing.assert_allclose([value, metrics["nll"]], [nll(z) + nll(moved), nll(z)], rtol=1e-4)
    assert moved[:, 1] == pytest.approx(0, abs=1e-6)


def test_an_ensemble_is_the_gaussian_of_the_mixtures_moments(ensembles, monkeypatch):
    """Of made-up predictions, whose best rate is the second."""
    table = data.Regression(np.zeros((6, 1), np.float32), np.arange(6, dtype=np.float32), np.zeros((1, 6), bool))
    table.test[0, [1, 4]] = True
    y, mean, variance = np.linspace(-1, 1, 6), RNG.random((1, 1, 2, 6)), 0.1 + RNG.random((1, 1, 2, 6))
    asked = []

    def predicted(cfg, run, networks, table, train, rates):
        asked.append((run.name, train.tolist(), rates.tolist()))
        means = np.stack([y + 9, y])[None, None] if run.name == "rates" else mean
        return means, variance, np.broadcast_to(y, mean.shape), np.array([3.0])

    monkeypatch.setattr(ensembles, "predicted", predicted)
    cfg = ensembles.Config(splits=1, members=2, rates=(0.5, 0.25), held_out=0.5)
    rmse, nll, rate, _ = ensembles.ensembles(cfg, Run(), table)
    assert rate.tolist() == [0.25]
    assert asked[1] == ("members", (~table.test).tolist(), [[[0.25, 0.25]]])
    centre = mean[0, 0].mean(0)
    second = (variance[0, 0] + mean[0, 0] ** 2).mean(0) - centre**2
    np.testing.assert_allclose(rmse, 3 * np.sqrt(((y - centre)[[1, 4]] ** 2).mean()))
    expected = -scipy.stats.norm.logpdf(3 * y, 3 * centre, 3 * np.sqrt(second))[[1, 4]].mean()
    np.testing.assert_allclose(nll, expected, rtol=1e-6)


def test_networks_of_a_seed_and_split_do_not_depend_on_others(ensembles):
    """A network is the same alone and beside those of another split; its members differ."""
    cfg = dataclasses.replace(ensembles.PRESETS["smoke"], epochs=2)
    table = data.regression("diabetes")
    rates = np.full((1, 2, 2), 0.01, np.float32)
    both = ensembles.predicted(cfg, Run(), ensembles.networks_of(cfg), table, ~table.test[:2], rates)
    first = ensembles.predicted(cfg, Run(), ensembles.networks_of(cfg), table, ~table.test[:1], rates[:, :1])
    np.testing.assert_allclose(both[0][:, :1], first[0], rtol=1e-4, atol=1e-5)
    assert (both[0][0, 0, 0] != both[0][0, 0, 1]).any()


@pytest.mark.parametrize("name", ["ensembles_uci", "dropout_uci"])
def test_a_seed_gives_the_same_alone_and_beside_another(name, load_experiment):
    experiment = load_experiment(f"tabular/{name}")
    both, alone = (
        experiment.main(experiment.PRESETS["smoke"], Run(settings=Settings(seeds=s))) for s in ((0, 1), (1,))
    )
    for metric, values in both.items():
        np.testing.assert_allclose(values[len(values) // 2 :], alone[metric], rtol=1e-3)


def test_coverage_of_normal_errors(ensembles):
    shares, covered = ensembles.coverage(RNG.normal(size=40_000))
    np.testing.assert_allclose(covered, shares, atol=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"splits": 21}, "splits is 21, expected at most 20, those of diabetes; lower --splits"),
        ({"datasets": ("digits",)}, "data set digits has no x and no y and no test_in_splits"),
        ({"held_out": 0.001}, "split 0 of diabetes has 398 training rows, expected 2000 or more"),
    ],
)
def test_what_cannot_work_is_refused_before_any_training(ensembles, change, message, monkeypatch):
    monkeypatch.setattr(ensembles, "fit", None)
    with pytest.raises(InputError, match=message) as error:
        ensembles.main(dataclasses.replace(ensembles.PRESETS["smoke"], **change), Run())
    assert "\n" not in str(error.value)


def test_a_constant_target_is_refused_and_a_constant_feature_is_not(ensembles, monkeypatch):
    table = data.regression("diabetes")
    constant = table._replace(x=np.where(np.arange(10) == 4, np.float32(0.998), table.x))
    monkeypatch.setattr(ensembles.data, "regression", lambda name: constant)
    found = ensembles.main(ensembles.PRESETS["smoke"], Run())
    assert all(np.isfinite(values).all() for values in found.values())
    monkeypatch.setattr(ensembles.data, "regression", lambda name: table._replace(y=np.full_like(table.y, 2)))
    with pytest.raises(InputError, match="the target of diabetes is 2 in all training rows of split 0, expected diff"):
        ensembles.main(ensembles.PRESETS["smoke"], Run())


def test_the_network_is_drawn_as_torch_draws_it(ensembles):
    params = ensembles.network(2000).init(jax.random.key(0), jnp.zeros((1, 4)), train=False)["params"]
    kernel = np.asarray(params["Dense_0"]["kernel"])
    assert 0.49 < np.abs(kernel).max() <= 0.5  # 1 / √4
    np.testing.assert_allclose(kernel.std(), 0.5 / np.sqrt(3), rtol=0.05)


@pytest.fixture(scope="module")
def dropout(load_experiment):
    return load_experiment("tabular/dropout_uci")


def test_the_likelihood_of_masks_is_that_of_their_mixture(dropout):
    outputs, y, tau = RNG.normal(size=(2, 7, 5)), RNG.normal(size=(2, 5)), 3.0
    densities = scipy.stats.norm.pdf(y[:, None], outputs, tau**-0.5).mean(1)
    np.testing.assert_allclose(dropout.nats(outputs, y, tau), -np.log(densities).mean(1))
    far = dropout.nats(np.zeros((3, 1)), np.array([1e3]), 1.0)  # whose density is 0 in float64
    np.testing.assert_allclose(far, 0.5e6 + 0.5 * np.log(2 * np.pi))


def test_masks_keep_the_mean_and_drop_the_share(dropout):
    params = dropout.network(7).init(jax.random.key(0), jnp.zeros((1, 5)), train=False)["params"]
    first, second = dropout.masks_of(jax.random.key(1), jnp.float32(0.25), params, 20_000)
    assert (first.shape, second.shape) == ((20_000, 5), (20_000, 7))
    for each in (first, second):
        np.testing.assert_allclose(np.unique(each), [0, 4 / 3])
        np.testing.assert_allclose(np.mean(each), 1, atol=0.01)


def test_a_network_without_dropped_units_is_the_mlp(dropout):
    model, x = dropout.network(7), np.float32(RNG.normal(size=(6, 5)))
    params = model.init(jax.random.key(0), x, train=False)["params"]
    scale = {"x_mean": x.mean(0), "x_deviation": x.std(0)}
    ours = dropout.outputs_of(params, scale, (jnp.ones(5), jnp.ones(7)), x)
    expected = model.apply({"params": params}, (x - x.mean(0)) / x.std(0), train=False)
    np.testing.assert_allclose(ours, np.asarray(expected)[:, 0], rtol=1e-5, atol=1e-6)


def test_rate_and_precision_are_those_that_were_best_on_held_out_rows(dropout, monkeypatch):
    """Of made-up outputs: the second of two rates has no error, and the precision fits the spread of the outputs."""
    table = data.Regression(np.zeros((10, 1), np.float32), np.arange(10, dtype=np.float32), np.zeros((1, 10), bool))
    table.test[0, 3:5] = True
    asked = []

    def predicted(cfg, run, table, train, test, rates, taus, masks):
        asked.append((run.name, int(train.sum()), int(test.sum()), rates.tolist(), masks))
        y = table.y[test[0]].astype(float)
        errors = np.array([5.0, 0.1]) if rates.shape[-1] == 2 else np.array([0.5])
        return np.broadcast_to((y + errors[:, None])[None, None, :, None], (1, 1, len(errors), 4, len(y))), y[
            None, None
        ]

    monkeypatch.setattr(dropout, "predicted", predicted)
    cfg = dropout.Config(splits=1, rates=(0.5, 0.25), held_out=0.25, masks=9, held_out_masks=7)
    rmse, nll, rate, tau = dropout.averaged(cfg, Run(), table, np.array([1.0, 100.0, 1e6]))
    assert (rmse.tolist(), rate.tolist(), tau.tolist()) == ([0.5], [0.25], [100.0])
    np.testing.assert_allclose(nll, [-scipy.stats.norm.logpdf(0.5, 0, 0.1)])
    assert asked == [("rates", 6, 2, [[[0.5, 0.25]]], 7), ("all", 8, 2, [[[0.25]]], 9)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"splits": 21}, "splits is 21, expected at most 20, those of diabetes; lower --splits"),
        ({"datasets": ("digits",)}, "data set digits has no x and no y and no test_in_splits"),
    ],
)
def test_dropout_refuses_what_cannot_work(dropout, change, message, monkeypatch):
    monkeypatch.setattr(dropout, "fit", None)
    with pytest.raises(InputError, match=message):
        dropout.main(dataclasses.replace(dropout.PRESETS["smoke"], **change), Run())
    with pytest.raises(InputError, match=r"data set other, expected one of boston, .* no precisions are known"):
        dropout.require_precisions(["other"])
