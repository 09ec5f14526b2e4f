"""Sets for regression with their splits, and the bundled one."""

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


def test_moments_and_a_constant_feature():
    values = np.float32([[1, 0.998, 2], [3, 0.998, 4], [5, 0.998, 1e9]])
    mean, deviation = data.moments(values)
    np.testing.assert_allclose(mean, [3, 0.998, (6 + 1e9) / 3], rtol=1e-6)
    np.testing.assert_allclose(deviation, [np.sqrt(8 / 3), 1, np.std([2, 4, 1e9])], rtol=1e-6)
    assert ((values - mean) / deviation)[:, 1].tolist() == [0, 0, 0]
    many = np.full((10_001, 1), 0.998, np.float32)  # whose deviation is not 0 in float32
    assert many.std(0) > 0
    assert ((many - data.moments(many)[0]) / data.moments(many)[1]).tolist() == [[0]] * 10_001
