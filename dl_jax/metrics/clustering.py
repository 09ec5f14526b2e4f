"""Agreement of a clustering with classes. Clusters have no names: all scores are the same if they are renamed.

Labels are int [N], clusters int [..., N], from 0 on; scores are float64 [...], one for each clustering, such as that of
a seed. Each raises InputError where the shapes do not fit, there is no example, or a label or cluster is negative or no
integer.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from dl_jax.core.errors import InputError


def cluster_accuracy(labels: Any, clusters: Any) -> np.ndarray:
    """The fraction of examples in the cluster of their class, in the best one-to-one assignment of clusters to classes.

    The assignment is found by the Hungarian method (Kuhn 1955). Where there are more clusters than classes, or fewer,
    some are assigned to none.
    """
    from scipy.optimize import linear_sum_assignment

    def accuracy(counts: np.ndarray) -> float:
        return counts[linear_sum_assignment(counts, maximize=True)].sum() / counts.sum()

    return _scores("cluster_accuracy", accuracy, labels, clusters)


def normalised_mutual_information(labels: Any, clusters: Any) -> np.ndarray:
    """The mutual information divided by the arithmetic mean of both entropies, in [0, 1].

    It is 1 where neither has more than one group.
    """

    def normalised(counts: np.ndarray) -> float:
        joint = counts / counts.sum()
        rows, columns = joint.sum(1), joint.sum(0)
        if min(len(rows), len(columns)) == 1:
            return float(len(rows) == len(columns))
        there = joint > 0
        information = (joint[there] * np.log(joint[there] / np.outer(rows, columns)[there])).sum()
        return max(0.0, information) / ((_entropy(rows) + _entropy(columns)) / 2)

    return _scores("normalised_mutual_information", normalised, labels, clusters)


def adjusted_rand_index(labels: Any, clusters: Any) -> np.ndarray:
    """The share of pairs on which both agree, scaled so that chance gives 0 on average, and identity 1.

    Hubert & Arabie 1985, equation 5.
    """

    def adjusted(counts: np.ndarray) -> float:
        pairs = lambda n: float((n.astype(np.float64) * (n - 1) / 2).sum())
        together, rows, columns = pairs(counts), pairs(counts.sum(1)), pairs(counts.sum(0))
        expected, most = rows * columns / max(1.0, pairs(counts.sum())), (rows + columns) / 2
        return 1.0 if most == expected else (together - expected) / (most - expected)

    return _scores("adjusted_rand_index", adjusted, labels, clusters)


def _entropy(shares: np.ndarray) -> float:  # [K], all above 0
    return float(-(shares * np.log(shares)).sum())


def _scores(name: str, score: Callable[[np.ndarray], float], labels: Any, clusters: Any) -> np.ndarray:
    """`score` of the contingency table of each clustering: counts [classes, clusters] of those that occur."""
    labels, clusters = np.asarray(labels), np.asarray(clusters)
    if labels.ndim != 1 or not labels.size or clusters.shape[-1:] != labels.shape:
        raise InputError(
            f"{name}: clusters {clusters.shape} for labels {labels.shape}, expected (..., N) for (N,), with N at least "
            "1; give one cluster for each label"
        )
    for what, values in (("labels", labels), ("clusters", clusters)):
        if values.dtype.kind not in "iu" or values.min(initial=0) < 0:
            least = f" from {values.min()}" if values.dtype.kind in "iuf" else ""
            raise InputError(
                f"{name}: {what} of {values.dtype}{least}, expected integers from 0 on; leave out the examples without "
                "one"
            )
    rows = clusters.reshape(-1, len(labels))
    return np.array([score(_table(labels, row)) for row in rows], np.float64).reshape(clusters.shape[:-1])


def _table(labels: np.ndarray, clusters: np.ndarray) -> np.ndarray:  # int [N] each -> int [C, K]
    (classes, row), (groups, column) = (np.unique(each, return_inverse=True) for each in (labels, clusters))
    flat = np.bincount(row * len(groups) + column, minlength=len(classes) * len(groups))
    return flat.reshape(len(classes), len(groups))
