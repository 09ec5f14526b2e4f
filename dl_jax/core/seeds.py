"""Splitting a tree with a seed axis, [S, ...], into one tree for each seed, and stacking such trees, on the host."""

from collections.abc import Sequence

import jax
import numpy as np

from dl_jax.core.devices import fetched
from dl_jax.core.step import Tree


def split(tree: Tree) -> list[Tree]:  # [S, ...] -> S times [...]
    """One tree of NumPy arrays for each seed. All processes have to call it together."""
    host = fetched(tree)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], host) for i in range(len(jax.tree.leaves(host)[0]))]


def stack(trees: Sequence[Tree]) -> Tree:  # S times [...] -> [S, ...]
    """One tree with a leading seed axis from the trees of S seeds."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
