"""Scores of clusterings against scikit-learn, and the accuracy against all assignments."""

import itertools

import numpy as np
import pytest

from dl_jax.core.errors import InputError
from dl_jax.metrics import adjusted_rand_index, cluster_accuracy, normalised_mutual_information

RNG = np.random.default_rng(0)
CASES = {
    "more clusters": (RNG.integers(0, 3, 40), RNG.integers(0, 5, 40)),
    "fewer clusters": (RNG.integers(0, 6, 40), RNG.integers(0, 2, 40)),
    "renamed": (np.arange(30) % 4, (np.arange(30) % 4 + 3) % 4),
    "names left out": (RNG.integers(0, 3, 25) * 2, RNG.integers(1, 4, 25) * 7),
    "one cluster": (RNG.integers(0, 3, 20), np.full(20, 2)),
    "one class": (np.zeros(20, int), RNG.integers(0, 3, 20)),
    "one of each": (np.zeros(5, int), np.full(5, 3)),
    "all alone": (np.arange(8), np.arange(8)[::-1]),
    "one example": (np.array([1]), np.array([0])),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_are_scikit_learns(case):
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    labels, clusters = CASES[case]
    ours = normalised_mutual_information(labels, clusters), adjusted_rand_index(labels, clusters)
    theirs = normalized_mutual_info_score(labels, clusters), adjusted_rand_score(labels, clusters)
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_the_accuracy_is_that_of_the_best_assignment(case):
    labels, clusters = CASES[case]
    if case == "all alone":
        assert cluster_accuracy(labels, clusters) == 1
        return
    classes, groups = np.unique(labels), np.unique(clusters)
    names = [*classes, *[-1] * len(groups)]  # -1 is no class
    assigned = lambda chosen: np.array(chosen)[np.searchsorted(groups, clusters)]
    best = max((assigned(chosen) == labels).mean() for chosen in itertools.permutations(names, len(groups)))
    assert cluster_accuracy(labels, clusters) == pytest.approx(best, abs=1e-12)


def test_one_score_for_each_clustering():
    labels, clusters = RNG.integers(0, 3, 30), RNG.integers(0, 4, (2, 3, 30))
    for score in (cluster_accuracy, normalised_mutual_information, adjusted_rand_index):
        found = score(labels, clusters)
        assert found.shape == (2, 3)
        assert found.dtype == np.float64
        assert found[1, 2] == score(labels, clusters[1, 2])


@pytest.mark.parametrize(
    ("labels", "clusters", "expected"),
    [
        ([0, 1], [0, 1, 2], r"clusters \(3,\) for labels \(2,\), expected \(..., N\) for \(N,\), with N at least 1"),
        (np.zeros(0, int), np.zeros(0, int), r"clusters \(0,\) for labels \(0,\)"),
        ([0, -1], [0, 1], "labels of int64 from -1, expected integers from 0 on; leave out the examples without one"),
        ([0, 1], [0.5, 1.0], "clusters of float64 from 0.5, expected integers"),
        (["a", "b"], [0, 1], "labels of <U1, expected integers"),
        ([0, None], [0, 1], "labels of object, expected integers"),
    ],
)
def test_bad_input_is_one_line(labels, clusters, expected):
    for score in (cluster_accuracy, normalised_mutual_information, adjusted_rand_index):
        with pytest.raises(InputError, match=f"^{score.__name__}: {expected}"):
            score(labels, clusters)
