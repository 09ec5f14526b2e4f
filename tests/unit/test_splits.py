"""Networks for all splits of a table: what each of them has, and the order of its rows."""

import jax
import numpy as np

from dl_jax import splits

TRAIN = np.array([[1, 1, 1, 0], [0, 1, 1, 1]], bool)  # two splits of four rows


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
