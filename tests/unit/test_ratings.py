"""Generated ratings: the planted rank, what is known of them, and the bundled set."""

import numpy as np
import pytest

from dl_jax import data
from dl_jax.core.errors import InputError
from dl_jax.data.ratings import ITEMS, KNOWN, NOISE, RANK, USERS, planted


def test_the_planted_matrix_has_its_rank_and_is_what_is_rated():
    for rank in (1, 4, 20):
        found = planted(30, 20, rank, 0.0, 1.0, seed=rank)
        assert np.linalg.matrix_rank(found["planted"] - 3.0, tol=1e-3) == rank
        np.testing.assert_array_equal(found["rating"], np.clip(np.rint(found["planted"]), 1, 5))
    assert np.ptp(planted(30, 20, 1, 0.0, 1.0, seed=0)["planted"], axis=1).max() == 0  # an item's offset alone


def test_ratings_are_known_at_random_with_noise():
    found = planted(400, 300, 3, 0.5, 0.3, seed=1)
    known = found["rating"] > 0
    assert abs(known.mean() - 0.3) < 0.01
    assert (found["rating"].min(), found["rating"].max()) == (0, 5)
    inner = known & (abs(found["planted"] - 3) < 0.5)  # hardly cut off
    errors = found["rating"][inner] - found["planted"][inner]
    assert abs(errors.mean()) < 0.03
    assert abs(errors.var() - (0.5**2 + 1 / 12)) < 0.03  # the noise, and rounding
    assert abs(np.corrcoef(known.ravel(), found["planted"].ravel())[0, 1]) < 0.02  # missing at random


def test_the_matrix_is_that_of_the_seed():
    one, same, other = (planted(20, 10, 2, 0.5, 0.5, seed) for seed in (3, 3, 4))
    for name, each in one.items():
        np.testing.assert_array_equal(each, same[name])
        assert (each != other[name]).any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((20, 10, 11, 0.5, 0.5), "rank is 11 for 20 users and 10 items, expected 1 to the smaller number"),
        ((20, 10, 0, 0.5, 0.5), "rank is 0 for 20 users"),
        ((0, 10, 1, 0.5, 0.5), "users is 0, expected more than 0"),
        ((20, 10, 2, -0.5, 0.5), "noise is -0.5 and known 0.5, expected 0 or more and a probability"),
        ((20, 10, 2, 0.5, 1.5), "noise is 0.5 and known 1.5"),
        ((20, 10, 2, float("nan"), 0.5), "noise is nan"),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        planted(*given, seed=0)


def test_the_bundled_set(tmp_path):
    cache = str(tmp_path)
    described = data.info("ratings", cache_dir=cache)
    assert described.splits == {"full": ITEMS, "pilot": ITEMS}
    for seed, split in enumerate(("full", "pilot")):
        found = data.load("ratings", split, cache_dir=cache)
        made = planted(USERS, ITEMS, RANK, NOISE, KNOWN, seed)
        assert sorted(found["item"]) == list(range(ITEMS))
        for name, each in made.items():
            np.testing.assert_array_equal(found[name], each[found["item"]])
