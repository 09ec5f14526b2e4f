"""Sets for regression with their splits, and the bundled one."""

import types

import numpy as np
import pytest
from sklearn import datasets

from dl_jax import data
from dl_jax.core.errors import InputError
from dl_jax.data import tabular


def test_diabetes_is_scikit_learns_with_splits_of_a_tenth():
    found, row = data.regression("diabetes"), data.load("diabetes", "full")["row"]
    x, y = datasets.load_diabetes(return_X_y=True, scaled=False)
    np.testing.assert_array_equal(found.x, x[row].astype(np.float32))
    np.testing.assert_array_equal(found.y, y[row].astype(np.float32))
    assert found.test.shape == (20, 442)
    assert found.test.sum(1).tolist() == [44] * 20
    assert len(np.unique(found.test, axis=0)) == 20


def test_a_set_without_splits_is_one_line():
    message = "data set digits has no x and no y and no test_in_splits, expected numbers"
    with pytest.raises(InputError, match=message) as error:
        data.regression("digits")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tests_on", [0, 3])
def test_a_split_without_a_part_is_one_line(monkeypatch, tests_on):
    test = np.zeros((3, 2), np.uint8)
    test[0, 0], test[:tests_on, 1] = 1, 1
    columns = {"x": np.zeros((3, 1)), "y": np.zeros(3), "test_in_splits": test}
    monkeypatch.setattr(tabular, "load", lambda name, split: columns)
    with pytest.raises(InputError, match=f"^split 1 of diabetes tests on {tests_on} of 3 rows, expected some of them$"):
        data.regression("diabetes")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.array([[1.0], [np.nan]]), "x of row 1 of diabetes is not a finite number; fill it in or leave it out"),
        (np.array([["a"], ["b"]]), "data set diabetes has the columns x object \\(1,\\), .*, expected numbers and"),
    ],
)
def test_what_is_no_number_is_one_line(monkeypatch, x, message):
    columns = {"x": x, "y": np.zeros(2), "test_in_splits": np.eye(2, dtype=np.uint8)}
    features = {name: data.Feature(column.shape[1:], "object" if column.dtype.kind == "U" else column.dtype.name)
                for name, column in columns.items()}  # fmt: skip
    described = types.SimpleNamespace(features=features)
    monkeypatch.setattr(tabular, "info", lambda name: described)
    monkeypatch.setattr(tabular, "load", lambda name, split: columns)
    with pytest.raises(InputError, match=message):
        data.regression("diabetes")


@pytest.mark.parametrize("share", [0.001, 1.0])
def test_a_part_without_rows_is_not_held_out(share):
    with pytest.raises(InputError, match=f"a share of {share} of 5 rows to hold out is"):
        data.held_out(np.ones(5, bool), share, 0)


def test_moments_and_a_constant_feature():
    values = np.float32([[1, 0.998, 2], [3, 0.998, 4], [5, 0.998, 1e9]])
    mean, deviation = data.moments(values)
    np.testing.assert_allclose(mean, [3, 0.998, (6 + 1e9) / 3], rtol=1e-6)
    np.testing.assert_allclose(deviation, [np.sqrt(8 / 3), 1, np.std([2, 4, 1e9])], rtol=1e-6)
    assert ((values - mean) / deviation)[:, 1].tolist() == [0, 0, 0]
    many = np.full((10_001, 1), 0.998, np.float32)  # whose deviation is not 0 in float32
    assert many.std(0) > 0
    assert ((many - data.moments(many)[0]) / data.moments(many)[1]).tolist() == [[0]] * 10_001


def test_rows_are_held_out_of_others():
    rows = np.random.default_rng(0).random(100) < 0.9
    learnt, held = data.held_out(rows, 0.2, 3)
    assert not (learnt & held).any()
    assert ((learnt | held) == rows).all()
    assert held.sum() == round(0.2 * rows.sum())
    assert (data.held_out(rows, 0.2, 4)[1] != held).any()
