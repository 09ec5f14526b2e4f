"""What is wrong with a data set: labels, copies, missing values and features that say nothing; and folds without leaks.

`experiments/learning/cleaning.py` plants such mistakes and finds them. Labels need `pip install -e '.[clean]'`.
"""

import numpy as np

from dl_jax.core.errors import InputError, not_installed

NEAR = 0.13  # of the median distance to the nearest row: two rows that are nearer are copies, as for cleanlab's Datalab


def folds(labels: np.ndarray, parts: int, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """The fold of each row, int [N], by scikit-learn's stratified splits of labels int [N].

    Rows of one group, int [N], are in one fold. Raises InputError for fewer than two folds, for labels of one class,
    and for a class with fewer rows, or with fewer groups, than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    classes, rows = np.unique(labels, return_counts=True)
    if parts < 2 or len(classes) < 2:
        raise InputError(
            f"the number of folds is {parts} and that of classes {len(classes)}, expected two or more of both; give "
            "more folds or rows"
        )
    kind, has = (
        ("rows", rows) if groups is None else ("groups", np.array([len(set(groups[labels == c])) for c in classes]))
    )
    if has.min() < parts:
        raise InputError(
            f"class {classes[has.argmin()]} has {has.min()} {kind}, expected {parts} or more, one for each fold; lower "
            "the number of folds or give more rows"
        )
    split = StratifiedKFold if groups is None else StratifiedGroupKFold
    found = np.empty(len(labels), int)
    empty = np.empty((len(labels), 0))
    for i, (_, held) in enumerate(split(parts, shuffle=True, random_state=seed).split(empty, labels, groups)):
        found[held] = i
    return found


def groups(x: np.ndarray) -> np.ndarray:  # [N, D] -> int [N]
    """A number for each row, which is the same for rows that are copies of each other, and for copies of copies.

    Two rows are copies if their distance is at most `NEAR` times the median of the distances to the nearest row.
    Features have to be on one scale. Raises InputError for a value that is not finite, and for fewer than two rows.
    """
    from scipy.sparse.csgraph import connected_components
    from sklearn.neighbors import NearestNeighbors

    if len(x) < 2 or not np.isfinite(x).all():
        raise InputError(
            f"copies among {len(x)} rows of which {(~np.isfinite(x)).any(1).sum()} have missing values, expected two "
            "rows or more and finite numbers; fill them in first"
        )
    distance, _ = NearestNeighbors(n_neighbors=1).fit(x).kneighbors()  # to another row than itself
    distinct, number = np.unique(x, axis=0, return_inverse=True)  # thousands of equal rows would be millions of pairs
    near = NearestNeighbors(radius=NEAR * np.median(distance)).fit(distinct).radius_neighbors_graph()
    return connected_components(near, directed=False)[1][number.ravel()]


def missing(x: np.ndarray) -> np.ndarray:  # [N, D] -> bool [N, D]
    """Which values are missing: NaN, or a number that stands for it, such as -999.

    That is the smallest or largest number of a feature, if several rows have it but less than half of them, and if it
    is further away from all others than any of these from the next. A number that stands for it within the range of the
    others, such as 0, is not found, and the second one of an end is not either. Raises InputError where everything is
    missing.
    """
    found = np.isnan(x)
    for j, column in enumerate(x.T):
        for end in (np.min, np.max):
            known = column[~found[:, j]]
            code = end(known, initial=np.inf if end is np.min else -np.inf)
            others = np.unique(known[known != code])
            several = 1 < (known == code).sum() < len(known) / 2
            if several and len(others) > 1 and np.abs(others - code).min() > np.diff(others).max():
                found[:, j] |= column == code
    if found.all():
        raise InputError(f"all {found.size} values of the table are missing, expected some; give other data")
    return found


def constant(x: np.ndarray) -> np.ndarray:  # [N, D] -> bool [D]
    """Which features are the same number, but for rounding, in all rows but a twentieth; NaN is not counted.

    Raises InputError where all features are so.
    """
    known = [column[~np.isnan(column)] for column in x.T]
    ends = [np.quantile(each, [0.025, 0.975]) if len(each) else np.zeros(2) for each in known]
    found = np.array([np.ptp(each) <= 1e-6 * np.abs(each).max() for each in ends])
    if found.all():
        raise InputError(f"all {len(found)} features are constant, expected one that is not; give other data")
    return found


def label_issues(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:  # int [N], [N, C] -> bool [N]
    """Which labels are wrong, by confident learning (Northcutt et al. 2021, arXiv:1911.00068), with cleanlab.

    The probabilities are of networks that did not learn from the row. A label is wrong if both of cleanlab's rules for
    pruning say so. Raises InputError where cleanlab is not installed, and for labels of one class.
    """
    try:
        from cleanlab.filter import find_label_issues
    except ModuleNotFoundError as error:
        raise not_installed("the search for wrong labels", error, "clean") from error
    if len(np.unique(labels)) < 2:
        raise InputError(f"labels of the class {labels[0]} alone, expected two classes or more; give more rows")
    return np.asarray(find_label_issues(labels, probabilities, filter_by="both", n_jobs=1))
