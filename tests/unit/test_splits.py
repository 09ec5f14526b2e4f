"""Networks for all splits of a table: what each of them has, and the order of its rows."""

import jax
import numpy as np
import pytest

from dl_jax import data, splits
from dl_jax.core.errors import InputError

TRAIN = np.array([[1, 1, 1, 0], [0, 1, 1, 1]], bool)  # two splits of four rows


def table(test):
    return data.Regression(np.zeros((4, 1), np.float32), np.arange(4, dtype=np.float32), np.array(test, bool))


def test_tables_are_called_by_the_last_part_of_their_names(monkeypatch):
    given = {"a/boston": table([[1, 0, 0, 0], [0, 1, 0, 0]]), "b/yacht": table([[0, 0, 0, 1]])}
    monkeypatch.setattr(splits.data, "regression", given.__getitem__)
    found = splits.tables(tuple(given), 1)
    assert {name: each.test.tolist() for name, each in found.items()} == {
        "boston": [[True, False, False, False]],
        "yacht": [[False, False, False, True]],
    }


def test_two_sets_of_one_name_are_refused_before_either_is_read(monkeypatch):
    monkeypatch.setattr(splits.data, "regression", None)
    expected = "^data sets a/boston and b/c/boston would both be called boston, expected names that differ after the"
    with pytest.raises(InputError, match=expected):
        splits.tables(("a/boston", "yacht", "b/c/boston"), 1)


def test_splits_of_different_sizes_are_refused(monkeypatch):
    """Their networks would take as many steps, which are fewer epochs for some of them."""
    monkeypatch.setattr(splits.data, "regression", lambda name: table([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]]))
    assert len(splits.tables(("a",), 2)["a"].test) == 2
    with pytest.raises(InputError, match=r"^the splits of a have 2 to 3 training rows, expected as many in each, as"):
        splits.tables(("a",), 3)


def test_each_network_has_what_its_split_has():
    found = splits.by_network([{"a": np.zeros(3)}, {"a": np.ones(3)}], networks=3, seeds=2)
    assert found["a"].shape == (12, 3)
    assert found["a"][:, 0].tolist() == [0, 0, 0, 1, 1, 1] * 2


def test_networks_shuffle_the_rows_of_their_split_whatever_seeds_are_beside_theirs():
    both, alone = (splits.orders(TRAIN, 2, 3, seeds)(0, slice(None))["row"] for seeds in ((0, 1), (1,)))
    assert both.shape == (8, 3)
    assert [sorted(rows) for rows in both.tolist()] == [[0, 1, 2], [0, 1, 2], [1, 2, 3], [1, 2, 3]] * 2
    np.testing.assert_array_equal(both[4:], alone)


def test_a_seeds_networks_have_keys_of_their_own():
    keys = splits.numbered(jax.random.split(jax.random.key(0), 2), 3)
    assert keys.shape == (6,)
    assert len(np.unique(jax.random.key_data(keys), axis=0)) == 6
