"""Returns of several seeds in one number that a few failed seeds do not move much.

Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (NeurIPS).
"""

from typing import NamedTuple

import numpy as np


class Interquartile(NamedTuple):
    """The interquartile mean of some values, and the 95 % interval of it."""

    mean: float
    low: float
    high: float


def interquartile(values: np.ndarray) -> Interquartile:  # [S]
    """The mean of the middle half of the seeds, with the interval of 10,000 bootstrap samples of them (percentiles).

    A quarter of the seeds, rounded down, is left out at each end. The samples are the same at every call. A value that
    is not finite makes all three NaN.
    """
    from scipy.stats import trim_mean

    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        return Interquartile(np.nan, np.nan, np.nan)
    drawn = values[np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))]  # [10000, S]
    low, high = np.percentile(trim_mean(drawn, 0.25, axis=1), [2.5, 97.5])
    return Interquartile(float(trim_mean(values, 0.25)), float(low), float(high))


def labelled(label: str, values: np.ndarray) -> str:  # [S]
    """`label` with the interquartile mean of `values` and its interval, for the legend of a figure."""
    found = interquartile(values)
    return f"{label}, IQM {found.mean:.1f} [{found.low:.1f}, {found.high:.1f}]"
