"""Trees of several seeds, [S, ...], apart and together, on the host."""

from collections.abc import Sequence

import jax
import numpy as np

from dl_jax.core.step import Tree


def split(tree: Tree) -> list[Tree]:  # [S, ...] -> S times [...]
    """Each seed's tree as NumPy arrays. On several processes the leaves must be replicated."""
    host = jax.device_get(tree)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], host) for i in range(len(jax.tree.leaves(host)[0]))]


def stack(trees: Sequence[Tree]) -> Tree:  # S times [...] -> [S, ...]
    """The trees of S seeds as one."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
