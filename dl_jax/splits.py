"""Networks for all splits of tables, trained together as the seed axis of one state.

Each of S seeds has n networks for each of K splits: they are L = S · K · n networks, in this order.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax import data
from dl_jax.core.errors import InputError
from dl_jax.core.step import Array, Batch, Metrics, State, Step, Tree


def tables(datasets: Sequence[str], splits: int) -> dict[str, data.Regression]:
    """The first `splits` splits of these sets, by what follows the last slash of their names.

    Raises InputError for two sets of one such name, for a set with fewer splits, for splits of different sizes, as all
    networks of a set take as many steps, and for a target that is constant in the training rows of a split.
    """
    names: dict[str, str] = {}
    for dataset in datasets:
        name = dataset.rpartition("/")[2]
        if name in names:
            raise InputError(
                f"data sets {names[name]} and {dataset} would both be called {name}, expected names that differ after "
                "the last slash; leave one out"
            )
        names[name] = dataset
    found = {}
    for name, dataset in names.items():
        table = data.regression(dataset)
        if len(table.test) < splits:
            raise InputError(f"splits is {splits}, expected at most {len(table.test)}, those of {name}; lower --splits")
        found[name] = table._replace(test=table.test[:splits])
        sizes = (~found[name].test).sum(1)
        if sizes.min() < sizes.max():
            raise InputError(
                f"the splits of {name} have {sizes.min()} to {sizes.max()} training rows, expected as many in each, as "
                "their networks take as many steps; lower --splits, or choose another set"
            )
        for k, test in enumerate(found[name].test):
            if np.ptp(table.y[~test]) == 0:
                raise InputError(
                    f"the target of {name} is {table.y[~test][0]:g} in all training rows of split {k}, expected "
                    "different values; choose another set"
                )
    return found


@functools.partial(jax.jit, static_argnums=1)
def numbered(keys: Array, n: int) -> Array:  # [S] -> [S · n]
    """n keys of each seed's key."""
    return jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n)))(keys).ravel()


def scale(table: data.Regression, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and deviation of inputs, [D] each, and of the target in these rows, bool [N]."""
    (x_mean, x_deviation), (y_mean, y_deviation) = data.moments(table.x[rows]), data.moments(table.y[rows])
    return {"x_mean": x_mean, "x_deviation": x_deviation, "y_mean": y_mean, "y_deviation": y_deviation}


def by_network(of_split: Sequence[Tree] | np.ndarray, networks: int, seeds: int) -> Any:
    """What each network has of its split: one tree of [L, ...], of K trees."""
    split = np.tile(np.repeat(np.arange(len(of_split)), networks), seeds)
    return jax.tree.map(lambda *each: np.stack(each)[split], *of_split)


def orders(train: np.ndarray, networks: int, batch_size: int, seeds: Sequence[int]) -> data.Stream:
    """Batches of row numbers, `row` int [L, B], where a network shuffles its split's rows of `train`, bool [K, N]."""
    numbers = np.repeat(np.arange(len(train)), networks)
    return data.per_seed(
        [
            data.shuffled({"row": np.flatnonzero(train[k])}, batch_size, i + 1_000_000 * seed)
            for seed in seeds
            for i, k in enumerate(numbers)
        ]
    )


def of_rows(step: Step):
    """The step `(table, states, batch)` of all networks, whose batch names rows of the table's columns [N, ...]."""

    def of_one(table: Tree, state: State, batch: Batch) -> tuple[State, Metrics]:
        return step(state, {name: column[batch["row"]] for name, column in table.items()})

    return jax.vmap(of_one, (None, 0, 0))
