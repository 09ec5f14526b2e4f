"""Correlations of predictions with what they should be."""

from collections.abc import Callable

import numpy as np

from dl_jax.core.errors import InputError


def pearson(predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:  # [..., N], [N] -> float64 [...]
    """Pearson's correlation, in [−1, 1], of the predictions with the targets.

    The axes before N, such as that of seeds, are kept. Where a prediction is not finite, or all are equal, the
    correlation is NaN. Raises InputError where shapes do not fit, there are fewer than two values, a target is not
    finite, or all targets are equal, for which there is no correlation.
    """
    return _correlation("pearson", lambda values: values, predictions, targets)


def spearman(predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:  # [..., N], [N] -> float64 [...]
    """Spearman's rank correlation, in [−1, 1]: Pearson's of the ranks, where equal values share their mean rank.

    Axes, NaN and errors are those of `pearson`.
    """
    from scipy.stats import rankdata

    return _correlation("spearman", rankdata, predictions, targets)


def _correlation(
    name: str, of: Callable[[np.ndarray], np.ndarray], predictions: np.ndarray, targets: np.ndarray
) -> np.ndarray:
    """Pearson's correlation of what `of` makes of the values [N]. `name` is for messages."""
    from scipy.stats import pearsonr

    predictions, targets = np.asarray(predictions, np.float64), np.asarray(targets, np.float64)
    if targets.ndim != 1 or len(targets) < 2 or predictions.shape[-1:] != targets.shape:
        raise InputError(
            f"{name}: predictions {predictions.shape} for targets {targets.shape}, expected (..., N) for (N,), with N "
            "at least 2; give one number for each target"
        )
    if not np.isfinite(targets).all():
        raise InputError(f"{name}: a target is not finite, expected numbers; leave such examples out")

    right, rows = of(targets), predictions.reshape(-1, len(targets))
    if _constant(right):
        raise InputError(
            f"{name}: all {len(targets)} targets are {targets[0]:g} up to rounding, expected different ones; a "
            "constant has no correlation"
        )
    compared = lambda row: np.nan if not np.isfinite(row).all() or _constant(of(row)) else pearsonr(of(row), right)[0]
    return np.array([compared(row) for row in rows], np.float64).reshape(predictions.shape[:-1])


def _constant(values: np.ndarray) -> bool:
    """Whether the deviations from the mean would be rounding errors."""
    return bool(np.ptp(values) <= 1e-11 * np.abs(values).max())
