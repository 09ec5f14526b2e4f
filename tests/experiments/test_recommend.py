"""experiments/generative/recommend.py: what is held out, the loss of known ratings, and the methods, by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dl_jax.core.errors import InputError
from dl_jax.data.ratings import planted
from dl_jax.harness import Run
from dl_jax.harness.run import Settings
from dl_jax.models.generative.autorec import AutoRec

KNOWN = np.array([[5, 0, 3, 0], [0, 0, 0, 0], [1, 2, 0, 0]], np.uint8)  # no rating of item 1, none by user 3


@pytest.fixture(scope="module")
def recommend(load_experiment):
    return load_experiment("generative/recommend")


def test_the_known_ratings_are_divided(recommend):
    ratings = planted(40, 30, 2, 0.5, 0.5, seed=0)["rating"]
    known, unseen = recommend.divided(ratings, 0.1, seed=3)
    np.testing.assert_array_equal(known + unseen, ratings)
    assert not ((known > 0) & (unseen > 0)).any()
    assert (unseen > 0).sum() == round(0.1 * (ratings > 0).sum())
    np.testing.assert_array_equal(recommend.divided(ratings, 0.1, seed=3)[1], unseen)
    assert (recommend.divided(ratings, 0.1, seed=4)[1] != unseen).any()
    for few, share in ((KNOWN, 0.1), (np.zeros((2, 2), np.uint8), 0.5)):
        with pytest.raises(InputError, match=r"0 of \d known ratings to hold out, expected some and not all"):
            recommend.divided(few, share, 0)


def test_means_of_items_and_errors_by_hand(recommend):
    means = recommend.item_means(KNOWN)
    np.testing.assert_allclose(means, [[4], [2.75], [1.5]])
    unseen = np.array([[0, 5, 0, 0], [0, 0, 4, 0], [0, 0, 0, 1]], np.uint8)
    assert recommend.rmse(means, unseen) == pytest.approx(np.sqrt((1 + 1.25**2 + 0.25) / 3))
    assert recommend.rmse(np.full((3, 4), 9.0), unseen) == pytest.approx(np.sqrt((0 + 1 + 16) / 3))  # cut to 5


def test_the_loss_is_that_of_known_ratings_alone(recommend):
    model = AutoRec(2)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 4)), train=False)
    value = jax.value_and_grad(lambda v, r: recommend.observed_loss(model, v, {"rating": r}, jax.random.key(0))[0])
    loss, grads = value(variables, jnp.asarray(KNOWN))
    guess = np.asarray(model.apply(variables, KNOWN, train=False))
    np.testing.assert_allclose(loss, ((guess - KNOWN) ** 2)[KNOWN > 0].sum() / 3, rtol=1e-6)
    last = grads["params"]["Dense_1"]
    assert last["bias"][3] == 0  # of a user without ratings
    assert not last["kernel"][:, 3].any()
    assert last["bias"][:3].all()
    empty, grads = value(variables, jnp.zeros((2, 4), jnp.uint8))
    assert empty == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads))


def test_ridge_is_the_least_squares_solution_of_each_row(recommend):
    rng = np.random.default_rng(0)
    there, factors = rng.random((5, 9)) < 0.6, rng.normal(size=(9, 3))
    there[2] = False
    rest = np.where(there, rng.normal(size=(5, 9)), 0)
    found = recommend.ridge(jnp.asarray(there), jnp.asarray(rest, jnp.float32), jnp.asarray(factors, jnp.float32), 0.5)
    for row, mine, target in zip(found, there, rest, strict=True):
        a = np.concatenate([factors[mine], np.sqrt(0.5) * np.eye(3)])
        np.testing.assert_allclose(row, np.linalg.lstsq(a, np.concatenate([target[mine], np.zeros(3)]))[0], atol=1e-5)
    assert not found[2].any()


def test_alternating_least_squares_finds_a_planted_matrix(recommend):
    given = planted(60, 40, 3, 0.0, 0.7, seed=0)
    cfg = dataclasses.replace(recommend.Config(), rank=3, als_steps=40, als_l2=0.01)
    behind = np.where(given["rating"] > 0, np.clip(given["planted"], 1, 5), 0)
    (guess,) = recommend.als(cfg, Run(), (behind.astype(np.float32),))
    inner = (given["planted"] > 1) & (given["planted"] < 5) & (given["rating"] == 0)
    means = np.broadcast_to(recommend.item_means(given["rating"]), inner.shape)
    error = lambda each: np.sqrt(((each - given["planted"])[inner] ** 2).mean())
    assert error(guess) < 0.3 * error(means)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rating": None}, "data set ratings has no ratings of items by users with the numbers behind them"),
        ({"planted": None}, "data set ratings has no ratings of items by users"),
        ({"rating": np.full((3, 4), 9, np.uint8)}, "the ratings of data set ratings are uint8 from 9 to 9, expected"),
    ],
)
def test_a_set_without_such_ratings_is_one_line(recommend, change, message):
    columns = {"rating": np.ones((3, 4), np.uint8), "planted": np.ones((3, 4)), **change}
    with pytest.raises(InputError, match=message):
        recommend.require_ratings("ratings", {name: each for name, each in columns.items() if each is not None})


def test_who_has_no_rating_gets_a_defined_answer(recommend):
    """An item or a user without ratings gets the mean of all by least squares, and something finite by AutoRec."""
    cfg = dataclasses.replace(recommend.PRESETS["smoke"], batch_size=3)
    run = Run(settings=Settings(seeds=(0, 1)))
    for guess in recommend.als(cfg, run, (KNOWN, KNOWN)):
        np.testing.assert_allclose(guess[1], 2.75, atol=1e-5)
        np.testing.assert_allclose(guess[:, 3], 2.75, atol=1e-5)
    for guess in recommend.autorec(cfg, run, (KNOWN, KNOWN)):
        assert np.isfinite(guess).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 301}, r"rank is 301 for ratings \(300, 600\), expected no more than their sides; lower it"),
        ({"held_out": 1e-9}, "0 of .* known ratings to hold out, expected some and not all; set --held-out"),
    ],
)
def test_what_cannot_work_is_refused_before_any_training(recommend, change, message, monkeypatch):
    monkeypatch.setattr(recommend, "fit", None)  # a step would fail
    with pytest.raises(InputError, match=message):
        recommend.main(dataclasses.replace(recommend.PRESETS["smoke"], **change), Run())
