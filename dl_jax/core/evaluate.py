"""Evaluation: sums and weights over every example, divided once."""

import collections
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from dl_jax.core.fit import IN_FLIGHT, Measurements
from dl_jax.core.step import Array, Batch, Tree


def evaluate(
    metrics: Callable[[Tree, Batch, Array], Mapping[str, tuple[Array, Array]]],
    variables: Tree,
    batches: Iterable[Batch],
    key: Array,
) -> Measurements:
    """Sum over weight of each metric, over all batches: exact over every example, whatever the batch size.

    `metrics(variables, batch, key) -> {name: (sum, weight)}`; a leading [S] axis is kept. Batch i gets the key
    `fold_in(key, i)`. Pass the same function each time: it is compiled once.
    """
    measure = jax.jit(metrics)
    total: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    pending: collections.deque = collections.deque()

    def settle(most: int) -> None:
        while len(pending) > most:
            for name, pair in pending.popleft().items():
                value, weight = (np.asarray(x, np.float64) for x in pair)
                value_before, weight_before = total.get(name, (0.0, 0.0))
                total[name] = (value_before + value, weight_before + weight)

    for i, batch in enumerate(batches):
        settle(IN_FLIGHT - 1)
        pending.append(measure(variables, batch, jax.random.fold_in(key, i)))
    settle(0)
    return {name: np.asarray(value / weight) for name, (value, weight) in total.items()}
