"""Sets for regression whose splits are columns: `uci_regression` and the bundled `diabetes`."""

from typing import NamedTuple

import numpy as np

from dl_jax.core.errors import InputError
from dl_jax.data.columns import load
from dl_jax.data.describe import info


class Regression(NamedTuple):
    """Numbers from which to predict a number, and several ways to split them into a training and a test part."""

    x: np.ndarray  # float32 [N, D]
    y: np.ndarray  # float32 [N]
    test: np.ndarray  # bool [K, N], the rows of the test part of each split; all others are its training part


def regression(name: str) -> Regression:
    """The set `name`, which has the columns `x` [D], `y` and `test_in_splits` [K].

    Raises InputError for a set that lacks one of them, whose splits are therefore unknown, for what is no number or not
    finite, and for a split without a training or a test part.
    """
    described = info(name).features
    axes = {column: len(feature.shape) for column, feature in described.items()}
    missing = [column for column, n in {"x": 1, "y": 0, "test_in_splits": 1}.items() if axes.get(column) != n]
    if missing:
        raise InputError(
            f"data set {name} has no {' and no '.join(missing)}, expected numbers x [D], y and test_in_splits [K], the "
            "splits that test on a row; give diabetes or uci_regression/boston, or prepare a set with these columns"
        )
    if described["test_in_splits"].shape == (0,) or not all(np.issubdtype(described[c].dtype, np.number) for c in "xy"):
        kinds = ", ".join(f"{column} {described[column].dtype} {described[column].shape}" for column in axes)
        raise InputError(f"data set {name} has the columns {kinds}, expected numbers and at least one split")
    records = load(name, "full")
    for column in "xy":
        if len(wrong := np.argwhere(~np.isfinite(records[column]))):
            raise InputError(
                f"{column} of row {wrong[0][0]} of {name} is not a finite number; fill it in or leave it out"
            )
    test = np.asarray(records["test_in_splits"]).T.astype(bool)
    for k, rows in enumerate(test):
        if rows.all() or not rows.any():
            raise InputError(f"split {k} of {name} tests on {rows.sum()} of {len(rows)} rows, expected some of them")
    return Regression(np.asarray(records["x"], np.float32), np.asarray(records["y"], np.float32), test)


def moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [N, ...] -> float32 [...], float32 [...]
    """The mean and the standard deviation of the rows; of values that are all equal, the deviation is 1.

    `(values - mean) / deviation` is therefore 0 for a constant feature. Whether values are equal is seen from the
    values themselves: rounding may give their deviation a small value, by which it would be wrong to divide.
    """
    wide = values.astype(np.float64)
    constant = np.ptp(wide, 0) == 0
    mean = np.where(constant, wide[0], wide.mean(0))
    return mean.astype(np.float32), np.where(constant, 1, wide.std(0)).astype(np.float32)


def held_out(rows: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:  # bool [N] -> bool [N] twice
    """The rows without a random share of them, and that share: what to learn from, and what to choose on.

    Raises InputError where one of the two would have no row.
    """
    order = np.random.default_rng(seed).permutation(np.flatnonzero(rows))
    held = np.zeros(len(rows), bool)
    held[order[: round(share * len(order))]] = True
    if not 0 < held.sum() < len(order):
        raise InputError(
            f"a share of {share} of {len(order)} rows to hold out is {held.sum()} rows, expected some and not all; "
            "change the share, or choose another set"
        )
    return rows & ~held, held
