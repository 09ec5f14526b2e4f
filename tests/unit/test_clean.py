"""dl_jax/clean.py: folds against what they must keep, copies by brute force, and mistakes that are planted."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from dl_jax import clean
from dl_jax.core.errors import InputError

RNG = np.random.default_rng(0)


def test_folds_keep_the_shares_of_the_classes():
    labels = RNG.permutation(np.repeat([0, 1, 2], [50, 30, 20]))
    found = clean.folds(labels, 5, seed=0)
    for k in range(5):
        np.testing.assert_array_equal(np.bincount(labels[found == k]), [10, 6, 4])
    np.testing.assert_array_equal(found, clean.folds(labels, 5, seed=0))
    assert (found != clean.folds(labels, 5, seed=1)).any()


def test_a_group_is_in_one_fold():
    groups = RNG.permutation(np.repeat(np.arange(40), 3))
    labels = groups % 2
    found = clean.folds(labels, 4, 0, groups)
    assert all(len(set(found[groups == g])) == 1 for g in range(40))
    shares = [labels[found == k].mean() for k in range(4)]
    assert min(shares) > 0.35
    assert max(shares) < 0.65
    without = clean.folds(labels, 4, 0)
    assert np.mean([len(set(without[groups == g])) > 1 for g in range(40)]) > 0.5


@pytest.mark.parametrize(
    ("labels", "parts", "groups", "message"),
    [
        ([3] * 9, 3, None, "the number of folds is 3 and that of classes 1, expected two or more of both"),
        ([0, 1] * 4, 1, None, "the number of folds is 1 and that of classes 2, expected two or more of both"),
        ([0] * 9 + [1, 1], 3, None, "class 1 has 2 rows, expected 3 or more, one for each fold; lower the number"),
        ([0, 1] * 6, 3, [0, 1] * 6, "class 0 has 1 groups, expected 3 or more"),
    ],
)
def test_labels_that_cannot_be_split_are_refused(labels, parts, groups, message):
    with pytest.raises(InputError, match=message):
        clean.folds(np.array(labels), parts, 0, None if groups is None else np.array(groups))


def test_copies_have_one_number():
    x = RNG.normal(size=(60, 8))
    x[50] = x[3]
    x[51] = x[50] + 1e-3
    x[52] = x[7] - 1e-3
    found = clean.groups(x)
    distance = np.sqrt(((x[:, None] - x) ** 2).sum(-1))
    near = clean.NEAR * np.median((distance + np.diag(np.full(60, np.inf))).min(1))
    np.testing.assert_array_equal(found[:, None] == found, (np.linalg.matrix_power((distance <= near) * 1, 3) > 0))
    assert found[3] == found[50] == found[51]
    assert len(set(found)) == 57


@pytest.mark.parametrize("features", [2, 8, 30])
def test_many_copies_of_a_row_have_one_number(features):
    """Also where the nearest row of each is another copy than that of the others, and where many are equal."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, features))
    x[250:] = np.repeat(x[:10], 5, 0) + 1e-5 * rng.normal(size=(50, features))
    x = np.concatenate([x, np.repeat(x[20:21], 50, 0)])
    found = clean.groups(x)
    for i in range(10):
        assert len(set(found[[i, *range(250 + 5 * i, 255 + 5 * i)]])) == 1
    assert len(set(found[[20, *range(300, 350)]])) == 1
    assert len(set(found)) == 250
    folds = clean.folds(np.arange(350) % 2, 5, 0, found)
    assert all(len(set(folds[found == each])) == 1 for each in found)


@pytest.mark.parametrize("rows", [[[1.0, 2.0]], [[1.0, np.nan], [2.0, 1.0]]])
def test_rows_that_cannot_be_compared_are_refused(rows):
    with pytest.raises(InputError, match=r"copies among . rows of which . have missing values, expected two rows"):
        clean.groups(np.array(rows))


def test_values_that_are_missing():
    x = RNG.normal(size=(100, 4)).astype(np.float32)
    x[3::20], x[7::20] = np.nan, 99
    planted = np.isnan(x) | (x == 99)
    np.testing.assert_array_equal(clean.missing(x), planted)
    grid = np.repeat(np.arange(5.0), 3)[:, None]  # no number of a grid is away from the others
    assert not clean.missing(grid).any()
    often = np.array([[0.0]] * 8 + [[5.0], [5.1], [5.2]])  # what half of the rows have stands for nothing
    assert not clean.missing(often).any()
    once = np.array([[1.0], [1.1], [1.2], [50.0]])  # an outlier
    assert not clean.missing(once).any()
    half = np.array([[np.nan, 1.0], [np.nan, 2.0]])
    np.testing.assert_array_equal(clean.missing(half), np.isnan(half))


def test_a_table_without_a_value_is_refused():
    with pytest.raises(InputError, match="all 6 values of the table are missing, expected some; give other data"):
        clean.missing(np.full((3, 2), np.nan))
    with pytest.raises(InputError, match="all 2 features are constant, expected one that is not"):
        clean.constant(np.ones((3, 2)))


@pytest.mark.parametrize("far", [1e7, -999999.0])
def test_a_single_number_far_away_makes_no_feature_constant(far):
    x = np.random.default_rng(0).uniform(size=(1000, 2))
    x[3, 0] = far
    np.testing.assert_array_equal(clean.constant(x), [False, False])


def test_features_that_are_constant():
    x = np.stack([np.full(100, 7.0), 7 + 1e-8 * RNG.normal(size=100), RNG.normal(size=100), np.zeros(100)], 1)
    x[:4, 0] = [1, 100, np.nan, 2]
    x[:10, 3] = 1
    np.testing.assert_array_equal(clean.constant(x), [True, True, False, False])


def test_labels_that_are_wrong():
    labels = np.repeat(np.arange(3), 40)
    p = np.full((120, 3), 0.05) + 0.85 * np.eye(3)[labels]
    given = labels.copy()
    given[::10] = (labels[::10] + 1) % 3
    np.testing.assert_array_equal(clean.label_issues(given, p), given != labels)
    with pytest.raises(InputError, match="labels of the class 1 alone, expected two classes or more"):
        clean.label_issues(np.ones(5, int), p[:5])


def test_without_cleanlab_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    with pytest.raises(InputError, match=r"which is not installed; run: pip install -e '\.\[clean"):
        clean.label_issues(np.array([0, 1]), np.eye(2))


def test_the_guides_association_rules(capsys):
    """The snippet runs, and its item sets are those of counting all sets by hand."""
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
    (snippet,) = (each for each in re.findall(r"```python\n(.*?)```", guide, re.S) if "mlxtend" in each)
    scope = {}
    exec(snippet, scope)  # noqa: S102
    assert "bread" in capsys.readouterr().out
    baskets, sets = scope["baskets"], scope["sets"]
    of = {frozenset(items): support for items, support in zip(sets["itemsets"], sets["support"], strict=True)}
    from itertools import combinations

    counted = {}
    for size in (1, 2, 3, 4):
        for items in combinations(sorted(set().union(*baskets)), size):
            share = np.mean([set(items) <= set(basket) for basket in baskets])
            if share >= 0.3:
                counted[frozenset(items)] = pytest.approx(share)
    assert of == counted
    assert (scope["rules"]["confidence"] >= 0.7).all()
