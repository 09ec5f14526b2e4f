"""experiments/learning/cleaning.py: what is planted, what a network may learn from, and input that cannot work."""

import dataclasses

import numpy as np
import pytest

from dl_jax.core.errors import InputError
from dl_jax.harness import Run
from dl_jax.harness.run import Settings


@pytest.fixture(scope="module")
def cleaning(load_experiment):
    return load_experiment("learning/cleaning")


@pytest.fixture(scope="module")
def cfg(cleaning):
    return cleaning.PRESETS["smoke"]


def test_what_is_planted_is_there(cleaning, cfg):
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    found = cleaning.of_table(cfg, 3)
    rows, order = len(found.labels), np.random.default_rng(3).permutation(569)
    truth = np.append(y[order][: rows - cfg.copies], y[order][found.twins[:, 0]])
    np.testing.assert_array_equal(found.wrong, found.labels != truth)
    assert found.wrong[: rows - cfg.copies].sum() == round(0.2 * 456)
    assert found.copied.sum() == cfg.copies
    np.testing.assert_array_equal(found.constant, [False] * 30 + [True] * 2)
    known = ~found.missing[: rows - cfg.copies, :30]
    np.testing.assert_allclose(
        found.x[: rows - cfg.copies, :30][known], x[order][: rows - cfg.copies][known], rtol=1e-6
    )
    assert 0.01 < found.missing.mean() < 0.03
    a, b = found.x[found.twins[:, 0]], found.x[found.twins[:, 1]]
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    np.testing.assert_allclose(a, b, atol=np.nanmax(0.05 * x.std(0)), equal_nan=True)
    assert (a != b).any()


def test_networks_do_not_learn_from_their_fold(cleaning, cfg, monkeypatch):
    """Neither do their scales; copies of a row are left out with it; rows that are not kept are left out too."""
    sets = [cleaning.prepared(cfg, cleaning.of_table(cfg, seed), seed, of_pixels=False) for seed in (0, 1)]
    seen = []

    def shuffled(columns, batch_size, seed):
        seen.append(columns)
        return given(columns, batch_size, seed)

    given = cleaning.data.shuffled
    monkeypatch.setattr(cleaning.data, "shuffled", shuffled)
    monkeypatch.setattr(cleaning, "fit", lambda step, states, *_, **__: states)
    kept = [np.arange(len(one.x)) % 3 > 0 for one in sets]
    run = Run(settings=Settings(seeds=(0, 1)))
    found = cleaning.out_of_fold(cfg, cleaning.parts_of(cfg, sets, run), sets, kept, 1, run)
    assert len(seen) == 4
    for i, (one, rows) in enumerate(zip(sets, kept, strict=True)):
        np.testing.assert_allclose(found[i].sum(1), 1)
        for k in (0, 1):
            learnt = rows & (one.grouped != k)
            np.testing.assert_array_equal(seen[2 * i + k]["x"], one.x[learnt])
            twins = one.planted.twins[(one.grouped == k)[one.planted.twins].any(1)]
            assert not learnt[twins].any()
    scale = cleaning.scale(sets[0].x[:50], sets[0].constant, of_pixels=False)
    z = np.asarray(cleaning.filled(sets[0].x[:50], scale))
    assert np.isfinite(z).all()
    assert (z[:, 30:] == 0).all()
    np.testing.assert_allclose(scale["mean"], np.nanmean(sets[0].x[:50].astype(np.float64), 0), rtol=1e-5)


def test_precision_and_recall(cleaning):
    truth, found = np.array([1, 1, 1, 1, 0, 0], bool), np.array([1, 1, 0, 0, 1, 0], bool)
    assert cleaning.rates(found, truth) == (2 / 3, 1 / 2)
    assert cleaning.rates(np.zeros(6, bool), truth) == (0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 2000}, "images is 2000, expected at most 1437, as train has; lower --images"),
        ({"copies": 41}, "copies is 41, expected at most 40, as there are few rows; lower --copies"),
        ({"folds": 1}, "the number of folds is 1 and that of classes 10, expected two or more of both"),
        ({"folds": 60}, "class . has .* rows, expected 60 or more, one for each fold"),
        ({"noise": 1e-3}, "noise plants nothing in 205 places of the images; raise --noise"),
        ({"missing": 1e-9}, "missing plants nothing in .* places of the table; raise --missing"),
        ({"missing": 1.0}, "all 32 features are constant, expected one that is not; give other data"),
    ],
)
def test_what_cannot_work_is_refused_before_any_training(cleaning, cfg, change, message, monkeypatch):
    monkeypatch.setattr(cleaning, "fit", None)  # a step would fail
    with pytest.raises(InputError, match=message):
        cleaning.main(dataclasses.replace(cfg, **change), Run())
